"""Sampling until a budget or a tolerance: settings, streamed probes, the stopping rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hvpfast.analysis.estimators.result import student_quantile
from hvpfast.analysis.estimators.tallies import Tally
from hvpfast.backends.probes.draw import probes_of_models
from hvpfast.backends.probes.source import ProbeSource, fresh_seed
from hvpfast.operators.matvecs import Products, at_least_single
from hvpfast.utils.choice import check_choice

DISTRIBUTIONS = ("rademacher", "normal", "sphere")
MIN_SAMPLES = 16  # before a tolerance is checked: Student's quantile needs near-normal means
_CHUNK_BYTES = 2**24  # of rows at once: batched products, in memory that malloc reuses
_MOST_ROWS = 256


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
        """Return the settings for the arguments of an estimator."""
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

    def bar(self, total: int, done: int = 0) -> tqdm[Any]:
        """A progress bar of products, where one is wanted."""
        return tqdm(total=total, initial=done, unit="matvec", disable=not self.progressbar)

    @property
    def most(self) -> int:
        """The largest number of products that a tolerance may cost."""
        return 100 * self.num_matvecs if self.max_matvecs is None else self.max_matvecs


class ProbeStream:
    """Probes 0, 1, 2, ... of one seed as rows (k, P), or (M, k, P) of many models, drawn when used.

    Args:
        shape: (P,) or (M, P).
        dtype: of the operator; rows have at least single precision.
        device: of the rows.
        settings: distribution and seed.
        at_once: probes of a chunk.
        stride: model m has the probes from number ``m stride`` on.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        settings: Settings,
        at_once: int,
        stride: int = 0,
    ) -> None:
        self._at_once, self._stride = at_once, stride
        self.shape, self.dtype, self._device = shape, at_least_single(dtype), device
        self._sphere = settings.distribution == "sphere"
        self._distribution = "normal" if self._sphere else settings.distribution
        self._seed, self._next = settings.seed, 0
        self._memory: Tensor | None = None

    def chunks(self, count: int) -> Iterator[Tensor]:
        """Yield the next ``count`` probes as rows, a chunk at a time, in the same memory."""
        step, width = min(self._at_once, count), math.prod(self.shape)
        if self._memory is None and self._device.type == "cpu" and count > step:
            # fresh pages for every chunk would cost more than the draw
            self._memory = torch.empty(step * width, dtype=self.dtype, device="cpu")
        for start in range(0, count, step):
            number = min(step, count - start)
            yield self.rows(
                number, None if self._memory is None else self._memory[: number * width]
            )

    def rows(self, count: int, memory: Tensor | None = None) -> Tensor:
        """Return the next ``count`` probes as rows, in ``memory`` of their size if it is given."""
        *lead, size = self.shape
        models = math.prod(lead)
        source = ProbeSource(count, self._distribution, self._seed, self._next)
        out = None if memory is None else memory.view(models, count, size)
        rows = probes_of_models(source, self._stride, models, size, self.dtype, self._device, out)
        self._next += count
        self.on_sphere(rows.view(-1, size), size)
        return rows if lead else rows[0]

    def on_sphere(self, rows: Tensor, dimension: int) -> Tensor:
        """Scale rows to length sqrt(dimension), in place, if the distribution is the sphere."""
        if not self._sphere:
            return rows
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        scale = math.sqrt(dimension) / norms.clamp_min(torch.finfo(torch.float64).tiny)
        return rows.mul_(scale.to(rows.dtype))


def probe_stream(products: Products, settings: Settings, at_once: int = 1) -> ProbeStream:
    """Return the probes for an operator, at least ``at_once`` at a time."""
    at_once = max(at_once, rows_at_once(products))
    return ProbeStream((products.size,), products.dtype, products.device, settings, at_once)


def sample(
    stream: ProbeStream,
    settings: Settings,
    spent: int,
    visit: Callable[[Tensor], None],
    tallies: Sequence[Tally],
) -> str:
    """Feed probes to ``visit`` until the budget is spent or all tallies reach the tolerance.

    With ``rtol`` the tallies are checked after ``num_matvecs`` products, and then whenever the
    present standard error predicts, with a margin, that the tolerance is reached. Every further
    check raises the chance that one interval misses the truth. The allowed error 1 - confidence is
    therefore divided: 1/4 for the first check, 1/2 for the second, 1/8, 1/16, ... for the others.

    Args:
        stream: the probes, one per product.
        settings: budget and tolerance.
        spent: products of the budget that are spent already.
        visit: is called with a chunk of k probes and adds k samples to every tally.
        tallies: the quantities that must reach the tolerance.

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
    total = count + spent if rtol is None else settings.most
    with settings.bar(total, spent) as bar:

        def take(count: int) -> None:
            for rows in stream.chunks(count):
                before = tallies[0].count
                visit(rows)
                bar.update(tallies[0].count - before)

        take(count)
        if rtol is None:
            return "budget"
        shares = itertools.chain((0.25, 0.5), (0.5**power for power in itertools.count(3)))
        for share, next_share in itertools.pairwise(shares):
            error, needed = _check(tallies, settings, share, next_share)
            if error <= rtol:
                return "rtol"
            if count >= most:
                return "max_matvecs"
            grown = min(most, max(math.ceil(1.2 * count), needed))
            take(grown - count)
            count = grown
    raise AssertionError("the shares do not end")


def _check(
    tallies: Sequence[Tally], settings: Settings, share: float, next_share: float
) -> tuple[float, int]:
    """Return the largest relative error now, and how many samples the next check should have."""
    rtol = settings.rtol
    assert rtol is not None
    n, alpha = tallies[0].count, 1 - settings.confidence
    error = max(t.relative_error(student_quantile(n - 1, 1 - alpha * share)) for t in tallies)
    later = max(t.relative_error(student_quantile(n - 1, 1 - alpha * next_share)) for t in tallies)
    # A half-width h of an estimate m bounds the error by h / (m - h) of the truth, and falls as
    # n^(-1/2). It is itself an estimate, hence 1.1; where it is large, m is hardly known.
    width = later / (1 + later) if later < math.inf else 1.0
    needed = n * (1.1 * width * (1 + rtol) / rtol) ** 2
    return error, math.ceil(min(needed, settings.most if width < 0.5 else 8 * n))


def rows_at_once(products: Products) -> int:
    """Return how many rows the operator multiplies at once."""
    return chunk_of(products.size * products.dtype.itemsize)


def chunk_of(size: int, most_bytes: int = _CHUNK_BYTES) -> int:
    """Return how many probes of so many bytes are used at once."""
    return max(1, min(_MOST_ROWS, most_bytes // size))
