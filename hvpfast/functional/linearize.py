"""The functional layer: a loss is linearized at one point, then curvature is applied to tangents.

    lin = linearize(spec, params, x, y)     loss L, gradient, residuals kept for what follows
    hvp(lin, V) = H V                       H = d2 L / d params2, (P, P), never formed
    ggnvp(lin, V) = G V                     G = J' (d2 L / d outputs2) J
    quadratic_form(lin, V) = v_k' H v_k     half the work of H V
    hvp_vjp(lin, V, U) = d sum_k u_k' H v_k / d params
    penalty(lin, V) = mean_k ||H v_k||^2    with the loss and one gradient of both; also tr H^2

V, U are one direction (P,) or K directions as columns (P, K). With parameters (M, P) all this is
done for M models of one network at once (``models.py``): V, U are (M, P) or (M, P, K), and results
have M in front. These functions are not recorded by
autograd and return detached results; the differentiable forms are ``hessian_penalty`` and the
operators in ``torch.ops.hvpfast``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast import backends
from hvpfast.backends.probes.draw import ProbeSource, fresh_seed
from hvpfast.functional.linearization import Linearization
from hvpfast.functional.many_models import ModelsLinearization
from hvpfast.functional.penalty import check_kind, penalty_of
from hvpfast.mlp.checks import (
    check_batch,
    check_curvature,
    check_params,
    check_tangents,
    nonfinite_reason,
    tangent_rows,
)
from hvpfast.mlp.model_checks import check_losses, check_models
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils import cuda_graph

_NO_EXACT = (
    "estimator='exact' takes one model at a time; for many use estimator='hutchinson', or "
    "linearize(spec, params[m], ...) for each"
)
_warned: set[str] = set()


@functools.lru_cache(maxsize=1024)
def _plan(
    spec: MLPSpec, backend: str, dtype: torch.dtype, device: torch.device
) -> tuple[backends.Choice, float]:
    """The backend for one case, chosen once, and the largest number of its dtype."""
    choice = backends.choose(backend, spec, device, dtype)
    compiled = device.type == "cpu" and dtype in (torch.float32, torch.float64)
    reason = backends.available()["cpu"]
    if backend == "auto" and compiled and reason is not None and "cpu" not in _warned:
        _warned.add("cpu")
        warnings.warn(
            f"hvpfast runs on the slow {choice.module.NAME} backend, because the cpu backend "
            f"cannot run: {reason}. This is said once; pass backend='reference' to mean it",
            RuntimeWarning,
            stacklevel=4,
        )
    return choice, torch.finfo(dtype).max


def linearize(
    spec: MLPSpec,
    params: Tensor | Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    backend: str = "auto",
    order: int = 3,
) -> Linearization:
    """Evaluate the loss at one point and keep what products with its curvature need.

    It can be called while a CUDA graph is recorded, once a first call outside has set up what does
    not change.

    Args:
        spec: the network and its loss.
        params: flat (P,), or the list ``[W1, b1, W2, ...]``; contiguous, used without a copy. Or
            (M, P) for M models at once, one flat row each: the result is then a
            :class:`hvpfast.ModelsLinearization`.
        x: inputs (N, D[0]), or (N, ...) with D[0] entries per sample; dtype of ``params``. For M
            models (M, N, D[0]), or (N, D[0]) for samples that all of them share.
        y: targets: (N,) int64 for cross_entropy, (N, D[L]) with the dtype of params for mse. For M
            models with M in front, or shared as they are.
        backend: ``"auto"`` or a name from ``available()``.
        order: 3, or 2 to keep only what products, quadratic forms and the gradient need.

    Raises:
        ValueError: wrong shapes, labels out of range, an empty batch, NaN or inf in the loss
            (while a CUDA graph is recorded, values are not looked at).
        TypeError: not tensors, or a mix of dtypes or devices.
        RuntimeError: the named backend cannot run this.
    """
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3; got {order!r}")
    if isinstance(params, Tensor) and params.dim() == 2:
        x_all, y_all = check_models(spec, params, x, y)
        choice, _ = _plan(spec, backend, params.dtype, params.device)
        many = choice.module.linearize_models(spec, params, x_all, y_all, order)
        if not cuda_graph.recording(params):
            check_losses(spec, many.loss, params, x_all, y_all)
        return ModelsLinearization(spec, many, choice, order, params, (params, x, y))
    like = check_params(spec, params)
    x_rows, y_rows = check_batch(spec, like, x, y)
    choice, largest = _plan(spec, backend, like.dtype, like.device)
    state = choice.module.linearize(spec, params, x_rows, y_rows, order)
    # While a CUDA graph is recorded nothing has run yet: there is no loss to look at.
    if (
        not cuda_graph.recording(like) and not abs(state.loss_value) <= largest
    ):  # also when it is NaN
        raise ValueError(nonfinite_reason(state.loss_value, spec, params, x_rows, y_rows))
    inputs = (params, x, y) if isinstance(params, Tensor) else (*params, x, y)
    return Linearization(spec, state, choice, order, like, inputs)


def hvp(lin: Linearization, tangents: Tensor) -> Tensor:
    """Hessian-vector products H v, H = d2 loss / d params2.

    Args:
        lin: from :func:`linearize`.
        tangents: (P,) or columns (P, K), K >= 0, with the dtype and device of the parameters; for M
            models (M, P) or (M, P, K).

    Returns:
        H v, shaped as ``tangents``.

    Raises:
        ValueError, TypeError: ``tangents`` is not as described.
        RuntimeError: the point was changed in place after linearize.

    References:
        Pearlmutter (1994), doi:10.1162/neco.1994.6.1.147.
    """
    return _product(lin, tangents, False)


def ggnvp(lin: Linearization, tangents: Tensor) -> Tensor:
    """Generalised Gauss-Newton products G v, G = J' (d2 loss / d outputs2) J; see :func:`hvp`.

    References:
        Schraudolph (2002), doi:10.1162/08997660260028683.
    """
    return _product(lin, tangents, True)


def _product(lin: Linearization, tangents: Tensor, ggn: bool) -> Tensor:
    if isinstance(lin, ModelsLinearization):
        return lin.product(tangents, ggn)
    check_tangents(tangents, lin.num_params, lin.like)
    lin.check_current()
    if tangents.dim() == 1:
        return lin.state.hvp(tangents if tangents.is_contiguous() else tangents.contiguous(), ggn)
    rows = tangents.T
    return lin.state.hvp(rows if rows.is_contiguous() else rows.contiguous(), ggn).T


def quadratic_form(lin: Linearization, tangents: Tensor, *, curvature: str = "hessian") -> Tensor:
    """Curvature v' H v along directions, without forming H v.

    Args:
        lin: from :func:`linearize`.
        tangents: (P,) or columns (P, K), K >= 0; for M models (M, P) or (M, P, K).
        curvature: ``"hessian"`` or ``"ggn"``.

    Returns:
        0-dim for (P,), (K,) for (P, K); with M in front for M models.

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: the point was changed in place after linearize.
    """
    ggn = check_curvature(curvature)
    if isinstance(lin, ModelsLinearization):
        return lin.quadratic(tangents, ggn)
    rows = tangent_rows(tangents, lin.num_params, lin.like)
    lin.check_current()
    out = lin.state.quadratic(rows, ggn)
    return out[0] if tangents.dim() == 1 else out


def hvp_vjp(
    lin: Linearization, tangents: Tensor, cotangents: Tensor, *, curvature: str = "hessian"
) -> Tensor:
    """Third-order product d(sum_k u_k' H v_k)/d params, with u_k and v_k held fixed.

    Args:
        lin: from :func:`linearize` with ``order=3``.
        tangents: v, (P,) or columns (P, K); for M models (M, P) or (M, P, K).
        cotangents: u, shaped as ``tangents``.
        curvature: ``"hessian"`` or ``"ggn"``; the ggn is differentiated in full, J included.

    Returns:
        (P,), summed over the K pairs; (M, P) for M models.

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: ``order=2``, or the point was changed in place after linearize.
    """
    ggn = check_curvature(curvature)
    if isinstance(lin, ModelsLinearization):
        return lin.hvp_vjp(tangents, cotangents, ggn)
    rows = tangent_rows(tangents, lin.num_params, lin.like)
    cotangent_rows = tangent_rows(cotangents, lin.num_params, lin.like, "cotangents")
    if tangents.shape != cotangents.shape:
        raise ValueError(
            "tangents and cotangents must have one shape, pair by pair; got "
            f"{tuple(tangents.shape)} and {tuple(cotangents.shape)}"
        )
    lin.check_third_order("hvp_vjp")
    lin.check_current()
    return lin.state.hvp_vjp(rows, cotangent_rows, ggn)


def penalty(
    lin: Linearization,
    tangents: Tensor | None = None,
    *,
    num_probes: int = 1,
    distribution: str = "rademacher",
    seed: int | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
    curvature: str = "hessian",
    kind: str = "fro2",
    estimator: str = "hutchinson",
) -> tuple[Tensor, Tensor, Tensor]:
    """Curvature penalty with the loss and one gradient of both.

    The penalty of kind "fro2" is (1/K) sum_k ||H v_k||^2, whose mean over random probes is the
    squared Frobenius norm of H; that of kind "trace" is (1/K) sum_k v_k' H v_k, of mean tr H.
    The estimator "exact" takes these means themselves, without probes.

    Args:
        lin: from :func:`linearize` with ``order=3``.
        tangents: probes v, (P,) or columns (P, K), K >= 1; None to have them drawn. For M models
            (M, P) or (M, P, K).
        num_probes: how many to draw.
        distribution: ``"rademacher"`` or ``"normal"``. A backend may draw normal probes in
            another basis: same distribution, other numbers than :func:`hvpfast.probes`.
        seed: of the drawn probes, in [0, 2**64); None takes fresh entropy. Of M models, model m has
            the K probes from number m K on: ``hvpfast.probes(P, K, seed=seed, first=m * K)``.
        weights: (w_loss, w_penalty) of the gradient.
        curvature: ``"hessian"`` or ``"ggn"``.
        kind: ``"fro2"`` or ``"trace"``.
        estimator: ``"hutchinson"`` or ``"exact"``; the work of the exact ``fro2`` grows with the
            square of the number of samples.

    Returns:
        (loss, penalty, gradient of w_loss * loss + w_penalty * penalty): 0-dim, 0-dim, (P,); for M
        models (M,), (M,), (M, P).

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: ``order=2``, or the point was changed in place after linearize.
        MemoryError: ``estimator="exact"`` where the scratch memory of a few samples is not there.
        NotImplementedError: ``estimator="exact"`` for M models.
    """
    check_kind(kind, estimator, tangents)
    ggn = check_curvature(curvature)
    if isinstance(lin, ModelsLinearization):
        if estimator == "exact":
            raise NotImplementedError(_NO_EXACT)
        own = lin.penalty(tangents, num_probes, distribution, seed, ggn, kind)
        gradient = own.gradient(float(weights[0]), float(weights[1]))
        return own.loss.clone(), own.penalty.clone(), gradient
    if estimator == "exact":
        lin.check_third_order("penalty")
        lin.check_current()
        result = lin.state.exact_penalty(kind, ggn, [True] * len(lin.spec.shapes))
    else:
        result = penalty_state(lin, tangents, num_probes, distribution, seed, ggn, kind)
    return result.loss, result.penalty, result.gradient(float(weights[0]), float(weights[1]))


def penalty_state(
    lin: Linearization,
    tangents: Tensor | None,
    num_probes: int,
    distribution: str,
    seed: int | None,
    ggn: bool,
    kind: str = "fro2",
) -> backends.PenaltyState:
    """The values of :func:`penalty`, with the gradient for weights that come later."""
    lin.check_third_order("penalty")
    probes = penalty_probes(lin.like, lin.num_params, tangents, num_probes, distribution, seed)
    lin.check_current()
    return penalty_of(lin.state, kind, probes, ggn, lin.like, lin.num_params)


def penalty_probes(
    like: Tensor,
    num_params: int,
    tangents: Tensor | None,
    num_probes: int,
    distribution: str,
    seed: int | None,
) -> Tensor | ProbeSource:
    """Tangents (P,) or (P, K) as rows (K, P), or the source of the probes to draw; K >= 1."""
    probes: Tensor | ProbeSource
    if tangents is not None:
        probes = tangent_rows(tangents, num_params, like)
        num_probes = probes.shape[0]
    else:
        probes = ProbeSource(num_probes, distribution, fresh_seed() if seed is None else seed)
    if num_probes < 1:
        raise ValueError("the penalty is a mean over probes and needs one or more; got 0")
    return probes
