"""Losses that use the model's parameters themselves, as regularisers do, are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import classes
from torch import Tensor, nn

import hvpfast as hf

pytestmark = [
    pytest.mark.usefixtures("single_threaded"),
    pytest.mark.filterwarnings("ignore::hvpfast.mlp.module_checks.SlowBackendWarning"),
]
REFUSED = r"loss_fn uses the parameter \d\.\w+ itself"


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def squares(model: nn.Module) -> Any:
    return sum(p.square().sum() for p in model.parameters())


def decay(model: nn.Module) -> Callable[..., Tensor]:
    return lambda z, y: (
        F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() for p in model.parameters())
    )


def last_layer(model: nn.Sequential) -> Callable[..., Tensor]:
    weight = model[2].weight  # the object, held by the closure
    return lambda z, y: F.cross_entropy(z, y) + weight.abs().mean()


def consolidation(model: nn.Module) -> Callable[..., Tensor]:
    old = [p.detach() + 1 for p in model.parameters()]
    return lambda z, y: (
        F.cross_entropy(z, y)
        + sum((p - q).square().sum() for p, q in zip(model.parameters(), old, strict=True))
    )


CALLS: dict[str, Callable[[nn.Module, Any, Any], Any]] = {
    "operator": lambda m, loss, data: hf.HessianOperator(m, loss, None, data, reduction="mean"),
    "GGN": lambda m, loss, data: hf.GGNOperator(m, loss, None, data, reduction="mean"),
    "penalty": lambda m, loss, data: hf.hessian_penalty(m, loss, data, seed=0),
    "landscape": lambda m, loss, data: hf.landscape.plane(
        m, loss, None, data, num_points=3, seed=0, reduction="mean"
    ),
}


@pytest.mark.parametrize("regulariser", [decay, last_layer, consolidation])
@pytest.mark.parametrize("call", CALLS)
def test_it_is_refused_by_name(call: str, regulariser: Callable[..., Any]) -> None:
    model = made()
    with pytest.raises(ValueError, match=REFUSED):
        CALLS[call](model, regulariser(model), classes(6, 4))
    with torch.no_grad(), pytest.raises(ValueError, match=REFUSED):
        CALLS[call](model, regulariser(model), classes(6, 4))


@pytest.mark.parametrize("call", CALLS)
def test_constants_and_other_networks_may_be_used(call: str) -> None:
    model, teacher = made(), made()
    x, y = classes(6, 4)
    size = squares(model).detach()
    soft = teacher(x)  # with a graph, which ends in other parameters
    CALLS[call](model, lambda z, y: (z - soft[: len(z)]).square().mean() + size, (x, y))


class WithDecay(nn.Module):
    """The way that the message names: the regulariser comes with the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), 0.1 * squares(self)


def test_a_regulariser_in_forward_is_differentiated() -> None:
    model, (x, y) = WithDecay(), classes(6, 4)

    def loss(z: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(z[0], y) + z[1]

    H = hf.HessianOperator(model, loss, None, (x, y), reduction="mean")
    plain = hf.HessianOperator(made(), nn.CrossEntropyLoss(), None, (x, y))
    eye = torch.eye(H.shape[0]).double()
    torch.testing.assert_close(H @ eye, plain @ eye + 0.2 * eye)
