"""Derivatives and vmap rules of the operators in ``torch_ops.py``.

operator           derivative for params              derivative for tangents
loss               g * gradient                       -
gradient           hvp(g)                             -
hvp, ggnvp         hvp_vjp(tangents, g)               the product of g (H and G are symmetric)
quadratic          hvp_vjp(tangents, g * tangents)    2 g * product
penalty            penalty_gradient                   2/K g_penalty * H H v_k
hvp_vjp, penalty_gradient                             none: an error
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvpfast.mlp.spec import split_flat
from hvpfast.utils.torch_private import (
    apply_of,
    at_this_level,
    below_autograd,
    forward_gradients,
    forward_mode_is_on,
    has_forward_tangent,
    torch_func_is_active,
)

ops = torch.ops.hvpfast

# ---- derivatives: a rule gives the gradients of params, flat (P,), and of tangents ----

Gradients = tuple[Tensor | None, Tensor | None]
Rule = Callable[..., Gradients]  # (inputs, (params wanted, tangents wanted), *gradients)


def _product(ggn: bool) -> Any:
    return ops.ggnvp if ggn else ops.hvp


def loss_rule(inputs: list[Any], wanted: tuple[bool, bool], g: Tensor) -> Gradients:
    """The gradient, times g."""
    return g * ops.gradient(*inputs), None


def gradient_rule(inputs: list[Any], wanted: tuple[bool, bool], g: Tensor) -> Gradients:
    """H g."""
    params, x, y, spec, backend = inputs
    return ops.hvp(params, x, y, g, spec, backend), None


def product_rule(ggn: bool) -> Rule:
    """d<g, H v>/dparams and H g."""

    def rule(inputs: list[Any], wanted: tuple[bool, bool], g: Tensor) -> Gradients:
        params, x, y, tangents, spec, backend = inputs
        return (
            ops.hvp_vjp(params, x, y, tangents, g, spec, ggn, backend) if wanted[0] else None,
            _product(ggn)(params, x, y, g, spec, backend) if wanted[1] else None,
        )

    return rule


def quadratic_rule(inputs: list[Any], wanted: tuple[bool, bool], g: Tensor) -> Gradients:
    """sum_k g_k d(v_k' H v_k)."""
    params, x, y, tangents, spec, ggn, backend = inputs
    weighted = g.unsqueeze(-1) * tangents
    return (
        ops.hvp_vjp(params, x, y, tangents, weighted, spec, ggn, backend) if wanted[0] else None,
        2 * _product(ggn)(params, x, y, weighted, spec, backend) if wanted[1] else None,
    )


def penalty_rule(
    inputs: list[Any], wanted: tuple[bool, bool], g_loss: Tensor, g_penalty: Tensor
) -> Gradients:
    """One collapsed third-order pass with both weights."""
    params, x, y, tangents, seed, spec, num_probes, distribution, ggn, backend = inputs
    flat = rows = None
    if wanted[0]:
        flat = ops.penalty_gradient(
            params, x, y, tangents, seed, g_loss, g_penalty, spec, num_probes, distribution, ggn,
            backend,
        )  # fmt: skip
    if wanted[1]:  # d mean_k |H v_k|^2 / d v_k = 2/K H H v_k
        weighted = g_penalty * (2 / tangents.shape[:-1].numel()) * tangents
        for _ in range(2):
            weighted = _product(ggn)(params, x, y, weighted, spec, backend)
        rows = weighted
    return flat, rows


def no_rule(inputs: list[Any], wanted: tuple[bool, bool], g: Tensor) -> Gradients:
    """An error: nothing is differentiated past third order."""
    raise RuntimeError(
        "hvpfast has no derivative beyond third order: the gradient of the penalty and hvp_vjp "
        "cannot be differentiated. Detach them, or use torch.func on a model in plain torch"
    )


def completion(op: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What adds to arguments of an overload the defaults, which the dispatcher drops."""
    arguments = op._schema.arguments
    defaults = tuple(a.default_value for a in arguments if a.has_default_value())
    missing = len(defaults) - len(arguments)  # and one more for each argument that is there
    return lambda args: args + defaults[missing + len(args) :]


def autograd_kernel(op: Any, implementation: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
    """What runs an operator where autograd looks at it: in eager mode, tracing and torch.func.grad.

    ``torch.library.register_autograd`` does this too, but raises inside torch.func.grad and ignores
    forward-mode tangents, which would make torch.func.jvp return zeros.

    Args:
        op: the operator's overload.
        implementation: what runs on real tensors.
        rule: the derivative.
    """
    completed = completion(op)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *tensors: Tensor) -> Any:
            params, *others = args
            ctx.num_params = len(params)
            ctx.others = [None if isinstance(t, Tensor) else (t,) for t in others]
            ctx.save_for_backward(*tensors)
            if not torch_func_is_active():
                return below_autograd(op, implementation, keyset, args)
            with torch.enable_grad(), forward_gradients():  # for the levels outside
                return below_autograd(op, implementation, keyset, args)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
            tensors = iter(ctx.saved_tensors)
            params = [next(tensors) for _ in range(ctx.num_params)]
            inputs = [next(tensors) if kept is None else kept[0] for kept in ctx.others]
            of_params = ctx.needs_input_grad[2 : 2 + len(params)]
            of_x, of_y, *of_rest = ctx.needs_input_grad[2 + len(params) :]
            if of_x or of_y:
                raise RuntimeError(
                    "hvpfast differentiates with respect to parameters and tangents, not with "
                    "respect to x or y; pass x.detach(), y.detach()"
                )
            flat, rows = rule([params, *inputs], (any(of_params), any(of_rest)), *gradients)
            split: list[Any] = [None] * len(params)
            if flat is not None:
                split = split_flat(flat, [p.shape for p in params], [p.numel() for p in params])
            of_others = [rows, *[None] * len(of_rest[1:])] if of_rest else []
            return (None, None, *split, None, None, *of_others)

    apply = apply_of(Node)

    def kernel(keyset: Any, *given: Any) -> Any:
        args = completed(given)
        tensors = [*args[0], *(t for t in args[1:] if isinstance(t, Tensor))]
        if forward_mode_is_on() and any(has_forward_tangent(t) for t in tensors):
            raise NotImplementedError(
                "hvpfast operators have no forward-mode derivatives; use torch.ops.hvpfast.hvp for "
                "the derivative of the gradient along a direction"
            )
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return below_autograd(op, implementation, keyset, args)
        with at_this_level():
            return apply(keyset, args, *tensors)

    return kernel


# ---- vmap ----


def each_element(op: Any) -> Callable[..., tuple[Any, Any]]:
    """One call per element of the batch."""

    def element(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, list):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(arg)
            return [element(t, d, i) for t, d in zip(arg, dims, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            op(*(element(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


def stacked_rows(op: Any) -> Callable[..., tuple[Any, Any]]:
    """One product of more rows where only the tangents (fourth) are batched."""
    one_by_one = each_element(op)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        params_dims, x_dim, y_dim, tangents_dim, *_ = in_dims
        of_params = params_dims if isinstance(params_dims, (list, tuple)) else [params_dims]
        if any(dim is not None for dim in (*of_params, x_dim, y_dim)):
            return one_by_one(info, in_dims, *args)
        params, x, y, tangents, *options = args
        tangents = tangents.movedim(tangents_dim, 0)  # (B, P) or (B, K, P)
        out = op(params, x, y, tangents.reshape(-1, tangents.shape[-1]), *options)
        return out.reshape(tangents.shape[: tangents.dim() - 2 + out.dim()]), 0

    return rule
