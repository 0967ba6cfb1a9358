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

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hvpfast.functional.hessian_penalty.call import PenaltyCall
from hvpfast.functional.hessian_penalty.engine import by_engine
from hvpfast.functional.hessian_penalty.operators import by_operators, some_require_grad
from hvpfast.functional.hessian_penalty.reference import by_reference
from hvpfast.functional.penalty_kinds import check_kind
from hvpfast.mlp.checks import check_curvature
from hvpfast.mlp.module import NotAnMLPError, spec_of
from hvpfast.mlp.recognised import plan_of
from hvpfast.utils.torch_private import (
    constant_in_compiled_code,
    is_compiling,
    num_dispatch_modes,
    torch_func_is_active,
)


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
    exact, ggn = estimator == "exact", check_curvature(curvature)
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"data must be one batch (x, y); got {type(data).__name__}")
    x, y = data
    call = PenaltyCall(kind, ggn, exact, tangents, num_probes, distribution, seed, backend)
    if is_compiling() or torch_func_is_active() or num_dispatch_modes():
        key = _traced_key(model, loss_fn, exact)
        return by_operators(key, list(model.parameters()), x, y, call)
    try:
        plan = plan_of(model, loss_fn)
    except NotAnMLPError as error:
        if exact:
            raise NotImplementedError(
                f"estimator='exact' takes multilayer perceptrons, but {error}. Use 'hutchinson'"
            ) from None
        return by_reference(model, loss_fn, x, y, call, str(error))
    params = plan.parameters()
    if not exact and (
        some_require_grad(params) or (tangents is not None and tangents.requires_grad)
    ):
        return by_operators(plan.spec.key, params, x, y, call)
    return by_engine(plan, params, x, y, call)


def _traced_key(model: nn.Module, loss_fn: Callable[..., Any], exact: bool) -> str:
    """``MLPSpec.key`` inside torch.compile and torch.func, or the error that there is none."""
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
    return key


_LOSS_OPTIONS = ("reduction", "ignore_index", "label_smoothing")


@constant_in_compiled_code
def _recognised(model: nn.Module, loss_fn: Callable[..., Any], *seen: object) -> tuple[str, str]:
    """(MLPSpec.key, "") or ("", the reason why there is none).

    ``seen`` is what may change it: compiled code is compiled again when an argument changes.
    """
    try:
        return spec_of(model, loss_fn).key, ""
    except NotAnMLPError as error:
        return "", str(error)
