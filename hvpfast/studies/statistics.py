"""Paired comparisons of two arms that share seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

MAX_EXACT_PAIRS = 40
"""Up to here the 2^n sign patterns are counted exactly, as pairs of 2^(n/2) sums."""


@dataclass(frozen=True)
class Paired:
    """Mean of n paired differences, its Student interval, sign-flip p; None where undefined."""

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    level: float

    @property
    def evidence(self) -> bool:
        """Whether there is an interval and it does not cover zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def paired(differences: Sequence[float], level: float = 0.95) -> Paired:
    """Return mean +- t_{n-1} s / sqrt(n) and the exact two-sided sign-flip p of n differences."""
    d = np.asarray(differences, dtype=np.float64)
    if d.size < 2:
        return Paired(int(d.size), float(d[0]) if d.size else None, None, None, None, level)
    mean, quantile = float(d.mean()), float(special.stdtrit(d.size - 1, 0.5 + level / 2))
    half = quantile * float(d.std(ddof=1)) / math.sqrt(d.size)
    return Paired(int(d.size), mean, mean - half, mean + half, sign_flip_p(d), level)


def sign_flip_p(d: npt.NDArray[np.float64]) -> float | None:
    """Return the share of the 2^n sign patterns s with ``|sum s_i d_i| >= |sum d_i|``."""
    if d.size > MAX_EXACT_PAIRS:
        return None
    threshold = abs(float(d.sum())) * (1 - 1e-12)  # a tie in exact arithmetic stays a tie
    if threshold == 0:
        return 1.0
    left, right = signed_sums(d[: d.size // 2]), np.sort(signed_sums(d[d.size // 2 :]))
    above = right.size - np.searchsorted(right, threshold - left, side="left")
    below = np.searchsorted(right, -threshold - left, side="right")
    return float((above + below).sum()) / (left.size * right.size)


def signed_sums(d: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return all 2^n sums of +-d_i."""
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    return sums
