"""Checks of modules, perceptrons or not: which are slow, and which have no one Hessian."""

from __future__ import annotations

import warnings

from torch import nn

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
