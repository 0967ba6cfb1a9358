"""Curvature penalties beyond mean_k ||H v_k||^2: traces by probes, and exact values.

With independent entries of mean 0 and variance 1 in v, E v' H v = tr H. The derivative of v' H v
with respect to the parameters is T[v, v], T the third derivative of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpfast.backends import PenaltyState, State
from hvpfast.backends.probes.draw import ProbeSource, probe_rows
from hvpfast.mlp.spec import check_choice

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
