"""hessian_penalty on every kind of model: frozen parameters, other modules, changes of modules."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from networks import Small, gradients, small
from oracle import dense_hessian
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.functional.hessian_penalty import hessian_penalty
from hvpfast.mlp import module_checks as checks

CURVATURES = ("hessian", "ggn")


@pytest.fixture(name="small")
def _small() -> Small:
    return small()


# ---- frozen parameters ----


def block_of_dense(spec: hf.MLPSpec, flat: Tensor, x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    return dense_hessian(spec, flat, x, y)[keep][:, keep]


def test_frozen_parameters_are_constants(small: Small) -> None:
    mlp, loss_fn, (x, y) = small
    model = mlp.to_sequential()
    model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
    spec = hf.spec_of(model, loss_fn)
    keep = torch.arange(20, spec.num_params)  # W1 is (4, 5)
    V = hf.probes(len(keep), 3, seed=4, dtype=torch.float64)

    def truth(flat: Tensor) -> Tensor:
        return (block_of_dense(spec, flat, x, y, keep) @ V).square().sum(0).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error", checks.SlowBackendWarning)
        _, penalty = hessian_penalty(model, loss_fn, (x, y), num_probes=3, seed=4)
    flat = mlp.flat.detach()
    torch.testing.assert_close(penalty.detach(), truth(flat))
    penalty.backward()
    assert model[0].weight.grad is None  # type: ignore[union-attr]
    step, direction = 1e-6, torch.zeros_like(flat)
    direction[keep] = torch.randn(len(keep), dtype=torch.float64)
    slope = (truth(flat + step * direction) - truth(flat - step * direction)) / (2 * step)
    torch.testing.assert_close(gradients(model) @ direction[keep], slope, rtol=1e-6, atol=1e-8)
    for wrong in (V[1:], V.T, V[:, :0]):
        with pytest.raises(ValueError, match="over the parameters that require gradients"):
            hessian_penalty(model, loss_fn, (x, y), tangents=wrong)


def test_some_trainable_agrees_with_reference_on_any_loss(small: Small) -> None:
    mlp, loss_fn, data = small
    model = mlp.to_sequential()
    model[2].requires_grad_(False)
    results = []
    for loss in (loss_fn, lambda z, y: F.cross_entropy(z, y)):
        for curvature in CURVATURES:
            values = hessian_penalty(
                model, loss, data, seed=1, curvature=curvature, backend="reference"
            )
            results.append((*values, *torch.autograd.grad(sum(values), model[0].parameters())))
    torch.testing.assert_close(results[:2], results[2:])


def test_all_frozen_means_all_parameters(small: Small) -> None:
    model, loss_fn, data = small
    expected = [t.item() for t in hessian_penalty(model, loss_fn, data, seed=1)]
    model.requires_grad_(False)
    results = hessian_penalty(model, loss_fn, data, seed=1)
    assert [t.item() for t in results] == expected
    assert not any(t.requires_grad for t in results)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.norm(self.conv(x)))).flatten(1))


@pytest.fixture
def conv() -> Iterator[tuple[ConvNet, tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ConvNet().double().eval()
        yield model, (torch.randn(5, 1, 4, 4).double(), torch.randint(3, (5,)))


Conv = tuple[ConvNet, tuple[Tensor, Tensor]]


def smooth_hinge(z: Tensor, y: Tensor) -> Tensor:
    margins = z - z.gather(1, y[:, None])
    return F.softplus(margins).square().mean()


def test_any_model_and_loss_run_on_the_reference(
    conv: Conv, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = conv
    monkeypatch.setattr(checks, "_warned", set())
    with pytest.warns(checks.SlowBackendWarning, match="ConvNet runs on the slow reference") as w:
        loss, penalty = hessian_penalty(model, smooth_hinge, (x, y), seed=2, num_probes=2)
    assert w[0].filename == __file__
    named = dict(model.named_parameters())
    numels = [p.numel() for p in named.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()]).requires_grad_()

    def objective(flat: Tensor) -> Tensor:
        parts = [
            part.view(p.shape) for part, p in zip(flat.split(numels), named.values(), strict=True)
        ]
        parameters = dict(zip(named, parts, strict=True))
        return smooth_hinge(torch.func.functional_call(model, parameters, (x,)), y)

    V = hf.probes(sum(numels), 2, seed=2, dtype=torch.float64)
    H = torch.autograd.functional.hessian(objective, flat, create_graph=True)
    truth = (H @ V).square().sum(0).mean()
    torch.testing.assert_close(loss, objective(flat))
    torch.testing.assert_close(penalty, truth)
    (loss + 0.1 * penalty).backward()
    expected = torch.autograd.grad(objective(flat) + 0.1 * truth, flat)[0]
    torch.testing.assert_close(gradients(model), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, and never for an explicit choice
        hessian_penalty(model, smooth_hinge, (x, y), curvature="ggn")
        monkeypatch.setattr(checks, "_warned", set())
        hessian_penalty(model, smooth_hinge, (x, y), backend="reference")
    with pytest.raises(RuntimeError, match="backend 'cpu' takes multilayer perceptrons, but"):
        hessian_penalty(model, smooth_hinge, (x, y), backend="cpu")


@pytest.mark.parametrize("name", ["norm", "dropout"])
def test_train_mode_raises(conv: Conv, name: str) -> None:
    model, data = conv
    model.get_submodule(name).train()
    with pytest.raises(ValueError, match=f"layer {name} is .* in train mode"):
        hessian_penalty(model, F.cross_entropy, data)


def test_changes_of_model_and_loss_are_seen(small: Small) -> None:
    mlp, loss_fn, data = small
    model = mlp.to_sequential()
    model.insert(2, nn.Dropout(0.5).eval())
    mean = hessian_penalty(model, loss_fn, data)[0]
    torch.testing.assert_close(mean, loss_fn(model(data[0]), data[1]))
    model[2].train()
    with pytest.raises(ValueError, match="layer 2 is Dropout in train mode"):
        hessian_penalty(model, loss_fn, data)
    model[2].eval()
    loss_fn.reduction = "sum"
    torch.testing.assert_close(hessian_penalty(model, loss_fn, data)[0], 7 * mean)
    loss_fn.weight = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(hessian_penalty(model, loss_fn, data)[0], 7 * mean)
    loss_fn.weight.mul_(2)
    torch.testing.assert_close(hessian_penalty(model, loss_fn, data)[0], 14 * mean)
    scaled = functools.partial(F.cross_entropy, weight=loss_fn.weight)
    torch.testing.assert_close(hessian_penalty(model, scaled, data)[0], mean)
    model[1] = nn.Sigmoid()
    new = hessian_penalty(model, F.cross_entropy, data)[0]
    torch.testing.assert_close(new, F.cross_entropy(model(data[0]), data[1]))
    model[0].weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))  # type: ignore[assignment]
    new = hessian_penalty(model, F.cross_entropy, data)[0]
    torch.testing.assert_close(new, F.cross_entropy(model(data[0]), data[1]))


def test_plans_do_not_stick_to_models(small: Small) -> None:
    mlp, loss_fn, data = small
    model: nn.Sequential | None = mlp.to_sequential()
    assert model is not None
    hessian_penalty(model, loss_fn, data)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin.state_dict().keys() == model.state_dict().keys()
    ref = weakref.ref(model)
    gc.disable()
    try:
        model = None
        assert ref() is None
    finally:
        gc.enable()
