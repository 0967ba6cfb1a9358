"""The functional layer: a loss is linearized at one point, then curvature is applied to tangents.

    lin = linearize(spec, params, x, y)     loss L, gradient, residuals kept for what follows
    hvp(lin, V) = H V                       H = d2 L / d params2, (P, P), never formed
    ggnvp(lin, V) = G V                     G = J' (d2 L / d outputs2) J
    quadratic_form(lin, V) = v_k' H v_k     half the work of H V
    hvp_vjp(lin, V, U) = d sum_k u_k' H v_k / d params
    penalty(lin, V) = mean_k ||H v_k||^2    with the loss and one gradient of both; also tr H^2

V, U are one direction (P,) or K directions as columns (P, K). These functions are not recorded by
autograd and return detached results; the differentiable forms are ``hessian_penalty`` and the
operators in ``torch.ops.hvpfast``.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast import backends
from hvpfast.checks import (
    check_batch,
    check_curvature,
    check_params,
    check_tangents,
    nonfinite_reason,
    tangent_rows,
)
from hvpfast.penalties import check_kind, penalty_of
from hvpfast.probes import ProbeSource, fresh_seed
from hvpfast.spec import MLPSpec


class Linearization:
    """A loss at one point, ready for curvature products. Made by :func:`linearize`.

    It belongs to the values that ``params``, ``x`` and ``y`` had: when one of them is changed in
    place, later products raise (changes through ``.data`` cannot be seen).

    Attributes:
        spec: the :class:`MLPSpec`.
        state: the backend's state; rows (K, P) inside.
        order: 2 or 3, as given to :func:`linearize`.
        num_params: P.
    """

    __slots__ = ("_choice", "_grad", "_inputs", "_like", "_versions", "num_params", "order",
                 "spec", "state")  # fmt: skip

    def __init__(
        self,
        spec: MLPSpec,
        state: backends.State,
        choice: backends.Choice,
        order: int,
        like: Tensor,
        inputs: tuple[Tensor, ...],
    ) -> None:
        self.spec, self.state, self.order = spec, state, order
        self.num_params = spec.num_params
        self._choice, self._like, self._inputs = choice, like, inputs
        self._grad: Tensor | None = None
        self._versions = _versions(inputs)

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim."""
        return self.state.loss

    @property
    def grad(self) -> Tensor:
        """The gradient of the loss, flat (P,); computed when first asked for."""
        if self._grad is None:
            self.check_current()
            self._grad = self.state.gradient()
        return self._grad

    @property
    def normalizer(self) -> float:
        """What the loss divides its sum by: 1 for "sum", else the samples or weights that count."""
        return self.state.normalizer

    @property
    def backend(self) -> str:
        """Name of the backend that runs."""
        return self._choice.module.NAME

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters and of every result."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters and of every result."""
        return self._like.device

    def check_current(self) -> None:
        """Raise RuntimeError if params, x or y were changed in place since :func:`linearize`."""
        if _versions(self._inputs) != self._versions:
            raise RuntimeError(
                "params, x or y were changed in place after linearize; the linearization belongs "
                "to their old values. Call linearize again"
            )

    def explain(self) -> str:
        """What runs where and why, in a few lines."""
        spec = self.spec
        lines = [
            f"MLP {spec.sizes} {spec.activation}, {spec.loss} ({spec.reduction}), "
            f"P = {self.num_params}, {self.dtype} on {self.device}",
            f"backend: {self.backend}",
        ]
        lines += [f"passed over {name}: {reason}" for name, reason in self._choice.passed_over]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Linearization of {self.explain().splitlines()[0]}, backend {self.backend}>"


_version = operator.attrgetter("_version")


