"""Kinds of curvature penalties by probes: mean_k ||H v_k||^2, which a backend fuses, and traces.

With independent entries of mean 0 and variance 1 in v, E v' H v = tr H. The derivative of v' H v
with respect to the parameters is T[v, v], T the third derivative of the loss.
"""

from __future__ import annotations

from torch import Tensor

from hvpfast.backends.contract import AnyState, PenaltyState, State
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource, fresh_seed
from hvpfast.utils.choice import check_choice

KINDS = ("fro2", "trace")
ESTIMATORS = ("hutchinson", "exact")
NO_PROBES = "the penalty is a mean over probes and needs one or more; got 0"


def check_kind(kind: str, estimator: str, tangents: Tensor | None) -> None:
    """Raise ValueError for a kind or an estimator that is none, or for tangents of an exact one."""
    check_choice("kind", kind, KINDS)
    check_choice("estimator", estimator, ESTIMATORS)
    if estimator == "exact" and tangents is not None:
        raise ValueError("estimator='exact' takes no tangents; drop them, or use 'hutchinson'")


def probes_given(
    tangents: Tensor | None, num_probes: int, distribution: str, seed: int | None
) -> Tensor | ProbeSource:
    """The tangents where there are some, else the source of the probes to draw."""
    if tangents is not None:
        return tangents
    return ProbeSource(num_probes, distribution, fresh_seed() if seed is None else seed)


class TracePenalty:
    """(1/K) sum_k v_k' H v_k of one model or many, before its gradient; v are rows (..., K, P)."""

    def __init__(self, state: AnyState, rows: Tensor, ggn: bool) -> None:
        self._state, self._rows, self._ggn = state, rows, ggn
        self._values = state.quadratic(rows, ggn).mean(-1)

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim or (M,)."""
        return self._state.loss.detach().clone()

    @property
    def penalty(self) -> Tensor:
        """The penalty, 0-dim or (M,), a new tensor each time: autograd attaches history to it."""
        return self._values.detach()

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        """Gradient d(g_loss * loss + g_penalty * penalty) / d params, (P,) or (M, P)."""
        rows = self._rows
        third = self._state.hvp_vjp(rows, rows, self._ggn)
        third.mul_(g_penalty / rows.shape[-2])
        return third.add_(self._state.gradient(), alpha=g_loss)


def penalty_of(
    state: State, kind: str, probes: Tensor | ProbeSource, ggn: bool, like: Tensor, num_params: int
) -> PenaltyState:
    """The penalty of a kind for probes given as rows (K, P) or as their source, K >= 1."""
    if (probes.num_probes if isinstance(probes, ProbeSource) else probes.shape[0]) < 1:
        raise ValueError(NO_PROBES)
    if kind == "fro2":
        return state.penalty(probes, ggn)
    if isinstance(probes, ProbeSource):
        probes = probe_rows(probes, num_params, like.dtype, like.device)
    return TracePenalty(state, probes.detach(), ggn)
