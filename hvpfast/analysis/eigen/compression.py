"""Row-space compression: the same eigenpairs from a perceptron with a narrower first layer.

The first layer acts on the inputs X (N, D[0]). With X = L Q, where Q (r, D[0]) has orthonormal rows
and r is the rank of X,

    z_1 = X W_1' + b_1 = L (W_1 Q')' + b_1

On the directions V_1 = V Q the Hessian is that of the perceptron with inputs L (N, r) and first
weights W_1 Q' (D[1], r); it is zero on the directions whose rows are orthogonal to those of Q. All
other parameters, including biases, are the same. The same holds for the generalised Gauss-Newton
matrix, and for several batches, with X all their inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from hvpfast.analysis.eigen.ritz import Array
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.mlp.module import MLP
from hvpfast.mlp.spec import MLPSpec
from hvpfast.operators.base import LinearOperator
from hvpfast.operators.hessian import CurvatureOperator
from hvpfast.operators.objective import MLPObjective

ROUNDING = 8.0  # times eps, relative to the longest input: the part of an input to leave out


class NotCompressibleError(ValueError):
    """An operator that row-space compression cannot make smaller; the message is the reason."""


class CompressedOperator:
    """A curvature operator in the row space of its inputs.

    Attributes:
        operator: the smaller operator (p, p).
        num_null: P - p, dimensions in which the given operator is zero.
        text: the sentence that says how the operator was made smaller.
    """

    def __init__(self, operator: LinearOperator, Q: Tensor, width: int, size: int) -> None:
        self.operator = operator
        self._Q, self._width = Q, width  # Q (r, D[0]), D[1]
        self._split, self._rest = width * Q.shape[0], size - width * Q.shape[1]
        self.num_null = size - operator.shape[0]
        self.text = (
            f"row-space compression: the inputs have rank {Q.shape[0]} of {Q.shape[1]} columns, so "
            f"that {operator.shape[0]:,} of {size:,} parameters do"
        )

    def lift(self, rows: Tensor) -> Tensor:
        """The vectors (K, P) of rows (K, p)."""
        r, d0 = self._Q.shape
        out = rows.new_empty(rows.shape[0], self._width * d0 + self._rest)
        first = rows[:, : self._split].reshape(-1, r) @ self._Q.to(rows)
        out[:, : self._width * d0] = first.view(rows.shape[0], -1)
        out[:, self._width * d0 :] = rows[:, self._split :]
        return out

    def project(self, rows: Tensor) -> Tensor:
        """Rows (K, p) of vectors (K, P), without their parts in the null space."""
        d0 = self._Q.shape[1]
        first = rows[:, : self._width * d0].reshape(-1, d0) @ self._Q.to(rows).T
        rest = rows[:, self._width * d0 :]
        return torch.cat([first.view(rows.shape[0], -1), rest], dim=1)

    def null_rows(self, count: int, like: Tensor) -> Tensor:
        """Orthonormal rows (count, P) of the null space, count <= num_null: e_i w', Q w = 0."""
        (r, d0), width = self._Q.shape, self._width
        Q = self._Q.double().cpu()
        given = probe_rows(ProbeSource(-(-count // width), "normal", 0), d0, torch.float64)
        W = np.linalg.qr(torch.cat([Q, given]).numpy().T)[0][:, r:].T  # (ceil(count / D[1]), d0)
        out = like.new_zeros(count, width * d0 + self._rest)
        for index in range(count):
            unit = index % width
            row = torch.from_numpy(np.ascontiguousarray(W[index // width])).to(like)
            out[index, unit * d0 : (unit + 1) * d0] = row
        return out


def compress(operator: Any) -> CompressedOperator:
    """The operator in the row space of its inputs.

    Raises:
        NotCompressibleError: it is not the curvature of a whole perceptron, or its inputs have, or
            may have, full column rank.
    """
    linearized = operator.linearized if isinstance(operator, CurvatureOperator) else None
    if linearized is None or not isinstance(linearized.objective, MLPObjective):
        raise NotCompressibleError("it needs the HessianOperator or GGNOperator of a perceptron")
    spec = linearized.objective.spec
    if not operator.subset.whole:
        raise NotCompressibleError("it needs all parameters of the perceptron")
    if linearized.group is not None:
        raise NotCompressibleError("the inputs are spread over processes")
    if not linearized.batches.held:
        raise NotCompressibleError("the inputs are not held in memory")
    batches = list(linearized.batches)
    X = torch.cat([batch.x.reshape(-1, spec.sizes[0]) for batch in batches]).to(operator.device)
    Q = torch.from_numpy(_row_space(X.to(operator.dtype))).to(operator.device)
    linearized.check_current()
    narrow = _narrowed(operator, linearized.objective, spec, batches, Q)
    return CompressedOperator(narrow, Q, spec.sizes[1], operator.shape[0])


def _row_space(X: Tensor) -> Array:
    """Orthonormal rows Q (r, D[0]) that span the rows of X (N, D[0]) to rounding, r < D[0]."""
    N, d0 = X.shape
    if d0 > N:
        return np.ascontiguousarray(np.linalg.qr(X.double().cpu().numpy().T)[0].T)
    # more samples than columns: half as many rows as columns show whether the rank may be low
    half = d0 // 2
    chosen = torch.linspace(0, N - 1, half, dtype=torch.float64, device="cpu").long().to(X.device)
    sample = X[chosen].double().cpu().numpy()
    allowed = ROUNDING * torch.finfo(X.dtype).eps * float(torch.linalg.vector_norm(X, dim=1).max())
    R = np.linalg.qr(sample.T, mode="r")  # |R_ii|: distance of row i from the span of those before
    if (np.abs(np.diag(R)) > allowed).sum() < 0.9 * half:
        rows = X.double().cpu().numpy()
        for _ in range(3):
            basis, R, _ = scipy.linalg.qr(sample.T, mode="economic", pivoting=True)
            Q = basis[:, np.abs(np.diag(R)) > allowed].T
            left = np.linalg.norm(rows - (rows @ Q.T) @ Q, axis=1)
            if left.max() <= allowed:
                return np.ascontiguousarray(Q)
            worst = np.argsort(-left)[: half - len(Q)]
            sample = np.concatenate([Q * np.sqrt(d0), rows[worst]])
    raise NotCompressibleError(
        f"the {N} inputs have more than half as many independent directions as columns ({d0})"
    )


def _narrowed(
    operator: CurvatureOperator, objective: MLPObjective, spec: MLPSpec, batches: Any, Q: Tensor
) -> LinearOperator:
    """The operator of the perceptron with inputs X Q' and first weights W_1 Q'."""
    dtype, device = operator.dtype, operator.device
    generator = torch.Generator(device)  # keeps the global one unchanged; values are overwritten
    sizes = (len(Q), *spec.sizes[1:])
    model = MLP(sizes, spec.activation, spec.bias, dtype=dtype, device=device, generator=generator)
    flat = torch.cat([t.detach().to(torch.float64).reshape(-1) for t in objective.tensors])
    first, *rest = spec.unflatten(flat)
    with torch.no_grad():
        model.flat.copy_(torch.cat([(first @ Q.T).reshape(-1), *(t.reshape(-1) for t in rest)]))
    data = [
        ((b.x.reshape(-1, spec.sizes[0]).to(device, torch.float64) @ Q.T).to(dtype), b.y)
        for b in batches
    ]
    loss = _loss_of(spec, dtype, device)
    return type(operator)(
        model, loss, None, data, backend=operator.backend, check_deterministic=False
    )


def _loss_of(spec: MLPSpec, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if spec.loss == "mse":
        return nn.MSELoss(reduction=spec.reduction)
    weights = spec.class_weights
    return nn.CrossEntropyLoss(
        weight=None if weights is None else torch.tensor(weights, dtype=dtype, device=device),
        ignore_index=spec.ignore_index,
        reduction=spec.reduction,
        label_smoothing=spec.label_smoothing,
    )
