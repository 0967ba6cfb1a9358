"""hf.optim: what an optimizer owes torch, and what it refuses."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import perceptron
from optimizing import adam, batches, flat, run
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.optim import CURVATURES, AdaHessian, HessianLRAdaptation

pytestmark = pytest.mark.usefixtures("single_threaded")


BASES: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda params: torch.optim.Adam(params, lr=1e-2),
    lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    lambda params: torch.optim.RMSprop(params, lr=1e-3),
]


@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_saved_run_goes_on_bit_for_bit(
    make: Callable[[Any], torch.optim.Optimizer], curvature: str
) -> None:
    data = batches(6)
    model = perceptron()
    optimizer = HessianLRAdaptation(make(model.parameters()), curvature, seed=11)
    run(model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, data[3:])

    file.seek(0)
    stored = torch.load(file, weights_only=True)
    again = perceptron(seed=5)
    other = HessianLRAdaptation(make(again.parameters()), curvature, beta=0.5, eps=1.0)
    again.load_state_dict(stored["model"])
    other.load_state_dict(stored["optimizer"])
    assert (other.beta, other.eps, other.seed, other.num_steps) == (0.9, 1e-8, 11, 3)
    assert other.param_groups is other.base.param_groups
    run(again, other, data[3:])
    assert torch.equal(flat(again), flat(model))


def test_adahessian_goes_on_bit_for_bit() -> None:
    data = batches(4)
    model = perceptron()

    def some(model: nn.Module, optimizer: AdaHessian, part: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in part:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step(operator=hf.HessianOperator(model, F.cross_entropy, None, (x, y)))

    optimizer = AdaHessian(model.parameters(), 0.05, seed=1)
    some(model, optimizer, data[:2])
    stored = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    some(model, optimizer, data[2:])
    again = perceptron(seed=5)
    again.load_state_dict(stored[0])
    other = AdaHessian(again.parameters(), 0.1)
    other.load_state_dict(stored[1])
    some(again, other, data[2:])
    assert torch.equal(flat(again), flat(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_is_whole_and_its_own(duplicate: Callable[[Any], Any]) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = HessianLRAdaptation(adam([p]), beta=0.7, seed=2)
    for t in range(3):
        p.grad = torch.full((3,), float(t + 1))
        optimizer.step()
    other = duplicate(optimizer)
    (q,) = other.param_groups[0]["params"]
    assert q is not p
    assert other.param_groups is other.base.param_groups
    assert (other.beta, other.seed, other.num_steps) == (0.7, 2, 3)
    before = p.detach().clone()
    q.grad = torch.full((3,), 9.0)
    other.step()
    assert torch.equal(p, before)
    p.grad = torch.full((3,), 9.0)
    optimizer.step()
    assert torch.equal(p, q)


def test_schedulers_and_groups_are_the_base_optimizers() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([{"params": [a], "lr": 0.5}], lr=0.1)
    optimizer = HessianLRAdaptation(base)
    optimizer.add_param_group({"params": [b]})
    assert [group["lr"] for group in base.param_groups] == [0.5, 0.1]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for p in (a, b):
        p.grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in base.param_groups] == [0.25, 0.05]
    assert a[0] == 0.5
    assert b[0].item() == pytest.approx(0.9)
    optimizer.zero_grad()
    assert a.grad is None
    assert "HessianLRAdaptation(difference" in repr(optimizer)


def test_hooks_run_once_a_step_and_the_loss_comes_back() -> None:
    model = nn.Linear(3, 1)
    optimizer = HessianLRAdaptation(adam(model.parameters()))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    evaluations = itertools.count()

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        next(evaluations)
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    truth = closure().item()
    assert optimizer.step(closure).item() == truth
    assert next(evaluations) == 2
    assert seen == ["pre", "post"]


def test_the_secant_evaluates_twice_and_puts_the_parameters_back() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = HessianLRAdaptation(torch.optim.SGD([p], lr=0.1), "secant")
    points: list[list[float]] = []

    def closure() -> Tensor:
        points.append(p.tolist())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    now = p.tolist()
    optimizer.step(closure)
    assert points == [[1, 1], [1, 1], now]

    def failing() -> Tensor:
        raise ArithmeticError

    now = p.tolist()
    with pytest.raises(ArithmeticError):
        optimizer.step(failing)
    assert p.tolist() == now


# what it refuses


def test_wrong_arguments_are_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"must be a torch\.optim.Optimizer; got Parameter"):
        HessianLRAdaptation(p)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LBFGS evaluates closures inside its step"):
        HessianLRAdaptation(torch.optim.LBFGS([p]))
    for wrong, message in (
        ({"curvature": "diagonal"}, "curvature"),
        ({"beta": 1.0}, "beta must be in"),
        ({"eps": -1.0}, "eps must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            HessianLRAdaptation(adam([p]), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="betas must be in"):
        AdaHessian([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="lr must be at least 0"):
        AdaHessian([p], -1.0)


def test_what_a_curvature_needs_must_be_given() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    p.grad, q.grad = torch.ones(2), torch.ones(1)
    with pytest.raises(TypeError, match=r"secant.*step\(closure\)"):
        HessianLRAdaptation(adam([p]), "secant").step()
    for curvature in ("hutchinson", "exact"):
        with pytest.raises(TypeError, match=r"step\(operator=H\)"):
            HessianLRAdaptation(adam([p]), curvature).step()
    with pytest.raises(TypeError, match=r"step\(operator=H\)"):
        AdaHessian([p]).step()
    with pytest.raises(TypeError, match="'difference' uses no operator"):
        HessianLRAdaptation(adam([p])).step(operator=torch.eye(2))
    with pytest.raises(ValueError, match="P = 3, and the parameters with a gradient have 2"):
        HessianLRAdaptation(adam([p]), "hutchinson").step(operator=torch.eye(3))
    assert p.tolist() == [1, 1]


def test_an_operator_with_the_parameters_in_another_order_is_refused() -> None:
    model = nn.Linear(2, 2)
    x, y = torch.ones(3, 2), torch.tensor([0, 1, 1])
    F.cross_entropy(model(x), y).backward()
    optimizer = HessianLRAdaptation(adam([model.bias, model.weight]), "hutchinson")
    with pytest.raises(ValueError, match="in the order of its groups"):
        optimizer.step(operator=hf.HessianOperator(model, F.cross_entropy, None, (x, y)))
    operator = hf.HessianOperator(model, F.cross_entropy, [model.bias, model.weight], (x, y))
    optimizer.step(operator=operator)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = HessianLRAdaptation(torch.optim.SGD(table.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="dense and real"):
        optimizer.step()


def test_a_state_of_another_kind_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = HessianLRAdaptation(adam([p]))
    with pytest.raises(ValueError, match=r"load that of a plain optimizer into \.base"):
        optimizer.load_state_dict(adam([p]).state_dict())
    secant = HessianLRAdaptation(adam([p]), "secant")
    with pytest.raises(ValueError, match="has curvature 'difference', and this optimizer has"):
        secant.load_state_dict(optimizer.state_dict())
