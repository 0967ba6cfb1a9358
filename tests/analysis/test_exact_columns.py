"""Exact values: identity columns against dense matrices, per-sample cores where there are some."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from dense import close, tangents
from estimates import TRUTH, number
from networks import small
from spectra import matrix, trained
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.analysis.estimators import exact, sampling
from hvpfast.analysis.estimators.estimate import (
    diagonal,
    estimate_all,
    frobenius_norm,
    frobenius_sq,
    row_norms_sq,
    trace,
)

ESTIMATORS = (trace, frobenius_sq, frobenius_norm, diagonal, row_norms_sq)
each = pytest.mark.parametrize("estimator", ESTIMATORS, ids=[e.__name__ for e in ESTIMATORS])
COLUMNS, CORES = "exact: identity columns", "exact: per-sample cores"


class NoCores:
    """An operator of a net that has nothing but products."""

    def __init__(self, H: Any) -> None:
        self.H, self.shape, self.dtype, self.device = H, H.shape, H.dtype, H.device

    def __matmul__(self, columns: Tensor) -> Tensor:
        return self.H @ columns


@each
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_columns_are_the_dense_values(
    estimator: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_MOST_ROWS", chunk)
    H, A = trained()
    for operator in (NoCores(H), A, A.numpy(), scipy.sparse.linalg.aslinearoperator(A.numpy())):
        result = estimator(operator, method="exact")
        close(number(result.estimate), TRUTH[estimator.__name__](A), 1e-12)
        assert float(number(result.stderr).abs().max()) == 0
        assert all(torch.equal(number(e), number(result.estimate)) for e in result.ci(0.99))
        assert (result.method, result.stop_reason, result.seed) == ("exact", COLUMNS, None)
        assert result.num_matvecs == len(A) + 2, "two test the symmetry"
    own = estimator(1.0 * H, method="exact")
    assert own.num_matvecs == len(A), "known to be symmetric"


def test_an_operator_may_return_what_it_was_given() -> None:
    class Identity:
        shape, dtype = (30, 30), torch.float64

        def __matmul__(self, columns: Tensor) -> Tensor:
            return columns

    for method in ("exact", "hutchinson"):
        for estimator, truth in ((trace, 30.0), (frobenius_sq, 30.0)):
            assert estimator(Identity(), 40, method=method).estimate == truth
        assert torch.equal(
            diagonal(Identity(), 40, method=method).estimate, torch.ones(30).double()
        )


def test_all_from_one_pass() -> None:
    H, A = trained()
    results = estimate_all(NoCores(H), method="exact")
    for name in ("trace", "frobenius_sq", "diagonal", "row_norms_sq"):
        result = getattr(results, name)
        close(number(result.estimate), TRUTH[name](A), 1e-12)
        assert result.num_matvecs == len(A) + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    A = matrix("outliers").to(dtype)
    result = diagonal(A, method="exact")
    assert result.estimate.dtype == dtype
    assert torch.equal(result.estimate, A.diagonal())
    assert trace(A, method="exact").estimate == pytest.approx(float(A.double().trace()), rel=1e-6)


@pytest.mark.parametrize("estimator", [trace, diagonal, frobenius_sq])
@pytest.mark.parametrize("kind", [hf.HessianOperator, hf.GGNOperator])
def test_cores_of_perceptrons(estimator: Any, kind: Any) -> None:
    model, loss, batch = small()
    operator = kind(model, loss, None, batch)
    A = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    result = estimator(operator, method="exact")
    assert (result.stop_reason, result.num_matvecs) == (CORES, 0)
    close(number(result.estimate), TRUTH[estimator.__name__](A), 1e-10)
    if estimator is frobenius_sq:
        norm = frobenius_norm(operator, method="exact")
        assert (norm.stop_reason, norm.estimate) == (CORES, result.estimate**0.5)


def test_row_norms_and_combinations_take_columns() -> None:
    model, loss, batch = small()
    H = hf.HessianOperator(model, loss, None, batch)
    A = H @ torch.eye(H.shape[0], dtype=torch.float64)
    norms = row_norms_sq(H, method="exact")
    assert (norms.stop_reason, norms.num_matvecs) == (COLUMNS, len(A))
    close(norms.estimate, A.square().sum(1))
    shifted = trace(H.shift(2.0), method="exact")
    assert shifted.stop_reason == COLUMNS
    assert shifted.estimate == pytest.approx(float(A.trace()) + 2 * len(A), rel=1e-12)


def test_cores_that_cost_more_than_columns_are_not_taken() -> None:
    """tr H^2 of many samples of a small net: the work of cores grows with their square."""
    model = hf.MLP((3, 2), dtype=torch.float64)
    x = tangents(600, 3)
    H = hf.HessianOperator(model, nn.CrossEntropyLoss(), None, (x, (x[:, 0] > 0).long()))
    result = frobenius_sq(H, method="exact")
    assert (result.stop_reason, result.num_matvecs) == (COLUMNS, 8)
    assert trace(H, method="exact").stop_reason == CORES


def test_auto_takes_what_is_cheaper_and_says_so() -> None:
    A = matrix("power")
    assert trace(A, 100, method="auto").stop_reason == COLUMNS
    estimate = trace(A, 99, method="auto", seed=3)
    assert (estimate.method, estimate.stop_reason) == ("hutchinson", "budget")
    assert estimate.estimate == trace(A, 99, seed=3).estimate
    model, loss, batch = small()
    H = hf.HessianOperator(model, loss, None, batch)
    assert trace(H, 20, method="auto").stop_reason == CORES
    assert row_norms_sq(H, 20, method="auto").method == "hutchinson"
    assert estimate_all(H, 20, method="auto").trace.method == "hutchinson"
    assert estimate_all(H, 39, method="auto").trace.stop_reason == COLUMNS
    tolerant = trace(A, 50, method="auto", rtol=0.2, seed=0, max_matvecs=10**5)
    assert (tolerant.method, tolerant.stop_reason) == ("hutchinson", "rtol")


def test_too_many_columns_are_refused_with_their_cost() -> None:
    A = matrix("power")
    with pytest.raises(
        ValueError, match=r"P = 100 products, .* s at the .* s of one product, and "
    ):
        trace(A, method="exact", max_matvecs=99)
    assert trace(A, method="exact", max_matvecs=100).num_matvecs == 102
    large = scipy.sparse.identity(exact.MOST_COLUMNS + 1, format="csr")
    with pytest.raises(
        ValueError, match=r"at most 20,000 are allowed \(csr_matrix has no .*max_matvecs=20001"
    ):
        trace(large, method="exact")
    H = hf.HessianOperator(*small()[:2], None, small()[2])
    with pytest.raises(ValueError, match="per-sample cores do not give the norms of rows"):
        row_norms_sq(H, method="exact", max_matvecs=5)
