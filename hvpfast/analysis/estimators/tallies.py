"""Running moments of samples: of one model, or with M in front of every shape of many models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_BLOCK = 2**20  # entries of some rows that stay in cache from one operation to the next


class ScalarTally:
    """Samples of one number, or of one number per model.

    Args:
        positive: the number cannot be negative.
    """

    def __init__(self, positive: bool) -> None:
        self._parts, self.positive, self.count = list[Tensor](), positive, 0

    def add(self, values: Tensor) -> None:
        """Take samples (k,) or (M, k)."""
        self._parts.append(values.to("cpu", torch.float64))
        self.count += values.shape[-1]

    def samples(self) -> Tensor:
        """Return all samples, (n,) or (M, n)."""
        return torch.cat(self._parts, -1) if len(self._parts) > 1 else self._parts[0]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the mean and its standard error, 0-dim or (M,)."""
        samples = self.samples()
        mean = samples.mean(-1)
        if self.count < 2:
            return mean, torch.full_like(mean, math.inf)
        return mean, samples.std(-1) / math.sqrt(self.count)

    def relative_error(self, quantile: float) -> float:
        """Bound of |mean - truth| / |truth| at so many standard errors; of M models the largest."""
        mean, stderr = self.moments()
        return _largest_error(mean, quantile * stderr, self.positive)


class EntryTally:
    """Running float64 sums of samples and their squares, for P numbers at once.

    Args:
        shape: P, (P,), or (M, P) for many models.
        device: of the sums.
        positive: no number can be negative.
    """

    def __init__(
        self, shape: int | tuple[int, ...], device: torch.device, positive: bool = False
    ) -> None:
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sum)
        self.positive, self.count = positive, 0

    def add(self, sample: Callable[[slice], Tensor], count: int) -> None:
        """Take ``count`` samples; ``sample(entries)`` gives those of some entries, (..., count, p).

        The samples of many models, of which a chunk has few, are taken whole.
        """
        one = self._sum.dim() == 1
        for part in blocks(len(self._sum), count) if one else [slice(None)]:
            values = sample(part)
            self._sum[..., part] += values.sum(-2)
            self._squares[..., part] += values.square_().sum(-2)
        self.count += count

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the means and their standard errors, float64 of the shape."""
        n = self.count
        mean = self._sum / n
        if n < 2:
            return mean, torch.full_like(mean, math.inf)
        variance = (self._squares - n * mean.square()).clamp_min_(0.0) / (n - 1)
        return mean, (variance / n).sqrt_()

    def relative_error(self, quantile: float) -> float:
        """Bound of ||mean - truth|| / ||truth||.

        E ||mean - truth||^2 = sum_i stderr_i^2; Student's quantile, of errors that move together,
        bounds that of errors that do not.
        """
        mean, stderr = self.moments()
        return _largest_error(mean.norm(dim=-1), quantile * stderr.norm(dim=-1), positive=False)


Tally = ScalarTally | EntryTally


def blocks(size: int, count: int) -> Iterator[slice]:
    """Yield slices of ``size`` entries such that ``count`` rows of one fit into cache."""
    step = max(1024, _BLOCK // max(1, count))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _largest_error(means: Tensor, halves: Tensor, positive: bool) -> float:
    """The largest bound of |mean - truth| / |truth| for intervals of these half-widths."""
    pairs = zip(means.reshape(-1).tolist(), halves.reshape(-1).tolist(), strict=True)
    bounds = [_relative_error(mean, half, positive) for mean, half in pairs]
    return float(torch.tensor(bounds, dtype=torch.float64, device="cpu").max())


def _relative_error(mean: float, half: float, positive: bool) -> float:
    if half == 0:
        return 0.0
    if positive:  # the interval of the logarithm
        return math.expm1(min(half / mean, 700.0)) if mean > 0 else math.inf
    return half / (abs(mean) - half) if half < abs(mean) else math.inf
