"""Differentiable curvature penalties on a module: the loss and ||H||_F^2 or tr H, or estimates.

    E ||H v||^2 = ||H||_F^2                 for v with independent entries of mean 0 and variance 1
    E v' H v    = tr H
    d ||H v||^2 / dparams = 2 T[v, H v]     T: the third derivative of the loss
    d v' H v / dparams    = T[v, v]

H is the Hessian of the loss in the parameters that require gradients, or the generalised
Gauss-Newton matrix. The backward pass knows the weights of both results, so that the gradients of
loss and penalty share their last products. Exact values come from per-sample Hessian cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, count
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hvpfast.backends import BACKENDS
from hvpfast.backends.contract import PenaltyState
from hvpfast.backends.reference import state as reference
from hvpfast.functional import linearize
from hvpfast.functional.linearization import versions
from hvpfast.functional.penalty import (
    check_kind,
    chosen_tensors,
    exact_value,
    penalty_of,
    penalty_probes,
    penalty_state,
)
from hvpfast.functional.torch_ops import ops
from hvpfast.mlp.checks import check_curvature, check_deterministic_modules, warn_slow
from hvpfast.mlp.module import NotAnMLPError, spec_of
from hvpfast.mlp.recognised import plan_of
from hvpfast.mlp.spec import split_flat
from hvpfast.utils.choice import check_choice

_compiling = torch.compiler.is_compiling
_transforming = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def hessian_penalty(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: tuple[Any, Any],
    *,
    kind: str = "fro2",
    curvature: str = "hessian",
    estimator: str = "hutchinson",
    num_probes: int = 1,
    distribution: str = "rademacher",
    seed: int | Tensor | None = None,
    tangents: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss and curvature penalty, both differentiable in the parameters.

    ``(loss + lam * penalty).backward()`` is a step of training with the penalty. With K probes the
    penalty is ``(1/K) sum_k ||H v_k||^2`` or ``(1/K) sum_k v_k' H v_k``; the means over random
    probes are the exact penalties ||H||_F^2 and tr H. Both results can be differentiated once; a
    second derivative raises.

    H is taken over the parameters that require gradients; the others are constants. With all of
    them an MLP (:class:`MLP` or a ``nn.Sequential`` that :func:`spec_of` recognises) runs one fused
    call; with some, it runs separate products of the same kernels. Any other module or loss runs on
    the slow reference backend and says why, once per class of model and reason.

    Inside ``torch.compile`` and ``torch.func`` transforms this becomes ``torch.ops.hvpfast``
    operators, which is possible for MLPs. An integer ``seed`` is a constant of the compiled code
    until it changes, then an input; None draws anew in every call; a tensor is always an input.
    The values of class weights are constants of the compiled code.

    Args:
        model: the network; parameters and buffers are not changed.
        loss_fn: called as ``loss_fn(model(x), y)``, gives a 0-dim loss.
        data: ``(x, y)``, one batch.
        kind: ``"fro2"``, the squared Frobenius norm, or ``"trace"``.
        curvature: ``"hessian"`` or ``"ggn"``.
        estimator: ``"hutchinson"``, by probes; ``"exact"``, without, for perceptrons: the work of
            ``fro2`` grows with the square of the number of samples.
        num_probes: number of probes K >= 1; like the next three not used by ``"exact"``.
        distribution: ``"rademacher"`` or ``"normal"``. A backend may draw normal probes in another
            basis: same distribution, other numbers than :func:`probes`.
        seed: in [0, 2**64), or an int64 0-dim tensor; None takes fresh entropy.
        tangents: the probes themselves, (P,) or columns (P, K), over the parameters that require
            gradients; ``num_probes``, ``distribution`` and ``seed`` are then not used.
        backend: ``"auto"`` or a name from ``available()``.

    Returns:
        (loss, penalty), both 0-dim, with the dtype of the parameters.

    Raises:
        ValueError: a shape or an option is wrong, a label is out of range, no parameter requires
            gradients, BatchNorm or Dropout is in train mode, or the loss is not finite.
        TypeError: a mix of dtypes or devices.
        RuntimeError: the named backend cannot run the model; in backward: parameters or batch were
            changed in place since, or a derivative is asked for that does not exist.
        NotImplementedError: inside ``torch.compile`` or ``torch.func``, ``estimator="exact"`` or a
            model that is not an MLP; anywhere, both together.
        MemoryError: ``estimator="exact"`` where the scratch memory of a few samples is not there.
    """
    check_kind(kind, estimator, tangents)
    exact = estimator == "exact"
    ggn = check_curvature(curvature)
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"data must be one batch (x, y); got {type(data).__name__}")
    x, y = data
    draw = (tangents, seed, num_probes, distribution)
    if _compiling() or _transforming() or _dispatch_modes():
        if exact:
            raise NotImplementedError(
                "inside torch.compile and torch.func transforms hessian_penalty has no "
                "estimator='exact'. Call it outside, or under torch.compiler.disable"
            )
        seen: list[object] = [module.training for module in model.modules()]
        seen += [getattr(loss_fn, name, None) for name in _LOSS_OPTIONS]
        key, reason = _recognised(model, loss_fn, *seen)
        if reason:
            raise NotImplementedError(
                "inside torch.compile and torch.func transforms hessian_penalty takes multilayer "
                f"perceptrons, but {reason}. Call it outside, or under torch.compiler.disable"
            )
        return _by_operators(key, list(model.parameters()), x, y, draw, kind, ggn, backend)
    try:
        plan = plan_of(model, loss_fn)
    except NotAnMLPError as error:
        if exact:
            raise NotImplementedError(
                f"estimator='exact' takes multilayer perceptrons, but {error}. Use 'hutchinson'"
            ) from None
        return _by_reference(model, loss_fn, x, y, draw, kind, ggn, backend, str(error))
    params = plan.parameters()
    if not exact and (_some(params) or (tangents is not None and tangents.requires_grad)):
        return _by_operators(plan.spec.key, params, x, y, draw, kind, ggn, backend)
    lin = linearize.linearize(
        plan.spec, params if plan.layout else params[0], x, y, backend=backend
    )
    if exact:
        chosen = chosen_tensors(lin, params)
        if not torch.is_grad_enabled():
            return lin.loss, exact_value(lin, kind, ggn, chosen)
        state = lin.state.exact_penalty(kind, ggn, chosen)
    else:
        state = penalty_state(lin, tangents, num_probes, distribution, _seed_value(seed), ggn, kind)
    return _recorded(state, plan.layout, (x, y), params)


