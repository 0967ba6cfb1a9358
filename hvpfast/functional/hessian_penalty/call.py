"""What one call asks for, handed to the route that answers it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hvpfast.backends.probes.source import ProbeSource
from hvpfast.functional.penalty_kinds import probes_given


class PenaltyCall(NamedTuple):
    """The options of :func:`hvpfast.hessian_penalty`, checked; see there."""

    kind: str
    ggn: bool
    exact: bool
    tangents: Tensor | None
    num_probes: int
    distribution: str
    seed: int | Tensor | None
    backend: str

    def probes(self) -> Tensor | ProbeSource:
        """The tangents, or the source of the probes to draw."""
        seed = self.seed
        value = int(seed) % 2**64 if isinstance(seed, Tensor) else seed
        return probes_given(self.tangents, self.num_probes, self.distribution, value)
