"""The Hessian-norm study: its trainings, what it chooses, finds and says."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hvpfast as hf
from hvpfast.lab.data import splits
from hvpfast.lab.measure.curvature import exact_curvature
from hvpfast.lab.runs.config import field_docs
from hvpfast.lab.runs.folder import StudyError
from hvpfast.lab.runs.run import run
from hvpfast.studies.hessian_norm import experiment as hessian_norm
from hvpfast.studies.hessian_norm import findings as reporting
from hvpfast.studies.hessian_norm import report as hessian_norm_report
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


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke run of the sound protocol; tests only read it."""
    out = tmp_path_factory.mktemp("sound") / "run"
    return hessian_norm.run(SMOKE, out, quiet=True).parent


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


# choosing


def test_arms_share_the_rate_and_differ_in_what_they_are_to_differ_in(sound: Path) -> None:
    rows = [json.loads(line) for line in (sound / "records.jsonl").read_text().splitlines()]
    finals = {(r["arm"], r["seed"]): r for r in rows if r["table"] == "final"}
    assert set(finals) == {(arm, seed) for arm in reporting.ARMS for seed in (0, 1)}
    rate = {arm: finals[arm, 0]["learning_rate"] for arm in reporting.ARMS}
    strength = {arm: finals[arm, 0]["strength"] for arm in reporting.ARMS}
    shared = ("penalised", "placebo", "exact", "weight-decay", "sam")
    assert {rate[arm] for arm in shared} == {rate["baseline"]}
    assert rate["smooth-penalised"] == rate["smooth"]
    alike = ("placebo", "exact", "own-rate")
    assert {strength[arm] for arm in alike} == {strength["penalised"]}
    assert strength["baseline"] == strength["smooth"] == 0
    trials = [r for r in rows if r["table"] == "trial" and r["arm"] == "penalised"]
    best = min(trials, key=lambda row: row["val_loss"])
    assert best["strength"] == strength["penalised"]
    assert {r["learning_rate"] for r in trials} == {rate["baseline"]}
    for row in finals.values():
        assert row["hessian_fro2"] > 0
        assert row["activation"] == ("gelu" if row["arm"].startswith("smooth") else "relu")


def test_when_every_trial_diverges_the_study_says_so(tmp_path: Path) -> None:
    config = replace(SMOKE, learning_rates=(1e30,))
    with pytest.raises(StudyError, match="every tuning trial of the baseline arm diverged"):
        run(hessian_norm.STUDY, config, tmp_path / "run", quiet=True)


# findings and words


def test_the_findings_of_a_run(sound: Path) -> None:
    found = json.loads((sound / "findings.json").read_text())
    assert found["placebo"] == {"num_same": 2, "num_seeds": 2, "coincides": True}
    assert set(found["against"]) == set(reporting.COMPARED)
    for name in ("train_ratio", "torch_train"):
        assert all(seconds > 0 for seconds in found["cost"][name].values())
    assert found["cost"]["measure_ratio"] > 0
    assert found["cost"]["protocol_ratio"] > 0
    assert found["cost"]["without_exact"] > 0
    assert (
        found["trivial"]["linear"]["test_loss"] < found["trivial"]["class frequencies"]["test_loss"]
    )
    assert all(0 <= found["equal_time"][arm]["epoch"] <= 2 for arm in reporting.COMPARED)


