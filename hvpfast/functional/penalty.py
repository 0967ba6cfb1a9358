"""Curvature penalties beyond mean_k ||H v_k||^2: traces by probes, and exact values.

With independent entries of mean 0 and variance 1 in v, E v' H v = tr H. The derivative of v' H v
with respect to the parameters is T[v, v], T the third derivative of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpfast.backends.contract import PenaltyState, State
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource, fresh_seed
from hvpfast.functional.many_models import ModelsLinearization
from hvpfast.mlp.checks import check_curvature, tangent_rows
from hvpfast.utils.choice import check_choice

if TYPE_CHECKING:
    from hvpfast.functional.linearization import Linearization

__all__ = ["ESTIMATORS", "KINDS", "check_kind", "chosen_tensors", "exact_value", "penalty_of"]

KINDS = ("fro2", "trace")
ESTIMATORS = ("hutchinson", "exact")


class TracePenalty:
    """(1/K) sum_k v_k' H v_k at one point, before its gradient; v_k are rows (K, P)."""

    def __init__(self, state: State, rows: Tensor, ggn: bool) -> None:
        self._state, self._rows, self._ggn = state, rows, ggn
        self._value = state.quadratic(rows, ggn).mean()

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim."""
        return self._state.loss.detach()

    @property
    def penalty(self) -> Tensor:
        """The penalty, 0-dim, a new tensor each time: autograd attaches history to it."""
        return self._value.detach()

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        """Gradient d(g_loss * loss + g_penalty * penalty) / d params, (P,)."""
        rows = self._rows
        third = self._state.hvp_vjp(rows, rows, self._ggn)
        return third.mul_(g_penalty / len(rows)).add_(self._state.gradient(), alpha=g_loss)


def penalty_of(
    state: State, kind: str, probes: Tensor | ProbeSource, ggn: bool, like: Tensor, num_params: int
) -> PenaltyState:
    """The penalty of a kind for probes given as rows (K, P) or as their source."""
    if kind == "fro2":
        return state.penalty(probes, ggn)
    if isinstance(probes, ProbeSource):
        probes = probe_rows(probes, num_params, like.dtype, like.device)
    return TracePenalty(state, probes.detach(), ggn)


def exact_value(lin: Linearization, kind: str, ggn: bool, chosen: Sequence[bool]) -> Tensor:
    """The exact penalty over the chosen tensors, 0-dim, for less than what its gradient needs."""
    state = lin.state
    if kind == "trace":
        return state.sample_traces(ggn, chosen).double().sum().to(lin.dtype)
    value = state.inner_product(state, ggn, chosen)
    return torch.full((), value, dtype=lin.dtype, device=lin.device)


def chosen_tensors(lin: Linearization, params: Sequence[Tensor]) -> list[bool]:
    """Flags of [W1, b1, ...]: those that require gradients, all of them if none does or if flat."""
    required = [p.requires_grad for p in params]
    if len(params) == 1 or not any(required):
        return [True] * len(lin.spec.shapes)
    return required


def check_kind(kind: str, estimator: str, tangents: Tensor | None) -> None:
    """Raise ValueError for a kind or an estimator that is none, or for tangents of an exact one."""
    check_choice("kind", kind, KINDS)
    check_choice("estimator", estimator, ESTIMATORS)
    if estimator == "exact" and tangents is not None:
        raise ValueError("estimator='exact' takes no tangents; drop them, or use 'hutchinson'")


_NO_EXACT = (
    "estimator='exact' takes one model at a time; for many use estimator='hutchinson', or "
    "linearize(spec, params[m], ...) for each"
)


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
) -> PenaltyState:
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
