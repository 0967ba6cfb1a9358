"""The compat modules against the packages themselves, where these are installed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from dense import classes, close, perceptron, tangents
from packages import real
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LOSS = nn.CrossEntropyLoss()
pytestmark = [
    pytest.mark.usefixtures("single_threaded"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True"),  # PyHessian
]


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(4), y.split(4), strict=True))


# curvlinops


@pytest.mark.parametrize("kind", ["HessianLinearOperator", "GGNLinearOperator"])
def test_curvlinops_operators(kind: str) -> None:
    theirs = real("curvlinops")
    ours = importlib.import_module("hvpfast.compat.curvlinops")
    model, (x, y) = perceptron(), classes(11, 4)
    for loss in (LOSS, nn.CrossEntropyLoss(reduction="sum")):
        arguments = model, loss, list(model.parameters()), batches(x, y)
        A, B = (getattr(package, kind)(*arguments) for package in (ours, theirs))
        V = tangents(A.shape[0], 3)
        assert A.shape == B.shape
        close(A @ V, B @ V)
        close((A @ V[:, 0]), (B @ V[:, 0]))
        for mine, other in zip(A @ list_of(model, V), B @ list_of(model, V), strict=True):
            close(mine, other)
        gradients, losses = zip(A.gradient_and_loss(), B.gradient_and_loss(), strict=True)
        for mine, other in zip(*gradients, strict=True):
            close(mine, other)
        close(*losses)


def list_of(model: nn.Module, V: Tensor) -> list[Tensor]:
    """Columns as tensors shaped like the parameters, with a trailing dimension."""
    sizes = [p.numel() for p in model.parameters()]
    return [
        piece.reshape(*p.shape, -1)
        for piece, p in zip(V.split(sizes), model.parameters(), strict=True)
    ]


def test_curvlinops_estimators_take_their_calls_and_give_their_forms() -> None:
    theirs = real("curvlinops")
    ours = importlib.import_module("hvpfast.compat.curvlinops")
    model, (x, y) = perceptron(), classes(11, 4)
    # theirs on our operator, ours on theirs: each by the other's protocol
    A = ours.HessianLinearOperator(model, LOSS, list(model.parameters()), batches(x, y))
    B = theirs.HessianLinearOperator(model, LOSS, list(model.parameters()), batches(x, y))
    calls: dict[str, tuple[Any, ...]] = {
        "hutchinson_trace": (60, "rademacher"),
        "hutchpp_trace": (60,),
        "xtrace": (60,),
        "hutchinson_diag": (60,),
        "xdiag": (60,),
        "hutchinson_squared_fro": (60,),
    }
    M = A @ torch.eye(A.shape[0], dtype=A.dtype)
    truths = {"trace": M.trace(), "diag": M.diagonal(), "fro": M.square().sum()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, arguments in calls.items():
            mine, other = (
                getattr(ours, name)(B, *arguments, seed=0),
                getattr(theirs, name)(A, *arguments),
            )
            assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
            truth = next(value for key, value in truths.items() if key in name)
            for found in (mine, other):
                assert float((found - truth).norm() / truth.norm()) < 0.6


@pytest.mark.parametrize("log", [False, True])
def test_curvlinops_spectrum_is_theirs_for_the_same_nodes(log: bool) -> None:
    theirs = real("curvlinops.papyan2020traces.spectrum")
    ours = importlib.import_module("hvpfast.compat.curvlinops")
    from hvpfast.analysis.density.quadrature import spectral_density

    model, (x, y) = perceptron(), classes(11, 4)
    A = ours.HessianLinearOperator(model, LOSS, list(model.parameters()), batches(x, y))
    quadrature = spectral_density(A, 12, 1, distribution="normal", seed=3)
    run = quadrature.ritz_values[0], quadrature.weights[:1].sqrt()
    options = {"num_points": 200, "kappa": 1.5, "margin": 0.1}
    if log:
        expected = theirs.lanczos_approximate_log_spectrum_from_iter(
            run, boundaries=(1e-3, 2.0), epsilon=1e-5, **options
        )
        found = ours.lanczos_approximate_log_spectrum(
            A, 12, boundaries=(1e-3, 2.0), seed=3, **options
        )
    else:
        expected = theirs.lanczos_approximate_spectrum_from_iter(
            run, boundaries=(-1.0, 2.0), **options
        )
        found = ours.lanczos_approximate_spectrum(A, 12, boundaries=(-1.0, 2.0), seed=3, **options)
    for mine, other in zip(found, expected, strict=True):
        close(mine, other, 1e-9)


# PyHessian


@pytest.mark.parametrize("loader", [False, True])
def test_pyhessian(loader: bool) -> None:
    theirs = real("pyhessian")
    ours = importlib.import_module("hvpfast.compat.pyhessian")
    model, (x, y) = perceptron(dtype=torch.float32), classes(30, 4, dtype=torch.float32)
    data: dict[str, Any] = {"data": (x, y)}
    if loader:
        data = {"dataloader": DataLoader(TensorDataset(x, y), batch_size=8)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        B = theirs.hessian(model, LOSS, **data, cuda=False)
        values, vectors = B.eigenvalues(maxIter=1000, tol=1e-7, top_n=2)
        samples = B.trace(maxIter=30, tol=0.0)
    A = ours.hessian(model, LOSS, **data, cuda=False, seed=0)
    mine, own = A.eigenvalues(tol=1e-4, top_n=2)
    close(torch.tensor(mine), torch.tensor(values), 1e-3)
    for vector, other in zip(own, vectors, strict=True):
        assert [v.shape for v in vector] == [v.shape for v in other]
        overlap = sum(float((v * o).sum()) for v, o in zip(vector, other, strict=True))
        assert abs(overlap) > 0.999
    drawn = A.trace(maxIter=30)
    assert type(drawn) is type(samples)
    assert type(drawn[0]) is type(samples[0])
    spread = 5 * (torch.tensor(drawn).var() * (1 / len(drawn) + 1 / len(samples))) ** 0.5
    assert abs(sum(drawn) / len(drawn) - sum(samples) / len(samples)) < float(spread)


# pytorch_optimizer


@pytest.mark.parametrize("name", ["AdaHessian", "SophiaH"])
def test_pytorch_optimizer_takes_the_diagonal(name: str) -> None:
    theirs = real("pytorch_optimizer")
    from hvpfast.compat.pytorch_optimizer import hessian_for

    model, (x, y) = perceptron(dtype=torch.float32), classes(30, 4, dtype=torch.float32)
    optimizer = getattr(theirs, name)(model.parameters(), lr=0.05)
    losses = []
    for step in range(15):
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        diagonal = hessian_for(optimizer, model, LOSS, (x, y), 2, seed=step)
        optimizer.step(hessian=diagonal)
        losses.append(float(loss.detach()))
        for p, d in zip(model.parameters(), diagonal, strict=True):
            assert torch.equal(optimizer.state[p]["hessian"], d)
    assert losses[-1] < losses[0]


# laplace-torch


def laplace_parts() -> tuple[Any, Any, Any]:
    package = real("laplace")
    theirs = importlib.import_module("laplace.curvature")
    return package, importlib.import_module("hvpfast.compat.laplace"), theirs


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_laplace_ggn(subset: str, structure: str, likelihood: str) -> None:
    package, ours, theirs = laplace_parts()
    model, (x, y) = perceptron(dtype=torch.float32), classes(30, 4, dtype=torch.float32)
    y = y if likelihood == "classification" else tangents(30, 3, dtype=torch.float32)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    options = {"subset_of_weights": subset, "hessian_structure": structure}
    fits = []
    for backend in (ours.HvpfastGGN, theirs.CurvlinopsGGN):
        fit = package.Laplace(model, likelihood, backend=backend, **options)
        fit.fit(loader)
        fits.append(fit)
    A, B = fits
    close(A.H, B.H.reshape(A.H.shape), 1e-4)
    close(torch.as_tensor(A.loss), torch.as_tensor(B.loss), 1e-5)
    close(A.log_marginal_likelihood(), B.log_marginal_likelihood(), 1e-4)
    close(A(x[:3])[0], B(x[:3])[0], 1e-4)


def test_laplace_hessian() -> None:
    _, ours, theirs = laplace_parts()
    model, (x, y) = perceptron(dtype=torch.float32), classes(30, 4, dtype=torch.float32)
    backends = [
        kind(model, "classification") for kind in (ours.HvpfastHessian, theirs.CurvlinopsHessian)
    ]
    (loss, H), (other_loss, other) = (backend.full(x, y) for backend in backends)
    close(H, other, 1e-4)
    close(loss, other_loss, 1e-5)
    loss, diagonal = backends[0].diag(x, y)
    close(diagonal, other.diagonal(), 1e-4)
    close(loss, other_loss, 1e-5)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_laplace_subnetwork(structure: str) -> None:
    package, ours, theirs = laplace_parts()
    model, (x, y) = perceptron(dtype=torch.float32), classes(30, 4, dtype=torch.float32)
    indices = torch.tensor([0, 3, 30, 31, 70])
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    fits = []
    for backend in (ours.HvpfastGGN, theirs.CurvlinopsGGN):
        fit = package.Laplace(
            model, "classification", subset_of_weights="subnetwork", backend=backend,
            hessian_structure=structure, subnetwork_indices=indices,
        )  # fmt: skip
        fit.fit(loader)
        fits.append(fit)
    close(fits[0].H, fits[1].H, 1e-4)


def test_laplace_says_what_is_not_offered() -> None:
    _, ours, _ = laplace_parts()
    model, (x, y) = perceptron(dtype=torch.float32), classes(30, 4, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="stochastic=True is not offered"):
        ours.HvpfastGGN(model, "classification", stochastic=True)
    with pytest.raises(NotImplementedError):
        ours.HvpfastGGN(model, "classification").kron(x, y, N=30)
