"""torch.compile(fullgraph=True) of penalised training steps and of products."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, problem
from networks import Penalised, mlp_of
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.functional import torch_ops

ops = torch.ops.hvpfast
CASE = Case(hf.MLPSpec((4, 5, 3), "tanh"), N=6, K=2)
# torch's own compiler uses what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def step_of(backend: str) -> Callable[..., Tensor]:
    def step(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return 2 * module(x, y)

    return torch.compile(step, fullgraph=True, backend=backend)


def gradients_of(module: nn.Module, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, [p for p in module.parameters() if p.requires_grad]))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.parametrize("sequential", [False, True])
def test_compiled_training_step(sequential: bool, compiler: str) -> None:
    p = problem(CASE)
    model: nn.Module = mlp_of(CASE).to_sequential() if sequential else mlp_of(CASE)
    module = Penalised(model, seed=2**63 + 1, num_probes=2)
    total = step_of(compiler)(module, p.x, p.y)
    expected = 2 * module(p.x, p.y)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradients_of(module, total), gradients_of(module, expected))


@needs_compiler
def test_compiled_products() -> None:
    p, key = problem(CASE), CASE.spec.key
    (flat,), V = [p.params], p.tangents.T.contiguous()

    @torch.compile(fullgraph=True, backend="inductor")
    def rayleigh(flat: Tensor, V: Tensor) -> Tensor:
        products = ops.hvp([2 * flat], p.x, p.y, V / V.norm(dim=1, keepdim=True), key)
        return (products * V).sum(1) / V.norm(dim=1)

    flat, V = flat.requires_grad_(), V.requires_grad_()
    exact = ops.hvp([2 * flat], p.x, p.y, V, key)
    expected = (exact * V).sum(1) / V.square().sum(1)
    actual = rayleigh(flat, V)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), (flat, V)),
        torch.autograd.grad(expected.sum(), (flat, V)),
    )


def test_compiled_with_frozen_parameters_and_class_weights() -> None:
    p = problem(CASE)
    model = mlp_of(CASE).to_sequential()
    model[2].requires_grad_(False)
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))

    def both(x: Tensor, y: Tensor) -> Tensor:
        loss, penalty = hf.hessian_penalty(model, loss_fn, (x, y), seed=1, curvature="ggn")
        return loss + penalty

    total = torch.compile(both, fullgraph=True, backend="aot_eager")(p.x, p.y)
    expected = both(p.x, p.y)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradients_of(model, total), gradients_of(model, expected))


def test_compiled_code_follows_changes_of_model_and_loss() -> None:
    p, model, loss_fn = problem(CASE), mlp_of(CASE).to_sequential(), nn.CrossEntropyLoss()
    model.append(nn.Dropout(0.5).eval())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return hf.hessian_penalty(model, loss_fn, (x, y), seed=1)[0]

    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(p.x, p.y), loss(p.x, p.y))
    loss_fn.reduction = "sum"
    torch.testing.assert_close(fast(p.x, p.y), loss(p.x, p.y))
    model[3].train()
    with pytest.raises(Exception, match="layer 3 is Dropout in train mode"):
        fast(p.x, p.y)


def test_seeds_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    p, model = problem(CASE), mlp_of(CASE)
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(1)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def penalty(seed: int | Tensor | None) -> Tensor:
        return hf.hessian_penalty(model, F.cross_entropy, (p.x, p.y), seed=seed)[1]

    fast = torch.compile(penalty, fullgraph=True, backend=count)
    for seed in range(5, 10):
        assert fast(seed) == penalty(seed)
    assert len(compiled) <= 2  # a constant at first, then an input
    compiled.clear()
    for number in range(5, 8):
        seed = torch.tensor(number)
        assert fast(seed) == penalty(seed)
    assert len(compiled) == 1
    compiled.clear()

    # None: new probes in every call, and for each of two calls in one graph; backward reuses them
    drawn = iter(range(1, 100))
    monkeypatch.setattr(torch_ops, "fresh_seed", lambda: next(drawn))

    def two() -> Tensor:
        return torch.stack([penalty(None), penalty(None)])

    run = torch.compile(two, fullgraph=True, backend=count)
    for first in (1, 3):
        values = run()
        expected = torch.stack([penalty(first), penalty(first + 1)])
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(
            gradients_of(model, values @ values.detach()),
            gradients_of(model, expected @ expected.detach()),
        )
    assert len(compiled) == 1


def test_other_models_raise_under_compile() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 3))

    def penalty(x: Tensor, y: Tensor) -> Tensor:
        return hf.hessian_penalty(model, F.cross_entropy, (x, y))[1]

    x, y = torch.ones(2, 1, 4), torch.tensor([0, 1])
    with pytest.raises(Exception, match="takes multilayer perceptrons, but layer 0 is Conv1d"):
        torch.compile(penalty, fullgraph=True, backend="eager")(x, y)
    with pytest.raises(NotImplementedError, match="takes multilayer perceptrons, but layer 0"):
        torch.func.vmap(penalty)(x[None], y[None])
