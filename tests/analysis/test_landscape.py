"""Landscapes: losses against moved parameters, directions, files, interruptions, figures."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense import ConvNet, classes, convnet, custom_loss, dense, perceptron, redraw
from planes import small_plane
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvpfast as hf
from hvpfast.analysis import landscape
from hvpfast.mlp.spec import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("single_threaded")

LOSS = nn.CrossEntropyLoss()


def moved(model: nn.Module, step: Tensor) -> nn.Module:
    """A copy of the model whose parameters are moved by a flat step."""
    other = copy.deepcopy(model)
    pieces = step.split([p.numel() for p in other.parameters()])
    with torch.no_grad():
        for p, piece in zip(other.parameters(), pieces, strict=True):
            p += piece.view(p.shape)
    return other


def expected(
    model: nn.Module, loss: Callable[..., Tensor], surface: Any, x: Tensor, y: Tensor
) -> Tensor:
    """The surface by moving a copy of the model to every point."""
    d = surface.directions
    ys = [0.0] if surface.y is None else surface.y.tolist()
    rows = []
    with torch.no_grad():
        for a in surface.x.tolist():
            steps = [a * d[:, 0] + (b * d[:, 1] if surface.y is not None else 0) for b in ys]
            rows.append([float(loss(moved(model, step)(x), y)) for step in steps])
    out = torch.tensor(rows, dtype=torch.float64)
    return out if surface.y is not None else out[:, 0]


WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2, label_smoothing=0.1),
    "mse": nn.MSELoss(),
    "mse sum": nn.MSELoss(reduction="sum"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("points_at_once", ["auto", 1, 4])
def test_perceptrons_at_many_points(loss: nn.Module, points_at_once: Any) -> None:
    model, (x, y) = perceptron(), classes(23, 4)
    if isinstance(loss, nn.MSELoss):
        y = torch.randn(23, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    data = list(zip(x.split(7), y.split(7), strict=True))  # ragged
    for ignore in ("bias,norm", None):
        found = landscape.plane(
            model, loss, None, data, seed=3, num_points=(5, 3), ignore=ignore,
            points_at_once=points_at_once,
        )  # fmt: skip
        truth = expected(model, loss, found, x, y)
        torch.testing.assert_close(found.losses, truth, rtol=1e-12, atol=1e-13)
        assert found.center_loss == pytest.approx(float(truth[2, 1]), rel=1e-12)
        assert float(found.losses[2, 1]) == pytest.approx(found.center_loss, rel=1e-14)
        assert found.complete


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_flat_perceptrons_of_every_activation(activation: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    model = hf.MLP((4, 6, 5, 3), activation, bias, dtype=torch.float64, generator=generator)
    x, y = classes(11, 4)
    found = landscape.plane(model, F.cross_entropy, None, (x, y), seed=3, num_points=3)
    truth = expected(model, F.cross_entropy, found, x, y)
    torch.testing.assert_close(found.losses, truth, rtol=1e-12, atol=1e-13)
    assert found.param_names[0] == "0.weight"


@pytest.mark.parametrize("source", ["list", "loader"])
def test_other_modules_by_functional_call(source: str) -> None:
    model, (x, y) = convnet(), classes(11, 1, 4, 4)
    data: Any = list(zip(x.split(4), y.split(4), strict=True))
    if source == "loader":
        data = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    for loss, reduction in ((LOSS, None), (custom_loss, "mean")):
        found = landscape.plane(
            model, loss, None, data, seed=1, num_points=3, span=0.5, reduction=reduction
        )
        truth = expected(model, loss, found, x, y)
        torch.testing.assert_close(found.losses, truth, rtol=1e-12, atol=1e-13)
    assert set(found.settings["still"]) == {"conv.bias", "norm.weight", "norm.bias", "head.bias"}
    part = landscape.line(model, LOSS, "head.*", data, seed=1, num_points=3)
    d = torch.zeros(sum(p.numel() for p in model.parameters()), 1, dtype=torch.float64)
    d[-27:] = part.directions
    torch.testing.assert_close(
        part.losses,
        torch.stack([LOSS(moved(model, a * d[:, 0])(x), y).detach() for a in part.x]),
        rtol=1e-12, atol=0,
    )  # fmt: skip


def test_part_of_a_perceptron_moves() -> None:
    model, (x, y) = perceptron(), classes(9, 4)
    found = landscape.line(model, LOSS, "2.*", (x, y), seed=1, num_points=5, ignore=None)
    assert found.param_names == ("2.weight", "2.bias")
    step = torch.zeros(82, dtype=torch.float64)
    step[25:61] = found.directions[:, 0]
    truth = torch.stack([LOSS(moved(model, a * step)(x), y).detach() for a in found.x])
    torch.testing.assert_close(found.losses, truth, rtol=1e-12, atol=0)


def norms(flat: Tensor, model: nn.Module) -> list[Tensor]:
    """Norms of the filters of every weight."""
    pieces = flat.split([p.numel() for p in model.parameters()])
    named = zip(model.named_parameters(), pieces, strict=True)
    return [piece.view(len(p), -1).norm(dim=1) for (_, p), piece in named if p.dim() > 1]


@pytest.mark.parametrize("make", [perceptron, convnet])
def test_filter_normalised_directions_are_orthogonal_with_the_norms_of_the_filters(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    x, y = classes(5, 1, 4, 4) if isinstance(model, ConvNet) else classes(5, 4)
    found = landscape.plane(model, LOSS, None, (x, y), seed=2, num_points=2)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for d in found.directions.T:
        for got, wanted in zip(norms(d, model), norms(flat, model), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    d1, d2 = found.directions.T
    assert abs(float(d1 @ d2)) < 1e-13
    assert float((d1 - d2).norm()) > 0.5 * float(d1.norm())
    moving = [n for n, _ in model.named_parameters() if n not in found.settings["still"]]
    assert all(n.endswith("weight") and "norm" not in n for n in moving)
    assert "norm of each filter" in found.unit
    assert f"length {float(d1.norm()):.4g} and" in found.unit


def test_layer_and_length_normalisation() -> None:
    model, data = perceptron(), classes(5, 4)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    sizes = [p.numel() for p in model.parameters()]
    found = landscape.plane(
        model, LOSS, None, data, seed=2, num_points=2, normalize="layer", ignore=None
    )
    for d in found.directions.T:
        for got, wanted in zip(d.split(sizes), flat.split(sizes), strict=True):
            torch.testing.assert_close(got.norm(), wanted.norm(), rtol=1e-12, atol=0)
    assert abs(float(found.directions[:, 0] @ found.directions[:, 1])) < 1e-13
    plain = landscape.plane(model, LOSS, None, data, seed=2, num_points=2, normalize=None)
    torch.testing.assert_close(
        plain.directions.T @ plain.directions, torch.eye(2).double(), rtol=0, atol=1e-14
    )
    raw = hf.probes(82, 1, distribution="normal", seed=2, dtype=torch.float64)[:, 0]
    raw[[*range(20, 25), *range(55, 61), *range(79, 82)]] = 0  # biases
    torch.testing.assert_close(plain.directions[:, 0], raw / raw.norm())
    assert plain.unit.startswith("distance 1 is a step of length 1")


def test_filters_of_one_entry_count_as_one_group() -> None:
    model = redraw(nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double(), 0)
    data = torch.randn(5, 1).double(), torch.randn(5, 1).double()
    found = landscape.plane(model, nn.MSELoss(), None, data, seed=2, num_points=3)
    d = found.directions[:6]
    norm = model[0].weight.detach().norm()
    torch.testing.assert_close(d.norm(dim=0), norm.expand(2), rtol=1e-12, atol=0)
    assert abs(float(d[:, 0] @ d[:, 1])) < 1e-14


def test_along_eigenvectors_the_curvature_is_the_eigenvalue() -> None:
    model, (x, y) = perceptron(), classes(20, 4)
    values, vectors = torch.linalg.eigh(dense(model, LOSS, x, y))
    found = landscape.plane(
        model, LOSS, None, (x, y), directions=vectors[:, [-1, 0]], span=1e-3, num_points=3
    )
    torch.testing.assert_close(found.directions, vectors[:, [-1, 0]], rtol=0, atol=1e-14)
    assert found.settings["normalize"] is None
    assert found.seed is None
    assert "one given direction" in found.unit
    f, h = found.losses, 1e-3  # second differences are off by O(h^2)
    for second, wanted in ((f[:, 1], values[-1]), (f[1], values[0])):
        got = float(second[0] - 2 * second[1] + second[2]) / h**2
        assert got == pytest.approx(float(wanted), abs=1e-4)


def test_given_directions() -> None:
    model, data = perceptron(), classes(5, 4)
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 82, dtype=torch.float64, generator=generator)
    found = landscape.plane(model, LOSS, None, data, directions=(u, v), num_points=2)
    torch.testing.assert_close(found.directions[:, 0], u)
    second = found.directions[:, 1]
    assert abs(float(second @ u)) < 1e-12
    assert float(second.norm()) == pytest.approx(float(v.norm()))
    line = landscape.line(model, LOSS, None, data, direction=u, span=(0, 1), num_points=3)
    assert line.x.tolist() == [0, 0.5, 1]
    assert line.y is None
    wrong: Any
    for wrong, message in (
        (u[None].T, "must be columns"),
        ((u, v[:5]), "must be columns"),
        ((u, 3 * u), "parallel"),
        ((u, 0 * u), "positive, finite length"),
    ):
        with pytest.raises(ValueError, match=message):
            landscape.plane(model, LOSS, None, data, directions=wrong)
    with pytest.raises(ValueError, match="drop it"):
        landscape.plane(model, LOSS, None, data, directions=(u, v), seed=1)


def test_the_model_and_the_generators_are_not_touched() -> None:
    class Noisy(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
            self.norm.running_mean += 1  # a forward that writes to buffers
            return super().forward(x)

    model: Any = redraw(Noisy().double(), 0).eval()
    x, y = classes(6, 1, 4, 4)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    state = copy.deepcopy(model.state_dict())
    versions = [p._version for p in (*model.parameters(), *model.buffers())]
    legacy = np.random.get_state
    before = torch.get_rng_state(), legacy()[1].copy(), random.getstate()
    data = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    landscape.plane(model, LOSS, None, data, num_points=2)
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )
    assert versions == [p._version for p in (*model.parameters(), *model.buffers())]
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.conv.bias.grad is None
    assert bool((model.conv.weight.grad == 1).all())
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == legacy()[1]).all()
    assert before[2] == random.getstate()
    with pytest.raises(ValueError, match="train mode"):
        landscape.plane(model.train(), LOSS, None, data, num_points=2)


def test_bad_input() -> None:
    model, data = perceptron(), classes(5, 4)
    wrong: Any
    for wrong, message in (
        ({"normalize": "row"}, "normalize must be"),
        ({"ignore": "bias,weights"}, "ignore must be one of"),
        ({"span": -1.0}, "span must go up"),
        ({"span": (1.0, float("inf"))}, "span must go up"),
        ({"num_points": 1}, "num_points must be"),
        ({"num_points": (3, 3, 3)}, "two axes"),
        ({"points_at_once": 0}, "points_at_once"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=message):
            landscape.plane(model, LOSS, None, data, **wrong)
    with pytest.raises(ValueError, match="leaves nothing to move"):
        landscape.plane(model, LOSS, "*.bias", data)
    with pytest.raises(ValueError, match="no target counts"):
        landscape.plane(
            model, nn.CrossEntropyLoss(ignore_index=1), None, (data[0], torch.ones(5).long())
        )
    fresh = [landscape.plane(model, LOSS, None, data, num_points=2).seed for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_axes_hold_the_center_and_may_differ() -> None:
    found = small_plane(None, span=((-0.3, 0.3), 2.0), num_points=(7, 3))
    assert found.losses.shape == (7, 3)
    assert float(found.x[3]) == 0
    assert found.y is not None
    assert found.y.tolist() == [-2, 0, 2]
    assert float(found.losses[3, 1]) == pytest.approx(found.center_loss, rel=1e-14)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    small_plane(None, progressbar=True)
    assert "36/36" in capsys.readouterr().err
