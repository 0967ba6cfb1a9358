"""Perceptrons over all their parameters, or exactly: one fused call of a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast.functional.hessian_penalty.call import PenaltyCall
from hvpfast.functional.hessian_penalty.recorded import recorded
from hvpfast.functional.linearization import ModelLinearization
from hvpfast.functional.linearize import linearize_model
from hvpfast.mlp.recognised import Plan


def by_engine(
    plan: Plan, params: list[Tensor], x: Tensor, y: Tensor, call: PenaltyCall
) -> tuple[Tensor, Tensor]:
    """(loss, penalty) of a recognised perceptron with these parameters."""
    flat_or_list = params if plan.layout else params[0]
    lin = linearize_model(plan.spec, flat_or_list, x, y, call.backend, 3)
    if call.exact:
        chosen = chosen_tensors(lin, params)
        if not torch.is_grad_enabled():
            return lin.loss, exact_value(lin, call, chosen)
        state = lin.state.exact_penalty(call.kind, call.ggn, chosen)
    else:
        state = lin.penalty(call.probes(), call.kind, call.ggn)
    return recorded(state, plan.layout, (x, y), params)


def exact_value(lin: ModelLinearization, call: PenaltyCall, chosen: Sequence[bool]) -> Tensor:
    """The exact penalty over the chosen tensors, 0-dim, for less than what its gradient needs."""
    state = lin.state
    if call.kind == "trace":
        return state.sample_traces(call.ggn, chosen).double().sum().to(lin.dtype)
    value = state.inner_product(state, call.ggn, chosen)
    return torch.full((), value, dtype=lin.dtype, device=lin.device)


def chosen_tensors(lin: ModelLinearization, params: Sequence[Tensor]) -> list[bool]:
    """Flags of [W1, b1, ...]: those that require gradients, all of them if none does or if flat."""
    required = [p.requires_grad for p in params]
    if len(params) == 1 or not any(required):
        return [True] * len(lin.spec.shapes)
    return required
