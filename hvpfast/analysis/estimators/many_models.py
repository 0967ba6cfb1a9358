"""Hutchinson's estimators for many models at once: each model has its own probes of one seed.

Model m of M has the probes ``m S, m S + 1, ...`` of the seed, with S = ``num_matvecs``, or the
largest number that a tolerance may cost: the estimates of the models are independent, and model
m's is that from ``hvpfast.probes(P, n, seed=seed, first=m * S)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpfast.analysis.estimators.hutchinson import POSITIVE, SCALARS, norms_sq
from hvpfast.analysis.estimators.result import Estimate, skewness_of_each
from hvpfast.analysis.estimators.sampling import (
    Settings,
    Tally,
    at_least_single,
    chunk_of,
    sample,
    scaled,
)
from hvpfast.backends.probes.draw import probes_of_models
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.functional.many_models import check_probe_count
from hvpfast.operators.many_models import ModelsOperator
from hvpfast.operators.matvecs import NonFiniteProductError

__all__ = ["ModelsEstimate", "estimate"]

_CHUNK_BYTES = 2**26  # of the probes of all models at once: each model needs several to be worth it


@dataclass(frozen=True, eq=False)
class ModelsEstimate(Estimate[Tensor]):
    """Estimates of M models; ``result[m]`` is the :class:`hvpfast.Estimate` of model m.

    Attributes:
        estimate: (M,) float64, or (M, P) where there is one number per row of each matrix.
        stderr: standard errors, of its shape.
        samples: (M, n) float64, or None.
        num_matvecs: products that were spent on each model.
        skews: per model, the coefficients that correct intervals for the skewness of samples.
    """

    skews: tuple[tuple[float, float], ...] | None = None

    def __len__(self) -> int:
        return len(self.estimate)

    def __getitem__(self, m: int) -> Estimate[float] | Estimate[Tensor]:
        value, stderr = self.estimate[m], self.stderr[m]
        samples = None if self.samples is None else self.samples[m]
        rest = (self.num_matvecs, self.stop_reason, self.seed, self.method, self.dof, self.positive)
        if self.skews is None:
            return Estimate(value, stderr, samples, *rest)
        return Estimate(float(value), float(stderr), samples, *rest, self.skews[m])

    def __iter__(self) -> Iterator[Estimate[float] | Estimate[Tensor]]:
        return (self[m] for m in range(len(self)))

    def __float__(self) -> float:
        raise TypeError(f"these are the estimates of {len(self)} models; take float(result[m])")

    def ci(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of each model's interval, shaped as ``estimate``; see :class:`Estimate`.

        Raises:
            ValueError: ``level`` is not in (0, 1).
        """
        if self.skews is None:
            return super().ci(level)
        ends = torch.tensor([one.ci(level) for one in self], dtype=torch.float64)
        return ends[:, 0], ends[:, 1]


def estimate(
    operator: ModelsOperator, settings: Settings, wanted: Sequence[str], method: str
) -> dict[str, ModelsEstimate]:
    """Return estimates of the wanted quantities of every model, from the same products.

    Raises:
        ValueError: another method than "hutchinson", or more probes than a seed has.
        NonFiniteProductError: a product holds NaN or infinity.
    """
    if method != "hutchinson":
        raise ValueError(
            f"many models at once take method='hutchinson'; got {method!r}. For others make an "
            "operator of each model"
        )
    M, P, _ = operator.shape
    stream = _Probes(operator, settings)
    scalars = {name: _Scalars(name in POSITIVE) for name in wanted if name in SCALARS}
    entries = {name: _Entries(M, P, operator.device) for name in wanted if name not in SCALARS}

    def visit(chunk: Tensor) -> None:
        rows, before = chunk.transpose(0, 1), stream.spent - len(chunk)  # (M, k, P)
        given = rows.to(operator.dtype)
        if list(wanted) == ["trace"]:
            scalars["trace"].add(_checked(operator.quadratic_rows(given), before))
            return
        out = _checked(operator.product_rows(given), before).to(stream.dtype)
        if "trace" in scalars:
            scalars["trace"].add(torch.linalg.vecdot(rows, out))
        if "frobenius_sq" in scalars:
            scalars["frobenius_sq"].add(norms_sq(out.reshape(-1, P)).view(M, -1))
        if "diagonal" in entries:
            entries["diagonal"].add(rows * out)
        if "row_norms_sq" in entries:
            entries["row_norms_sq"].add(out.square())

    tallies: dict[str, _Scalars | _Entries] = {**scalars, **entries}
    reason = sample(stream, settings, 0, visit, list[Tally](tallies.values()))
    results: dict[str, ModelsEstimate] = {}
    for name, tally in tallies.items():
        mean, stderr = tally.moments()
        samples = skews = None
        if isinstance(tally, _Scalars):
            samples = tally.samples()
            skews = tuple(skewness_of_each(samples, tally.positive))
        else:
            mean, stderr = mean.to(operator.dtype), stderr.to(operator.dtype)
        results[name] = ModelsEstimate(
            mean,
            stderr,
            samples,
            stream.spent,
            reason,
            settings.seed,
            method,
            tally.count - 1,
            name in POSITIVE,
            skews=skews,
        )
    return results


