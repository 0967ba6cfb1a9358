"""Many models at once, by definition: each model's own state, one after the other, stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hvpfast.backends.contract import PenaltyState, State
from hvpfast.backends.probes.source import ProbeSource


class ReferenceModels:
    """The states of M models."""

    def __init__(self, states: Sequence[State]) -> None:
        self._states = states

    @property
    def loss(self) -> Tensor:
        return torch.stack([state.loss for state in self._states])

    @property
    def normalizers(self) -> Tensor:
        values = [state.normalizer for state in self._states]
        return torch.tensor(values, dtype=torch.float64, device=self._states[0].loss.device)

    @property
    def nbytes(self) -> int:
        """Estimate: M times that of the first model."""
        return len(self._states) * self._states[0].nbytes

    def gradient(self) -> Tensor:
        return torch.stack([state.gradient() for state in self._states])

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        return self._each(lambda state, rows: state.hvp(rows, ggn), tangents)

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        return self._each(lambda state, rows: state.quadratic(rows, ggn), tangents)

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        pairs = zip(self._states, tangents, cotangents, strict=True)
        return torch.stack([state.hvp_vjp(v, u, ggn) for state, v, u in pairs])

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> ReferenceModelsPenalty:
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
        return torch.stack([penalty.loss for penalty in self._penalties])

    @property
    def penalty(self) -> Tensor:
        return torch.stack([penalty.penalty for penalty in self._penalties])

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        return torch.stack([p.gradient(g_loss, g_penalty) for p in self._penalties])
