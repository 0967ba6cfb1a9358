"""torch.autograd as people use it: repeated reverse mode on a retained graph, dual numbers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvpfast.bench.cases import ADAM, PENALTY_WEIGHTS, Problem
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers.base import Prepared, Provider

# Untyped in torch.
forward_ad: Any = importlib.import_module("torch.autograd.forward_ad")
Loss = Callable[[Sequence[Tensor]], Tensor]


class TorchEager(Provider):
    """Reverse mode twice (or three times) on one graph; with K tangents looped over or batched."""

    name = "torch-eager"
    kind = "eager"

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        batched = ("double backward batched",) if num_tangents > 1 else ()
        hvp = ("double backward", *batched, "forward over reverse")
        penalty = ("triple backward", "triple backward, seeded", "triple backward, per probe")
        table: dict[str, tuple[str, ...]] = {
            "gradient": ("backward",),
            "hvp": hvp,
            "hvp_warm": ("double backward", *batched),
            "quadratic": hvp,
            "penalty": (*penalty, *(f"triple backward{b[15:]}" for b in batched)),
            "train_step": ("triple backward, seeded, fused Adam",),
        }
        return table["penalty" if operation == "penalty_normal" else operation]

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        params, x, y = common.inputs(problem)
        params = tuple(p.requires_grad_() for p in params)
        loss = functools.partial(_loss, x=x, y=y, act=common.ACTIVATIONS[problem.case.activation])
        batched = form.endswith("batched")
        V = common.tangents(problem, operation, batched)
        call = _call(form, operation, params, loss, V, problem.num_tangents, batched)
        if operation == "train_step":
            return train_step(params, call, capturable=problem.device != "cpu")
        return Prepared(call, common.named_outputs(operation))


def _loss(
    params: Sequence[Tensor], x: Tensor, y: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    return common.mlp_loss(params, x, y, act)


def _call(
    form: str,
    operation: str,
    params: tuple[Tensor, ...],
    loss: Loss,
    V: Any,
    K: int,
    batched: bool,
) -> Callable[[], Any]:
    if operation == "gradient":

        def gradient() -> Any:
            value = loss(params)
            return value, torch.autograd.grad(value, params)

        return gradient
    if operation == "hvp":
        if form == "forward over reverse":
            return lambda: [forward_over_reverse(params, loss, v) for v in V]
        return lambda: backward_products(first_gradient(params, loss), params, V, batched)
    if operation == "hvp_warm":
        kept = first_gradient(params, loss)
        return lambda: backward_products(kept, params, V, batched)
    if operation == "quadratic":

        def quadratic() -> Any:
            if form == "forward over reverse":
                found: Any = [forward_over_reverse(params, loss, v) for v in V]
            else:
                found = backward_products(first_gradient(params, loss), params, V, batched)
            if batched:
                return sum((v * h).flatten(1).sum(1) for v, h in zip(V, found, strict=True))
            return [_dot(v, h) for v, h in zip(V, found, strict=True)]

        return quadratic
    return functools.partial(penalised, form, params, loss, V, K, batched)


def _dot(u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    total = torch.dot(u[0].flatten(), v[0].flatten())
    for a, b in zip(u[1:], v[1:], strict=True):
        total = total + torch.dot(a.flatten(), b.flatten())
    return total


def first_gradient(params: tuple[Tensor, ...], loss: Loss) -> tuple[Tensor, ...]:
    """The gradient with its graph."""
    return torch.autograd.grad(loss(params), params, create_graph=True)


def backward_products(
    g: tuple[Tensor, ...], params: tuple[Tensor, ...], V: Any, batched: bool
) -> Any:
    """H V by reverse mode over the retained graph of the gradient."""
    if batched:
        return torch.autograd.grad(g, params, V, retain_graph=True, is_grads_batched=True)
    return [torch.autograd.grad(g, params, v, retain_graph=True) for v in V]


def forward_over_reverse(
    params: tuple[Tensor, ...], loss: Loss, v: Sequence[Tensor]
) -> list[Tensor]:
    """H v by reverse mode on dual numbers."""
    with forward_ad.dual_level():
        dual = [
            forward_ad.make_dual(p.detach(), t).requires_grad_()
            for p, t in zip(params, v, strict=True)
        ]
        g = torch.autograd.grad(loss(dual), dual)
        return [forward_ad.unpack_dual(part).tangent for part in g]


def penalised(
    form: str, params: tuple[Tensor, ...], loss: Loss, V: Any, K: int, batched: bool
) -> tuple[Tensor, Tensor, Any]:
    """loss, mean_k ||H v_k||^2 and the gradient of their weighted sum.

    ``seeded`` starts the last reverse pass at H v itself: grad ||H v||^2 = 2 (d(H v)/dp)' u with u
    = H v held fixed.
    """
    c_loss, c_penalty = PENALTY_WEIGHTS[0], PENALTY_WEIGHTS[1] / K
    value = loss(params)
    g = torch.autograd.grad(value, params, create_graph=True)
    if form == "triple backward, per probe":
        return _per_probe(params, value, g, V, K)
    if batched:
        found = torch.autograd.grad(g, params, V, create_graph=True, is_grads_batched=True)
    else:
        found = tuple(h for v in V for h in torch.autograd.grad(g, params, v, create_graph=True))
    if form.startswith("triple backward, seeded"):
        fixed = [h.detach() for h in found]
        penalty = sum(torch.dot(u.flatten(), u.flatten()) for u in fixed) / K
        seeds = torch._foreach_mul(fixed, 2 * c_penalty)
        gradient = torch.autograd.grad(
            (value, *found), params, (torch.full_like(value, c_loss), *seeds)
        )
        return value, torch.as_tensor(penalty), gradient
    squares = torch.stack([torch.dot(h.flatten(), h.flatten()) for h in found]).sum()
    return value, squares / K, torch.autograd.grad(c_loss * value + c_penalty * squares, params)


def _per_probe(
    params: tuple[Tensor, ...], value: Tensor, g: tuple[Tensor, ...], V: Any, K: int
) -> tuple[Tensor, Tensor, Any]:
    """One reverse pass per probe: the smallest graph alive at a time, so the least memory."""
    c_loss, c_penalty = PENALTY_WEIGHTS[0], PENALTY_WEIGHTS[1] / K
    total: Any = torch.autograd.grad(c_loss * value, params, retain_graph=True)
    penalty = torch.zeros_like(value)
    for v in V:
        found = torch.autograd.grad(g, params, v, create_graph=True)
        fixed = [h.detach() for h in found]
        penalty = penalty + sum(torch.dot(u.flatten(), u.flatten()) for u in fixed)
        part = torch.autograd.grad(
            found, params, torch._foreach_mul(fixed, 2 * c_penalty), retain_graph=True
        )
        total = torch._foreach_add(total, part)
    return value, penalty / K, total


def train_step(
    params: tuple[Tensor, ...], penalised_call: Callable[[], Any], *, capturable: bool
) -> Prepared:
    """A penalised step: gradient into ``.grad``, then Adam; ``capturable`` counts on the device."""
    optimizer = torch.optim.Adam(params, fused=True, capturable=capturable, **ADAM)
    restore_params = common.restorer(params)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        _, _, gradient = penalised_call()
        for p, g in zip(params, gradient, strict=True):
            p.grad = g
        optimizer.step()
        return params

    @torch.no_grad()
    def restore() -> None:
        restore_params()
        for state in optimizer.state.values():  # all of it starts at zero
            for value in state.values():
                value.zero_()

    return Prepared(step, step_outputs, restore=restore)


def step_outputs(params: Sequence[Tensor]) -> dict[str, Any]:
    """Gradient and parameters after a step, from tensors that hold ``.grad``."""
    return {"gradient": common.flat([p.grad for p in params]), "params": common.flat(params)}