class _Probes:
    """The probes of M models as chunks (k, M, P), whose transposes (M, k, P) are contiguous."""

    def __init__(self, operator: ModelsOperator, settings: Settings) -> None:
        self._M, self._P, _ = operator.shape
        self._device, self._settings = operator.device, settings
        self._stride = settings.num_matvecs if settings.rtol is None else settings.most
        check_probe_count(self._M, self._stride)
        self._at_once = chunk_of(self._M * self._P * operator.dtype.itemsize, _CHUNK_BYTES)
        self.dtype = at_least_single(operator.dtype)
        self._memory: Tensor | None = None
        self.spent = 0

    def chunks(self, count: int) -> Iterator[Tensor]:
        """Yield the next ``count`` probes of every model."""
        sphere = self._settings.distribution == "sphere"
        name = "normal" if sphere else self._settings.distribution
        seed, most = self._settings.seed, min(self._at_once, count)
        if self._memory is None and self._device.type == "cpu" and count > most:
            self._memory = torch.empty(self._M * most * self._P, dtype=self.dtype)
        end = self.spent + count
        while self.spent < end:
            number = min(most, end - self.spent)
            shape = self._M, number, self._P
            memory = self._memory  # the same for every chunk: fresh pages cost more than the draw
            out = None if memory is None else memory[: math.prod(shape)].view(shape)
            source = ProbeSource(number, name, seed, self.spent)
            rows = probes_of_models(
                source, self._stride, self._M, self._P, self.dtype, self._device, out
            )
            if sphere:
                scaled(rows.view(-1, self._P), self._P)
            self.spent += number
            yield rows.transpose(0, 1)


class _Scalars:
    """Samples of one number per model."""

    def __init__(self, positive: bool) -> None:
        self._parts, self.positive, self.count = list[Tensor](), positive, 0

    def add(self, values: Tensor) -> None:
        """Take samples (M, k)."""
        self._parts.append(values.to("cpu", torch.float64))
        self.count += values.shape[1]

    def samples(self) -> Tensor:
        """Return all samples (M, n)."""
        return torch.cat(self._parts, 1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the means (M,) and their standard errors (M,)."""
        samples = self.samples()
        mean = samples.mean(1)
        if self.count < 2:
            return mean, torch.full_like(mean, math.inf)
        return mean, samples.std(1) / math.sqrt(self.count)

    def relative_error(self, quantile: float) -> float:
        """Bound of |mean - truth| / |truth|, the largest of all models."""
        mean, stderr = self.moments()
        if self.positive:  # the interval of the logarithm
            half = torch.where(mean > 0, quantile * stderr / mean, math.inf)
            bound = torch.expm1(half)
        else:
            bound = _bound(mean.abs(), quantile * stderr)
        return float(torch.where(stderr == 0, 0.0, bound).max())


class _Entries:
    """Running float64 sums of samples and their squares, for P numbers of each model."""

    def __init__(self, M: int, P: int, device: torch.device) -> None:
        self._sum = torch.zeros(M, P, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sum)
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Take samples (M, k, P), which are overwritten."""
        self._sum += values.sum(1)
        self._squares += values.square_().sum(1)
        self.count += values.shape[1]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the means (M, P) and their standard errors (M, P)."""
        n = self.count
        mean = self._sum / n
        if n < 2:
            return mean, torch.full_like(mean, math.inf)
        variance = (self._squares - n * mean.square()).clamp_min_(0.0) / (n - 1)
        return mean, (variance / n).sqrt_()

    def relative_error(self, quantile: float) -> float:
        """Bound of ||mean - truth|| / ||truth||, the largest of all models."""
        mean, stderr = self.moments()
        return float(_bound(mean.norm(dim=1), quantile * stderr.norm(dim=1)).max())


def _bound(size: Tensor, half: Tensor) -> Tensor:
    """half / (size - half) where that bounds the error relative to the truth, else infinity."""
    return torch.where(half == 0, 0.0, torch.where(half < size, half / (size - half), math.inf))


def _checked(out: Tensor, before: int) -> Tensor:
    """Products (M, k, P) or forms (M, k) of the probes from ``before`` on, all finite."""
    if math.isfinite(float(out.sum())) or bool(torch.isfinite(out).all()):
        return out
    m, k = (~torch.isfinite(out)).nonzero()[0, :2].tolist()
    raise NonFiniteProductError(
        f"model {m}: product {before + k} with its matrix holds NaN or infinity: look at the "
        "parameters and the data of that model"
    )
