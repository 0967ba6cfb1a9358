"""Checks of modules, perceptrons or not: which are slow, and which have no one Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hvpfast.utils.torch_private import AnyBatchNorm, AnyDropout


class SlowBackendWarning(UserWarning):
    """A model runs on the reference backend, which is slow; the message says why."""


_warned: set[tuple[type, str]] = set()


def warn_slow(model: nn.Module, reason: str, *, stacklevel: int = 3) -> None:
    """Warn that the model runs on the reference backend: once per class of model and reason."""
    if (type(model), reason) not in _warned:
        _warned.add((type(model), reason))
        warnings.warn(
            f"{type(model).__name__} runs on the slow reference backend: {reason}. This is said "
            "once; pass backend='reference' to mean it",
            SlowBackendWarning,
            stacklevel=stacklevel,
        )


def check_deterministic_modules(model: nn.Module) -> None:
    """Raise ValueError for modules that draw random numbers or mix samples: both in train mode."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        mixes = isinstance(module, AnyBatchNorm)
        p = getattr(module, "p" if isinstance(module, AnyDropout) else "dropout", 0.0)
        draws = isinstance(module, nn.RReLU) or (isinstance(p, (int, float)) and p > 0)
        if mixes or draws:
            effect = "the loss of a sample depends on the others" if mixes else "the loss is random"
            raise ValueError(
                f"layer {name or 'the model itself'} is {type(module).__name__} in train mode: "
                f"{effect}, so there is no one Hessian; call model.eval(), or .eval() on that layer"
            )


def loss_of_outputs(
    loss_fn: Callable[[Any], Any], outputs: Any, params: Mapping[str, Tensor]
) -> Any:
    """``loss_fn(outputs)``, detached, for outputs without a graph.

    Raises:
        ValueError: the loss depends on one of the parameters otherwise than by the outputs: in
            derivatives of loss(outputs(p)) that part would be missing.
    """
    with torch.enable_grad():
        loss = loss_fn(outputs)
    if not isinstance(loss, Tensor):
        return loss
    if loss.requires_grad and loss.dim() == 0:
        used = {name: p for name, p in params.items() if p.requires_grad}
        parts = torch.autograd.grad(loss, list(used.values()), allow_unused=True) if used else ()
        for name, part in zip(used, parts, strict=True):
            if part is not None:
                raise ValueError(
                    f"loss_fn uses the parameter {name} itself, beside the model's outputs, as a "
                    "regulariser does: curvature and gradients of that part would be missing. "
                    "Compute it in the model's forward and return it with the outputs, or detach "
                    "it in loss_fn if it is a constant"
                )
    return loss.detach()
