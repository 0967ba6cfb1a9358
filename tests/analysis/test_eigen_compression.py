"""Row-space compression: the same eigenpairs as the dense matrix of the whole perceptron."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from dense import dense
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.analysis.eigen.compression import NotCompressibleError, compress
from hvpfast.analysis.eigen.solver import eigsh

pytestmark = pytest.mark.usefixtures("single_threaded")

LOSS = nn.CrossEntropyLoss()
OPERATORS = {False: hf.HessianOperator, True: hf.GGNOperator}


def net(sizes: tuple[int, ...], bias: bool = True, activation: type[nn.Module] = nn.Tanh) -> Any:
    """A perceptron of torch layers in float64."""
    layers: list[nn.Module] = []
    for d_in, d in itertools.pairwise(sizes):
        layers += [nn.Linear(d_in, d, bias), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator).double() / p.shape[-1] ** 0.5)
    return model


def batch(n: int, d0: int, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Normal inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d0, generator=generator).double()
    return x, torch.randint(classes, (n,), generator=generator)


def largest(A: Tensor, k: int) -> Tensor:
    """The k eigenvalues of largest magnitude."""
    values = torch.linalg.eigvalsh(A)
    return values[values.abs().argsort(descending=True)][:k]


@pytest.mark.parametrize("ggn", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("split", [(6,), (2, 3, 1)])
def test_same_eigenpairs(ggn: bool, bias: bool, split: tuple[int, ...]) -> None:
    model, (x, y) = net((14, 5, 3), bias), batch(6, 14)
    data = list(zip(x.split(split), y.split(split), strict=True))
    H = OPERATORS[ggn](model, LOSS, None, data)
    small = compress(H)
    assert small.operator.shape[0] == H.shape[0] - 5 * (14 - 6) == H.shape[0] - small.num_null
    result = eigsh(H, 5, tol=1e-9, seed=0, compress=True)
    torch.testing.assert_close(
        result.eigenvalues, largest(dense(model, LOSS, x, y, ggn=ggn), 5), rtol=1e-10, atol=1e-13
    )
    Y = result.eigenvectors
    assert Y.shape == (H.shape[0], 5)
    torch.testing.assert_close(Y.T @ Y, torch.eye(5).double(), rtol=0, atol=1e-12)
    residuals = torch.linalg.vector_norm(H @ Y - Y * result.eigenvalues, dim=0)
    assert bool((residuals <= 1e-9 * result.eigenvalues.abs()).all())
    assert result.compressed is not None and "rank 6 of 14" in result.compressed


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(),
        nn.CrossEntropyLoss(torch.tensor([1.0, 0.5, 2.0]).double(), label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=1, reduction="sum"),
    ],
)
def test_losses(loss: nn.Module) -> None:
    model, (x, y) = net((12, 4, 3), activation=nn.Sigmoid), batch(7, 12)
    target = torch.randn(7, 3, generator=torch.Generator().manual_seed(3)).double()
    y = target if isinstance(loss, nn.MSELoss) else y
    H = hf.HessianOperator(model, loss, None, [(x[:3], y[:3]), (x[3:], y[3:])])
    result = eigsh(H, 4, tol=1e-9, seed=0, compress=True)
    torch.testing.assert_close(result.eigenvalues, largest(dense(model, loss, x, y), 4))


def test_flat_module_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    model = hf.MLP((40, 8, 6, 3), "relu", generator=generator)
    x = torch.randn(9, 40, generator=generator)
    y = torch.randint(3, (9,), generator=generator)
    H = hf.HessianOperator(model, LOSS, None, (x, y))
    state = torch.get_rng_state()
    result = eigsh(H, 6, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.compressed is not None
    plain = eigsh(H, 6, seed=0, compress=False)
    assert plain.compressed is None
    torch.testing.assert_close(result.eigenvalues, plain.eigenvalues, rtol=2e-6, atol=0)
    theta = result.eigenvalues.float()
    residuals = torch.linalg.vector_norm(
        H @ result.eigenvectors - result.eigenvectors * theta, dim=0
    )
    assert bool((residuals <= 1e-4 * theta.abs()).all())


@pytest.mark.parametrize("k", [4, 12])
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("ggn", [False, True])
def test_zeros_of_the_null_space_take_their_place(which: str, k: int, ggn: bool) -> None:
    """With few samples few eigenvalues have the wanted sign, and zeros come before the others."""
    model, (x, y) = net((30, 3, 2), activation=nn.Sigmoid), batch(2, 30, 2)
    H = OPERATORS[ggn](model, LOSS, None, (x, y))
    truth = torch.linalg.eigvalsh(dense(model, LOSS, x, y, ggn=ggn)).flip(0)
    wanted = {
        "LM": largest(dense(model, LOSS, x, y, ggn=ggn), k),
        "LA": truth[:k],
        "SA": truth.flip(0)[:k],
        "BE": torch.cat([truth[: k - k // 2], truth[len(truth) - k // 2 :]]),
    }[which]
    result = eigsh(H, k, which, tol=1e-6, seed=0, compress=True)
    if which == "LM":  # zeros in any order
        torch.testing.assert_close(result.eigenvalues.abs(), wanted.abs(), rtol=1e-8, atol=1e-13)
    else:
        torch.testing.assert_close(result.eigenvalues, wanted, rtol=1e-8, atol=1e-13)
    assert result.converged.all(), result.message
    Y = result.eigenvectors
    torch.testing.assert_close(Y.T @ Y, torch.eye(k).double(), rtol=0, atol=1e-10)
    assert float((H @ Y - Y * result.eigenvalues).abs().max()) < 1e-6


def test_inputs_of_low_rank() -> None:
    """More samples than columns, but pixels that are mixtures of a few."""
    model = net((24, 4, 3))
    generator = torch.Generator().manual_seed(2)
    mixture = torch.randn(6, 24, generator=generator).double()
    x = torch.randn(80, 6, generator=generator).double() @ mixture
    y = torch.randint(3, (80,), generator=generator)
    H = hf.HessianOperator(model, LOSS, None, (x, y))
    assert compress(H).operator.shape[0] == H.shape[0] - 4 * 18
    result = eigsh(H, 5, tol=1e-8, seed=0)
    assert result.compressed is not None and "rank 6 of 24" in result.compressed
    torch.testing.assert_close(result.eigenvalues, largest(dense(model, LOSS, x, y), 5))
    # one sample elsewhere is found among the many, and kept
    x[50] = torch.randn(24, generator=generator).double()
    H = hf.HessianOperator(model, LOSS, None, (x, y))
    result = eigsh(H, 5, tol=1e-8, seed=0)
    assert result.compressed is not None and "rank 7 of 24" in result.compressed
    torch.testing.assert_close(result.eigenvalues, largest(dense(model, LOSS, x, y), 5))


def test_warm_start_in_the_given_space() -> None:
    model, (x, y) = net((40, 6, 3)), batch(12, 40)
    H = hf.HessianOperator(model, LOSS, None, (x, y))
    cold = eigsh(H, 3, tol=1e-6, seed=0, block_size=1)
    warm = eigsh(H, 3, tol=1e-6, seed=0, block_size=1, V0=cold.eigenvectors)
    assert cold.compressed is not None and warm.num_matvecs < cold.num_matvecs
    small = compress(H)
    rows = cold.eigenvectors.T
    torch.testing.assert_close(small.lift(small.project(rows)), rows)


def test_what_cannot_be_compressed() -> None:
    model, (x, y) = net((5, 4, 3)), batch(40, 5)
    cases = {
        "more than half as many independent directions": hf.HessianOperator(
            model, LOSS, None, (x, y)
        ),
        "all parameters of the perceptron": hf.HessianOperator(model, LOSS, "0.*", (x[:2], y[:2])),
        "HessianOperator or GGNOperator": torch.eye(3),
    }
    for message, operator in cases.items():
        with pytest.raises(NotCompressibleError, match=message):
            compress(operator)
        assert eigsh(operator, 2, seed=0).compressed is None
        with pytest.raises(ValueError, match=message):
            eigsh(operator, 2, seed=0, compress=True)


def test_changed_parameters_are_noticed() -> None:
    model, (x, y) = net((20, 4, 3)), batch(5, 20)
    H = hf.HessianOperator(model, LOSS, None, (x, y))
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        eigsh(H, 2, seed=0)
