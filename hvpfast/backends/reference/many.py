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
        return self._each(lambda state: state.loss)

    @property
    def normalizers(self) -> Tensor:
        values = [state.normalizer for state in self._states]
        return torch.tensor(values, dtype=torch.float64, device=self._states[0].loss.device)

    @property
    def nbytes(self) -> int:
        """Estimate: M times that of the first model."""
        return len(self._states) * self._states[0].nbytes

    def gradient(self) -> Tensor:
        return self._each(lambda state: state.gradient())

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        return self._each(lambda state, v: state.hvp(v, ggn), tangents)

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        return self._each(lambda state, v: state.quadratic(v, ggn), tangents)

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        return self._each(lambda state, v, u: state.hvp_vjp(v, u, ggn), tangents, cotangents)

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> ReferenceModelsPenalty:
        if isinstance(probes, ProbeSource):
            each: Iterable[Tensor | ProbeSource] = map(probes.of_model, range(len(self._states)))
        else:
            each = probes
        pairs = zip(self._states, each, strict=True)
        return ReferenceModelsPenalty([state.penalty(own, ggn) for state, own in pairs])

    def _each(self, operation: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """``operation`` of each state and its own rows, stacked."""
        return torch.stack([operation(*own) for own in zip(self._states, *rows, strict=True)])


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
