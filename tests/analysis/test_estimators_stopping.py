"""Stopping at a tolerance: the tolerance is kept as often as promised, and costs no more than due.

The coverage is tested for means of samples of many shapes, then for estimators; the rule of two
running means that agree is shown to fail the same test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from spectra import matrix
from torch import Tensor

from hvpfast.analysis.estimators.estimate import (
    diagonal,
    estimate_all,
    frobenius_norm,
    frobenius_sq,
    trace,
)
from hvpfast.analysis.estimators.sampling import Settings, sample
from hvpfast.analysis.estimators.tallies import EntryTally, ScalarTally

pytestmark = pytest.mark.usefixtures("single_threaded")

Draw = Callable[[int, torch.Generator], Tensor]


def uniform(count: int, g: torch.Generator) -> Tensor:
    return torch.rand(count, generator=g, dtype=torch.float64).clamp_min(1e-12)


SHAPES: dict[str, Draw] = {  # samples with mean 1
    "normal": lambda n, g: 1 + torch.randn(n, generator=g, dtype=torch.float64),
    "exponential": lambda n, g: -uniform(n, g).log(),
    "square of a normal": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64).square(),
    "two values": lambda n, g: 3.0 * (uniform(n, g) < 1 / 3),
    "long left tail": lambda n, g: 2 + uniform(n, g).log(),
}


class Stream:
    """Gives artificial samples in place of probes."""

    def __init__(self, draw: Draw, seed: int) -> None:
        self.draw, self.generator = draw, torch.Generator().manual_seed(seed)

    def chunks(self, count: int) -> Iterator[Tensor]:
        yield self.draw(count, self.generator)


def settings(num_matvecs: int, rtol: float, **others: Any) -> Settings:
    given = {"confidence": 0.95, "max_matvecs": 10**6, "progressbar": False, **others}
    return Settings.of(num_matvecs, "normal", 0, rtol, **given)


def stopped(draw: Draw, seed: int, chosen: Settings, positive: bool) -> ScalarTally:
    tally = ScalarTally(positive)
    reason = sample(Stream(draw, seed), chosen, 0, tally.add, [tally])  # type: ignore[arg-type]
    assert reason == "rtol"
    return tally


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_for_samples_of_any_shape(shape: str, positive: bool) -> None:
    """1000 runs: at most 5 % miss the tolerance, and 3 binomial standard errors are 2.1 %."""
    for first, rtol in ((16, 0.25), (30, 0.1)):
        chosen = settings(first, rtol)
        tallies = [stopped(SHAPES[shape], s, chosen, positive) for s in range(1000)]
        kept = sum(abs(t.moments()[0] - 1) <= rtol for t in tallies) / 1000
        assert kept >= 0.95 - 0.021
        # A sample of fixed size needs (1.96 * deviation / rtol)^2, and rtol / (1 + rtol) of the
        # estimate is what rtol of an unknown truth must be taken for.
        variance = float(SHAPES[shape](10**6, torch.Generator().manual_seed(1)).var())
        needed = max(first, variance * (1.96 / rtol) ** 2)
        assert sum(t.count for t in tallies) / 1000 < 3 * needed * (1 + rtol) ** 2


def test_means_that_agree_are_not_enough() -> None:
    """The rule of two running means that agree fails the test above."""
    missed, rtol = 0, 0.1
    for seed in range(300):
        values = SHAPES["exponential"](400, torch.Generator().manual_seed(seed))
        means = values.cumsum(0) / torch.arange(1, 401)
        agree = (means[1:] - means[:-1]).abs() <= rtol * means[1:].abs()
        missed += abs(float(means[1 + int(agree.int().argmax())]) - 1) > rtol
    assert missed / 300 > 0.5


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.99])
def test_other_confidences(confidence: float) -> None:
    chosen = settings(30, 0.1, confidence=confidence)
    tallies = [stopped(SHAPES["exponential"], s, chosen, False) for s in range(600)]
    kept = sum(abs(t.moments()[0] - 1) <= 0.1 for t in tallies) / 600
    assert kept >= confidence - 3 * (confidence * (1 - confidence) / 600) ** 0.5


@pytest.mark.parametrize(
    ("estimator", "method", "rtol", "name"),
    [
        (trace, "hutchinson", 0.05, "outliers"),
        (trace, "hutch++", 0.02, "power"),
        (trace, "na-hutch++", 0.05, "net"),
        (frobenius_sq, "hutchinson", 0.1, "net"),
        (frobenius_sq, "deflated", 0.01, "outliers"),
        (frobenius_norm, "hutchinson", 0.05, "power"),
    ],
)
def test_coverage_of_estimators(estimator: Any, method: str, rtol: float, name: str) -> None:
    A = matrix(name)
    truth = float(
        A.trace() if estimator is trace else A.norm() ** (1 + (estimator is frobenius_sq))
    )
    options = {"method": method, "rtol": rtol, "max_matvecs": 10**5}
    results = [estimator(A, 30, seed=s, **options) for s in range(400)]
    kept = sum(abs(r.estimate - truth) <= rtol * abs(truth) for r in results) / 400
    assert kept >= 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5
    assert {r.stop_reason for r in results} == {"rtol"}
    assert max(r.num_matvecs for r in results) > min(r.num_matvecs for r in results)
    ends = [r.ci(0.95) for r in results]
    assert sum(low <= truth <= high for low, high in ends) / 400 > 0.9


def test_coverage_in_norms() -> None:
    """P numbers: the error in Euclidean norms."""
    A = matrix("net")
    results = [diagonal(A, 50, rtol=0.2, max_matvecs=10**5, seed=s) for s in range(100)]
    kept = [(r.estimate - A.diagonal()).norm() <= 0.2 * A.diagonal().norm() for r in results]
    assert sum(map(bool, kept)) >= 95  # the bound is loose for errors of many entries
    assert {r.stop_reason for r in results} == {"rtol"}


def test_joint_pass_waits_for_all() -> None:
    A = matrix("outliers")
    joint = estimate_all(A, 50, rtol=0.3, max_matvecs=10**5, seed=0)
    alone = trace(A, 50, rtol=0.3, max_matvecs=10**5, seed=0)
    assert joint.trace.num_matvecs > alone.num_matvecs
    assert (joint.diagonal.estimate - A.diagonal()).norm() <= 0.3 * A.diagonal().norm()


def test_budget_ends_first() -> None:
    A = matrix("outliers")
    result = trace(A, 50, rtol=1e-4, max_matvecs=333, seed=0)
    assert (result.stop_reason, result.num_matvecs) == ("max_matvecs", 333)
    assert result.stderr > 1e-4 * abs(result.estimate)
    default = trace(A, 20, rtol=1e-4, seed=0)
    assert (default.stop_reason, default.num_matvecs) == ("max_matvecs", 2000)
    deflated = trace(A, 60, rtol=1e-9, max_matvecs=100, method="hutch++", seed=0)
    assert (deflated.stop_reason, deflated.num_matvecs) == ("max_matvecs", 100)


def test_first_look_is_enough() -> None:
    result = trace(torch.eye(50), 40, rtol=0.01, seed=0)
    assert (result.stop_reason, result.num_matvecs, result.stderr) == ("rtol", 40, 0.0)
    fewest = trace(matrix("flat"), 2, rtol=0.5, seed=0)
    assert fewest.num_matvecs == 16, "no look before 16 samples"


def test_a_mean_near_zero_is_not_known_to_any_relative_error() -> None:
    A = torch.zeros(60, 60)
    A[0, 1] = A[1, 0] = 1.0  # the trace is zero
    result = trace(A, 20, rtol=0.1, max_matvecs=500, seed=1)
    assert result.stop_reason == "max_matvecs"


def test_tallies_agree_with_torch() -> None:
    X = torch.randn(37, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entries, scalars = EntryTally(5, torch.device("cpu")), ScalarTally(positive=False)
    for part in X.split(7):
        entries.add(lambda entry, part=part: part[:, entry].clone(), len(part))
        scalars.add(part[:, 0])
    mean, stderr = entries.moments()
    torch.testing.assert_close(mean, X.mean(0))
    torch.testing.assert_close(stderr, X.std(0) / 37**0.5)
    assert scalars.moments() == pytest.approx((float(mean[0]), float(stderr[0])))
