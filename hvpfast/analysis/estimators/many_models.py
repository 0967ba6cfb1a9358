"""Hutchinson's estimators for many models at once: each model has its own probes of one seed.

Model m of M has the probes ``m S, m S + 1, ...`` of the seed, where S is ``num_matvecs``, or with a
tolerance the largest number of products. The estimates of the models are thus independent, and that
of model m is the one from ``hvpfast.probes(P, n, seed=seed, first=m * S)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpfast.analysis.estimators.hutchinson import sampled
from hvpfast.analysis.estimators.result import Estimate, skewness_of_each
from hvpfast.analysis.estimators.sampling import ProbeStream, Settings, chunk_of
from hvpfast.analysis.estimators.tallies import ScalarTally
from hvpfast.functional.many_models import check_probe_count
from hvpfast.operators.many_models import ModelsOperator
from hvpfast.operators.matvecs import NonFiniteProductError, all_finite

_CHUNK_BYTES = 2**26  # of the probes of all models at once: several probes of each model


@dataclass(frozen=True, eq=False)
class ModelsEstimate(Estimate[Tensor]):
    """Estimates of M models; ``result[m]`` is the :class:`hvpfast.Estimate` of model m.

    Attributes:
        estimate: (M,) float64, or (M, P) where there is one number per row of each matrix.
        stderr: standard errors, of its shape.
        samples: (M, n) float64, or None.
        num_matvecs: products spent on each model.
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
        ends = torch.tensor([one.ci(level) for one in self], dtype=torch.float64, device="cpu")
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
    products = _Products(operator)
    tallies, reason = sampled(products, _probe_stream(operator, settings), settings, wanted)
    results: dict[str, ModelsEstimate] = {}
    for name, tally in tallies.items():
        mean, stderr = tally.moments()
        samples = skews = None
        if isinstance(tally, ScalarTally):
            samples = tally.samples()
            skews = tuple(skewness_of_each(samples, tally.positive))
        else:
            mean, stderr = mean.to(operator.dtype), stderr.to(operator.dtype)
        results[name] = ModelsEstimate(
            estimate=mean,
            stderr=stderr,
            samples=samples,
            num_matvecs=products.num_matvecs,
            stop_reason=reason,
            seed=settings.seed,
            method=method,
            dof=tally.count - 1,
            positive=tally.positive,
            skews=skews,
        )
    return results


class _Products:
    """Products with the matrices of M models: rows (M, k, P) in and out, counted and checked."""

    def __init__(self, operator: ModelsOperator) -> None:
        self._operator, self.num_matvecs = operator, 0
        self.dtype, self.device = operator.dtype, operator.device

    def rows(self, rows: Tensor) -> Tensor:
        """A v (M, k, P)."""
        return self._checked(self._operator.product_rows(rows.to(self.dtype)))

    def quadratic(self, rows: Tensor) -> Tensor:
        """v'Av (M, k)."""
        return self._checked(self._operator.quadratic_rows(rows.to(self.dtype)))

    def _checked(self, out: Tensor) -> Tensor:
        first, self.num_matvecs = self.num_matvecs, self.num_matvecs + out.shape[1]
        if not all_finite(out):
            m, k = (~torch.isfinite(out)).nonzero()[0, :2].tolist()
            raise NonFiniteProductError(
                f"model {m}: product {first + k} with its matrix holds NaN or infinity: look at "
                "the parameters and the data of that model"
            )
        return out


def _probe_stream(operator: ModelsOperator, settings: Settings) -> ProbeStream:
    """The probes of M models as rows (M, k, P)."""
    M, P, _ = operator.shape
    stride = settings.num_matvecs if settings.rtol is None else settings.most
    check_probe_count(M, stride)
    at_once = chunk_of(M * P * operator.dtype.itemsize, _CHUNK_BYTES)
    return ProbeStream((M, P), operator.dtype, operator.device, settings, at_once, stride)
