"""What estimators return: values, errors, seeds, counts; any operator; bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from dense import close, dense, tangents
from estimates import METHODS, TRUTH, number
from networks import small
from spectra import matrix, rotated, trained
from torch import Tensor

import hvpfast as hf
import hvpfast.operators.matvecs
from hvpfast.analysis.estimators.estimate import (
    diagonal,
    estimate_all,
    frobenius_norm,
    frobenius_sq,
    row_norms_sq,
    trace,
)
from hvpfast.analysis.estimators.result import Estimate
from hvpfast.analysis.estimators.subspace import orthonormal_rows, project_out, row_products
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.operators.matvecs import NonFiniteProductError

IDS = [f"{estimator.__name__}-{method}" for estimator, method in METHODS]


each_method = pytest.mark.parametrize(("estimator", "method"), METHODS, ids=IDS)


def distributions(method: str) -> tuple[str, ...]:
    return ("rademacher",) if method == "xdiag" else ("rademacher", "normal", "sphere")


@each_method
def test_close_to_the_truth(estimator: Any, method: str) -> None:
    """The error in units of the standard error, and that error small, on every operator kind."""
    A = matrix("power")
    for distribution in distributions(method):
        result = estimator(A, 90, method=method, distribution=distribution, seed=1)
        truth = TRUTH[estimator.__name__](A)
        error = number(result.estimate) - truth
        stderr = number(result.stderr)
        assert float(error.norm()) < 4 * float(stderr.norm())
        assert float(stderr.norm()) < 0.6 * float(truth.norm())
        low, high = (number(end) for end in result.ci(0.9999))
        assert float(((low <= truth) & (truth <= high)).double().mean()) > 0.95


@each_method
def test_any_operator_gives_the_same_numbers(estimator: Any, method: str) -> None:
    H, A = trained()
    reference = estimator(A, 40, method=method, seed=2)
    kinds = (A.numpy(), scipy.sparse.linalg.aslinearoperator(A.numpy()), H, 1.0 * H)
    for operator in kinds:
        result = estimator(operator, 40, method=method, seed=2)
        for field in ("estimate", "stderr"):
            ours, theirs = (number(getattr(r, field)) for r in (result, reference))
            close(ours, theirs, 1e-9)
        tested = reference.num_matvecs - 40  # products that test the symmetry of strangers
        assert tested == (2 if method in ("xtrace", "xdiag", "deflated") else 0)
        own = operator is H or operator is kinds[-1]
        assert result.num_matvecs == (40 if own else reference.num_matvecs)


@each_method
def test_results(estimator: Any, method: str) -> None:
    H, A = trained()
    result = estimator(H, 41, method=method, seed=7)
    assert isinstance(result, Estimate)
    assert (result.seed, result.method, result.stop_reason) == (7, method, "budget")
    assert result.num_matvecs == (40 if method in ("xtrace", "xdiag") else 41)
    assert result.dof >= 9
    again = estimator(H, 41, method=method, seed=7)
    other = estimator(H, 41, method=method, seed=8)
    assert torch.equal(number(result.estimate), number(again.estimate))
    assert not torch.equal(number(result.estimate), number(other.estimate))
    if estimator in (diagonal, row_norms_sq):
        assert result.estimate.shape == result.stderr.shape == (len(A),)
        assert result.estimate.dtype == result.stderr.dtype == torch.float64
        assert result.samples is None
        assert (result.stderr > 0).all()
    else:
        assert float(result) == result.estimate
        assert result.stderr > 0
        if estimator is not frobenius_norm:
            assert result.samples.shape == (result.dof + 1,)
            assert result.samples.dtype == torch.float64
            assert float(result.samples.mean()) == pytest.approx(result.estimate, rel=1e-12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.estimate = 0.0


@each_method
def test_fresh_seeds_are_recorded(estimator: Any, method: str) -> None:
    A = matrix("power")
    before = torch.get_rng_state()
    first, second = (estimator(A, 30, method=method) for _ in range(2))
    assert first.seed != second.seed
    again = estimator(A, 30, method=method, seed=first.seed)
    assert torch.equal(number(first.estimate), number(again.estimate))
    assert torch.equal(before, torch.get_rng_state())


@each_method
def test_float32_and_bfloat16(estimator: Any, method: str) -> None:
    A = matrix("outliers")
    exact = number(estimator(A, 60, method=method, seed=3).estimate)
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.bfloat16, 0.3)):
        result = estimator(A.to(dtype), 60, method=method, seed=3)
        if isinstance(result.estimate, Tensor):
            assert result.estimate.dtype == result.stderr.dtype == dtype
        close(number(result.estimate), exact, tolerance)


def test_hutchinson_is_what_it_says() -> None:
    """The samples, written out with the probes of the seed."""
    A = matrix("outliers")
    V = probe_rows(ProbeSource(20, "normal", 5), len(A), torch.float64)
    normal: dict[str, Any] = {"distribution": "normal", "seed": 5}
    Y = V @ A
    close(trace(A, 20, **normal).samples, (V * Y).sum(1))
    close(frobenius_sq(A, 20, **normal).samples, Y.square().sum(1), 1e-10)
    for estimator, samples in ((diagonal, V * Y), (row_norms_sq, Y.square())):
        result = estimator(A, 20, **normal)
        close(result.estimate, samples.mean(0))
        close(result.stderr, samples.std(0) / 20**0.5)
    sphere = V * (len(A) ** 0.5 / V.norm(dim=1, keepdim=True))
    samples = trace(A, 20, distribution="sphere", seed=5).samples
    close(samples, ((sphere @ A) * sphere).sum(1))
    gaussian = trace(A, 20, distribution="gaussian", seed=5)
    assert gaussian.estimate == trace(A, 20, **normal).estimate


def test_joint_pass() -> None:
    """All quantities from the same products: the numbers of the single estimators."""
    H, _ = trained()
    joint = estimate_all(H, 300, seed=4)
    for name in ("trace", "frobenius_sq", "diagonal", "row_norms_sq"):
        ours, alone = (
            getattr(joint, name),
            getattr(hf, name)(H, 300, seed=4),
        )
        assert ours.num_matvecs == alone.num_matvecs == 300
        for field in ("estimate", "stderr"):
            a, b = (number(getattr(result, field)) for result in (ours, alone))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    total = float(joint.diagonal.estimate.sum())
    assert total == pytest.approx(joint.trace.estimate, rel=1e-10)
    assert float(joint.row_norms_sq.estimate.sum()) == pytest.approx(
        joint.frobenius_sq.estimate, rel=1e-10
    )


def test_trace_takes_quadratic_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    H, A = trained()
    monkeypatch.setattr(H, "_apply", lambda rows: pytest.fail("a product was formed"))
    assert trace(H, 200, seed=0).estimate == pytest.approx(float(A.trace()), rel=0.2)


def test_norm_is_the_root_of_the_square() -> None:
    A = matrix("outliers")
    square, norm = (f(A, 50, seed=6) for f in (frobenius_sq, frobenius_norm))
    assert norm.estimate == pytest.approx(square.estimate**0.5, rel=1e-14)
    assert norm.stderr == pytest.approx(square.stderr / (2 * norm.estimate), rel=1e-14)
    for level in (0.5, 0.99):
        assert norm.ci(level) == pytest.approx([end**0.5 for end in square.ci(level)], rel=1e-12)


def test_intervals() -> None:
    plain = Estimate(2.0, 0.5, None, 5, "budget", 0, "hutchinson", 4)
    low, high = plain.ci(0.95)
    assert (low, high) == pytest.approx((2 - 2.7764451 * 0.5, 2 + 2.7764451 * 0.5), rel=1e-7)
    positive = dataclasses.replace(plain, positive=True)
    factor = math.exp(2.7764451 * 0.25)
    assert positive.ci(0.95) == pytest.approx((2 / factor, 2 * factor), rel=1e-7)
    exact = dataclasses.replace(plain, stderr=0.0, dof=0)
    assert exact.ci() == (2.0, 2.0)
    lone = trace(matrix("power"), 1, seed=0)
    assert lone.stderr == math.inf
    assert lone.ci() == (-math.inf, math.inf)
    assert frobenius_sq(matrix("power"), 1, seed=0).ci() == (0.0, math.inf)
    skewed = dataclasses.replace(plain, skew=(0.4, 0.2))
    ends = skewed.ci(0.95)
    for end, t in zip(ends, (2.7764451, -2.7764451), strict=True):  # the inverse, written forwards
        y, root = (2.0 - end) / 0.5, 5**0.5
        cubed = root / (3 * 0.4) * ((1 + 0.4 * y / root) ** 3 - 1) + 0.2 / root
        assert cubed == pytest.approx(t, rel=1e-7)
    assert ends[1] - 2 > 2 - ends[0], "samples with a long right tail: the truth may be far above"
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
            plain.ci(level)


def test_exact_cases() -> None:
    """No error where there is no variance: Rademacher on a diagonal, deflation of low rank."""
    D = torch.diag(tangents(12, 1)[:, 0])
    for estimator in (trace, diagonal, row_norms_sq, frobenius_sq):
        close(number(estimator(D, 3, seed=0).estimate), TRUTH[estimator.__name__](D))
    low = rotated(torch.cat([torch.tensor([3.0, -2.0, 1.0]), torch.zeros(40)]).double())
    for method in ("hutch++", "na-hutch++", "xtrace"):
        result = trace(low, 40, method=method, seed=0)
        assert result.estimate == pytest.approx(2.0, rel=1e-9)
        assert 0 <= result.stderr < 1e-8
    assert frobenius_sq(low, 40, method="deflated", seed=0).estimate == pytest.approx(14, rel=1e-10)
    close(diagonal(low, 40, method="xdiag", seed=0).estimate, low.diagonal(), 1e-9)
    for estimator, method in METHODS:
        result = estimator(torch.zeros(15, 15), 12, method=method, seed=0)
        assert float(number(result.estimate).abs().max()) == 0
        assert float(number(result.stderr).abs().max()) == 0


@each_method
def test_more_products_than_rows(estimator: Any, method: str) -> None:
    A = rotated(torch.tensor([3.0, -1.0, 0.5, 0.2, 0.1]).double())
    result = estimator(A, 60, method=method, seed=0)
    error = number(result.estimate) - TRUTH[estimator.__name__](A)
    assert float(error.norm()) <= 5 * float(number(result.stderr).norm()) + 1e-12


@each_method
def test_one_row(estimator: Any, method: str) -> None:
    A = torch.tensor([[-4.0]])
    if method in ("xtrace", "xdiag"):
        with pytest.raises(ValueError, match="leaves probes out in turn and needs P >= 2; got P ="):
            estimator(A, 12, method=method, seed=0)
    else:
        result = number(estimator(A, 12, method=method, seed=0).estimate).reshape(())
        close(result, TRUTH[estimator.__name__](A).double().reshape(()), 1e-6)


def test_orthonormal_rows() -> None:
    """Well-conditioned, ill-conditioned and rank-deficient rows, by Cholesky or Householder."""
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        for low in (1.0, 1e-3, 1e-9, 0.0):
            Y = tangents(300, 6).T.contiguous()
            Y = (
                torch.logspace(0, math.log10(low), 6).double()
                if low
                else torch.tensor([1.0, 1, 1, 0, 0, 0]).double()
            )[:, None] * Y
            Y[1] += Y[0]
            Y = Y.to(dtype)
            Q, L = orthonormal_rows(Y.clone())
            close((Q.double() @ Q.T.double()), torch.eye(6).double(), 60 * eps)
            close(L @ Q.double(), Y.double(), 60 * eps)
            assert torch.equal(L, L.tril())
            v = tangents(300, 3, seed=9).T.contiguous().to(dtype)
            close(row_products(v, Q), v.double() @ Q.T.double(), 60 * eps)
            assert float((project_out(v, Q) @ Q.T).abs().max()) < 100 * eps


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "magic"}, ValueError, "method must be one of hutchinson, hutch\\+\\+, na-"),
        ({"distribution": "uniform"}, ValueError, "rademacher, normal, sphere; got 'uniform'"),
        ({"num_matvecs": 0}, ValueError, "num_matvecs must be >= 1; got 0"),
        ({"num_matvecs": 2.5}, TypeError, "num_matvecs must be an integer; got 2.5"),
        ({"max_matvecs": True}, TypeError, "max_matvecs must be an integer; got True"),
        ({"rtol": 0}, ValueError, r"rtol must be in \(0, 1\)"),
        ({"rtol": 1.5}, ValueError, r"rtol must be in \(0, 1\)"),
        ({"confidence": 95}, ValueError, r"confidence must be in \(0, 1\)"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
        ({"seed": 2**64}, ValueError, "below 2\\*\\*64"),
        ({"rtol": 0.1, "max_matvecs": 10}, ValueError, "max_matvecs must be at least 100"),
        ({"method": "hutch++", "num_matvecs": 2}, ValueError, r"hutch\+\+ needs num_matvecs >= 3"),
        ({"method": "na-hutch++", "num_matvecs": 3}, ValueError, "needs num_matvecs >= 4; got 3"),
        ({"method": "xtrace", "num_matvecs": 3}, ValueError, "xtrace needs num_matvecs >= 4"),
        ({"method": "xtrace", "rtol": 0.1}, ValueError, "xtrace has a fixed budget"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trace(matrix("power"), **{"seed": 0, **arguments})


def test_bad_choices_of_other_quantities() -> None:
    A = matrix("power")
    with pytest.raises(ValueError, match="one of hutchinson, deflated, exact, auto; got 'xtrace'"):
        frobenius_sq(A, method="xtrace")
    with pytest.raises(ValueError, match="one of hutchinson, exact, auto; got 'deflated'"):
        row_norms_sq(A, method="deflated")
    with pytest.raises(ValueError, match="one of hutchinson, exact, auto; got 'xdiag'"):
        estimate_all(A, method="xdiag")
    with pytest.raises(ValueError, match=r"xdiag needs entries with w_i\^2 = 1"):
        diagonal(A, method="xdiag", distribution="normal")
    with pytest.raises(TypeError, match=r"needs \.shape and @"):
        trace(3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("estimator", "method"),
    [(trace, "xtrace"), (frobenius_sq, "deflated"), (diagonal, "xdiag"), (row_norms_sq, "exact")],
)
def test_asymmetric_operators_are_refused(estimator: Any, method: str) -> None:
    with pytest.raises(ValueError, match="not symmetric"):
        estimator(tangents(20, 20), 12, method=method, seed=0)


@each_method
def test_nonfinite_products_stop(estimator: Any, method: str) -> None:
    A = matrix("power").clone()
    A[3, 5] = A[5, 3] = torch.nan
    with pytest.raises(NonFiniteProductError, match="product 0 with the operator holds NaN"):
        estimator(A, 30, method=method, seed=0)


@pytest.mark.parametrize(
    ("estimator", "method"),
    [(trace, "hutch++"), (trace, "na-hutch++"), (trace, "xtrace"), (frobenius_sq, "deflated")],
)
def test_what_does_not_fit_is_refused(
    estimator: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Huge:
        shape, dtype, self_adjoint = (40_000_000, 40_000_000), torch.float32, True

        def __matmul__(self, columns: Tensor) -> Tensor:
            raise AssertionError("refused before the first product")

    monkeypatch.setattr(hvpfast.operators.matvecs, "available_bytes", lambda *args, **kwargs: 2**30)
    with pytest.raises(
        MemoryError, match=r"keeps .* take .* GB, and 1.07 GB are available; [123] fit"
    ):
        estimator(Huge(), 90, method=method, seed=0)


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    trace(matrix("power"), 30, progressbar=True)
    assert "30/30" in capfd.readouterr().err
    trace(matrix("power"), 30, method="exact", progressbar=True)
    assert "100/100" in capfd.readouterr().err


def test_an_operator_beyond_perceptrons() -> None:
    """Estimates of a convolutional net on the reference backend."""
    from dense import classes, convnet, custom_loss

    model, (x, y) = convnet(), classes(6, 1, 4, 4)
    H = hf.HessianOperator(model, custom_loss, None, (x, y), reduction="mean", backend="reference")
    A = dense(model, custom_loss, x, y)
    results = estimate_all(H, 60, seed=0)
    for name in ("trace", "frobenius_sq", "diagonal", "row_norms_sq"):
        result = getattr(results, name)
        error = number(result.estimate) - TRUTH[name](A)
        assert float(error.norm()) < 4 * float(number(result.stderr).norm())
    model, loss, batch = small()
    G = hf.GGNOperator(model, loss, None, batch)
    assert trace(G, 60, method="hutch++", seed=0).estimate > 0


def test_numpy_scalars_of_results() -> None:
    result = trace(matrix("power"), 30, seed=0)
    assert np.float64(result) == float(result)
