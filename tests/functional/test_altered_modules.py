"""Modules whose calls compute something else than their classes say: never by a fused kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import classes, dense
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import hvpfast as hf

pytestmark = [
    pytest.mark.usefixtures("single_threaded"),
    pytest.mark.filterwarnings("ignore::hvpfast.mlp.module_checks.SlowBackendWarning"),
]


def made(kind: str = "sequential") -> nn.Module:
    torch.manual_seed(0)
    if kind == "MLP":
        return hf.MLP((4, 5, 3), "tanh", dtype=torch.float64)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Twice the function, under its name."""

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Tensor:
        return 2 * function(*args, **options)

    return wrapper


@contextmanager
def patched(owner: Any, name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, doubled(getattr(owner, name)))
        yield


@contextmanager
def hook_of_all_modules() -> Iterator[None]:
    handle = register_module_forward_hook(
        lambda module, args, out: out * 1.5 if isinstance(module, (nn.Linear, hf.MLP)) else None
    )
    try:
        yield
    finally:
        handle.remove()


ALTERED: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "forward of a layer": lambda m, loss: patched(m[0], "forward"),
    "forward of an activation": lambda m, loss: patched(m[1], "forward"),
    "forward of the container": lambda m, loss: patched(m, "forward"),
    "class of the layers": lambda m, loss: patched(nn.Linear, "forward"),
    "class of the activation": lambda m, loss: patched(nn.Tanh, "forward"),
    "class of the container": lambda m, loss: patched(nn.Sequential, "forward"),
    "forward of the loss": lambda m, loss: patched(loss, "forward"),
    "class of the loss": lambda m, loss: patched(nn.CrossEntropyLoss, "forward"),
    "function of the loss": lambda m, loss: patched(F, "cross_entropy"),
    "all modules": lambda m, loss: hook_of_all_modules(),
}
OF_MLP: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "forward of an MLP": lambda m, loss: patched(m, "forward"),
    "class MLP": lambda m, loss: patched(hf.MLP, "forward"),
    "all modules and an MLP": lambda m, loss: hook_of_all_modules(),
}


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("name", [*ALTERED, *OF_MLP])
def test_what_the_module_computes_is_differentiated(name: str, called_before: bool) -> None:
    model = made("MLP" if name in OF_MLP else "sequential")
    loss_fn, (x, y) = nn.CrossEntropyLoss(), classes(6, 4)
    plain = dense(model, loss_fn, x, y)
    if called_before:
        hf.hessian_penalty(model, loss_fn, (x, y), seed=0)
        hf.HessianOperator(model, loss_fn, None, (x, y))
    with {**ALTERED, **OF_MLP}[name](model, loss_fn):
        truth = dense(model, loss_fn, x, y)
        assert not torch.allclose(truth, plain)
        H = hf.HessianOperator(model, loss_fn, None, (x, y), reduction="mean")
        eye = torch.eye(len(truth)).double()
        torch.testing.assert_close(H @ eye, truth)
        loss, penalty = hf.hessian_penalty(model, loss_fn, (x, y), tangents=eye)
        torch.testing.assert_close(loss.detach(), loss_fn(model(x), y).detach())
        torch.testing.assert_close(penalty.detach() * len(truth), truth.square().sum())
        with pytest.raises(hf.NotAnMLPError):
            hf.spec_of(model, loss_fn)
    assert hf.spec_of(model, loss_fn).sizes == (4, 5, 3)
    again = hf.HessianOperator(model, loss_fn, None, (x, y))
    torch.testing.assert_close(again @ eye, plain)
    assert again.backend != "reference" or hf.available()["cpu"] is not None
