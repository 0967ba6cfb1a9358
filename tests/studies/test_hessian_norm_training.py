"""The training steps of the Hessian-norm study: each against torch's own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import hvpfast as hf
from hvpfast.lab.data import splits
from hvpfast.lab.measure.curvature import exact_curvature
from hvpfast.studies.hessian_norm import experiment as hessian_norm
from hvpfast.studies.hessian_norm.torch_baseline import (
    exact_step,
    hessian_fro2,
    penalty,
    train_by_torch,
)
from hvpfast.studies.hessian_norm.train import Setting, Shape, batches, step_of, train

for package in ("mnist1d", "matplotlib"):
    pytest.importorskip(package)

SMOKE = hessian_norm.PRESETS["smoke"]
SHAPE = Shape((40, 8, 10), epochs=2, batch_size=128, backend="reference", root_seed=0)
PLAIN = Setting("plain", "relu", 1e-2)
PENALISED = Setting("penalised", "relu", 1e-2, 1e-2)


@pytest.fixture(scope="module")
def small() -> splits.Data:
    return hessian_norm.load(SMOKE)


def losses(
    shape: Shape, made: splits.Data, setting: Setting, purpose: str = "final", seed: int = 0
) -> list[float]:
    return [row["val_loss"] for row in train(shape, made, setting, purpose, seed).epochs]


# trainings


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_the_plain_step_is_torch_training(small: splits.Data, strength: float) -> None:
    found = train(SHAPE, small, replace(PLAIN, strength=strength), "final", 5)
    start = hf.MLP(SHAPE.sizes, generator=splits.generator(0, "init", "final", 5))
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 10))
    with torch.no_grad():
        for p, value in zip(model.parameters(), start.weights, strict=True):
            p.copy_(value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=strength)
    order, expected = splits.generator(0, "batches", "final", 5), []
    for _ in range(2):
        for batch in torch.randperm(320, generator=order).split(128):
            optimizer.zero_grad()
            logits = model(small.train.x[batch])
            nn.functional.cross_entropy(logits, small.train.y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            expected.append(float(nn.functional.cross_entropy(model(small.val.x), small.val.y)))
    assert [row["val_loss"] for row in found.epochs[1:]] == pytest.approx(expected, rel=1e-4)
    assert all(row["batch_penalty"] is None for row in found.epochs)


def one_step(
    small: splits.Data, setting: Setting, backend: str
) -> tuple[hf.MLP, splits.Split, tuple[float, float | None, torch.Tensor]]:
    generator = splits.generator(0, "test")
    model = hf.MLP(SHAPE.sizes, setting.activation, dtype=torch.float64, generator=generator)
    batch = splits.Split(small.train.x[:50].double(), small.train.y[:50])
    before = model.flat.detach().clone()
    result = step_of(replace(SHAPE, backend=backend), model, setting)(batch, 11)
    assert torch.equal(model.flat, before)
    return model, batch, result


def autograd(model: hf.MLP, batch: splits.Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and its gradient, with a graph."""
    ce = nn.functional.cross_entropy(model(batch.x), batch.y)
    return ce, torch.autograd.grad(ce, model.flat, create_graph=True)[0]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_penalised_gradient_is_double_backward_with_the_same_probe(
    small: splits.Data, backend: str
) -> None:
    setting = Setting("penalised", "tanh", 1e-2, 0.03)
    model, batch, (loss, value, grad) = one_step(small, setting, backend)
    v = hf.probes(model.flat.numel(), seed=11, dtype=torch.float64)[:, 0]
    ce, g = autograd(model, batch)
    (hv,) = torch.autograd.grad(g @ v, model.flat, create_graph=True)
    (expected,) = torch.autograd.grad(ce + 0.03 * hv.square().sum(), model.flat)
    assert loss == pytest.approx(ce.item(), rel=1e-12)
    assert value == pytest.approx(hv.square().sum().item(), rel=1e-10)
    assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(grad, g)  # the penalty does reach the parameters


def test_the_placebo_computes_the_penalty_and_leaves_the_gradient(small: splits.Data) -> None:
    setting = Setting("placebo", "tanh", 1e-2, 0.03)
    _, _, (loss, value, grad) = one_step(small, setting, "auto")
    _, _, (same, penalised, _) = one_step(small, replace(setting, method="penalised"), "auto")
    _, _, (_, _, plain) = one_step(small, replace(setting, method="plain"), "auto")
    assert (loss, value) == pytest.approx((same, penalised), rel=1e-12)
    assert torch.equal(grad, plain)


def test_the_exact_gradient_is_that_of_the_whole_norm(small: splits.Data) -> None:
    setting = Setting("exact", "tanh", 1e-2, 0.03)
    model, batch, (_, value, grad) = one_step(small, setting, "auto")
    ce, g = autograd(model, batch)
    expected, norm = torch.autograd.grad(ce, model.flat, retain_graph=True)[0], 0.0
    for basis in torch.eye(len(g), dtype=g.dtype).split(200):
        (rows,) = torch.autograd.grad(
            g, model.flat, basis, create_graph=True, is_grads_batched=True
        )
        part = rows.square().sum()
        norm += part.item()
        expected += torch.autograd.grad(0.03 * part, model.flat, retain_graph=True)[0]
    assert value == pytest.approx(norm, rel=1e-9)
    assert torch.allclose(grad, expected, rtol=1e-8, atol=1e-11)


