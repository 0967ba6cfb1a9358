"""The loss over a data set at many points p + sum_i c_i d_i of parameter space.

A perceptron is evaluated at G points at once. Its parameters are affine in c, so its first layer is

    z_1(c) = x W_1' + b_1 + sum_i c_i (x D_i' + e_i)      (W_1, b_1), (D_i, e_i): center, directions

from products of x that are computed once for all points; the other layers are batched products.
Any other module is called through torch.func.functional_call, one point at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast.mlp.checks import check_batch, check_labels
from hvpfast.mlp.module import NotAnMLPError, params_of
from hvpfast.mlp.module_checks import check_deterministic_modules, loss_of_outputs
from hvpfast.mlp.spec import ACTIVATION_TABLE, MLPSpec, split_flat
from hvpfast.operators.batch import Batch, bytes_of, tensors_in
from hvpfast.operators.data import Batches
from hvpfast.operators.objective import spec_for
from hvpfast.operators.parameters import Entry, Subset, owners_of
from hvpfast.operators.reduction import BatchWeight
from hvpfast.utils.functional_call import functional_call
from hvpfast.utils.memory import KEPT_SHARE, available_bytes
from hvpfast.utils.random_state import RandomState

_SAMPLES = 1024  # that go through the layers together
_ELEMENTS = 2**19  # values of a layer at all points together: they stay in cache


class Losses:
    """The loss L(c) over data at points c (G, D), exact for batches of any sizes.

    Args:
        model, loss_fn, data, reduction, dtype: as for :class:`hvpfast.HessianOperator`.
        entries: the parameters that move.
        rows: directions (D, P) along the entries.

    Attributes:
        dtype: floating-point type of the computation.
        points_at_once: how many points to give to one call; a function of sizes alone.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        data: Any,
        reduction: str | None,
        dtype: torch.dtype | None,
        entries: Sequence[Entry],
        rows: Tensor,
    ) -> None:
        check_deterministic_modules(model)
        self._weight = BatchWeight(loss_fn, reduction)
        device = entries[0].owner.device
        budget = KEPT_SHARE * available_bytes(device)
        self.batches = Batches(data, device, dtype, budget)
        first = next(iter(self.batches))
        self._model, self._loss_fn = model, loss_fn
        self._spec: MLPSpec | None = None
        try:
            self._spec = spec_for(model, loss_fn, first)
            own = params_of(model)
            tensors = [own] if isinstance(own, Tensor) else list(own)
        except NotAnMLPError:
            tensors = owners_of(entries)
        self._tensors, self._dtype = tensors, dtype
        self._center = torch.cat([self._cast(t).reshape(-1) for t in tensors])
        self.dtype = self._center.dtype
        moves = Subset(entries, tensors).embed(rows.to(device, self._center.dtype))
        self._lines = torch.cat((self._center[None], moves))  # (1 + D, F)
        # a model that draws random numbers draws them from here, not from the caller's generators
        self._random = None if self._spec else RandomState(device=device)
        self._first: dict[int, Tensor] = {}  # first layers along the lines, by batch
        self._room = budget - self.batches.nbytes
        self.points_at_once = 1
        if self._spec is not None:
            samples = 0
            for batch in self.batches:
                _, y = check_batch(self._spec, self._center, batch.x, batch.y)
                if self._spec.loss == "cross_entropy":
                    check_labels(self._spec, y)
                samples = max(samples, y.shape[0])
            width = max(self._spec.sizes[1:])
            self.points_at_once = max(1, _ELEMENTS // (min(_SAMPLES, samples) * width))

    def checksums(self) -> dict[str, str]:
        """SHA-256 of all parameters and buffers of the model, and of the data."""
        state = [*self._model.parameters(), *self._model.buffers()]
        return {"parameters": _checksum(state), "data": _checksum(tensors_in(list(self.batches)))}

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """L(c) (G,) in float64 on the CPU for points c (G, D) in float64; may be inf or NaN.

        Raises:
            ValueError: no target counts.
        """
        coefficients = torch.cat(
            (torch.ones(len(points), 1, dtype=torch.float64, device="cpu"), points), dim=1
        ).to(self._lines)
        evaluate = self._any_module if self._spec is None else self._perceptron
        losses = torch.zeros(len(points), dtype=torch.float64, device="cpu")
        total = 0.0
        with self._random or nullcontext():
            for index, batch in enumerate(self.batches):
                weight = self._weight(batch)
                if weight > 0:
                    losses += evaluate(index, batch, coefficients, weight)
                    total += weight
        if total == 0:
            raise ValueError("no target counts: all have ignore_index or a class weight of zero")
        return losses / total if self._weight.reduction == "mean" else losses

    def _perceptron(self, index: int, batch: Batch, coefficients: Tensor, weight: float) -> Tensor:
        """Sums of the loss over the samples of a batch, (G,)."""
        spec = self._spec
        assert spec is not None
        x, y = check_batch(spec, self._center, batch.x, batch.y)
        step = 2 if spec.bias else 1
        lines = [split_flat(line, spec.shapes, spec.numels) for line in self._lines]
        first = self._first.get(index)
        if first is None:
            first = torch.stack([F.linear(x, *line[:step]) for line in lines])  # (1 + D, N, D[1])
            if first.nbytes <= self._room:
                self._first[index] = first
                self._room -= first.nbytes
        layers = [
            [
                torch.tensordot(coefficients, torch.stack([line[i + j] for line in lines]), 1)
                for j in range(step)
            ]
            for i in range(step, len(spec.shapes), step)
        ]
        act = ACTIVATION_TABLE[spec.activation][0]
        sums = coefficients.new_zeros(len(coefficients), dtype=torch.float64)
        for start in range(0, len(x), _SAMPLES):
            part = slice(start, start + _SAMPLES)
            z = torch.tensordot(coefficients, first[:, part], 1)  # (G, n, D[1])
            for W, *b in layers:
                z = torch.bmm(act(z), W.mT)  # (G, n, D[l])
                if b:
                    z += b[0][:, None]
            sums += self._sample_losses(spec, z, y[part]).sum(1, dtype=torch.float64)
        return sums.cpu()

    def _sample_losses(self, spec: MLPSpec, z: Tensor, y: Tensor) -> Tensor:
        """Loss terms (G, N or more) whose sum is the loss under reduction "sum"."""
        if spec.loss == "mse":
            return (z - y).square().flatten(1)
        weights = spec.class_weights
        terms = F.cross_entropy(
            z.flatten(0, 1),
            y.repeat(len(z)),
            weight=None if weights is None else z.new_tensor(weights),
            ignore_index=spec.ignore_index,
            reduction="none",
            label_smoothing=spec.label_smoothing,
        )
        return terms.view(len(z), -1)

    def _any_module(self, index: int, batch: Batch, coefficients: Tensor, weight: float) -> Tensor:
        """The loss of a batch times its weight, (G,)."""

        def loss(outputs: Any) -> Any:
            return self._loss_fn(outputs, batch.y)

        every = dict(self._model.named_parameters())
        own = {id(t) for t in self._tensors}
        names = {id(p): name for name, p in every.items()}
        fixed = {n: self._cast(p) for n, p in every.items() if id(p) not in own}
        buffers = {name: self._cast(b) for name, b in self._model.named_buffers()}
        values = []
        for point in coefficients:
            pieces = (point @ self._lines).split([t.numel() for t in self._tensors])
            moved = {
                names[id(t)]: piece.view(t.shape)
                for t, piece in zip(self._tensors, pieces, strict=True)
            }
            # copies: a forward pass may write to buffers, and the model's must not change
            copies = {name: buffer.clone() for name, buffer in buffers.items()}
            state = {**fixed, **copies, **moved}
            outputs = functional_call(self._model, state, (batch.x,))
            values.append(float(loss_of_outputs(loss, outputs, every)))
        scale = weight if self._weight.reduction == "mean" else 1.0
        return scale * torch.tensor(values, dtype=torch.float64, device="cpu")

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._dtype if tensor.is_floating_point() else None)


def _checksum(tensors: Any) -> str:
    """SHA-256 of dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
