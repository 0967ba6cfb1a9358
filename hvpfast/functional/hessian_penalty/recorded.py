"""A penalty as a node of autograd: its backward pass knows the weights of loss and penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvpfast.backends.contract import PenaltyState
from hvpfast.functional.linearization import versions
from hvpfast.mlp.spec import split_flat
from hvpfast.utils.torch_private import apply_of, graph_is_kept

# Shapes and numels of the parameters, or None for one flat parameter.
Layout = tuple[Sequence[tuple[int, ...]], Sequence[int]] | None


def recorded(
    state: PenaltyState, layout: Layout, batch: Sequence[Tensor], params: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(loss, penalty) with the gradient of ``state`` behind them, where gradients are recorded."""
    if not torch.is_grad_enabled():
        return state.loss, state.penalty
    inputs = (*batch, *params)
    fixed = [t for t in batch if t.requires_grad]
    saved = (state, layout, inputs, versions(inputs), len(fixed))
    return _apply(saved, *fixed, *params)


class _HessianPenalty(torch.autograd.Function):
    """(loss, penalty) of a PenaltyState as functions of the parameter tensors.

    What ``save_for_backward`` would do, for less: a second backward and changes in place raise.
    """

    @staticmethod
    def forward(ctx: Any, saved: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.saved = saved
        state: PenaltyState = saved[0]
        return state.loss, state.penalty

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor, g_penalty: Tensor) -> Any:
        if ctx.saved is None:
            raise RuntimeError(
                "Trying to backward through hessian_penalty a second time: its residuals were "
                "freed. Specify retain_graph=True the first time"
            )
        state, layout, inputs, seen, num_fixed = ctx.saved
        if num_fixed:
            raise RuntimeError(
                "hessian_penalty differentiates with respect to the parameters, not to x, y or "
                "tangents; detach them"
            )
        if versions(inputs) != seen:
            raise RuntimeError(
                "parameters, x or y were modified by an inplace operation between hessian_penalty "
                "and backward; call backward first"
            )
        flat = state.gradient(g_loss.item(), g_penalty.item())
        gradients: Sequence[Tensor] = (flat,) if layout is None else split_flat(flat, *layout)
        if not graph_is_kept():
            ctx.saved = None
        if torch.is_grad_enabled():
            once: Callable[..., tuple[Tensor, ...]] = _Once.apply
            gradients = once(len(gradients), *gradients, *inputs)
        return (None, *gradients)


# hessian_penalty has made the checks for torch.func already.
_apply: Callable[..., tuple[Tensor, Tensor]] = apply_of(_HessianPenalty)


class _Once(torch.autograd.Function):
    """Gradients as functions of what they were computed from, with an error as derivative.

    ``once_differentiable`` does this only where the incoming gradients require gradients, and not
    as a function of the parameters, so that a second derivative could be lost silently.
    """

    @staticmethod
    def forward(ctx: Any, num_gradients: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.clone() for g in tensors[:num_gradients])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "hessian_penalty can be differentiated once: its gradient is of third order already"
        )