def test_sam_takes_the_gradient_at_the_worst_point_of_a_ball(small: splits.Data) -> None:
    setting = Setting("sam", "tanh", 1e-2, 0.3)
    model, batch, (loss, value, grad) = one_step(small, setting, "auto")
    ce, g = autograd(model, batch)
    with torch.no_grad():
        model.flat.add_(0.3 * g / g.norm())
    _, expected = autograd(model, batch)
    assert (loss, value) == (pytest.approx(ce.item(), rel=1e-12), None)
    assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_placebo_is_the_baseline_bit_for_bit(small: splits.Data, backend: str) -> None:
    shape = replace(SHAPE, backend=backend)
    base = losses(shape, small, PLAIN)
    assert losses(shape, small, replace(PENALISED, method="placebo")) == base
    assert losses(shape, small, PENALISED)[0] == base[0]
    assert losses(shape, small, PENALISED)[2] != base[2]


def test_arms_of_a_seed_share_weights_and_batches_and_seeds_do_not(small: splits.Data) -> None:
    base = losses(SHAPE, small, PLAIN)
    tiny = losses(SHAPE, small, replace(PENALISED, strength=1e-12))
    assert tiny == pytest.approx(base, rel=1e-4)
    assert losses(SHAPE, small, PLAIN) == base
    assert losses(SHAPE, small, PLAIN, "tune")[0] != base[0]
    assert losses(SHAPE, small, PLAIN, "final", 1)[0] != base[0]
    other = train(SHAPE, small, PLAIN, "final", 0, order="other").epochs
    assert other[0]["val_loss"] == base[0]
    assert other[2]["val_loss"] != base[2]


def test_batches_are_the_permuted_data_and_probes_differ(small: splits.Data) -> None:
    epochs = [list(epoch) for epoch in batches(SHAPE, small, "final", 0)]
    assert [len(batch.y) for batch, _ in epochs[0]] == [128, 128, 64]
    for epoch in epochs:
        rows = torch.cat([batch.x for batch, _ in epoch])
        assert torch.equal(rows.sort(0).values, small.train.x.sort(0).values)
    assert not torch.equal(epochs[0][0][0].x, epochs[1][0][0].x)
    assert len({seed for epoch in epochs for _, seed in epoch}) == 6


def test_training_leaves_global_state_alone(small: splits.Data) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train(SHAPE, small, PENALISED, "final", 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["plain", "penalised", "placebo", "exact", "sam"])
def test_divergence_is_a_result(small: splits.Data, method: str) -> None:
    setting = Setting(method, "relu", 1e30, 1e-3)
    shape = replace(SHAPE, backend="auto")
    assert train(shape, small, setting, "final", 0).diverged
    if method == "plain":
        config = replace(SMOKE, seeds=(0,), torch_seeds=(0,))
        (*_, final) = hessian_norm.final_rows(config, small, "baseline", 0, setting)
        assert final["diverged"]
        assert "test_loss" not in final
        rows = list(hessian_norm.trial_rows(config, small, "rate", "baseline", 0, setting))
        assert hessian_norm.mean_loss(rows) == math.inf


# what torch autograd alone does


@pytest.mark.parametrize("setting", [PLAIN, Setting("sam", "relu", 1e-2, 0.1)])
def test_training_by_torch_is_the_same_training(small: splits.Data, setting: Setting) -> None:
    ours = train(SHAPE, small, setting, "final", 3).model
    theirs = train_by_torch(SHAPE, small, setting, "final", 3)
    with torch.no_grad():
        assert torch.allclose(ours(small.test.x), theirs(small.test.x), rtol=1e-3, atol=1e-3)


def test_the_exact_step_of_torch_is_ours(small: splits.Data) -> None:
    setting = Setting("exact", "tanh", 1e-2, 0.03)
    model, batch, (_, _, grad) = one_step(small, setting, "auto")
    theirs = model.to_sequential()
    params = list(theirs.parameters())
    exact_step(theirs, params, batch, 0.03)
    found = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
    assert torch.allclose(found, grad, rtol=1e-8, atol=1e-11)
    placebo = replace(PENALISED, method="placebo")
    plain, same = (train_by_torch(SHAPE, small, s, "final", 0) for s in (PLAIN, placebo))
    assert torch.equal(plain(small.test.x), same(small.test.x))


def test_the_penalty_of_torch_has_the_mean_of_ours(small: splits.Data) -> None:
    model = hf.MLP((40, 4, 10), "tanh", generator=splits.generator(0, "test")).to_sequential()
    x, y = small.train.x[:30], small.train.y[:30]
    params = list(model.parameters())
    values = []
    for seed in range(200):
        loss = nn.functional.cross_entropy(model(x), y)
        values.append(float(penalty(loss, params, seed).detach()))
    norm = hessian_fro2(model, splits.Split(x, y))
    assert abs(np.mean(values) - norm) < 4 * np.std(values) / math.sqrt(200)
    loss = nn.functional.cross_entropy(model(x), y)
    penalty(loss, params, 0).backward()
    assert params[0].grad is not None
    assert float(params[0].grad.norm()) > 0
    flat = hf.MLP.from_sequential(model)
    found = exact_curvature(flat, splits.Split(x, y), "auto")
    assert found["hessian_fro2"] == pytest.approx(norm, rel=1e-3)
