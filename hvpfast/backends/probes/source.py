"""Probes described by distribution, seed and number, before any is drawn."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from hvpfast.utils.choice import check_choice

DISTRIBUTIONS = ("rademacher", "normal")


@dataclass(frozen=True)
class ProbeSource:
    """Probes described, not drawn: a backend may generate them where it needs them.

    Args:
        num_probes: number of probes K >= 0.
        distribution: ``"rademacher"`` (entries +-1) or ``"normal"`` (standard normal).
        seed: in [0, 2**64).
        first: index of the first probe, so that probes can be drawn in parts; first + K <= 2**32.

    Raises:
        ValueError: an argument is out of range.
    """

    num_probes: int
    distribution: str
    seed: int
    first: int = 0

    def __post_init__(self) -> None:
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        for name in ("num_probes", "seed", "first"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name} must be an integer >= 0; got {getattr(self, name)!r}")
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64; got {self.seed}")
        if self.first + self.num_probes > 2**32:
            raise ValueError(f"probe indices must stay below 2**32; got first={self.first}")

    def of_model(self, m: int, stride: int | None = None) -> ProbeSource:
        """The K probes of model m of many, from ``first + m stride`` on; the stride None is K."""
        stride = self.num_probes if stride is None else stride
        return replace(self, first=self.first + m * stride)


def fresh_seed() -> int:
    """A seed from the operating system's entropy, in [0, 2**63)."""
    return secrets.randbits(63)