def test_the_report_of_a_run(sound: Path) -> None:
    text = (sound / "report.md").read_text()
    assert "{" not in text
    flat = " ".join(text.split())
    assert "In 2 of 2 seeds its curve and final numbers are the baseline's" in flat
    assert "The published gap, -0.1681." in flat
    for picture in ("validation_curves.png", "arms.png", "tuning.png"):
        assert f"]({picture})" in text
        assert (sound / picture).read_bytes().startswith(b"\x89PNG")
    page = (sound / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in re.sub(r"data:[^\"]+", "", page)


def test_a_placebo_that_differs_is_told() -> None:
    rows: list[dict[str, Any]] = []
    for arm, end in (("baseline", 1.0), ("placebo", 1.5)):
        for seed in (0, 1):
            loss = end if seed else 1.0
            rows.append({"table": "epoch", "cell": arm, "arm": arm, "seed": seed, "val_loss": loss})
            rows.append({"table": "final", "cell": arm, "arm": arm, "seed": seed, "strength": 1.0})
    assert reporting.placebo(rows) == {"num_same": 1, "num_seeds": 2, "coincides": False}


def final(arm: str, seed: int, test: float, train_loss: float) -> dict[str, Any]:
    return {
        "table": "final", "arm": arm, "seed": seed, "test_loss": test, "train_loss": train_loss,
        "gap": test - train_loss, "hessian_fro2": 2.0 + seed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shift", "start", "matched"),
    [(-0.9, "Yes. ", "No: "), (0.9, "No, it is worse. ", "No: "), (0.0, "No evidence. ", "Yes: ")],
)
def test_the_answer_follows_from_the_interval(
    sound: Path, shift: float, start: str, matched: str
) -> None:
    rng = np.random.default_rng(0)
    finals = []
    for seed in range(6):
        base, noise = rng.uniform(1, 2), rng.normal(0, 0.05)
        finals += [final("baseline", seed, base, 0.9)]
        finals += [final("penalised", seed, base + shift + noise, 0.9)]
    comparison = {m: reporting.compared(finals, "penalised", m) for m in reporting.MEASURES}
    found = json.loads((sound / "findings.json").read_text())
    found["comparison"] = comparison
    found["arms"]["baseline"]["test_loss"]["sd"] = 0.3
    answer = hessian_norm_report.headline(found).splitlines()[0]
    assert answer.startswith(start)
    assert "6 paired seeds, 95 % interval" in answer
    assert ("covers zero" in answer) == (shift == 0)
    text = " ".join(hessian_norm_report.report(found).split())
    assert f"**{answer}**" in text
    assert "train loss shows no evidence" in text
    assert f"once the learning rate is matched.* {matched}" in text
    assert "It lies outside the interval" in text


def test_one_seed_is_no_evidence(tmp_path: Path) -> None:
    config = replace(SMOKE, seeds=(3,), torch_seeds=(3,))
    report = run(hessian_norm.STUDY, config, tmp_path / "one", quiet=True)
    text = " ".join(report.read_text().split())
    assert "**No evidence: 1 pair of final runs cannot give an interval.**" in text
    assert "No evidence: there are too few seeds." in text


def test_diverged_runs_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*args: Any) -> Any:
        trained = train(*args)
        trained.diverged = args[3:] == ("final", 1) and args[2].method == "penalised"
        return trained

    monkeypatch.setattr(hessian_norm, "train", diverging)
    config = replace(SMOKE, seeds=(0, 1, 2), torch_seeds=())
    report = run(hessian_norm.STUDY, config, tmp_path / "run", quiet=True)
    text = " ".join(report.read_text().split())
    assert "mean of 2 paired seeds" in text
    assert "3 of them diverged" in text
    assert "torch autograd alone would take – times as long" in text


# as published


def test_the_published_protocol_is_repeated(tmp_path: Path) -> None:
    config = replace(SMOKE, protocol="published", repetitions=3)
    folder = run(hessian_norm.STUDY, config, tmp_path / "run", quiet=True).parent
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    (told,) = (row for row in rows if row["table"] == "data")
    assert (told["num_train"], told["num_val"], told["num_test"]) == (400, 100, 100)
    trials = [row for row in rows if row["table"] == "trial"]
    assert len(trials) == 3 * 3 * 10
    rates = np.log10([row["learning_rate"] for row in trials])
    assert -5 <= rates.min() < -4
    assert -2 < rates.max() <= -1
    assert len({row["learning_rate"] for row in trials}) == len(trials)
    chosen = [row for row in rows if row["table"] == "repetition"]
    assert [(r["repetition"], r["arm"]) for r in chosen] == [
        (i, arm) for i in range(3) for arm in ("baseline", "penalised", "placebo")
    ]
    for row in chosen:
        mine = [t for t in trials if (t["arm"], t["repetition"]) == (row["arm"], row["repetition"])]
        best = min(mine, key=lambda t: math.inf if t["val_loss"] is None else t["val_loss"])
        assert row["learning_rate"] == best["learning_rate"]
        assert (row["strength"] == 0) == (row["arm"] == "baseline")
    found = json.loads((folder / "findings.json").read_text())
    null = found["comparison"]["placebo"]
    assert null["n"] == 3
    assert null["sd"] > 0  # a placebo tuned by itself is no copy of the baseline
    text = (folder / "report.md").read_text()
    assert "{" not in text
    assert "-0.1681" in text
    assert (folder / "repetitions.png").exists()


# configuration


def test_every_option_is_documented() -> None:
    assert set(field_docs(hessian_norm.Config)) == {f.name for f in fields(hessian_norm.Config)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"repetitions": 0}, "repetitions must be at least 1"),
        ({"learning_rates": ()}, "learning_rates must be positive"),
        ({"rhos": (0.1, -0.1)}, "rhos must be positive and rising"),
        ({"radii": (0.2, 0.1)}, "radii must be positive and rising"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"tune_seeds": ()}, "tune_seeds must be different"),
        ({"torch_seeds": (99,)}, "torch_seeds must be among the seeds"),
    ],
)
def test_a_wrong_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(hessian_norm.Config(), **change)


@pytest.mark.parametrize("name", ["headline.jinja", "report.md.jinja", "published.md.jinja"])
def test_no_number_of_the_report_is_typed_by_hand(name: str) -> None:
    template = (hessian_norm_report.TEMPLATES / name).read_text(encoding="utf-8")
    assert not re.search(r"\d", re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", template, flags=re.DOTALL))
    assert not re.search(r"\d", reporting.QUESTION.replace("MNIST-1D", ""))
