"""Exact curvature of a perceptron without probes, over all data of an operator.

The Hessian of a perceptron's loss on one sample is a small matrix, its core, between two wide and
simple factors (formulas: ``hvpfast/backends/reference/cores.py``). With L = sum_b c_b L_b over
batches,

    tr H = sum_b c_b tr H_b,    diag H likewise,    tr H^2 = sum_bb' c_b c_b' tr H_b H_b'
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpfast.backends.contract import State
from hvpfast.mlp.spec import MLPSpec
from hvpfast.operators.batch import batch_size
from hvpfast.operators.linearized_data import LinearizedData
from hvpfast.operators.objective import MLPObjective
from hvpfast.operators.parameters import Subset


@dataclass(frozen=True)
class CoreCost:
    """Multiply-adds of exact curvature, and of one product for comparison.

    Args:
        trace: of the trace or the diagonal; grows with N.
        frobenius_sq: of tr H^2; grows with N^2.
        matvec: of one product H v.
    """

    trace: float
    frobenius_sq: float
    matvec: float


class Cores:
    """Exact values of a Hessian or Gauss-Newton matrix H of a perceptron; made by ``A.cores()``.

    H is the block of the operator's parameters. Nothing is kept between calls; samples are taken
    in chunks, which bounds the memory.

    Args:
        linearized: the data, linearized.
        subset: the parameters among those of the network.
        ggn: whether H is the Gauss-Newton matrix.

    Raises:
        RuntimeError: in each value: parameters or data were changed since the operator was made.
        MemoryError: in each value: the scratch memory of a few samples is not available.
        NotImplementedError: the model, the loss or the data are not those of a perceptron, a
            parameter tensor is chosen in part, or the data are spread over processes.
    """

    def __init__(self, linearized: LinearizedData, subset: Subset, ggn: bool) -> None:
        objective = linearized.objective
        if not isinstance(objective, MLPObjective):
            raise NotImplementedError(
                f"per-sample cores are those of multilayer perceptrons ({objective.text})"
            )
        if linearized.group is not None:
            raise NotImplementedError("per-sample cores are not shared between processes")
        self._linearized, self._subset, self._ggn = linearized, subset, ggn
        self._spec: MLPSpec = objective.spec
        ends = list(itertools.accumulate(self._spec.numels, initial=0))
        self._chosen = [subset.holds(a, b) for a, b in itertools.pairwise(ends)]

    def trace(self) -> Tensor:
        """tr H, 0-dim."""
        return self.sample_traces().double().sum().to(self._linearized.objective.dtype)

    def sample_traces(self) -> Tensor:
        """The trace of each sample's part of H (N,), in the order of the data; they sum to tr H."""
        linearized, ggn, chosen = self._linearized, self._ggn, self._chosen
        parts = self._over_batches(lambda c, s: c * s.sample_traces(ggn, chosen), "traces")
        if linearized.skipped:  # batches of which no sample counts
            found, parts = iter(parts), []
            for c, batch in zip(linearized.coefficients, linearized.batches, strict=True):
                empty = torch.zeros(
                    batch_size(batch), dtype=linearized.objective.dtype, device="cpu"
                )
                parts.append(next(found) if c > 0 else empty.to(linearized.objective.device))
        return torch.cat(parts)

    def diagonal(self) -> Tensor:
        """diag H, (P,), in the order of the operator's parameters."""
        total, *others = self._over_batches(lambda c, s: c * s.diagonal(self._ggn), "diagonal")
        for part in others:
            total.add_(part)
        return self._subset.restrict(total.unsqueeze(0))[0]

    def frobenius_sq(self) -> Tensor:
        """tr H^2 = ||H||_F^2, 0-dim; the work grows with N^2 for N samples."""
        linearized, total = self._linearized, 0.0
        linearized.check_current()
        with linearized.running():
            for index, (c, state) in enumerate(linearized.states("tr H^2")):
                total += c * c * state.inner_product(state, self._ggn, self._chosen)
                for c_other, other in itertools.islice(linearized.states("tr H^2"), index):
                    value = state.inner_product(other, self._ggn, self._chosen)
                    total += 2 * c * c_other * value
        return torch.tensor(
            total, dtype=linearized.objective.dtype, device=linearized.objective.device
        )

    def cost(self) -> CoreCost:
        """Multiply-adds of the matrix products behind the values.

        For N samples and widths D the cores take sum_l D[l]^2 D[l+1] N and more; tr H^2 takes the
        pairs of samples times the entries of a core.
        """
        num_samples = sum(batch_size(batch) for batch in self._linearized.batches)
        per_core, per_pair = _counts(self._spec, self._ggn)
        layers = list(itertools.pairwise(self._spec.sizes))
        per_sample = 6 * sum(a * b for a, b in layers) - 4 * layers[0][0] * layers[0][1]
        pairs = num_samples * (num_samples + 1) / 2
        return CoreCost(
            num_samples * per_core[0],
            num_samples * per_core[1] + pairs * per_pair,
            float(num_samples * per_sample),
        )

    def _over_batches(self, value: Callable[[float, State], Tensor], what: str) -> list[Tensor]:
        """``value(c_b, state of batch b)`` for all batches that count."""
        linearized = self._linearized
        linearized.check_current()
        with linearized.running():
            return [value(c, state) for c, state in linearized.states(what)]


def _counts(spec: MLPSpec, ggn: bool) -> tuple[tuple[float, float], float]:
    """Multiply-adds per sample (for B_l alone; for all blocks) and per pair of samples."""
    D, L = spec.sizes, spec.num_layers
    own = far = pair = 0.0
    for k in range(1, L + 1):
        pair += D[k - 1] + D[k] * (D[k] + 1) / 2
        if k < L:
            own += D[k] * D[k + 1] * (D[k + 1] + (D[k] if k > 1 else 1))
            far += D[1] ** 2 * D[2] / 2 if k == 1 else 0
        for m in range(k + 1, L + 1):
            pair += D[k] * D[m]
            far += D[k] * D[k + 1] * D[m] if m > k + 1 else 0
            if ggn:
                continue
            pair += 2 * D[k] * D[m] if m == k + 1 else D[k] * (2 * D[m] + 3 * D[m - 1])
            far += D[k] * D[k + 1] * D[m - 1] if m > k + 2 else 0
    return (own, own + far), pair if ggn else pair + sum(D[2:])
