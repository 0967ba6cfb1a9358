"""Many models at once, by definition: each model's own state, one after the other, stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hvpfast.backends.contract import PenaltyState, State
from hvpfast.backends.probes.source import ProbeSource

__all__ = ["ReferenceModels", "ReferenceModelsPenalty"]


class ReferenceModels:
    """The states of M models."""

    def __init__(self, states: Sequence[State]) -> None:
        self._states = states

    @property
    def loss(self) -> Tensor:
        """The losses, (M,); a new tensor each time."""
        return torch.stack([state.loss for state in self._states])

    @property
    def normalizers(self) -> Tensor:
        """What each model's sum of losses was divided by, (M,) float64."""
        values = [state.normalizer for state in self._states]
        return torch.tensor(values, dtype=torch.float64, device=self._states[0].loss.device)

    @property
    def nbytes(self) -> int:
        """Estimate: M times that of the first model."""
        return len(self._states) * self._states[0].nbytes

    def gradient(self) -> Tensor:
        """Gradients, (M, P)."""
        return torch.stack([state.gradient() for state in self._states])

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        """H_m v_mk, or with ``ggn`` G_m v_mk, for rows (M, K, P): (M, K, P)."""
        return self._each(lambda state, rows: state.hvp(rows, ggn), tangents)

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        """v_mk' H_m v_mk, (M, K)."""
        return self._each(lambda state, rows: state.quadratic(rows, ggn), tangents)

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        """d sum_k <u_mk, H_m v_mk> / d params_m, (M, P)."""
        pairs = zip(self._states, tangents, cotangents, strict=True)
        return torch.stack([state.hvp_vjp(v, u, ggn) for state, v, u in pairs])

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> ReferenceModelsPenalty:
        """(1/K) sum_k ||H_m v_mk||^2 for probes given as rows (M, K, P) or as their source."""
        each: Iterable[Tensor | ProbeSource]
        if isinstance(probes, ProbeSource):
            each = [probes.of_model(m) for m in range(len(self._states))]
        else:
            each = probes
        pairs = zip(self._states, each, strict=True)
        return ReferenceModelsPenalty([state.penalty(own, ggn) for state, own in pairs])

    def _each(self, operation: Callable[[State, Tensor], Tensor], tangents: Tensor) -> Tensor:
        pairs = zip(self._states, tangents, strict=True)
        return torch.stack([operation(state, rows) for state, rows in pairs])


class ReferenceModelsPenalty:
    """The penalties of M models."""

    def __init__(self, penalties: Sequence[PenaltyState]) -> None:
        self._penalties = penalties

    @property
    def loss(self) -> Tensor:
        """The losses, (M,); a new tensor each time."""
        return torch.stack([penalty.loss for penalty in self._penalties])

    @property
    def penalty(self) -> Tensor:
        """The penalties, (M,); a new tensor each time."""
        return torch.stack([penalty.penalty for penalty in self._penalties])

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        """Gradients d(g_loss * loss_m + g_penalty * penalty_m) / d params_m, (M, P)."""
        return torch.stack([p.gradient(g_loss, g_penalty) for p in self._penalties])
