"""The flatness study: its data, its training, its measures, and functions of one's own."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import dense_ggn, dense_hessian
from torch import nn

import hvpfast as hf
from hvpfast.lab.data.splits import Data, Split, generator
from hvpfast.lab.runs.config import field_docs
from hvpfast.lab.runs.folder import StudyError
from hvpfast.studies.flatness import data as flatness_data
from hvpfast.studies.flatness import experiment as flatness
from hvpfast.studies.flatness import measure as flatness_measures
from hvpfast.studies.flatness import timing
from hvpfast.studies.flatness import train as flatness_training

pytest.importorskip("matplotlib")

SMOKE = replace(flatness.PRESETS["smoke"], backend="reference")
NONE_OF_MINE = flatness_data.Custom()


@pytest.fixture(scope="module")
def data() -> Data:
    return flatness_data.load(NONE_OF_MINE, SMOKE)


def make(data: Data, **changes: Any) -> Any:
    return flatness.maker(NONE_OF_MINE, replace(SMOKE, **changes), data)


# data and networks


def test_the_networks_are_those_of_the_original(data: Data) -> None:
    published = flatness.PRESETS["published"]
    made = flatness_data.load(NONE_OF_MINE, published)
    assert (len(made.train.y), len(made.test.y)) == (2400, 600)
    assert made.val is made.test
    assert flatness.maker(NONE_OF_MINE, published, made)(42).num_params == 28_516
    spec = hf.MLPSpec((3072, *flatness.Config().hidden, 100))
    assert spec.num_params == 812_388
    assert made.train.x.mean(0).abs().max() < 1e-4
    assert (made.train.x.std(0, correction=0) - 1).abs().max() < 1e-3


def test_held_out_samples_are_neither_trained_nor_tested_on(data: Data) -> None:
    parts = [{row.numpy().tobytes() for row in s.x} for s in (data.train, data.val, data.test)]
    assert [len(part) for part in parts] == [256, 64, 100]
    assert not parts[0] & parts[1] | parts[1] & parts[2] | parts[0] & parts[2]


def test_weights_are_he_normal_and_biases_zero() -> None:
    model = flatness_training.perceptron((400, 300, 10), "relu", torch.float64, 1)
    W1, b1, W2, b2 = model.weights
    assert float(W1.detach().std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert float(W2.detach().std()) == pytest.approx(math.sqrt(2 / 300), rel=0.06)
    assert not b1.detach().any()
    assert not b2.detach().any()


def test_a_batch_that_is_not_there_is_refused() -> None:
    with pytest.raises(StudyError, match="fewer than a batch"):
        flatness_data.load(NONE_OF_MINE, replace(SMOKE, n_samples=50))


# training


@pytest.mark.parametrize("kind", ["mlp", "module"])
def test_the_penalised_gradient_is_double_backward_with_the_same_probes(kind: str) -> None:
    model = flatness_training.perceptron((6, 5, 4), "tanh", torch.float64, 0)
    net = flatness_training.network(model, "reference")
    if kind == "module":
        net = flatness_training.network(model.to_sequential(), "reference")
    twin = timing.twin(model)
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Split(x, torch.arange(20) % 4)
    loss, penalty = flatness_training.step_gradient(net, batch, 0.03, 3, seed=11)
    rows = hf.probes(59, 3, distribution="normal", seed=11, dtype=torch.float64).T
    expected = timing.torch_gradient(twin, batch, 0.03, rows)
    assert loss == pytest.approx(float(expected[0]), rel=1e-12)
    assert penalty == pytest.approx(float(expected[1]), rel=1e-10)
    ours, theirs = (timing.flat_gradient(m) for m in (net.model, twin))
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    timing.torch_gradient(twin, batch, 0.0, None)
    assert not torch.allclose(ours, timing.flat_gradient(twin))  # the penalty arrives


@pytest.mark.parametrize("kind", ["mlp", "module"])
def test_the_gauss_newton_matrix_can_be_penalised_instead(kind: str) -> None:
    model = flatness_training.perceptron((6, 5, 4), "tanh", torch.float64, 0)
    module = model if kind == "mlp" else model.to_sequential()
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Split(x, torch.arange(20) % 4)
    penalties = {}
    for penalised in ("hessian", "ggn"):
        net = flatness_training.network(module, "reference", penalised)
        penalties[penalised] = flatness_training.step_gradient(net, batch, 0.1, 3, seed=11)[1]
    rows = hf.probes(59, 3, distribution="normal", seed=11, dtype=torch.float64)
    G = dense_ggn(hf.spec_of(model, F.cross_entropy), model.flat.detach(), batch.x, batch.y)
    assert penalties["ggn"] == pytest.approx(float((G @ rows).square().sum(0).mean()), rel=1e-9)
    assert penalties["hessian"] != pytest.approx(penalties["ggn"], rel=1e-3)


def test_lambda_zero_is_plain_torch_training(data: Data) -> None:
    net = make(data)(3)
    model = timing.twin(net.model)
    trained = flatness_training.train(SMOKE, data, net, 0.0, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=SMOKE.learning_rate)
    batches, losses = generator(SMOKE.root_seed, "batches", 3), []
    for _ in range(SMOKE.num_epochs):
        for index in torch.randperm(256, generator=batches).view(4, 64):
            timing.torch_gradient(model, Split(data.train.x[index], data.train.y[index]), 0.0, None)
            optimizer.step()
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(data.val.x), data.val.y)))
    assert [row["loss"] for row in trained.epochs[1:]] == pytest.approx(losses, rel=1e-4)


def test_lambdas_of_a_seed_share_weights_batches_and_probes_and_seeds_do_not(data: Data) -> None:
    def run(lam: float, seed: int) -> list[dict[str, Any]]:
        return flatness_training.train(SMOKE, data, make(data)(seed), lam, seed).epochs

    base, tiny, large = run(0.0, 0), run(1e-9, 0), run(10.0, 0)
    assert base[0] == large[0]
    assert [r["loss"] for r in tiny] == pytest.approx([r["loss"] for r in base], rel=1e-4)
    assert base[2]["loss"] != pytest.approx(large[2]["loss"], rel=1e-4)
    assert large[2]["train_objective"] == pytest.approx(
        large[2]["train_ce"] + 10 * large[2]["train_penalty"]
    )
    assert run(0.0, 0) == base
    assert run(0.0, 1)[0] != base[0]


def test_training_leaves_global_state_alone(data: Data) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    flatness_training.train(SMOKE, data, make(data)(0), 0.1, 0)
    flatness_training.custom(lambda: nn.Linear(10, 5), torch.float32, 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_custom_model_gets_its_weights_from_the_seed() -> None:
    first, again, other = (
        nn.utils.parameters_to_vector(
            flatness_training.custom(lambda: nn.Linear(10, 5), torch.float64, seed).parameters()
        )
        for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_divergence_is_a_result(data: Data, lam: float, tmp_path: Path) -> None:
    config = replace(SMOKE, learning_rate=1e30)
    make_one = flatness.maker(NONE_OF_MINE, config, data)
    rows = list(flatness.final_rows(NONE_OF_MINE, config, data, make_one, lam, 0, tmp_path))
    assert rows[-1]["diverged"]
    assert "test_loss" not in rows[-1]


def test_the_probes_of_a_step_are_told_from_fresh_ones(data: Data) -> None:
    config = replace(SMOKE, num_hutchinson_samples=1)
    trained = flatness_training.train(config, data, make(data)(0), 0.0, 0)
    assert len(set(trained.probes.values())) == 3
    net, batch = make(data)(0), Split(data.train.x[:64], data.train.y[:64])
    value = flatness_training.flatness(net, batch, 2, 5)
    rows = hf.probes(net.num_params, 2, distribution="normal", seed=5).T
    expected = timing.torch_gradient(timing.twin(net.model), batch, 1.0, rows)[1]
    assert value == pytest.approx(float(expected) / 64, rel=1e-4)


# measures


@pytest.fixture(scope="module")
def small() -> tuple[flatness_training.Network, Data, torch.Tensor]:
    """A network, its data and its dense Hessian on the train split."""
    random = torch.Generator().manual_seed(2)
    model = flatness_training.perceptron((5, 6, 4), "relu", torch.float64, 3)
    train, val, test = (
        Split(torch.randn(n, 5, dtype=torch.float64, generator=random), torch.arange(n) % 4)
        for n in (40, 12, 20)
    )
    spec = hf.spec_of(model, F.cross_entropy)
    H = dense_hessian(spec, model.flat.detach(), train.x, train.y)
    made = Data(train, val, test, check="", name="small", num_classes=4)
    return flatness_training.network(model, "auto"), made, H


def test_curvature_is_that_of_the_dense_hessian(small: Any) -> None:
    net, made, H = small
    config = replace(SMOKE, curvature_probes=400)
    found = flatness_measures.curvature(config, net, made, 0)
    assert found["hessian_fro2"] == pytest.approx(float(H.square().sum()), rel=1e-9)
    assert found["hessian_trace"] == pytest.approx(float(H.trace()), rel=1e-9)
    estimate, stderr = found["hessian_fro2_probes"], found["hessian_fro2_probes_stderr"]
    assert 0 < stderr < found["hessian_fro2"]
    assert abs(estimate - found["hessian_fro2"]) < 5 * stderr
    held_out = dense_hessian(net.spec, net.model.flat.detach(), made.val.x, made.val.y)
    assert found["held_out_fro2"] == pytest.approx(float(held_out.square().sum()), rel=1e-9)
    part = (made.train.x[:12], made.train.y[:12])
    H = dense_hessian(net.spec, net.model.flat.detach(), *part)
    assert found["part_fro2"] == pytest.approx(float(H.square().sum()), rel=1e-9)
    G = dense_ggn(net.spec, net.model.flat.detach(), *part)
    assert found["part_ggn_fro2"] == pytest.approx(float(G.square().sum()), rel=1e-9)


def test_curvature_of_part_of_the_samples(small: Any) -> None:
    net, made, _ = small
    found = flatness_measures.curvature(replace(SMOKE, curvature_samples=7), net, made, 0)
    H = dense_hessian(net.spec, net.model.flat.detach(), made.train.x[:7], made.train.y[:7])
    assert found["hessian_fro2"] == pytest.approx(float(H.square().sum()), rel=1e-9)


def test_filter_curvature_is_the_mean_over_filter_normalised_directions(small: Any) -> None:
    net, _, H = small
    random, values = torch.Generator().manual_seed(0), []
    for _ in range(3000):
        parts = []
        for W in (w.detach() for w in net.model.weights):
            d = torch.zeros_like(W)
            if W.dim() == 2:
                d = torch.randn(W.shape, dtype=torch.float64, generator=random)
                d *= (W.norm(dim=1) / d.norm(dim=1))[:, None]
            parts.append(d.reshape(-1))
        d = torch.cat(parts)
        values.append(float(d @ H @ d))
    stderr = np.std(values) / math.sqrt(len(values))
    found = flatness_measures.filter_curvature(net.model, H.diagonal())
    assert abs(found - np.mean(values)) < 4 * stderr
    assert stderr < 0.05 * abs(found)


def test_filter_curvature_does_not_see_the_scale_of_relu_layers(small: Any) -> None:
    net, made, H = small
    spec = net.spec
    W1, b1, W2, b2 = (w.detach() for w in net.model.weights)
    scaled = hf.MLP(spec.sizes, spec.activation, dtype=torch.float64)
    with torch.no_grad():
        scaled.flat.copy_(spec.flatten([10 * W1, 10 * b1, W2 / 10, b2]))
    other = dense_hessian(spec, scaled.flat.detach(), made.train.x, made.train.y)
    assert float(other.square().sum()) > 5 * float(H.square().sum())
    assert flatness_measures.filter_curvature(scaled, other.diagonal()) == pytest.approx(
        flatness_measures.filter_curvature(net.model, H.diagonal()), rel=1e-9
    )


def test_landscapes_go_through_the_network_and_agree_with_its_hessian(small: Any) -> None:
    _, made, _ = small
    tanh = flatness_training.perceptron((5, 6, 4), "tanh", torch.float64, 3)
    smooth = flatness_training.network(tanh, "auto")
    config = replace(SMOKE, landscape_points=5, landscape_planes=1, landscape_samples=40)
    rows = list(flatness_measures.landscape_rows(config, smooth, made, 0))
    lines, (centre,) = rows[:-1], rows[-1:]
    losses = np.array([[float(v) for v in row["losses"].split()] for row in lines])
    assert losses.shape == (5, 5)
    with torch.no_grad():
        loss = float(F.cross_entropy(tanh(made.train.x), made.train.y))
    assert losses[2, 2] == pytest.approx(loss, rel=1e-12)
    assert centre["loss"] == pytest.approx(loss, rel=1e-12)
    assert centre["mean_rise"] == pytest.approx(losses.mean() - loss)
    fine = replace(config, landscape_points=201)
    (last,) = list(flatness_measures.landscape_rows(fine, smooth, made, 0))[-1:]
    for axis in "xy":
        assert last[f"curvature_{axis}"] == pytest.approx(centre[f"curvature_{axis}"])
        assert last[f"difference_{axis}"] == pytest.approx(last[f"curvature_{axis}"], rel=1e-2)


def test_right_answers_survive_their_packing(small: Any) -> None:
    net, made, _ = small
    row = flatness_measures.scores(net.model, made)
    right = flatness_measures.rights(row, 20)
    assert right.mean() == pytest.approx(row["test_accuracy"])
    with torch.no_grad():
        expected = net.model(made.test.x).argmax(1) == made.test.y
    assert (right == expected.numpy()).all()


# configuration


def test_every_option_is_documented() -> None:
    assert set(field_docs(flatness.Config)) == {f.name for f in fields(flatness.Config)}
    wanted = {"n_samples", "learning_rate", "num_epochs", "batch_size", "lambda_values",
              "num_hutchinson_samples"}  # fmt: skip
    assert wanted <= {f.name for f in fields(flatness.Config)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": 0}, "num_epochs must be at least 1"),
        ({"test_samples": -1}, "test_samples must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"lambda_values": (0.1, 0.0)}, "must begin with 0"),
        ({"lambda_values": (0.0, 0.1, 0.1)}, "must begin with 0"),
        ({"lambda_values": ()}, "must begin with 0"),
        ({"landscape_lambda": 0.5}, "landscape_lambda must be one of"),
        ({"landscape_points": 10}, "landscape_points must be odd"),
        ({"seeds": (1, 1)}, "seeds must be different"),
    ],
)
def test_a_wrong_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(flatness.Config(), **change)


# functions of one's own


def images() -> tuple[Any, ...]:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(60, 1, 6, 6)), np.arange(60) % 3
    x[:, 0, 0, :3] += 2 * np.eye(3)[y]
    return x[:40], y[:40], x[40:], y[40:]


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))


def confidence(model: nn.Module, data: Data) -> float:
    return float(model(data.test.x).softmax(1).amax(1).mean())


OWN = flatness.Config(
    num_epochs=2,
    batch_size=8,
    lambda_values=(0.0, 1.0),
    landscape_lambda=1.0,
    landscape_points=3,
    landscape_planes=1,
    seeds=(0, 1),
    curvature_probes=3,
    timing_rounds=1,
)


def test_own_data_model_and_metrics(tmp_path: Path) -> None:
    own: dict[str, Any] = {"data": images, "model": conv_net, "metrics": {"confidence": confidence}}
    report = flatness.run(OWN, tmp_path / "run", quiet=True, **own)
    text = report.read_text(encoding="utf-8")
    assert "| confidence |" in text
    assert "(the user's own)" in text
    assert f"own model | {__name__}.conv_net" in text
    found = json.loads((report.parent / "findings.json").read_text(encoding="utf-8"))
    assert found["flat"] == "hessian_fro2_probes"
    assert found["by_arm"]["0"]["metric_confidence"]["mean"] > 1 / 3
    assert found["data"]["inputs"] == "1x6x6"
    (report.parent / "cells" / "lambda-1-seed-001.jsonl").unlink()
    with pytest.raises(StudyError, match="another environment"):
        flatness.run(OWN, tmp_path / "run", quiet=True, resume=True, **{**own, "metrics": {}})


def test_own_splits_are_used_as_they_are() -> None:
    x, y, x_test, y_test = (torch.as_tensor(part) for part in images())
    test = Split(x_test, y_test)
    given = Data(Split(x, y), test, test, check="mine", name="mine", num_classes=3)
    made = flatness_data.load(flatness_data.Custom(data=lambda: given), OWN)
    assert made.train.x.dtype == torch.float32
    assert made.val is made.test
    assert len(made.train.y) == 40


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, 2), "must return .x_train"),
        ((np.zeros((9, 2)), np.zeros(8, int), np.zeros((4, 2)), np.zeros(4, int)), "x .N, ...."),
        ((np.zeros((9, 2)), np.zeros(9), np.zeros((4, 2)), np.zeros(4, int)), "integer classes"),
        ((np.zeros((9, 2)), -np.ones(9, int), np.zeros((4, 2)), np.zeros(4, int)), "classes 0 to"),
    ],
)
def test_data_that_do_not_fit_are_refused(given: Any, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        flatness_data.load(flatness_data.Custom(data=lambda: given), replace(OWN, batch_size=2))
