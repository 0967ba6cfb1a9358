"""Sampling until a budget or a tolerance: streamed probes, running moments, the stopping rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hvpfast.analysis.estimators.result import student_quantile
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource, fresh_seed
from hvpfast.operators.matvecs import Products
from hvpfast.utils.choice import check_choice

__all__ = [
    "EntryTally",
    "ProbeStream",
    "Progress",
    "ScalarTally",
    "Settings",
    "Tally",
    "at_least_single",
    "blocks",
    "chunk_of",
    "rows_at_once",
    "sample",
    "scaled",
]

DISTRIBUTIONS = ("rademacher", "normal", "sphere")
MIN_SAMPLES = 16  # before the first look at a tolerance: Student's quantile needs near-normal means
_CHUNK_BYTES = 2**24  # of rows at once: batched products, in memory that malloc uses again
_MOST_ROWS = 256
_BLOCK = 2**20  # entries of some rows that stay in cache from one operation to the next


@dataclass(frozen=True)
class Settings:
    """The checked arguments that every estimator has.

    Raises:
        ValueError: an argument is out of range.
        TypeError: a count is not an integer.
    """

    num_matvecs: int
    distribution: str
    seed: int
    rtol: float | None
    confidence: float
    max_matvecs: int | None
    progressbar: bool

    @classmethod
    def of(
        cls,
        num_matvecs: int,
        distribution: str,
        seed: int | None,
        rtol: float | None,
        confidence: float,
        max_matvecs: int | None,
        progressbar: bool,
    ) -> Settings:
        """Return the settings for what a user gave."""
        for name, count in (("num_matvecs", num_matvecs), ("max_matvecs", max_matvecs)):
            if count is None and name == "max_matvecs":
                continue
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name} must be an integer; got {count!r}")
            if count < 1:
                raise ValueError(f"{name} must be >= 1; got {count}")
        distribution = "normal" if distribution == "gaussian" else distribution
        check_choice("distribution", distribution, DISTRIBUTIONS)
        if rtol is not None and not 0 < rtol < 1:
            raise ValueError(f"rtol must be in (0, 1), or None for a fixed budget; got {rtol!r}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), such as 0.95; got {confidence!r}")
        seed = fresh_seed() if seed is None else seed
        ProbeSource(0, "normal", seed)  # refuses a seed that is out of range
        return cls(num_matvecs, distribution, seed, rtol, confidence, max_matvecs, progressbar)

    @property
    def most(self) -> int:
        """The largest number of products that a tolerance may cost."""
        return 100 * self.num_matvecs if self.max_matvecs is None else self.max_matvecs


class ProbeStream:
    """Probes 0, 1, 2, ... of one seed as rows, drawn as they are used.

    Args:
        products: the operator, which tells P, dtype and device.
        settings: distribution and seed.
        at_once: draw at least so many at a time.
    """

    def __init__(self, products: Products, settings: Settings, at_once: int = 1) -> None:
        self._products, self._next = products, 0
        self._at_once = max(at_once, rows_at_once(products))
        self._memory: Tensor | None = None
        self._distribution, self._seed = settings.distribution, settings.seed
        self.dtype = at_least_single(products.dtype)

    def chunks(self, count: int) -> Iterator[Tensor]:
        """Yield the next ``count`` probes as rows (k, P), a chunk at a time, in the same memory."""
        step, size = min(self._at_once, count), self._products.size
        if self._memory is None and self._products.device.type == "cpu" and count > step:
            self._memory = torch.empty(step, size, dtype=self.dtype)
        for start in range(0, count, step):
            number = min(step, count - start)
            yield self.rows(number, None if self._memory is None else self._memory[:number])

    def rows(self, count: int, out: Tensor | None = None) -> Tensor:
        """Return the next ``count`` probes as rows (count, P), in ``out`` where it is given."""
        sphere = self._distribution == "sphere"
        name = "normal" if sphere else self._distribution
        source = ProbeSource(count, name, self._seed, self._next)
        size, device = self._products.size, self._products.device
        rows = probe_rows(source, size, self.dtype, device, out)
        self._next += count
        return scaled(rows, self._products.size) if sphere else rows

    def on_sphere(self, rows: Tensor, dimension: int) -> Tensor:
        """Scale rows to length sqrt(dimension), in place, where the distribution is the sphere."""
        return scaled(rows, dimension) if self._distribution == "sphere" else rows


class Chunks(Protocol):
    """What gives probes."""

    def chunks(self, count: int) -> Iterator[Tensor]:
        """Yield the next ``count`` probes, a chunk at a time; a chunk's length counts them."""


class Tally(Protocol):
    """Running moments of one quantity."""

    count: int

    def relative_error(self, quantile: float) -> float:
        """Bound of |estimate - truth| / |truth| at so many standard errors."""


class ScalarTally:
    """Samples of one number.

    Args:
        positive: the number cannot be negative.
    """

    def __init__(self, positive: bool) -> None:
        self._parts, self.positive, self.count = list[Tensor](), positive, 0

    def add(self, values: Tensor) -> None:
        """Take samples (k,)."""
        self._parts.append(values.to("cpu", torch.float64))
        self.count += len(values)

    def samples(self) -> Tensor:
        """Return all samples (n,)."""
        return torch.cat(self._parts) if len(self._parts) > 1 else self._parts[0]

    def moments(self) -> tuple[float, float]:
        """Return the mean and its standard error."""
        samples = self.samples()
        mean = float(samples.mean())
        if self.count < 2:
            return mean, math.inf
        return mean, float(samples.std()) / math.sqrt(self.count)

    def relative_error(self, quantile: float) -> float:
        """Bound of |mean - truth| / |truth|."""
        mean, stderr = self.moments()
        half = quantile * stderr
        if half == 0:
            return 0.0
        if self.positive:  # the interval of the logarithm
            return math.expm1(min(half / mean, 700.0)) if mean > 0 else math.inf
        return half / (abs(mean) - half) if half < abs(mean) else math.inf


