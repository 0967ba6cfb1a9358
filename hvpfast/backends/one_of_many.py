"""One model as M = 1 of many, for backends whose engine runs M models at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import Tensor

from hvpfast.backends.contract import ModelsState, PenaltyState
from hvpfast.backends.probes.source import ProbeSource

Models = TypeVar("Models", bound=ModelsState)


class OneModel(Generic[Models]):
    """The only model of a state of many; a backend adds ``loss_value`` and ``normalizer``."""

    __slots__ = ("_models",)

    def __init__(self, models: Models) -> None:
        self._models = models

    @property
    def loss(self) -> Tensor:
        return self._models.loss[0]

    @property
    def nbytes(self) -> int:
        return self._models.nbytes

    def gradient(self) -> Tensor:
        return self._models.gradient()[0]

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        rows = tangents.reshape(1, -1, tangents.shape[-1])
        return self._models.hvp(rows, ggn).view_as(tangents)

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        return self._models.quadratic(tangents.unsqueeze(0), ggn)[0]

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        return self._models.hvp_vjp(tangents.unsqueeze(0), cotangents.unsqueeze(0), ggn)[0]

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> OnePenalty:
        rows = probes if isinstance(probes, ProbeSource) else probes.unsqueeze(0)
        return OnePenalty(self._models.penalty(rows, ggn))

    def sample_traces(self, ggn: bool, chosen: Sequence[bool]) -> Tensor:
        raise self._no_exact("trace")

    def diagonal(self, ggn: bool) -> Tensor:
        raise self._no_exact("trace")

    def inner_product(self, other: object, ggn: bool, chosen: Sequence[bool]) -> float:
        raise self._no_exact("fro2")

    def exact_penalty(self, kind: str, ggn: bool, chosen: Sequence[bool]) -> OnePenalty:
        raise self._no_exact(kind)

    def _no_exact(self, kind: str) -> NotImplementedError:
        """The error for an exact value of a kind, in the backend's words."""
        raise NotImplementedError


class OnePenalty:
    """One model's penalty, for its gradient."""

    __slots__ = ("_models",)

    def __init__(self, models: PenaltyState) -> None:
        self._models = models

    @property
    def loss(self) -> Tensor:
        return self._models.loss[0]

    @property
    def penalty(self) -> Tensor:
        return self._models.penalty[0]

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        return self._models.gradient(g_loss, g_penalty)[0]
