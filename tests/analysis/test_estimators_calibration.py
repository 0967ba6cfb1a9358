"""Estimates have no bias and their intervals cover what they say, for each method and spectrum.

Over 200 seeds the mean error is within three of its standard errors; over 1000 seeds the 95 %
intervals cover the truth in 93 to 97 % of the cases (three binomial standard errors are 2.1 %).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from estimates import METHODS, TRUTH, number
from spectra import matrix, trained
from torch import Tensor

import hvpfast as hf
from hvpfast.analysis.estimators.estimate import (
    diagonal,
    frobenius_norm,
    row_norms_sq,
    trace,
)

pytestmark = pytest.mark.usefixtures("single_threaded")

BUDGET = 100
# without the norm: the root of an estimate has a bias, and the interval of the square
UNBIASED = [m for m in METHODS if m[0] is not frobenius_norm]


def runs(estimator: Any, method: str, operator: Any, count: int, **options: Any) -> list[Any]:
    return [estimator(operator, BUDGET, method=method, seed=s, **options) for s in range(count)]


def errors_of(results: list[Any], truth: Tensor) -> Tensor:
    """Estimates minus truth, (runs, 1) or (runs, P)."""
    return torch.stack([number(r.estimate) for r in results]).reshape(len(results), -1) - truth


def assert_unbiased(errors: Tensor) -> None:
    """The mean error is within 3 standard errors: that of one number, or of the sum of P.

    Each of P entries is within the bound that the largest of P normal numbers keeps as surely.
    """
    if errors.shape[1] > 1:
        scores = errors.mean(0) / (errors.std(0) / len(errors) ** 0.5)
        tail = torch.tensor(0.00135 / errors.shape[1], dtype=torch.float64)
        assert float(scores.abs().max()) < -float(torch.special.ndtri(tail))
    total = errors.sum(1)
    assert abs(float(total.mean())) < 3 * float(total.std()) / len(total) ** 0.5


def coverage(results: list[Any], truth: Tensor) -> float:
    """The share of 95 % intervals, over runs and entries, that cover the truth."""
    ends = [tuple(number(end) for end in r.ci(0.95)) for r in results]
    hits = [((low <= truth) & (truth <= high)).double().mean() for low, high in ends]
    return float(torch.stack(hits).mean())


@pytest.mark.parametrize("name", ["outliers", "net"])
@pytest.mark.parametrize(("estimator", "method"), UNBIASED)
def test_unbiased_and_calibrated(estimator: Any, method: str, name: str) -> None:
    operator = trained()[0] if name == "net" else matrix(name)
    truth = number(TRUTH[estimator.__name__](matrix(name)))
    results = runs(estimator, method, operator, 1000)
    errors = errors_of(results, truth)
    assert_unbiased(errors[:200])
    assert 0.93 <= coverage(results, truth) <= 0.97
    # the mean of stderr^2 is the variance
    stated = torch.stack([number(r.stderr).square() for r in results]).mean()
    assert float(stated / errors.square().mean()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", ["flat", "power", "exponential"])
@pytest.mark.parametrize("distribution", ["normal", "sphere"])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "na-hutch++", "xtrace"])
def test_trace_with_other_probes(method: str, distribution: str, name: str) -> None:
    A = matrix(name)
    results = runs(trace, method, A, 200, distribution=distribution)
    assert_unbiased(errors_of(results, A.trace()))
    assert 0.89 <= coverage(results, A.trace()) <= 0.99  # 0.95 -+ four binomial standard errors


@pytest.mark.parametrize("name", ["flat", "power", "exponential"])
@pytest.mark.parametrize(("estimator", "method"), [m for m in UNBIASED if m[0] is not trace])
def test_other_spectra(estimator: Any, method: str, name: str) -> None:
    A = matrix(name)
    truth = number(TRUTH[estimator.__name__](A))
    results = runs(estimator, method, A, 200)
    assert_unbiased(errors_of(results, truth))
    assert 0.89 <= coverage(results, truth) <= 0.99


def test_variance_follows_theory() -> None:
    """2 (||A||_F^2 - sum_i A_ii^2) / m for Rademacher, 2 ||A||_F^2 / m for normal probes, and less
    by tr(A)^2 / P for the sphere."""
    A = matrix("flat")
    P, square = len(A), A.square().sum()
    theory = {
        "rademacher": 2 * (square - A.diagonal().square().sum()),
        "normal": 2 * square,
        "sphere": 2 * P / (P + 2) * (square - A.trace() ** 2 / P),
    }
    for distribution, variance in theory.items():
        results = runs(trace, "hutchinson", A, 400, distribution=distribution)
        observed = errors_of(results, A.trace()).square().mean()
        # the relative standard deviation of a variance from n normal errors is sqrt(2 / n)
        assert float(observed * BUDGET / variance) == pytest.approx(1, abs=4 * (2 / 400) ** 0.5)


def test_spread_of_leave_one_out_samples_is_not_the_standard_error() -> None:
    """What the covariance of the samples is for: without it intervals are too short."""
    A = matrix("power")
    results = runs(trace, "xtrace", A, 400)
    errors = errors_of(results, A.trace())[:, 0].abs()
    naive = torch.stack([r.samples.std() / len(r.samples) ** 0.5 for r in results])
    assert float((errors < 2.01 * naive).double().mean()) < 0.88
    assert 0.92 < coverage(results, A.trace()) < 0.98


def test_better_methods_are_better() -> None:
    """On decaying spectra the error falls by the factors that the methods are for."""
    A = matrix("power")
    errors = {
        method: float(errors_of(runs(trace, method, A, 60), A.trace()).square().mean().sqrt())
        for method in ("hutchinson", "hutch++", "na-hutch++", "xtrace")
    }
    assert errors["hutch++"] < errors["hutchinson"] / 4
    assert errors["na-hutch++"] < errors["hutchinson"] / 2
    assert errors["xtrace"] < errors["hutchinson"] / 5
    for estimator, method in (m for m in METHODS if m[1] in ("deflated", "xdiag")):
        truth = number(TRUTH[estimator.__name__](A))
        plain, better = (
            errors_of(runs(estimator, m, A, 40), truth).square().mean()
            for m in ("hutchinson", method)
        )
        assert float(better) < float(plain) / 4


@pytest.mark.parametrize("estimator", [diagonal, row_norms_sq])
def test_intervals_of_the_gauss_newton_matrix(estimator: Any) -> None:
    """Float32 products of another operator: the same coverage."""
    H, _ = trained()
    model = hf.MLP((8, 10, 4), "tanh")
    with torch.no_grad():
        model.flat.copy_(H.model.flat)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 8, generator=generator)
    y = torch.randint(4, (60,), generator=generator)
    G = hf.GGNOperator(model, torch.nn.CrossEntropyLoss(), None, (x, y))
    A = (G @ torch.eye(G.shape[0])).double()
    truth = number(TRUTH[estimator.__name__](A))
    assert 0.93 <= coverage(runs(estimator, "hutchinson", G, 300), truth) <= 0.97