def _versions(tensors: tuple[Tensor, ...]) -> int:
    """Sum of the version counters: each only ever grows, so a change of any changes the sum."""
    try:
        return sum(map(_version, tensors))
    except RuntimeError:  # inference tensors keep no version counter
        return sum(t._version for t in tensors if not t.is_inference())


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

    Args:
        spec: the network and its loss.
        params: flat (P,), or the list ``[W1, b1, W2, ...]``; contiguous, used without a copy.
        x: inputs (N, D[0]), or (N, ...) with D[0] entries per sample; dtype of ``params``.
        y: targets: (N,) int64 for cross_entropy, (N, D[L]) with the dtype of params for mse.
        backend: ``"auto"`` or a name from ``available()``.
        order: 3, or 2 to keep only what products, quadratic forms and the gradient need.

    Raises:
        ValueError: wrong shapes, labels out of range, an empty batch, NaN or inf in the loss.
        TypeError: not tensors, or a mix of dtypes or devices.
        RuntimeError: the named backend cannot run this.
    """
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3; got {order!r}")
    like = check_params(spec, params)
    x_rows, y_rows = check_batch(spec, like, x, y)
    choice, largest = _plan(spec, backend, like.dtype, like.device)
    state = choice.module.linearize(spec, params, x_rows, y_rows, order)
    if not abs(state.loss_value) <= largest:  # also when it is NaN
        raise ValueError(nonfinite_reason(state.loss_value, spec, params, x_rows, y_rows))
    inputs = (params, x, y) if isinstance(params, Tensor) else (*params, x, y)
    return Linearization(spec, state, choice, order, like, inputs)


def hvp(lin: Linearization, tangents: Tensor) -> Tensor:
    """Hessian-vector products H v, H = d2 loss / d params2.

    Args:
        lin: from :func:`linearize`.
        tangents: (P,) or columns (P, K), K >= 0, with the dtype and device of the parameters.

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
    check_tangents(tangents, lin.num_params, lin._like)
    lin.check_current()
    if tangents.dim() == 1:
        return lin.state.hvp(tangents if tangents.is_contiguous() else tangents.contiguous(), ggn)
    rows = tangents.T
    return lin.state.hvp(rows if rows.is_contiguous() else rows.contiguous(), ggn).T


def quadratic_form(lin: Linearization, tangents: Tensor, *, curvature: str = "hessian") -> Tensor:
    """Curvature v' H v along directions, without forming H v.

    Args:
        lin: from :func:`linearize`.
        tangents: (P,) or columns (P, K), K >= 0.
        curvature: ``"hessian"`` or ``"ggn"``.

    Returns:
        0-dim for (P,), (K,) for (P, K).

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: the point was changed in place after linearize.
    """
    ggn = check_curvature(curvature)
    rows = tangent_rows(tangents, lin.num_params, lin._like)
    lin.check_current()
    out = lin.state.quadratic(rows, ggn)
    return out[0] if tangents.dim() == 1 else out


def hvp_vjp(
    lin: Linearization, tangents: Tensor, cotangents: Tensor, *, curvature: str = "hessian"
) -> Tensor:
    """Third-order product d(sum_k u_k' H v_k)/d params, with u_k and v_k held fixed.

    Args:
        lin: from :func:`linearize` with ``order=3``.
        tangents: v, (P,) or columns (P, K).
        cotangents: u, shaped as ``tangents``.
        curvature: ``"hessian"`` or ``"ggn"``; the ggn is differentiated in full, J included.

    Returns:
        (P,), summed over the K pairs.

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: ``order=2``, or the point was changed in place after linearize.
    """
    ggn = check_curvature(curvature)
    rows = tangent_rows(tangents, lin.num_params, lin._like)
    cotangent_rows = tangent_rows(cotangents, lin.num_params, lin._like, "cotangents")
    if tangents.shape != cotangents.shape:
        raise ValueError(
            "tangents and cotangents must have one shape, pair by pair; got "
            f"{tuple(tangents.shape)} and {tuple(cotangents.shape)}"
        )
    _check_third_order(lin, "hvp_vjp")
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
        tangents: probes v, (P,) or columns (P, K), K >= 1; None to have them drawn.
        num_probes: how many to draw.
        distribution: ``"rademacher"`` or ``"normal"``. A backend may draw normal probes in
            another basis: same distribution, other numbers than :func:`hvpfast.probes`.
        seed: of the drawn probes, in [0, 2**64); None takes fresh entropy.
        weights: (w_loss, w_penalty) of the gradient.
        curvature: ``"hessian"`` or ``"ggn"``.
        kind: ``"fro2"`` or ``"trace"``.
        estimator: ``"hutchinson"`` or ``"exact"``; the work of the exact ``fro2`` grows with the
            square of the number of samples.

    Returns:
        (loss, penalty, gradient of w_loss * loss + w_penalty * penalty): 0-dim, 0-dim, (P,).

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: ``order=2``, or the point was changed in place after linearize.
        MemoryError: ``estimator="exact"`` where the scratch memory of a few samples is not there.
    """
    check_kind(kind, estimator, tangents)
    ggn = check_curvature(curvature)
    if estimator == "exact":
        _check_third_order(lin, "penalty")
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
    _check_third_order(lin, "penalty")
    probes = penalty_probes(lin._like, lin.num_params, tangents, num_probes, distribution, seed)
    lin.check_current()
    return penalty_of(lin.state, kind, probes, ggn, lin._like, lin.num_params)


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


def _check_third_order(lin: Linearization, name: str) -> None:
    if lin.order < 3:
        raise RuntimeError(
            f"{name} needs third-order residuals, but this linearization has order=2; call "
            "linearize(..., order=3)"
        )
