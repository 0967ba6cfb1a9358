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
NUM_FLIPS = 99_999
"""Random sign patterns drawn where there are more pairs than that."""
NUM_RESAMPLES = 10_000
"""Resamples of the bootstrap."""
SEED = 20_260
"""Seed of the bootstrap and of the random sign patterns, so that equal differences give equal p."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """Mean of n paired differences, its intervals and p; None where undefined."""

    n: int
    mean: float | None
    low: float | None
    """Lower end of Student's interval."""
    high: float | None
    t: float | None
    """mean / (s / sqrt(n)); None for differences that are all equal."""
    boot_low: float | None
    """Lower end of the bootstrap's interval (BCa)."""
    boot_high: float | None
    p: float | None
    """Of flipping the signs of the differences, two-sided."""
    p_resolution: float | None
    """The smallest possible p: 2 / 2^n where all patterns are counted, else 1 / (draws + 1)."""
    level: float

    @property
    def evidence(self) -> bool:
        """Whether there is Student's interval and it does not cover zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def paired(differences: Sequence[float], level: float = 0.95) -> Paired:
    """Return mean +- t_{n-1} s / sqrt(n), bootstrap interval and sign-flip p of n differences."""
    d = np.asarray(differences, dtype=np.float64)
    if d.size < 2:
        mean = float(d[0]) if d.size else None
        return Paired(int(d.size), mean, None, None, None, None, None, None, None, level)
    mean, quantile = float(d.mean()), float(special.stdtrit(d.size - 1, 0.5 + level / 2))
    stderr = float(d.std(ddof=1)) / math.sqrt(d.size)
    half = quantile * stderr
    exact = d.size <= MAX_EXACT_PAIRS
    boot_low, boot_high = bootstrap_interval(d, level)
    return Paired(
        n=int(d.size),
        mean=mean,
        low=mean - half,
        high=mean + half,
        t=mean / stderr if stderr > 0 else None,
        boot_low=boot_low,
        boot_high=boot_high,
        p=sign_flip_p(d) if exact else random_sign_flip_p(d),
        p_resolution=2.0 ** (1 - d.size) if exact else 1 / (NUM_FLIPS + 1),
        level=level,
    )


def bootstrap_interval(d: Array, level: float) -> tuple[float, float]:
    """Return the bias-corrected and accelerated (BCa) bootstrap interval of the mean of d (n,).

    The ends are quantiles of the resampled means, at levels shifted by the bias
    z0 = Phi^-1(P(mean* < mean)) and the acceleration a = skewness / (6 sqrt(n)).

    References:
        Efron (1987), doi:10.1080/01621459.1987.10478410.
    """
    centred, mean = d - d.mean(), d.mean()
    variance = float(np.mean(centred**2))
    if variance == 0:
        return float(mean), float(mean)
    draws = np.random.Generator(np.random.Philox(SEED)).integers(
        d.size, size=(NUM_RESAMPLES, d.size)
    )
    means = np.sort(d[draws].mean(axis=1))
    below = (np.sum(means < mean) + 0.5 * np.sum(means == mean)) / NUM_RESAMPLES
    bias = float(special.ndtri(min(max(below, 1 / NUM_RESAMPLES), 1 - 1 / NUM_RESAMPLES)))
    acceleration = float(np.mean(centred**3)) / variance**1.5 / (6 * math.sqrt(d.size))
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + float(special.ndtri(tail))
        ends.append(float(special.ndtr(bias + z / (1 - acceleration * z))))
    low, high = np.quantile(means, ends)
    return float(low), float(high)


def sign_flip_p(d: Array) -> float | None:
    """Return the share of the 2^n sign patterns s with ``|sum s_i d_i| >= |sum d_i|``.

    None for more than `MAX_EXACT_PAIRS` differences.
    """
    if d.size > MAX_EXACT_PAIRS:
        return None
    threshold = flip_threshold(d)
    if threshold == 0:
        return 1.0
    left, right = signed_sums(d[: d.size // 2]), np.sort(signed_sums(d[d.size // 2 :]))
    above = right.size - np.searchsorted(right, threshold - left, side="left")
    below = np.searchsorted(right, -threshold - left, side="right")
    return float((above + below).sum()) / (left.size * right.size)


def random_sign_flip_p(d: Array) -> float:
    """Return the same share over random sign patterns, the observed one counted among them."""
    random = np.random.Generator(np.random.Philox(SEED))
    threshold, hits, left = flip_threshold(d), 0, NUM_FLIPS
    while left:
        num = min(left, 2**22 // d.size + 1)
        signs = random.integers(2, size=(num, d.size), dtype=np.int8) * 2.0 - 1.0
        hits += int(np.sum(np.abs(signs @ d) >= threshold))
        left -= num
    return (hits + 1) / (NUM_FLIPS + 1)


def flip_threshold(d: Array) -> float:
    """Return |sum d_i|, less what rounding may take from a tie."""
    return abs(float(d.sum())) * (1 - 1e-12)


def signed_sums(d: Array) -> Array:
    """Return all 2^n sums of +-d_i."""
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected by Holm's step-down rule; None counts as not tested.

    The k-th smallest of m becomes max_{j <= k} min(1, (m - j + 1) p_(j)): what falls below a level
    keeps the probability of any false finding below it.

    References:
        Holm (1979), Scandinavian Journal of Statistics 6, 65-70.
    """
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    worst = 0.0
    for rank, (p, i) in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p))
        corrected[i] = worst
    return corrected
