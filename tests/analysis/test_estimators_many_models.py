"""Estimators over many models: against the probes they document, dense Hessians, single results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import dense_ggn, dense_hessian
from torch import Tensor

import hvpfast as hf

pytestmark = pytest.mark.usefixtures("single_threaded")

M, SPEC = 3, hf.MLPSpec((4, 5, 3), "tanh")
P = SPEC.num_params
ESTIMATORS: dict[str, Callable[..., Any]] = {
    "trace": hf.trace,
    "frobenius_sq": hf.frobenius_sq,
    "diagonal": hf.diagonal,
    "row_norms_sq": hf.row_norms_sq,
}
each = pytest.mark.parametrize("name", ESTIMATORS)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    params = 0.5 * torch.randn(M, P, generator=g).to(dtype)
    x = torch.randn(M, 7, 4, generator=g).to(dtype)
    return params, x, torch.randint(3, (M, 7), generator=g)


@pytest.fixture
def A() -> hf.ModelsOperator:
    return operator()


def operator(curvature: str = "hessian", dtype: torch.dtype = torch.float64) -> hf.ModelsOperator:
    lin = hf.linearize(SPEC, *data(dtype), order=2)
    assert isinstance(lin, hf.ModelsLinearization)
    return hf.ModelsOperator(lin, curvature)


def truths(name: str, dense: Tensor) -> Tensor:
    """The quantity of every matrix (M, P, P)."""
    return {
        "trace": dense.diagonal(dim1=1, dim2=2).sum(1),
        "frobenius_sq": dense.square().sum((1, 2)),
        "diagonal": dense.diagonal(dim1=1, dim2=2),
        "row_norms_sq": dense.square().sum(2),
    }[name]


def samples_of(name: str, V: Tensor, Y: Tensor) -> Tensor:
    """Samples along the last axis, of probes V (P, n) and products Y."""
    return {
        "trace": (V * Y).sum(0),
        "frobenius_sq": Y.square().sum(0),
        "diagonal": V * Y,
        "row_norms_sq": Y.square(),
    }[name]


@each
@pytest.mark.parametrize("distribution", ["rademacher", "normal", "sphere"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_the_probes_are_those_documented(name: str, distribution: str, curvature: str) -> None:
    result = ESTIMATORS[name](operator(curvature), 9, seed=11, distribution=distribution)
    assert isinstance(result, hf.ModelsEstimate)
    assert (result.num_matvecs, result.dof, result.seed, len(result)) == (9, 8, 11, M)
    assert (result.stop_reason, result.method) == ("budget", "hutchinson")
    dense = {"hessian": dense_hessian, "ggn": dense_ggn}[curvature]
    for m, (params, x, y) in enumerate(zip(*data(), strict=True)):
        given = "normal" if distribution == "sphere" else distribution
        V = hf.probes(P, 9, distribution=given, seed=11, first=9 * m, dtype=torch.float64)
        if distribution == "sphere":
            V = V * (P**0.5 / V.norm(dim=0))
        samples = samples_of(name, V, dense(SPEC, params, x, y) @ V)
        torch.testing.assert_close(result.estimate[m], samples.mean(-1), rtol=1e-9, atol=1e-11)
        stderr = samples.std(-1) / 3
        torch.testing.assert_close(result.stderr[m], stderr, rtol=1e-6, atol=1e-8)
        if result.samples is not None:
            torch.testing.assert_close(result.samples[m], samples, rtol=1e-9, atol=1e-11)


@each
def test_close_to_the_truth(name: str, A: hf.ModelsOperator) -> None:
    """Within six standard errors, and these small."""
    dense = torch.stack([dense_hessian(SPEC, *one) for one in zip(*data(), strict=True)])
    result, truth = ESTIMATORS[name](A, 4000, seed=1), truths(name, dense)
    assert ((result.estimate - truth).abs() <= 6 * result.stderr + 1e-9).all()
    scale = truth.reshape(M, -1).norm(dim=1)
    assert (result.stderr.reshape(M, -1).norm(dim=1) <= 0.1 * scale).all()


@each
def test_result_of_one_model(name: str, A: hf.ModelsOperator) -> None:
    result = ESTIMATORS[name](A, 40, seed=2)
    low, high = result.ci(0.9)
    assert low.shape == high.shape == result.estimate.shape
    for m, one in enumerate(result):
        assert type(one) is hf.Estimate
        ends = one.ci(0.9)
        for all_ends, end in zip((low, high), ends, strict=True):
            torch.testing.assert_close(all_ends[m], torch.as_tensor(end, dtype=all_ends.dtype))
        if name in ("trace", "frobenius_sq"):
            assert isinstance(one.estimate, float) and float(one) == float(result.estimate[m])
    with pytest.raises(TypeError, match=r"result\[m\]"):
        float(result)
    with pytest.raises(ValueError, match="level"):
        result.ci(1.5)


def test_intervals_are_those_of_single_estimates(A: hf.ModelsOperator) -> None:
    """The same samples give the same interval, skewness included, as an estimate of one model."""
    from hvpfast.analysis.estimators.result import skewness_coefficients

    for estimator in (hf.trace, hf.frobenius_sq):
        result = estimator(A, 30, seed=4)
        assert isinstance(result, hf.ModelsEstimate)
        for one in result:
            assert one.samples is not None
            assert one.skew == pytest.approx(skewness_coefficients(one.samples, one.positive))
            assert one.skew != (0.0, 0.0)


def test_all_quantities_from_the_same_products(A: hf.ModelsOperator) -> None:
    joint = hf.estimate_all(A, 20, seed=6)
    for name, estimator in ESTIMATORS.items():
        alone, together = estimator(A, 20, seed=6), getattr(joint, name)
        torch.testing.assert_close(together.estimate, alone.estimate, rtol=1e-9, atol=1e-12)
    root = hf.frobenius_norm(A, 20, seed=6)
    torch.testing.assert_close(root.estimate, joint.frobenius_sq.estimate.sqrt())
    torch.testing.assert_close(
        root.stderr, joint.frobenius_sq.stderr / (2 * joint.frobenius_sq.estimate.sqrt())
    )
    assert root.ci()[0].shape == (M,)


def test_seeds(A: hf.ModelsOperator) -> None:
    first, again, other = (hf.trace(A, 8, seed=seed).estimate for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    params, x, y = data()
    same = hf.linearize(SPEC, params[0].repeat(2, 1), x[0], y[0])
    estimates = hf.trace(hf.ModelsOperator(same), 8, seed=1).estimate
    assert estimates[0] != estimates[1], "models have their own probes"


def test_chunks_do_not_matter(A: hf.ModelsOperator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hf.estimate_all(A, 23, seed=8)
    monkeypatch.setattr("hvpfast.analysis.estimators.many_models._CHUNK_BYTES", 5 * M * P * 8)
    parts = hf.estimate_all(A, 23, seed=8)
    for name in ESTIMATORS:
        torch.testing.assert_close(getattr(parts, name).estimate, getattr(whole, name).estimate)
        torch.testing.assert_close(getattr(parts, name).stderr, getattr(whole, name).stderr)


@each
def test_tolerance_is_reached_by_all(name: str, A: hf.ModelsOperator) -> None:
    result = ESTIMATORS[name](A, 16, seed=3, rtol=0.1, max_matvecs=100_000)
    assert result.stop_reason == "rtol" and result.num_matvecs > 16
    error = 2 * result.stderr.reshape(M, -1).norm(dim=1)
    assert (error <= 0.1 * 1.1 * result.estimate.reshape(M, -1).norm(dim=1)).all()
    short = ESTIMATORS[name](A, 16, seed=3, rtol=1e-3, max_matvecs=40)
    assert (short.stop_reason, short.num_matvecs) == ("max_matvecs", 40)


def test_one_sample(A: hf.ModelsOperator) -> None:
    for estimator in ESTIMATORS.values():
        result = estimator(A, 1, seed=0)
        assert torch.isinf(result.stderr).all() and torch.isfinite(result.estimate).all()


def test_float32(A: hf.ModelsOperator) -> None:
    single = operator(dtype=torch.float32)
    for estimator in ESTIMATORS.values():
        a, b = estimator(single, 12, seed=5), estimator(A, 12, seed=5)
        torch.testing.assert_close(a.estimate.double(), b.estimate, rtol=1e-4, atol=1e-5)
    assert hf.diagonal(single, 3, seed=5).estimate.dtype == torch.float32


def test_the_operator(A: hf.ModelsOperator) -> None:
    V = hf.probes(P, M * 2, seed=0, dtype=torch.float64).T.reshape(M, 2, P).transpose(1, 2)
    dense = torch.stack([dense_hessian(SPEC, *one) for one in zip(*data(), strict=True)])
    torch.testing.assert_close(A @ V, dense @ V, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(A.quadratic_form(V), (V * (dense @ V)).sum(1), rtol=1e-9, atol=1e-11)
    assert A.shape == (M, P, P) and A.dtype == torch.float64 and A.device.type == "cpu"
    assert "Hessians of 3 models" in A.explain() and "3 models" in repr(A)
    assert "Gauss-Newton" in operator("ggn").explain()


@pytest.mark.parametrize("method", ["hutch++", "na-hutch++", "xtrace", "exact", "auto"])
def test_other_methods_are_refused(A: hf.ModelsOperator, method: str) -> None:
    with pytest.raises(ValueError, match="take method='hutchinson'"):
        hf.trace(A, 12, method=method)


def test_bad_arguments(A: hf.ModelsOperator) -> None:
    with pytest.raises(ValueError, match=r"more than the 2\*\*32 probes"):
        hf.trace(A, 2**31)
    with pytest.raises(ValueError, match="max_matvecs must be at least"):
        hf.trace(A, 16, rtol=0.1, max_matvecs=5)
    with pytest.raises(ValueError, match="num_matvecs must be"):
        hf.trace(A, 0)
    with pytest.raises(ValueError, match=r"square \(P, P\); got \(3, "):
        hf.eigsh(A, 1)


def test_products_that_overflow_name_the_model() -> None:
    """A finite loss whose second derivatives are not: x squared is beyond float32."""
    spec = hf.MLPSpec((2, 1), loss="mse")
    x = torch.ones(M, 4, 2)
    x[1, :, 0] = 1e25
    lin = hf.linearize(spec, torch.zeros(M, 3), x, torch.ones(M, 4, 1))
    A = hf.ModelsOperator(lin)
    for estimator in ESTIMATORS.values():
        with pytest.raises(hf.NonFiniteProductError, match="model 1: product 0"):
            estimator(A, 4, seed=0)
