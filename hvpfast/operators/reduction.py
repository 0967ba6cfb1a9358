"""The reduction of a loss over samples, and the weight of each batch.

A loss over batches b with values L_b is

    sum    L = sum_b L_b
    mean   L = sum_b n_b L_b / sum_b n_b       n_b: what the mean of batch b divides by

so ragged batches, class weights and ignored targets are exact. n_b is the number of targets that
count, weighted by their class weights (cross-entropy, nll), the number of elements (mse and its
kin), or else the number of samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast.operators.batch import Batch, batch_size

Loss = Callable[..., Any]

# The functions of torch.nn.functional, and the modules with the same arguments and defaults.
_MODULE_OF: dict[Loss, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
_PER_TARGET = (nn.CrossEntropyLoss, nn.NLLLoss)
_PER_ELEMENT = tuple(module for module in _MODULE_OF.values() if module not in _PER_TARGET)


def reduction_of(loss_fn: Loss, reduction: str | None = None) -> str:
    """How ``loss_fn`` joins the samples of a batch: ``"mean"`` or ``"sum"``.

    Args:
        loss_fn: called as ``loss_fn(outputs, y)``. Its ``reduction`` attribute is read; the
            functions of ``torch.nn.functional`` mean ``"mean"``, and ``functools.partial`` of
            them what its keywords say.
        reduction: the answer for any other callable.

    Raises:
        ValueError: neither known nor given; not mean or sum; given and contradicting the loss.
    """
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    if reduction not in (None, "mean", "sum"):
        raise ValueError(f'reduction must be "mean", "sum" or None; got {reduction!r}')
    own = getattr(_as_module(loss_fn), "reduction", None)
    own = "mean" if own == "batchmean" else own  # nn.KLDivLoss: the mean over samples
    if own is None and reduction is None:
        raise ValueError(
            f"the reduction of the loss {name} is not known (it has no .reduction attribute); "
            'pass reduction="mean" or reduction="sum", as it joins the samples of a batch'
        )
    if own not in (None, "mean", "sum"):
        raise ValueError(f'the loss {name} must reduce by "mean" or "sum"; got reduction={own!r}')
    if None not in (own, reduction) and own != reduction:
        raise ValueError(
            f"reduction={reduction!r} was asked for, but the loss {name} reduces by {own!r}; "
            f"drop reduction=, or build the loss with reduction={reduction!r}"
        )
    return own or reduction or ""


def _as_module(loss_fn: Loss) -> Loss:
    """The module of a function of torch.nn.functional, or of a partial of one; else the loss."""
    function: Any = loss_fn
    options: dict[str, Any] = {}
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        function, options = loss_fn.func, loss_fn.keywords
    for known, module in _MODULE_OF.items():
        if function is known:
            return module(**options)
    return loss_fn


class BatchWeight:
    """The weight n_b of a batch in a mean over batches; 1 for every batch of a sum.

    Zero means that no target of the batch counts: its mean is 0/0, and the loss leaves it out.
    """

    def __init__(self, loss_fn: Loss, reduction: str | None = None) -> None:
        self.reduction = reduction_of(loss_fn, reduction)
        self._loss = _as_module(loss_fn)

    def __call__(self, batch: Batch) -> float:
        """The weight n_b of ``batch``.

        Raises:
            ValueError: a target is not a class of the loss's class weights.
        """
        kind, y = type(self._loss), batch.y
        if self.reduction == "sum":
            return 1.0
        if kind in _PER_TARGET and isinstance(y, Tensor):
            return self._counted_targets(y)
        if kind in _PER_ELEMENT and isinstance(y, Tensor):
            return float(y.numel())
        return float(batch_size(batch))

    def _counted_targets(self, y: Tensor) -> float:
        if y.is_floating_point():  # class probabilities (N, C, ...): one term per distribution
            return float(y.numel() // max(1, y.shape[1 if y.dim() > 1 else 0]))
        counted = y[y != getattr(self._loss, "ignore_index", None)]
        weights: Tensor | None = getattr(self._loss, "weight", None)
        if weights is None or counted.numel() == 0:
            return float(counted.numel())
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= weights.numel():
            raise ValueError(
                f"targets must be classes 0 to {weights.numel() - 1}, one per class weight; "
                f"got values from {low} to {high}"
            )
        return float(weights.to(y.device)[counted].sum(dtype=torch.float64))
