"""hessian_penalty without probes, and of the trace: values, gradients, options, errors."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from backends_here import BACKENDS
from cases import FEW, Case, problem
from dense import classes, close, convnet, perceptron
from networks import gradients, loss_module, mlp_of, small
from oracle import loss_of, outputs
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.functional.linearize import linearize
from hvpfast.mlp.spec import ACTIVATIONS, MLPSpec

pytestmark = pytest.mark.usefixtures("single_threaded")

functional = torch.autograd.functional
CASES = [
    *FEW,
    *(Case(MLPSpec((2, 3, 4, 2, 2), a), 3) for a in ACTIVATIONS),
    *(Case(MLPSpec((3, 4, 3, 2), a, "mse"), 4) for a in ACTIVATIONS),
]


@functools.cache
def truth(case: Case, kind: str, curvature: str) -> tuple[Tensor, Tensor]:
    """The loss plus 0.7 times the penalty and its gradient, through a dense matrix."""
    spec, p = case.spec, problem(case)
    flat = p.flat.clone().requires_grad_()

    def loss(q: Tensor) -> Tensor:
        return loss_of(spec, outputs(spec, q, p.x), p.y)

    if curvature == "hessian":
        A = functional.hessian(loss, flat, create_graph=True)
    else:
        z = outputs(spec, flat, p.x)
        J = functional.jacobian(lambda q: outputs(spec, q, p.x), flat, create_graph=True)
        D = functional.hessian(lambda t: loss_of(spec, t, p.y), z, create_graph=True)
        J = J.reshape(z.numel(), -1)
        A = J.T @ D.reshape(z.numel(), z.numel()) @ J
    total = loss(flat) + 0.7 * (A.square().sum() if kind == "fro2" else A.trace())
    return total.detach(), torch.autograd.grad(total, flat)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("kind", ["fro2", "trace"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient(case: Case, kind: str, curvature: str, backend: str) -> None:
    p, model = problem(case), mlp_of(case)
    options: Any = {"kind": kind, "curvature": curvature, "backend": backend}
    loss, penalty = hf.hessian_penalty(
        model, loss_module(case.spec, case.dtype), (p.x, p.y), estimator="exact", **options
    )
    total = loss + 0.7 * penalty
    total.backward()
    value, gradient = truth(case, kind, curvature)
    close(total.detach(), value, 1e-10)
    close(gradients(model), gradient, 1e-10)
    lin = linearize(case.spec, p.params, p.x, p.y, backend=backend)
    found = hf.penalty(lin, estimator="exact", weights=(1.0, 0.7), kind=kind, curvature=curvature)
    close(found[0] + 0.7 * found[1], value, 1e-10)
    close(found[2], gradient, 1e-10)
    with torch.no_grad():
        values = hf.hessian_penalty(
            model, loss_module(case.spec, case.dtype), (p.x, p.y), estimator="exact", **options
        )
    close(values[0] + 0.7 * values[1], value, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("kind", ["fro2", "trace"])
def test_gradcheck(kind: str, curvature: str, estimator: str, backend: str) -> None:
    model, loss_fn, data = small()

    def penalties(flat: Tensor) -> tuple[Tensor, Tensor]:
        options: Any = {"kind": kind, "curvature": curvature, "backend": backend, "seed": 3}
        module = Penalised(model, loss_fn, data, estimator=estimator, **options)
        return torch.func.functional_call(module, {"model.flat": flat}, ())

    assert torch.autograd.gradcheck(penalties, model.flat.detach().clone().requires_grad_())


class Penalised(nn.Module):
    """hessian_penalty as a module, so that functional_call can give the parameters."""

    def __init__(self, model: nn.Module, loss_fn: nn.Module, data: Any, **options: Any) -> None:
        super().__init__()
        self.model, self.loss_fn, self.data, self.options = model, loss_fn, data, options

    def forward(self) -> tuple[Tensor, Tensor]:
        return hf.hessian_penalty(self.model, self.loss_fn, self.data, **self.options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["fro2", "trace"])
@pytest.mark.parametrize("frozen", [["0.weight"], ["2.weight", "2.bias"], ["0.bias", "4.weight"]])
def test_frozen_parameters_are_constants(frozen: list[str], kind: str, backend: str) -> None:
    model, (x, y) = perceptron(), classes(7, 4)
    loss_fn = nn.CrossEntropyLoss()
    everything = dict(model.named_parameters())
    for name in frozen:
        everything[name].requires_grad_(False)
    loss, penalty = hf.hessian_penalty(
        model, loss_fn, (x, y), kind=kind, estimator="exact", backend=backend
    )
    (loss + 0.7 * penalty).backward()
    names = [name for name in everything if name not in frozen]
    shapes = [everything[name].shape for name in names]
    flat = torch.cat([everything[n].detach().reshape(-1) for n in names]).requires_grad_()

    def objective(q: Tensor) -> Tensor:
        pieces = q.split([shape.numel() for shape in shapes])
        own = {n: t.view(s) for n, t, s in zip(names, pieces, shapes, strict=True)}
        rest = {n: everything[n].detach() for n in frozen}
        return loss_fn(torch.func.functional_call(model, {**rest, **own}, (x,)), y)

    H = functional.hessian(objective, flat, create_graph=True)
    total = objective(flat) + 0.7 * (H.square().sum() if kind == "fro2" else H.trace())
    total.backward()
    assert flat.grad is not None and everything[frozen[0]].grad is None
    close((loss + 0.7 * penalty).detach(), total.detach(), 1e-10)
    close(gradients(model), flat.grad, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
@pytest.mark.parametrize("kind", ["fro2", "trace"])
def test_graph_can_be_kept_and_is_of_first_order(kind: str, estimator: str, backend: str) -> None:
    model, loss_fn, data = small()
    options: Any = {"kind": kind, "estimator": estimator, "backend": backend, "seed": 5}
    loss, penalty = hf.hessian_penalty(model, loss_fn, data, **options)
    (loss - 2 * penalty).backward(retain_graph=True)
    first = gradients(model).clone()
    (loss - 2 * penalty).backward(retain_graph=True)
    close(gradients(model), 2 * first, 1e-14)
    model.flat.grad = None
    (g,) = torch.autograd.grad(penalty, model.flat, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        g.sum().backward()


def test_hutchinson_trace_is_the_quadratic_form() -> None:
    model, loss_fn, (x, y) = small()
    V = torch.randn(
        model.flat.numel(), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    for curvature in ("hessian", "ggn"):
        loss, penalty = hf.hessian_penalty(
            model, loss_fn, (x, y), kind="trace", curvature=curvature, tangents=V
        )
        lin = linearize(hf.spec_of(model, loss_fn), model.flat, x, y)
        close(penalty.detach(), hf.quadratic_form(lin, V, curvature=curvature).mean(), 1e-14)
        model.flat.grad = None
        (0.5 * loss + penalty).backward()
        expected = 0.5 * lin.grad + hf.hvp_vjp(lin, V, V, curvature=curvature) / 3
        found = hf.penalty(lin, V, kind="trace", weights=(0.5, 1.0), curvature=curvature)
        close(found[2], expected, 1e-14)
        close(gradients(model), expected, 1e-13)


@pytest.mark.parametrize("kind", ["fro2", "trace"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_probes_average_to_the_exact_value(kind: str, curvature: str) -> None:
    model, loss_fn, data = small()
    options: Any = {"kind": kind, "curvature": curvature}
    with torch.no_grad():
        exact = float(hf.hessian_penalty(model, loss_fn, data, estimator="exact", **options)[1])
        means = torch.stack(
            [
                hf.hessian_penalty(model, loss_fn, data, num_probes=100, seed=s, **options)[1]
                for s in range(60)
            ]
        )
    stderr = float(means.std()) / 60**0.5
    assert abs(float(means.mean()) - exact) < 4 * stderr < 0.1 * exact


def test_trace_of_other_models_and_of_some_parameters() -> None:
    net, (x, y) = convnet(), classes(5, 1, 4, 4)
    loss_fn = nn.CrossEntropyLoss()
    V = torch.randn(sum(p.numel() for p in net.parameters()), 2, dtype=torch.float64)
    options: Any = {"kind": "trace", "tangents": V, "backend": "reference"}
    value = hf.hessian_penalty(net, loss_fn, (x, y), **options)[1]
    H = hf.HessianOperator(net, loss_fn, None, (x, y), backend="reference")
    close(value.detach(), (V * (H @ V)).sum(0).mean(), 1e-12)
    model = perceptron()
    model[0].requires_grad_(False)
    data = classes(9, 4)
    W = torch.randn(sum(p.numel() for p in model[2:].parameters()), 2, dtype=torch.float64)
    loss, value = hf.hessian_penalty(model, loss_fn, data, kind="trace", tangents=W)
    block = hf.HessianOperator(model, loss_fn, None, data)
    close(value.detach(), (W * (block @ W)).sum(0).mean(), 1e-12)
    (loss + value).backward()
    assert model[2].weight.grad is not None and model[0].weight.grad is None


def test_trace_inside_torch_func() -> None:
    model, loss_fn, data = small()
    module = Penalised(model, loss_fn, data, kind="trace", num_probes=2, seed=7)

    def total(flat: Tensor) -> Tensor:
        loss, penalty = torch.func.functional_call(module, {"model.flat": flat}, ())
        return loss + 0.3 * penalty

    flat = model.flat.detach().clone()
    transformed = torch.func.grad(total)(flat)
    leaf = flat.clone().requires_grad_()
    close(transformed, torch.autograd.grad(total(leaf), leaf)[0], 1e-12)


def test_errors() -> None:
    model, loss_fn, data = small()
    with pytest.raises(ValueError, match="kind must be one of fro2, trace"):
        hf.hessian_penalty(model, loss_fn, data, kind="fro")
    with pytest.raises(ValueError, match="estimator must be one of hutchinson, exact"):
        hf.hessian_penalty(model, loss_fn, data, estimator="xtrace")
    V = torch.ones(model.flat.numel(), dtype=torch.float64)
    with pytest.raises(ValueError, match="takes no tangents"):
        hf.hessian_penalty(model, loss_fn, data, estimator="exact", tangents=V)
    with pytest.raises(NotImplementedError, match="takes multilayer perceptrons"):
        hf.hessian_penalty(convnet(), nn.CrossEntropyLoss(), classes(5, 1, 4, 4), estimator="exact")
    module = Penalised(model, loss_fn, data, estimator="exact")
    flat = model.flat.detach()
    with pytest.raises(NotImplementedError, match="outside"):
        torch.func.grad(lambda p: torch.func.functional_call(module, {"model.flat": p}, ())[1])(
            flat
        )
    loss, penalty = hf.hessian_penalty(model, loss_fn, data, estimator="exact")
    with torch.no_grad():
        model.flat.add_(0.1)
    with pytest.raises(RuntimeError, match="inplace"):
        (loss + penalty).backward()