class EntryTally:
    """Running float64 sums of samples and their squares, for P numbers at once."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sum)
        self.count = 0

    def add(self, sample: Callable[[slice], Tensor], count: int) -> None:
        """Take ``count`` samples; ``sample(entries)`` gives those of some entries, (count, p)."""
        for part in blocks(len(self._sum), count):
            values = sample(part)
            self._sum[part] += values.sum(0)
            self._squares[part] += values.square_().sum(0)
        self.count += count

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the means (P,) and their standard errors (P,), float64."""
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
        half, size = quantile * float(stderr.norm()), float(mean.norm())
        if half == 0:
            return 0.0
        return half / (size - half) if half < size else math.inf


def blocks(size: int, count: int) -> Iterator[slice]:
    """Yield slices of ``size`` entries such that ``count`` rows of one fit into cache."""
    step = max(1024, _BLOCK // max(1, count))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def sample(
    stream: Chunks,
    settings: Settings,
    spent: int,
    visit: Callable[[Tensor], None],
    tallies: Sequence[Tally],
) -> str:
    """Feed probes to ``visit`` until the budget is spent or all tallies reach the tolerance.

    With ``rtol`` the tallies are looked at after ``num_matvecs`` products and then where the
    present standard error predicts that the tolerance is reached, with a margin. Looking more than
    once raises the chance that one interval misses: the allowed error 1 - confidence is therefore
    shared out, 1/4 to the first look, 1/2 to the second, 1/8, 1/16, ... to the others.

    Args:
        stream: gives the probes, one per product.
        settings: budget and tolerance.
        spent: products of the budget that are spent already.
        visit: takes a chunk of k probes and adds k samples to every tally.
        tallies: what must be known well enough.

    Returns:
        The reason to stop.

    Raises:
        ValueError: ``max_matvecs`` is below ``num_matvecs``.
    """
    rtol, count = settings.rtol, settings.num_matvecs - spent
    most = settings.most - spent
    if rtol is not None:
        count = max(count, MIN_SAMPLES)
        if most < count:
            raise ValueError(
                f"max_matvecs must be at least {count + spent}: num_matvecs, and {MIN_SAMPLES} "
                f"samples before the first look at rtol; got {settings.most}"
            )
    with Progress(
        settings.progressbar, count + spent if rtol is None else settings.most, spent
    ) as advance:

        def take(count: int) -> None:
            for rows in stream.chunks(count):
                visit(rows)
                advance(len(rows))

        take(count)
        if rtol is None:
            return "budget"
        for share, next_share in itertools.pairwise(_shares()):
            error, needed = _look(tallies, settings, share, next_share)
            if error <= rtol:
                return "rtol"
            if count >= most:
                return "max_matvecs"
            grown = min(most, max(math.ceil(1.2 * count), needed))
            take(grown - count)
            count = grown
    raise AssertionError("the shares do not end")


def _shares() -> Iterator[float]:
    """1/4, 1/2, 1/8, 1/16, ...: their sum is 1."""
    yield 0.25
    yield 0.5
    for power in itertools.count(3):
        yield 0.5**power


def _look(
    tallies: Sequence[Tally], settings: Settings, share: float, next_share: float
) -> tuple[float, int]:
    """Return the largest relative error now, and how many samples the next look should have."""
    rtol = settings.rtol
    assert rtol is not None
    n, alpha = tallies[0].count, 1 - settings.confidence
    error = max(t.relative_error(student_quantile(n - 1, 1 - alpha * share)) for t in tallies)
    later = max(t.relative_error(student_quantile(n - 1, 1 - alpha * next_share)) for t in tallies)
    # A half-width h of an estimate m bounds the error by h / (m - h) of the truth, and falls as
    # n^(-1/2); 1.1 because it is itself an estimate. Where it is not small, m is hardly known.
    width = later / (1 + later) if later < math.inf else 1.0
    needed = n * (1.1 * width * (1 + rtol) / rtol) ** 2
    return error, math.ceil(min(needed, settings.most if width < 0.5 else 8 * n))


class Progress:
    """A progress bar over products, where one is wanted; gives the function that moves it."""

    def __init__(self, shown: bool, total: int, initial: int = 0) -> None:
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit="matvec")

    def __enter__(self) -> Callable[[int], object]:
        return (lambda count: None) if self._bar is None else self._bar.update

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def scaled(rows: Tensor, dimension: int) -> Tensor:
    """Scale rows to length sqrt(dimension), in place."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    scale = math.sqrt(dimension) / norms.clamp_min(torch.finfo(torch.float64).tiny)
    return rows.mul_(scale.to(rows.dtype))


def rows_at_once(products: Products) -> int:
    """Return how many rows are multiplied by the operator at once."""
    return chunk_of(products.size * products.dtype.itemsize)


def chunk_of(size: int, most_bytes: int = _CHUNK_BYTES) -> int:
    """Return how many probes of so many bytes are used at once."""
    return max(1, min(_MOST_ROWS, most_bytes // size))


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for anything else: the dtype of sums and projections."""
    return dtype if dtype == torch.float64 else torch.float32
