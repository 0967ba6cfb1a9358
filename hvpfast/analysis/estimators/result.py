"""Estimates: values with standard errors and intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", float, Tensor)


@dataclass(frozen=True, eq=False)
class Estimate(Generic[Value]):
    """An estimate with its uncertainty.

    Attributes:
        estimate: a float, or one number per row of the operator (P,).
        stderr: standard error of ``estimate``, of its kind and shape; 0 for an exact value, inf
            (unknown) for a single sample. It measures the randomness of the probes, not rounding.
        samples: (n,) float64, whose mean is ``estimate``; None if there are none, or if each would
            be P numbers.
        num_matvecs: products with one vector; a quadratic form v'Av counts as one.
        stop_reason: ``"budget"``, ``"rtol"`` (the tolerance is reached), ``"max_matvecs"`` (it is
            not), ``"exact: per-sample cores"`` or ``"exact: identity columns"``.
        seed: of the probes; None for an exact value.
        method: that was used.
        dof: degrees of freedom of ``stderr``.
        positive: the quantity cannot be negative, and intervals are those of its logarithm.
        skew: the coefficients (a, b) of :func:`unskewed`, which corrects intervals for the
            skewness of the samples.
    """

    estimate: Value
    stderr: Value
    samples: Tensor | None
    num_matvecs: int
    stop_reason: str
    seed: int | None
    method: str
    dof: int
    positive: bool = False
    skew: tuple[float, float] = (0.0, 0.0)

    def __float__(self) -> float:
        return float(self.estimate)

    def ci(self, level: float = 0.95) -> tuple[Value, Value]:
        """Return the ends of the interval that covers the truth with probability ``level``.

        With Student's quantile t for ``dof``, y = unskewed(t) and y' = unskewed(-t), which are t
        and -t for samples without skewness: from estimate - y stderr to estimate - y' stderr, or
        where ``positive`` from estimate exp(-y stderr / estimate) to estimate exp(-y' stderr /
        estimate). For (P,) values the level is that of each entry.

        Raises:
            ValueError: ``level`` is not in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be in (0, 1), such as 0.95; got {level!r}")
        t = student_quantile(self.dof, level)
        below, above = (-unskewed(y, self.skew, self.dof + 1) for y in (t, -t))
        if isinstance(self.estimate, Tensor):
            given = (self.estimate, torch.as_tensor(self.stderr, device=self.estimate.device))
            return _end(*given, below, self.positive), _end(*given, above, self.positive)
        mean, stderr = torch.tensor([self.estimate, self.stderr], dtype=torch.float64, device="cpu")
        low, high = (_end(mean, stderr, errors, self.positive) for errors in (below, above))
        return float(low), float(high)


def _end(mean: Tensor, stderr: Tensor, errors: float, positive: bool) -> Tensor:
    """The number that is so many standard errors above the mean, or above its logarithm."""
    step = torch.where(stderr > 0, errors * stderr, 0.0)  # also for infinitely many
    return mean * torch.exp(torch.where(step != 0, step / mean, 0.0)) if positive else mean + step


def skewness_coefficients(samples: Tensor, positive: bool) -> tuple[float, float]:
    """Return (a, b) of :func:`unskewed` for the mean of samples (n,), or for its logarithm.

    With the skewness g and the relative standard deviation c of the samples, T = sqrt(n) (mean -
    truth) / s has the mean -g / (2 sqrt(n)) and T + (g / 3) T^2 / sqrt(n) + (g / 6) / sqrt(n) is
    normal to order 1 / n; for the logarithm of the mean g / 3 becomes g / 3 - c / 2.
    """
    ((a, b),) = skewness_of_each(samples.unsqueeze(0), positive)
    return a, b


def skewness_of_each(samples: Tensor, positive: bool) -> list[tuple[float, float]]:
    """Return :func:`skewness_coefficients` of every row of samples (M, n)."""
    mean = samples.mean(1)
    centred = samples - mean.unsqueeze(1)
    spread = centred.square().mean(1).sqrt()
    skewness = (centred / spread.unsqueeze(1)).pow(3).mean(1)
    bend = torch.zeros_like(mean)
    if positive:
        bend = torch.where(mean > 0, 0.5 * spread / mean, bend)
    pairs = torch.stack((skewness / 3 - bend, skewness / 6), 1)
    return [(a, b) for a, b in torch.where(spread.unsqueeze(1) == 0, 0.0, pairs).tolist()]


def unskewed(quantile: float, skew: tuple[float, float], n: int) -> float:
    """Return the y with ((1 + a y / sqrt(n))^3 - 1) sqrt(n) / (3 a) + b / sqrt(n) = quantile.

    That is y + a y^2 / sqrt(n) + ... + b / sqrt(n), made monotone by a cubic term.

    References:
        Hall (1992), On the removal of skewness by transformation, J. R. Statist. Soc. B 54.
    """
    a, b = skew
    if math.isinf(quantile):
        return quantile
    root = math.sqrt(n)
    shifted = quantile - b / root
    if abs(a) < 1e-6 * root:
        return shifted
    cube = 1 + 3 * a * shifted / root
    return root / a * (math.copysign(abs(cube) ** (1 / 3), cube) - 1)


@dataclass(frozen=True, eq=False)
class Estimates:
    """All quantities of :func:`hvpfast.estimate_all`, from the same products."""

    trace: Estimate[float]
    frobenius_sq: Estimate[float]
    diagonal: Estimate[Tensor]
    row_norms_sq: Estimate[Tensor]


def student_quantile(dof: int, level: float) -> float:
    """Half-width in standard errors of a two-sided interval; inf without degrees of freedom."""
    from scipy import special  # late: takes longer to import than all of this package

    return float(special.stdtrit(dof, 0.5 + level / 2)) if dof > 0 else math.inf
