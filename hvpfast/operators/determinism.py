"""Checks that two evaluations of a loss agree: a random loss has no single Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hvpfast.backends.probes.draw import probes
from hvpfast.operators.base import LinearOperator
from hvpfast.operators.distributed import together
from hvpfast.operators.linearized_data import LinearizedData
from hvpfast.operators.objective import MLPObjective

_passed: dict[tuple[object, ...], None] = {}  # in order of insertion, the oldest dropped
_REMEMBERED = 256


def check_batch_twice(
    linearized: LinearizedData, model: nn.Module, loss_fn: Callable[..., Any], data: Any
) -> str:
    """Compare two losses and gradients of one batch, once per kind of model, mode and data.

    Returns:
        A line for ``explain()``.

    Raises:
        RuntimeError: they differ.
    """
    if isinstance(linearized.objective, MLPObjective):
        return "given, the backend evaluates the MLP itself"
    modules = list(model.modules())
    parts = data if isinstance(data, tuple) else (data,)
    key = (
        tuple(type(m) for m in modules),
        tuple(m.training for m in modules),
        getattr(loss_fn, "__qualname__", type(loss_fn)),
        tuple(id(part) for part in parts),
    )
    if key in _passed:
        return "checked before, for this kind of model, mode and data"
    with linearized.running():
        batch = next((batch for batch in linearized.batches if linearized.weight(batch) > 0), None)
        if batch is None:
            return "not checked, this process has no data"
        states = [linearized.objective.linearize(batch) for _ in range(2)]
        values = [(state.loss, state.gradient()) for state in states]
    _compare("two evaluations of one batch", *values)
    _passed[key] = None
    if len(_passed) > _REMEMBERED:
        del _passed[next(iter(_passed))]
    return "checked, two evaluations of one batch agree"


def check_everything_twice(operator: LinearOperator, linearized: LinearizedData) -> str:
    """Compare two readings of the data, and two losses, gradients and products over all data.

    Returns:
        A line for ``explain()``.

    Raises:
        RuntimeError: they differ.
    """
    with together(linearized.group, "second reading of the data"):
        if not linearized.batches.repeats():
            raise RuntimeError(
                "the data are not deterministic: two readings gave different batches. Pass "
                "list(data), or a loader that repeats itself; check_deterministic=False takes the "
                "first reading"
            )
    v = probes(operator.shape[0], seed=0, dtype=operator.dtype, device=operator.device)
    values = []
    for evaluation in range(2):
        if evaluation:
            linearized.update()
        values.append((linearized.loss, linearized.gradient(), operator @ v))
    _compare("two evaluations of all data", *values)
    return "checked, two evaluations and products over all data agree"


def _compare(what: str, first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    """Raise RuntimeError where a loss, gradient or product differs beyond rounding."""
    scale = float(first[0].abs())
    for name, one, other in zip(("losses", "gradients", "products"), first, second, strict=False):
        size = float(torch.linalg.vector_norm(one))
        difference = float(torch.linalg.vector_norm(one - other))
        if not difference <= torch.finfo(one.dtype).eps ** 0.5 * (size + scale):
            raise RuntimeError(
                f"the loss is not deterministic: {what} gave {name} that differ by "
                f"{difference / max(size, 1e-300):.1%}, and a random loss has no one Hessian. "
                "Remove the randomness (model.eval(), no sampling in forward or in the loss), or "
                "pass check_deterministic=False to go on with random products"
            )