# Probes as the caller gave them: tangents (columns), seed, num_probes, distribution.
_Draw = tuple[Tensor | None, int | Tensor | None, int, str]
# Shapes and numels of the parameters, or None for one flat parameter.
_Layout = tuple[Sequence[tuple[int, ...]], Sequence[int]] | None


def _some(params: Sequence[Tensor]) -> bool:
    """Whether some parameters require gradients and some do not."""
    if len(params) == 1:
        return False
    required = [p.requires_grad for p in params]
    return True in required and False in required


def _recorded(
    state: PenaltyState, layout: _Layout, batch: Sequence[Tensor], params: Sequence[Tensor]
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
        if not _keeps_graph():
            ctx.saved = None
        if torch.is_grad_enabled():
            once: Callable[..., tuple[Tensor, ...]] = _Once.apply
            gradients = once(len(gradients), *gradients, *inputs)
        return (None, *gradients)


# What Function.apply wraps in checks for torch.func, which hessian_penalty has made already.
_apply: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, _HessianPenalty).apply


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


def _by_operators(
    key: str,
    params: list[Tensor],
    x: Tensor,
    y: Tensor,
    draw: _Draw,
    kind: str,
    ggn: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The penalty made of operators: in compiled code, and over some of the parameters."""
    tangents, seed, num_probes, distribution = draw
    rows = seed_tensor = None
    if tangents is not None:
        rows = tangents.T if tangents.dim() == 2 else tangents
    elif isinstance(seed, Tensor):
        seed_tensor = seed
    elif seed is None:
        seed_tensor = ops.fresh_seed(_call_site())
    elif 0 <= seed < 2**64:  # int64 in two's complement
        seed_tensor = torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)
    else:
        raise ValueError(f"seed must be in [0, 2**64); got {seed}")
    if kind == "fro2" and not _some(params):
        loss, penalty = ops.penalty(
            params, x, y, rows, seed_tensor, key, num_probes, distribution, ggn, backend
        )
        return loss, penalty
    # over some parameters: v zero elsewhere, H v restricted to them
    like, ends = params[0], list(accumulate(p.numel() for p in params))
    index = torch.cat(
        [
            torch.arange(end - p.numel(), end, device=like.device)
            for p, end in zip(params, ends, strict=True)
            if p.requires_grad or not _some(params)
        ]
    )
    if rows is None:
        rows = ops.probes(
            seed_tensor, index.numel(), num_probes, distribution, like.dtype, like.device
        )
    if rows.shape[-1] != index.numel() or rows.numel() == 0:
        raise ValueError(
            f"tangents must be ({index.numel()},) or ({index.numel()}, K), K >= 1, over the "
            f"parameters that require gradients; got {tuple(rows.T.shape)}"
        )
    full = rows.new_zeros((*rows.shape[:-1], ends[-1])).index_copy(-1, index, rows)
    if kind == "trace":
        forms = ops.quadratic(params, x, y, full, key, ggn, backend)
        return ops.loss(params, x, y, key, backend), forms.mean()
    product = ops.ggnvp if ggn else ops.hvp
    products = product(params, x, y, full, key, backend).index_select(-1, index)
    return ops.loss(params, x, y, key, backend), products.square().sum(-1).mean()


_calls = count()


def _call_site() -> int:
    """A new number: two fresh seeds in one compiled graph must not be merged into one."""
    return next(_calls)


_LOSS_OPTIONS = ("reduction", "ignore_index", "label_smoothing")


def _recognised(model: nn.Module, loss_fn: Callable[..., Any], *seen: object) -> tuple[str, str]:
    """(MLPSpec.key, "") or ("", the reason why there is none).

    ``seen`` is what may change it: compiled code is compiled again when an argument changes.
    """
    try:
        return spec_of(model, loss_fn).key, ""
    except NotAnMLPError as error:
        return "", str(error)


# Evaluated while torch.compile traces. torch.compiler.assume_constant_result does the same, but
# imports the compiler, which takes longer than importing torch.
for _function in (_call_site, _recognised):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010  # no declared attribute


def _by_reference(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    x: Any,
    y: Any,
    draw: _Draw,
    kind: str,
    ggn: bool,
    backend: str,
    reason: str,
) -> tuple[Tensor, Tensor]:
    """The penalty of any other module or loss."""
    check_choice("backend", backend, ("auto", *BACKENDS))
    if backend not in ("auto", "reference"):
        raise RuntimeError(f"backend {backend!r} takes multilayer perceptrons, but {reason}")
    check_deterministic_modules(model)
    if backend == "auto":
        warn_slow(model, reason, stacklevel=4)
    every = dict(model.named_parameters())
    named = {name: p for name, p in every.items() if p.requires_grad} or every
    params = tuple(named.values())

    def outputs(tensors: tuple[Tensor, ...]) -> Any:
        return torch.func.functional_call(model, dict(zip(named, tensors, strict=True)), (x,))

    lin = reference.linearize_function(outputs, lambda z: loss_fn(z, y), params)
    loss = float(lin.loss)
    if not isfinite(loss):
        raise ValueError(f"the loss is {loss}; parameters, inputs and targets must be finite")
    tangents, seed, num_probes, distribution = draw
    numels = [p.numel() for p in params]
    probes = penalty_probes(
        params[0], sum(numels), tangents, num_probes, distribution, _seed_value(seed)
    )
    fixed = [t for t in tree_leaves((x, y, tangents)) if isinstance(t, Tensor)]
    state = penalty_of(lin, kind, probes, ggn, params[0], sum(numels))
    return _recorded(state, ([p.shape for p in params], numels), fixed, params)


def _seed_value(seed: int | Tensor | None) -> int | None:
    return int(seed) % 2**64 if isinstance(seed, Tensor) else seed
