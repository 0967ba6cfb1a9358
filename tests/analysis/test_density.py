"""Spectral density: quadratures against eigenvectors, statistics of probes, distances, figures."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import scipy.stats
import torch
from torch import Tensor

import hvpfast as hf
from hvpfast.analysis.density import quadrature, spectrum
from hvpfast.analysis.density.quadrature import spectral_density
from hvpfast.analysis.density.spectrum import SpectralDensity, wasserstein
from hvpfast.operators.matvecs import NonFiniteProductError

pytestmark = pytest.mark.usefixtures("single_threaded")


def prescribed(values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors as columns."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    U, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    A = U * values @ U.T
    return (A + A.T) / 2, U


def unit_probe(size: int, index: int, seed: int, distribution: str = "rademacher") -> Tensor:
    v = hf.probes(size, 1, first=index, seed=seed, distribution=distribution, dtype=torch.float64)
    return v[:, 0] / v.norm()


SPECTRUM = torch.cat((torch.linspace(-1, 2, 27), torch.tensor([5.0, 9.0, 30.0]))).double()


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_all_steps_give_the_spectrum_as_each_probe_sees_it(distribution: str) -> None:
    A, U = prescribed(SPECTRUM)
    found = spectral_density(A, 30, 3, seed=5, distribution=distribution)
    assert found.num_nodes.tolist() == [30, 30, 30]
    for k in range(3):
        torch.testing.assert_close(found.ritz_values[k], SPECTRUM, rtol=0, atol=1e-12)
        masses = (U.T @ unit_probe(30, k, 5, distribution)).square()
        torch.testing.assert_close(found.weights[k], masses, rtol=0, atol=1e-12)


def test_quadratures_are_exact_for_polynomials_of_degree_below_twice_the_steps() -> None:
    A, _ = prescribed(SPECTRUM / 30)
    m = 6
    found = spectral_density(A, m, 2, seed=1)
    for k in range(2):
        v = unit_probe(30, k, 1)
        power = v
        for degree in range(2 * m + 4):
            got = float((found.weights[k] * found.ritz_values[k] ** degree).sum())
            error = abs(got - float(v @ power))
            if degree < 2 * m:
                assert error < 1e-13
            power = A @ power
    assert error > 1e-12  # at degree 2 m + 3: so the bound can fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalisation_leaves_no_copies_of_outliers(dtype: torch.dtype) -> None:
    values = torch.cat((torch.logspace(-6, -2, 195), torch.tensor([1.0, 3.0, 10.0, 30, 100])))
    A, _ = prescribed(values.double(), 3)
    found = spectral_density(A.to(dtype), 60, 4, seed=2)
    for top in (100.0, 30.0, 10.0, 3.0, 1.0):
        near = (found.ritz_values - top).abs() < 1e-3 * top
        assert near.sum(1).tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(found.weights.sum(1), torch.ones(4).double(), rtol=0, atol=1e-14)
    assert bool((found.weights >= 0).all())


def test_probes_do_not_depend_on_their_number_or_on_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    A, _ = prescribed(SPECTRUM)
    many = spectral_density(A, 12, 7, seed=9)
    few = spectral_density(A, 12, 2, seed=9)
    torch.testing.assert_close(few.ritz_values, many.ritz_values[:2], rtol=0, atol=1e-12)
    monkeypatch.setattr(quadrature, "available_bytes", lambda device: 4 * 3 * 16 * 30 * 8)
    grouped = spectral_density(A, 12, 7, seed=9)  # three probes at a time
    torch.testing.assert_close(grouped.ritz_values, many.ritz_values, rtol=0, atol=1e-12)
    torch.testing.assert_close(grouped.weights, many.weights, rtol=0, atol=1e-12)
    assert grouped.num_matvecs == many.num_matvecs
    monkeypatch.setattr(quadrature, "available_bytes", lambda device: 10 * 30 * 8)
    with pytest.raises(MemoryError, match=r"num_steps=12 vectors of 30 entries.*num_steps=6 fits"):
        spectral_density(A, 12, 7, seed=9)


def test_seeds() -> None:
    A, _ = prescribed(SPECTRUM)
    one, same = (spectral_density(A, 5, 2, seed=3) for _ in range(2))
    assert torch.equal(one.ritz_values, same.ritz_values)
    assert torch.equal(one.weights, same.weights)
    fresh, other = (spectral_density(A, 5, 2) for _ in range(2))
    assert fresh.seed != other.seed
    again = spectral_density(A, 5, 2, seed=fresh.seed)
    assert torch.equal(again.weights, fresh.weights)


def test_exhausted_krylov_spaces_end_early_and_are_exact() -> None:
    U = prescribed(SPECTRUM)[1]
    A = 3 * torch.outer(U[:, 0], U[:, 0]) - 2 * torch.outer(U[:, 1], U[:, 1])
    calls = list[int]()

    class Counted:
        shape, dtype, device, self_adjoint = (30, 30), torch.float64, torch.device("cpu"), True

        def __matmul__(self, columns: Tensor) -> Tensor:
            calls.append(columns.shape[1])
            return A @ columns

    found = spectral_density(Counted(), 20, 4, seed=0)
    assert found.num_nodes.tolist() == [3, 3, 3, 3]
    assert calls == [4, 4, 4]
    assert found.num_matvecs == 12
    torch.testing.assert_close(
        found.ritz_values[:, :3], torch.tensor([-2.0, 0.0, 3.0]).double().expand(4, 3),
        rtol=0, atol=1e-12,
    )  # fmt: skip
    assert bool((found.weights[:, 3:] == 0).all())
    assert math.isfinite(float(found.trace(lambda t: 1 / (t + 2.5))))  # padding is in the range
    identity = spectral_density(2 * torch.eye(7), 5, 2, seed=0)
    assert identity.num_nodes.tolist() == [1, 1]
    assert float(identity.trace()) == pytest.approx(14)
    zero = spectral_density(torch.zeros(4, 4), 5, 2, seed=0)
    assert zero.distance(torch.zeros(4)) == 0
    assert bool(torch.isfinite(zero.curve(axis="log").density).all())


def test_every_kind_of_operator() -> None:
    A, _ = prescribed(SPECTRUM)
    wanted = spectral_density(A, 10, 3, seed=4)
    array = A.numpy()
    for operator in (array, scipy.sparse.linalg.aslinearoperator(array)):
        found = spectral_density(operator, 10, 3, seed=4)
        torch.testing.assert_close(found.ritz_values, wanted.ritz_values, rtol=0, atol=1e-12)
        assert found.num_matvecs == 30 + 2  # two to see that it is symmetric
    low = spectral_density(A.bfloat16(), 10, 3, seed=4)
    assert low.ritz_values.dtype == torch.float64
    assert abs(float(low.ritz_values.max()) - 30) < 0.5


def test_traces_of_functions_are_calibrated() -> None:
    values = torch.linspace(-1, 2, 30).double()
    A, _ = prescribed(values)
    found = spectral_density(A, 12, 4000, seed=11)
    for function in (None, torch.exp, lambda t: (t - 0.3) ** 4):
        truth = float((values if function is None else function(values)).sum())
        whole = found.trace(function)
        assert abs(float(whole) - truth) < 3 * whole.stderr
        assert whole.samples is not None
        groups = whole.samples.view(400, 10)
        half = float(scipy.stats.t.ppf(0.975, 9)) * groups.std(1) / math.sqrt(10)
        covered = float(((groups.mean(1) - truth).abs() < half).double().mean())
        assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)
        part = SpectralDensity(
            found.ritz_values[:10], found.weights[:10], found.num_nodes[:10], 30, 120, 11, "r"
        )
        low, high = part.trace(function).ci(0.95)
        assert low == pytest.approx(float(groups[0].mean() - half[0]))
        assert high == pytest.approx(float(groups[0].mean() + half[0]))
    with pytest.raises(ValueError, match=r"not finite at -0\.9\d*, a node"):
        found.trace(lambda t: torch.log(t))


def test_cumulative_is_the_share_below() -> None:
    A, _ = prescribed(SPECTRUM)
    found = spectral_density(A, 30, 400, seed=6)
    grid = torch.tensor([-2.0, 0.5, 4.0, 40.0])
    share, stderr = found.cumulative(grid)
    truth = torch.tensor([0.0, float((SPECTRUM <= 0.5).sum()) / 30, 27 / 30, 1.0]).double()
    assert bool(((share - truth).abs() <= 3 * stderr + 1e-12).all())
    assert 0 < float(stderr[1]) < 0.02


def test_wasserstein_is_exact() -> None:
    assert wasserstein(torch.tensor([0.0]), None, torch.tensor([3.0]), None) == 3
    two = torch.tensor([0.0, 4.0])
    assert wasserstein(two, torch.tensor([3.0, 1.0]), two, None) == 1
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=50), generator.normal(size=31)
    a[:5] = a[5]  # ties
    u, v = generator.random(50), generator.random(31)
    got = wasserstein(*map(torch.from_numpy, (a, u, b, v)))
    assert got == pytest.approx(scipy.stats.wasserstein_distance(a, b, u, v), rel=1e-12)
    assert wasserstein(*map(torch.from_numpy, (b, v, a, u))) == pytest.approx(got, rel=1e-12)
    for wrong in (
        (two, torch.tensor([1.0, -1.0]), two, None),
        (two, torch.ones(3), two, None),
        (two, torch.zeros(2), two, None),
        (torch.tensor([0.0, math.nan]), None, two, None),
        (torch.empty(0), None, two, None),
    ):
        with pytest.raises(ValueError, match="points"):
            wasserstein(*wrong)


def trained_net() -> tuple[hf.MLP, Tensor, Tensor]:
    """A 40-32-32-10 net of 2,698 parameters, trained on ten noisy clusters."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 40, dtype=torch.float64, generator=generator)
    y = torch.arange(300) % 10
    x = centers[y] + 0.8 * torch.randn(300, 40, dtype=torch.float64, generator=generator)
    model = hf.MLP((40, 32, 32, 10), "tanh", dtype=torch.float64, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def test_distance_to_the_exact_spectrum_of_2698_parameters_falls_with_steps() -> None:
    model, x, y = trained_net()
    H = hf.HessianOperator(model, torch.nn.CrossEntropyLoss(), None, (x, y))
    assert H.num_params == 2698
    exact = torch.linalg.eigvalsh(H @ torch.eye(2698, dtype=torch.float64))
    steps = (2, 4, 8, 16, 32)
    found = [spectral_density(H, m, 8, seed=1) for m in steps]
    distances = [quadrature.distance(exact) / float(exact.abs().max()) for quadrature in found]
    assert [quadrature.num_matvecs for quadrature in found] == [8 * m for m in steps]
    for before, after in itertools.pairwise(distances):
        assert after < 0.8 * before
    assert distances[-1] < distances[0] / 5 < 4e-3
    total = found[-1].trace()
    assert abs(float(total) - float(exact.sum())) < 3 * total.stderr


@pytest.mark.parametrize("axis", ["linear", "log"])
def test_curves_have_unit_mass_and_a_band(axis: str) -> None:
    A, _ = prescribed(SPECTRUM)
    found = spectral_density(A, 30, 60, seed=8)
    curve = found.curve(axis=axis, num_points=4001)
    assert float(torch.trapezoid(curve.density, curve.coordinate)) == pytest.approx(1, abs=1e-4)
    exact = torch.asinh(SPECTRUM / curve.threshold) if curve.threshold else SPECTRUM
    away = (curve.coordinate[:, None] - exact) / curve.kernel_width
    kernel = torch.exp(-0.5 * away.square()) / (curve.kernel_width * math.sqrt(2 * math.pi))
    truth = kernel.mean(1)
    stderr = curve.samples.std(0) / math.sqrt(60)
    assert bool(((curve.density - truth).abs() <= 5 * stderr + 1e-12).all())
    half = float(scipy.stats.t.ppf(0.975, 59)) * stderr
    torch.testing.assert_close(curve.density, curve.samples.mean(0))
    torch.testing.assert_close(curve.upper, curve.density + half)
    torch.testing.assert_close(curve.lower, (curve.density - half).clamp(min=0))
    assert curve.confidence == 0.95
    assert (curve.threshold is None) == (axis == "linear")
    wide = found.curve(axis=axis, kernel_width=3 * curve.kernel_width)
    assert float(wide.density.max()) < float(curve.density.max())
    alone = spectral_density(A, 30, 1, seed=8).curve(axis=axis)
    assert bool(torch.isfinite(alone.density).all())
    assert bool(alone.upper.isinf().all())


@pytest.mark.parametrize("axis", ["linear", "log"])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_figures_state_the_kernel_and_change_no_setting(
    axis: str, scale: str, tmp_path: Path
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    A, _ = prescribed(SPECTRUM)
    found = spectral_density(A, 20, 5, seed=8)
    settings, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    figure = found.plot(axis=axis, density=scale, exact=SPECTRUM, title="a title")
    figure.savefig(tmp_path / "density.png")
    assert dict(matplotlib.rcParams) == settings
    assert matplotlib.get_backend() == backend
    (ax,) = figure.axes
    assert ax.get_yscale() == scale
    width = found.curve(axis=axis).kernel_width
    small_print = figure._supxlabel.get_text()
    assert f"kernel of width {width:.3g}" in small_print
    assert "20 Lanczos steps, 5 rademacher probes (seed 8), 102 products" in small_print
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["95% band over 5 probes", "mean over probes", "exact eigenvalues"]
    other = type(figure)()
    assert found.plot(ax=other.add_subplot()) is other


def test_bad_input() -> None:
    A, _ = prescribed(SPECTRUM)
    for steps, probes, name in ((0, 1, "num_steps"), (1.5, 1, "num_steps"), (3, 0, "num_probes")):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
            spectral_density(A, steps, probes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="distribution"):
        spectral_density(A, 2, 2, distribution="cauchy")
    with pytest.raises(ValueError, match="seed"):
        spectral_density(A, 2, 2, seed=-1)
    with pytest.raises(ValueError, match="not symmetric"):
        spectral_density(torch.triu(A), 2, 2)
    with pytest.raises(NonFiniteProductError):
        spectral_density(A * math.nan, 2, 2)
    found = spectral_density(A, 4, 2, seed=0)
    wrong: Any
    for wrong in ({"axis": "cubic"}, {"kernel_width": 0.0}, {"confidence": 1.0}, {"threshold": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            found.curve(**wrong)
    with pytest.raises(ValueError, match="density"):
        found.plot(density="cubic")
    assert spectrum.SpectralDensity is SpectralDensity


def test_progress_bar_counts_steps(capsys: pytest.CaptureFixture[str]) -> None:
    A, _ = prescribed(SPECTRUM)
    spectral_density(A, 6, 2, seed=0, progressbar=True)
    assert "6/6" in capsys.readouterr().err


def test_bench_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("mnist1d", "matplotlib"):
        pytest.importorskip(package)
    from hvpfast.bench.suites import density as suite

    monkeypatch.setattr(suite, "SIZES", (40, 8, 10))
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    assert suite.run(parser.parse_args(["--quick", "--out", str(tmp_path)])) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["status"] == "checked"
    assert [(r["num_steps"], r["num_probes"]) for r in result["rows"]] == [
        (4, 1), (8, 1), (16, 1), (4, 4), (8, 4), (16, 4),
    ]  # fmt: skip
    for rows in (result["rows"][:3], result["rows"][3:]):
        for before, after in itertools.pairwise(rows):
            assert after["distance"] < before["distance"]
    text = capsys.readouterr().out
    assert (tmp_path / "bench.txt").read_text() in text
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    monkeypatch.setattr(suite, "moment_error", lambda H: 0.1)
    assert suite.run(parser.parse_args(["--quick"])) == 1
