"""The compat modules by themselves: their forms, and their numbers against dense matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dense import classes, close, convnet, dense, perceptron, tangents
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvpfast as hf
from hvpfast.compat import curvlinops, eigenthings, pyhessian, pytorch_optimizer

LOSS = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("single_threaded")


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(4), y.split(4), strict=True))


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    Q = torch.linalg.qr(tangents(len(eigenvalues), len(eigenvalues), seed))[0]
    return Q @ torch.diag(eigenvalues) @ Q.T


def low_rank(size: int = 60) -> Tensor:
    eigenvalues = torch.zeros(size, dtype=torch.float64)
    eigenvalues[:5] = torch.tensor([5.0, -4, 3, 2, 1])
    return symmetric(eigenvalues)


# curvlinops


@pytest.mark.parametrize("kind", ["HessianLinearOperator", "GGNLinearOperator"])
def test_curvlinops_constructors(kind: str) -> None:
    model, (x, y) = perceptron(), classes(11, 4)
    M = dense(model, LOSS, x, y, ggn=kind.startswith("GGN"))
    make = getattr(curvlinops, kind)
    params = list(model.parameters())
    for given in (params, dict(model.named_parameters())):
        A = make(model, LOSS, given, batches(x, y), False, True, num_data=11)
        close(A @ tangents(len(M), 3), M @ tangents(len(M), 3))
        assert A.SELF_ADJOINT
    gradient, loss = A.gradient_and_loss()
    truth = LOSS(model(x), y)
    close(loss, truth.detach())
    for mine, theirs in zip(gradient, torch.autograd.grad(truth, params), strict=True):
        close(mine, theirs)
    assert [B.shape[0] for B in A.blocks()] == [25, 36, 21]
    with pytest.raises(NotImplementedError, match=r"H\.blocks\(\)"):
        make(model, LOSS, params, batches(x, y), block_sizes=[1] * 6)


def test_curvlinops_estimators_are_exact_where_they_must_be() -> None:
    A = low_rank()
    D = torch.diag(torch.linspace(-1, 2, 60, dtype=torch.float64))
    close(curvlinops.hutchinson_trace(D, 3, seed=0), D.trace())
    close(curvlinops.hutchinson_diag(D, 3, seed=0), D.diagonal())
    close(curvlinops.hutchinson_squared_fro(D, 3, seed=0), D.square().sum())
    close(curvlinops.hutchpp_trace(A, 30, seed=0), A.trace(), 1e-9)
    close(curvlinops.xtrace(A, 24, seed=0), A.trace(), 1e-9)
    close(curvlinops.xdiag(A, 24, seed=0), A.diagonal(), 1e-9)
    for distribution in ("rademacher", "normal"):
        found = curvlinops.hutchinson_trace(A, 59, distribution, seed=1)
        error = 5 * math.sqrt(2 * float(A.square().sum()) / 59)
        assert abs(float(found - A.trace())) < error
        assert found.dim() == 0
        assert torch.equal(found, curvlinops.hutchinson_trace(A, 59, distribution, seed=1))


def test_curvlinops_spectra_have_unit_mass_where_the_eigenvalues_are() -> None:
    A = symmetric(torch.cat([torch.full((45,), -1.0), torch.full((15,), 3.0)]).double())
    grid, density = curvlinops.lanczos_approximate_spectrum(
        A, 20, num_points=4000, num_repeats=30, kappa=1e3, margin=0.5, seed=2
    )
    step = float(grid[1] - grid[0])
    assert density.shape == grid.shape == (4000,)
    assert abs(float(density.sum()) * step - 1) < 1e-3
    assert abs(float(density[grid > 1].sum()) * step - 0.25) < 0.05
    ends = (-1.0, 3.0)
    given, _ = curvlinops.lanczos_approximate_spectrum(A, 20, boundaries=ends, seed=2)
    close(given[[0, -1]], torch.tensor([-1.2, 3.2], dtype=torch.float64))
    for log_ends in (None, (1.0, 3.0)):
        grid, density = curvlinops.lanczos_approximate_log_spectrum(
            A, 20, num_points=4000, num_repeats=30, margin=0.5, kappa=1e3, boundaries=log_ends,
            seed=2,
        )  # fmt: skip
        mass = torch.trapezoid(density, grid)
        assert abs(float(mass) - 1) < 5e-3
        assert float(grid[0]) < 1 < 3 < float(grid[-1])
    with pytest.raises(ValueError, match="kappa must be > 1"):
        curvlinops.lanczos_approximate_spectrum(A, 20, kappa=1.0, boundaries=ends)
    with pytest.raises(ValueError, match="ncv must be >= 2"):
        curvlinops.lanczos_approximate_spectrum(A, 1, boundaries=ends)


# PyHessian


def test_pyhessian_forms() -> None:
    model, (x, y) = perceptron().train(), classes(30, 4)
    M = dense(model, LOSS, x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    for H in (
        pyhessian.hessian(model, LOSS, data=(x, y), cuda=False, seed=0),
        pyhessian.hessian(model, LOSS, dataloader=loader, seed=0),
    ):
        values, vectors = H.eigenvalues(tol=1e-6, top_n=3)
        truth = torch.linalg.eigvalsh(M)
        truth = truth[truth.abs().argsort(descending=True)][:3]
        close(torch.tensor(values, dtype=torch.float64), truth, 1e-9)
        for value, vector in zip(values, vectors, strict=True):
            assert [v.shape for v in vector] == [p.shape for p in model.parameters()]
            flat = torch.cat([v.reshape(-1) for v in vector])
            close(M @ flat, value * flat, 1e-5)
        samples = H.trace(maxIter=50)
        assert len(samples) == 50
        deviation = np.std(samples, ddof=1) / len(samples) ** 0.5
        assert abs(np.mean(samples) - float(M.trace())) < 4 * deviation
        nodes, weights = H.density(iter=7, n_v=3)
        assert [len(row) for row in nodes] == [len(row) for row in weights] == [7, 7, 7]
        assert all(abs(sum(row) - 1) < 1e-12 for row in weights)
        mean = np.mean([np.dot(n, w) for n, w in zip(nodes, weights, strict=True)])
        assert abs(mean - float(M.trace()) / len(M)) < 0.1
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_pyhessian_evaluates_in_eval_mode_and_leaves_the_mode() -> None:
    model, (x, y) = convnet().train(), classes(9, 1, 4, 4)
    H = pyhessian.hessian(model, LOSS, data=[x, y], backend="reference")
    v = tangents(H.operator.shape[0], 1)
    close(H.operator @ v, dense(convnet(), LOSS, x, y) @ v)
    assert all(module.training for module in model.modules())


def test_pyhessian_says_what_is_wrong() -> None:
    model, data = perceptron(), classes(9, 4)
    for given in ({}, {"data": data, "dataloader": [data]}):
        with pytest.raises(ValueError, match="one of the two"):
            pyhessian.hessian(model, LOSS, **given)
    with pytest.raises(ValueError, match="the model is on cpu"):
        pyhessian.hessian(model, LOSS, data=data, cuda=True)
    H = pyhessian.hessian(model, LOSS, data=data, seed=0)
    with pytest.warns(RuntimeWarning, match="raise maxIter"):
        values, _ = H.eigenvalues(maxIter=3, tol=1e-12, top_n=2)
    assert len(values) <= 2
    assert 16 <= len(H.trace(maxIter=4000, tol=0.3)) < 4000


# hessian-eigenthings


def test_eigenthings_operators() -> None:
    model, (x, y) = perceptron(), classes(11, 4)
    names = ["2.weight", "2.bias"]
    chosen = eigenthings.match_names("2.*")
    for ggn in (False, True):
        M = dense(model, LOSS, x, y, ggn=ggn)
        part = dense(model, LOSS, x, y, names, ggn=ggn)

        def made(loader: Any, *, plain: bool, ggn: bool = ggn, **options: Any) -> Any:
            if not ggn:
                loss: Any = eigenthings.supervised_loss(LOSS)
                if plain:
                    loss = lambda m, b: LOSS(m(b[0]), b[1])  # noqa: E731
                return eigenthings.HessianOperator(model, loader, loss, **options)
            of_output = eigenthings.supervised_loss_of_output(LOSS)
            forward: Any = eigenthings.supervised_forward
            if plain:
                forward = lambda m, b: m(b[0])  # noqa: E731
            return eigenthings.GGNOperator(model, loader, forward, of_output, **options)

        v = tangents(len(M), 1)[:, 0]
        loader = DataLoader(TensorDataset(x, y), batch_size=4)
        A = made(loader, plain=False)
        assert A.size == len(M)
        assert (A.backend == "reference") == (hf.available()["cpu"] is not None)
        close(A.matvec(v), M @ v)
        B = made(batches(x, y), plain=True, backend="reference")
        close(B @ v, M @ v)
        C = made(loader, plain=False, param_filter=chosen, num_batches=3)
        close(C.matvec(v[: len(part)]), part @ v[: len(part)])
    with pytest.raises(ValueError, match=r"param_filter takes no parameter; there are 0\.weight"):
        made(loader, plain=False, param_filter=eigenthings.match_names("9.*"))


def test_eigenthings_algorithms() -> None:
    eigenvalues = torch.linspace(-1, 1, 50, dtype=torch.float64) ** 3
    eigenvalues[:3] = torch.tensor([-8.0, 9, 4])
    A = symmetric(eigenvalues)
    for which, first in (("LM", [9.0, -8, 4]), ("LA", [9.0, 4, 1]), ("SA", [-8.0])):
        result = eigenthings.lanczos(A, k=len(first), which=which, tol=1e-7, seed=0)
        close(result.eigenvalues, torch.tensor(first, dtype=torch.float64), 1e-9)
        assert result.eigenvectors.shape == (len(first), 50)
        expected = result.eigenvalues[:, None] * result.eigenvectors
        close(result.eigenvectors @ A, expected, 1e-5)
        assert result.converged.tolist() == [True] * len(first)
        assert result.residuals.shape == (len(first),)
    few = eigenthings.lanczos(A, k=2, max_iter=3, tol=1e-12, seed=0)
    assert few.iterations <= 3
    assert not few.converged.all()
    for method in ("hutchinson", "hutch++"):
        found = eigenthings.trace(A, num_matvecs=45, method=method, seed=0)
        assert abs(found.estimate - float(A.trace())) < 4 * found.stderr
    density = eigenthings.spectral_density(A, num_runs=20, lanczos_steps=30, seed=0)
    assert density.grid.shape == density.density.shape == (10000,)
    assert density.raw_eigenvalues.shape == density.raw_weights.shape == (20, 30)
    assert abs(float(torch.trapezoid(density.density, density.grid)) - 1) < 1e-2
    moments = (density.raw_weights * density.raw_eigenvalues.nan_to_num()).sum(1)
    assert abs(float(moments.mean() - eigenvalues.mean())) < 4 * float(moments.std()) / 20**0.5


def test_eigenthings_old_function() -> None:
    model, (x, y) = perceptron(), classes(11, 4)
    M = dense(model, LOSS, x, y)
    values, vectors = eigenthings.compute_hessian_eigenthings(
        model, batches(x, y), LOSS, 3, tol=1e-6, seed=0
    )
    truth = torch.linalg.eigvalsh(M)
    truth = truth[truth.abs().argsort(descending=True)][:3]
    assert isinstance(values, np.ndarray)
    assert vectors.shape == (3, len(M))
    close(torch.from_numpy(values), truth, 1e-9)
    close(torch.from_numpy(vectors) @ M, torch.from_numpy(values[:, None] * vectors), 1e-5)


# pytorch_optimizer


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_the_diagonal_in_the_order_of_an_optimizer(curvature: str) -> None:
    model, (x, y) = perceptron(), classes(11, 4)
    diagonal = dense(model, LOSS, x, y, ggn=curvature == "ggn").diagonal()
    pieces = dict(zip(model.state_dict(), diagonal.split([20, 5, 30, 6, 18, 3]), strict=True))
    params = dict(model.named_parameters())
    order = ["4.bias", "0.weight", "2.weight"]
    groups = [{"params": [params[order[0]]]}, {"params": [params[n] for n in order[1:]], "lr": 2.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    found = pytorch_optimizer.hessian_for(
        optimizer, model, LOSS, (x, y), method="exact", curvature=curvature
    )
    for name, piece in zip(order, found, strict=True):
        close(piece, pieces[name].reshape(params[name].shape), 1e-10)
    draws = [
        torch.cat([t.reshape(-1) for t in pytorch_optimizer.hessian_for(
            optimizer, model, LOSS, (x, y), 4, seed=seed, curvature=curvature)])
        for seed in range(40)
    ]  # fmt: skip
    truth = torch.cat([pieces[name] for name in order])
    samples = torch.stack(draws)
    bound = 5 * samples.std(0) / len(draws) ** 0.5 + 1e-12
    assert ((samples.mean(0) - truth).abs() < bound).all()
    stranger = torch.optim.SGD(perceptron(1).parameters(), lr=1.0)
    with pytest.raises(ValueError, match="is not a parameter of the model"):
        pytorch_optimizer.hessian_for(stranger, model, LOSS, (x, y))
