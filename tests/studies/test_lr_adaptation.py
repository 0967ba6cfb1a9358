"""The learning-rate study: its trainings, its proxies, what it concludes, and a run of it."""

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
import torch.nn.functional as F
from scipy import stats

import hvpfast as hf
from hvpfast.lab.data import splits as datasets
from hvpfast.lab.runs.config import field_docs
from hvpfast.lab.runs.folder import StudyError
from hvpfast.lab.runs.run import run
from hvpfast.studies.lr_adaptation import experiment as lr_adaptation
from hvpfast.studies.lr_adaptation import findings as lr_adaptation_findings
from hvpfast.studies.lr_adaptation import measure as lr_adaptation_proxies
from hvpfast.studies.lr_adaptation import report as lr_adaptation_report
from hvpfast.studies.lr_adaptation.findings import ARMS, CLAIMS
from hvpfast.studies.lr_adaptation.train import Stream, Trained, spec, train

for package in ("mnist1d", "optuna", "matplotlib"):
    pytest.importorskip(package)
pytestmark = pytest.mark.usefixtures("single_threaded")

SMALL = replace(lr_adaptation.PRESETS["smoke"], hidden=(8,))
PUBLISHED = replace(SMALL, protocol="published", trials=3, tune_epochs=1, seeds=(0, 1, 2))
START: Stream = ("final", 0)


@pytest.fixture(scope="module")
def small() -> datasets.Data:
    return lr_adaptation.load(SMALL)


def trained(
    data: datasets.Data, arm: str, rate: float = 1e-2, init: Stream = START, **changes: Any
) -> Trained:
    return train(replace(SMALL, **changes), data, arm, rate, init, init, changes.get("epochs", 2))


# trainings


@pytest.mark.parametrize("arm", ["adam", "adam-0.9", "difference", "sgd"])
def test_trainings_are_plain_torch_trainings(arm: str) -> None:
    data = lr_adaptation.load(replace(SMALL, dtype="float64"))
    found = trained(data, arm, dtype="float64")
    start = hf.MLP(
        (40, 8, 10), dtype=torch.float64, generator=datasets.generator(0, "init", *START)
    )
    model = start.to_sequential()
    params = list(model.parameters())
    if arm == "sgd":
        base: torch.optim.Optimizer = torch.optim.SGD(params, lr=1e-2, momentum=0.9)
    else:
        base = torch.optim.Adam(params, lr=1e-2, betas=(0.9, 0.9 if arm == "adam-0.9" else 0.999))
    s: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    order = datasets.generator(0, "batches", *START)
    for _ in range(2):
        for index in torch.randperm(320, generator=order).split(32):
            base.zero_grad()
            F.cross_entropy(model(data.train.x[index]), data.train.y[index]).backward()
            if arm == "difference":  # the published wrapper, written out
                grads = [p.grad.clone() for p in params if p.grad is not None]
                if last:
                    s = s or [torch.zeros_like(g) for g in grads]
                    s = [
                        0.9 * a + 0.1 * (g - b) ** 2 for a, g, b in zip(s, grads, last, strict=True)
                    ]
                    for p, g, a in zip(params, grads, s, strict=True):
                        p.grad = g / (a.sqrt() + 1e-8)
                last = grads
            base.step()
    truth = torch.cat([p.detach().reshape(-1) for p in params])
    assert torch.allclose(found.model.flat.detach(), truth, rtol=1e-7, atol=1e-10)
    assert len(found.epochs) == 3
    assert found.num_steps == 20


def test_arms_of_a_seed_share_weights_and_batches(small: datasets.Data) -> None:
    curves = {arm: trained(small, arm).epochs for arm in ARMS}
    starts = {arm: curve[0]["val_loss"] for arm, curve in curves.items()}
    assert len(set(starts.values())) == 1
    ends = {arm: curve[-1]["val_loss"] for arm, curve in curves.items()}
    assert len(set(ends.values())) == len(ARMS)
    assert trained(small, "hutchinson").epochs == curves["hutchinson"]
    assert trained(small, "adam", init=("tune", 0)).epochs[0] != curves["adam"][0]
    assert trained(small, "adam", init=("final", 1)).epochs[0] != curves["adam"][0]


def test_speed_is_the_first_evaluation_at_the_target(small: datasets.Data) -> None:
    curve = trained(small, "adam", evaluations=1, epochs=4, target_loss=0.0)
    assert curve.steps_to_target is None
    losses = [row["val_loss"] for row in curve.epochs]
    assert losses[3] < losses[2] < losses[1]
    reached = trained(small, "adam", evaluations=1, epochs=4, target_loss=losses[2])
    assert reached.steps_to_target == 20
    finer = trained(small, "adam", evaluations=10, epochs=4, target_loss=losses[2])
    assert finer.steps_to_target is not None
    assert 10 < finer.steps_to_target <= 20


def test_speed_is_measured_again_at_its_own_rate(small: datasets.Data) -> None:
    config = replace(SMALL, evaluations=10, target_loss=2.25)
    plain = list(lr_adaptation.final_rows(config, small, "adam", 0, 1e-3, START))
    *curve, row = lr_adaptation.final_rows(config, small, "adam", 0, 1e-3, START, 3e-2)
    assert curve == plain[:-1]
    assert {name: row[name] for name in plain[-1]} == plain[-1]
    whole = train(config, small, "adam", 3e-2, START, START, 2)
    assert row["steps_tuned"] == whole.steps_to_target != row["steps_to_target"]
    never = replace(config, target_loss=0.0)
    *_, row = lr_adaptation.final_rows(never, small, "adam", 0, 1e-3, START, 3e-2)
    assert (row["steps_tuned"], row["speed_reached"]) == (20, False)


def test_the_fastest_rate_is_that_of_the_fewest_steps() -> None:
    trials: list[Any] = [
        [{"learning_rate": rate, "steps_counted": steps, "val_loss": loss}]
        for rate, steps, loss in (
            (1e-3, 200, 1.0),
            (2e-3, 200, 0.9),
            (1e-2, 300, 0.5),
            (1, None, 0),
        )
    ]
    assert lr_adaptation.fastest_rate(trials) == 2e-3


def test_the_final_row_measures_the_four_claims(small: datasets.Data) -> None:
    config = replace(SMALL, epochs=6, proxy_epochs=(1,))
    rate = 0.3  # large: the lowest loss is not the last
    *_, row = lr_adaptation.final_rows(config, small, "adam", 0, rate, START)
    last = trained(small, "adam", rate, epochs=6)
    losses = [epoch["val_loss"] for epoch in last.epochs]
    best = int(np.argmin(losses[1:])) + 1
    assert best < 6
    early = train(config, small, "adam", rate, START, START, best).model
    score = lr_adaptation.score
    assert row["best_epoch"] == best
    assert row["val_lowest"] == losses[best]
    assert row["test_loss"] == score(last.model, small.test)[0]
    assert row["test_lowest"] == score(early, small.test)[0]
    assert row["drift"] == row["test_loss"] - row["test_lowest"]
    assert row["steps_counted"] == row["steps_to_target"] or row["num_steps"] == 60


@pytest.mark.parametrize("arm", ["sgd", "secant", "adahessian"])
def test_divergence_is_a_result(arm: str, small: datasets.Data) -> None:
    found = trained(small, arm, 1e30)
    assert found.diverged
    (*_, row) = lr_adaptation.final_rows(SMALL, small, arm, 0, 1e30, START)
    assert row["diverged"]
    assert "test_loss" not in row
    config = replace(SMALL, learning_rates=(1e30,))
    rows = list(lr_adaptation.trial_rows(config, small, arm, 0))
    assert lr_adaptation.mean_loss(rows) == math.inf
    with pytest.raises(StudyError, match=f"every tuning trial of the arm {arm} diverged"):
        lr_adaptation.best_rate(arm, [rows])


def test_the_best_rate_is_that_of_the_lowest_mean() -> None:
    losses = {1e-3: (1.0, 1.4), 1e-2: (1.1, 1.2), 1e-1: (0.5, None)}
    trials: list[Any] = [
        [{"learning_rate": rate, "val_loss": loss} for loss in pair]
        for rate, pair in losses.items()
    ]
    assert lr_adaptation.best_rate("adam", trials) == 1e-2


# the published protocol


def test_published_validation_is_the_test_split_and_nothing_is_held_out() -> None:
    data = lr_adaptation.load(PUBLISHED)
    assert len(data.train.y) == 400
    assert torch.equal(data.val.x, data.test.x)


def test_a_repeat_searches_at_random_first_and_shares_one_initial_state() -> None:
    data = lr_adaptation.load(PUBLISHED)
    rows = {seed: list(lr_adaptation.repeat_rows(PUBLISHED, data, "adam", seed)) for seed in (0, 1)}
    wrapper = list(lr_adaptation.repeat_rows(PUBLISHED, data, "difference", 0))
    assert wrapper != list(rows[0])
    starts = [
        next(r["val_loss"] for r in found if r["table"] == "epoch" and r["epoch"] == 0)
        for found in (rows[0], wrapper, rows[1])
    ]
    assert starts[0] == starts[1] != starts[2]
    trials = [row for row in rows[0] if row["table"] == "trial"]
    assert len({row["learning_rate"] for row in trials}) == 3
    assert all(3e-3 <= row["learning_rate"] <= 3e-2 for row in trials)
    best = min(trials, key=lambda row: row["val_loss"])
    assert rows[0][-1]["learning_rate"] == best["learning_rate"]
    assert rows[0] == list(lr_adaptation.repeat_rows(PUBLISHED, data, "adam", 0))


# proxies


def test_proxies_are_measured_along_the_final_run(small: datasets.Data) -> None:
    points: dict[str, torch.Tensor] = {}
    compare = lr_adaptation_proxies.compare_proxies

    def spy(config: Any, model: hf.MLP, *rest: Any) -> Any:
        points[rest[-1]["trajectory"]] = model.flat.detach().clone()
        return compare(config, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lr_adaptation_proxies, "compare_proxies", spy)
        for arm in ("adam", "difference"):
            list(lr_adaptation_proxies.proxy_rows(SMALL, small, arm, 1e-2, 0))
    for arm, point in points.items():
        assert torch.equal(point, trained(small, arm).model.flat)


def test_a_ghost_does_what_its_arm_would(small: datasets.Data) -> None:
    model = hf.MLP((40, 8, 10), generator=torch.Generator().manual_seed(0))
    ghost = lr_adaptation_proxies.Ghost("difference", model.flat.detach())
    optimizer = hf.optim.HessianLRAdaptation(torch.optim.Adam([model.flat], lr=1e-2))
    for i in range(5):
        x, y = small.train.x[32 * i : 32 * i + 32], small.train.y[32 * i : 32 * i + 32]
        grad = hf.linearize(spec(SMALL), model.flat, x, y).grad
        ghost.update(grad)
        before = model.flat.detach().clone()
        model.flat.grad = grad
        optimizer.step()
        assert torch.allclose(model.flat.detach() - before, 1e-2 * ghost.param, atol=1e-7)
    found, own = ghost.second_moment(), optimizer.rms_curvature(model.flat)
    assert found is not None
    assert own is not None
    assert torch.equal(found, own)


def test_noise_and_diagonal_are_those_of_single_samples(small: datasets.Data) -> None:
    model = hf.MLP((40, 8, 10), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    split = datasets.Split(small.train.x[:300].double(), small.train.y[:300])
    gradients = torch.stack([
        torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), model.flat)[0]
        for x, y in zip(split.x, split.y, strict=True)
    ])  # fmt: skip
    found = lr_adaptation_proxies.gradient_noise(model, split)
    assert torch.allclose(found, gradients.std(0), rtol=1e-8, atol=1e-12)


def test_rank_correlation_and_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, generator=generator, dtype=torch.float64)
    b = a + torch.randn(200, generator=generator, dtype=torch.float64)
    rank, slope = lr_adaptation_proxies.rank_correlation(a, b), lr_adaptation_proxies.slope(a, b)
    assert rank == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-10)
    assert slope == pytest.approx(stats.linregress(b, a).slope, rel=1e-10)


# conclusions


def final(arm: str, seed: int, value: float) -> dict[str, Any]:
    row = {"table": "final", "arm": arm, "seed": seed, "diverged": False}
    return {**row, **dict.fromkeys(CLAIMS, value)}


def finals(shifts: dict[str, float]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(12):
        base = rng.uniform(1, 2)
        rows += [final(arm, seed, base + x + rng.normal(0, 0.02)) for arm, x in shifts.items()]
    return rows


def studied(rows: list[dict[str, Any]], base: str) -> dict[str, Any]:
    compared, holm = lr_adaptation_findings.compared, lr_adaptation_findings.holm_correct
    return holm({claim: compared(rows, claim, base, "difference") for claim in CLAIMS})


@pytest.mark.parametrize(("shift", "start"), [(-0.3, "Yes."), (0.3, "No. "), (0.0, "No evidence.")])
def test_the_answer_follows_from_the_four_claims(shift: float, start: str) -> None:
    rows = finals({"adam": 0.0, "difference": shift})
    found = {"protocol": "published", "claims": CLAIMS, "study": studied(rows, "adam")}
    told = lr_adaptation_report.headline(found)
    assert told.startswith(start)
    assert "12 pairs" in told
    mixed = {**studied(rows, "adam")}
    mixed["drift"] = studied(finals({"adam": 0.0, "difference": -shift}), "adam")["drift"]
    if shift:
        told = lr_adaptation_report.headline({**found, "study": mixed})
        assert told.startswith("In part.")


@pytest.mark.parametrize(("shift", "word"), [(0.3, "refuted"), (0.0, "not refuted")])
def test_the_prediction_is_answered(shift: float, word: str) -> None:
    compared = studied(finals({"adam-0.9": 0.0, "difference": shift}), "adam-0.9")
    found = {"protocol": "sound", "claims": CLAIMS, "study": compared, "against_control": compared}
    told = lr_adaptation_report.headline(found).splitlines()[1]
    assert told.startswith(f"Indistinguishable from {ARMS['adam-0.9']}: {word};")


@pytest.mark.parametrize(
    ("cosines", "word"),
    [((0.9, 0.7, 0.6), "held"), ((0.6, 0.7, 0.9), "refuted"), ((0.7, 0.7, 0.7), "undecided")],
)
def test_the_nearest_relative_is_told(cosines: tuple[float, ...], word: str) -> None:
    rng = np.random.default_rng(0)
    records: list[Any] = [
        {"table": "similarity", "trajectory": "difference", "seed": seed, "control": arm,
         "epoch": 1, "cosine": cosine + rng.normal(0, 0.01)}
        for seed in range(8)
        for arm, cosine in zip(("adam-0.9", "adam-0.99", "adam"), cosines, strict=True)
    ]  # fmt: skip
    found = {
        "similarity": lr_adaptation_findings.similarity(records),
        "nearest": lr_adaptation_findings.nearest(records),
    }
    assert lr_adaptation_report.nearest_verdict(found) == word


# configuration, report, run


def test_every_option_is_documented() -> None:
    assert set(field_docs(lr_adaptation.Config)) == {f.name for f in fields(lr_adaptation.Config)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"evaluations": 0}, "evaluations must be at least 1"),
        ({"learning_rates": ()}, "learning_rates must be positive and ascending"),
        ({"learning_rates": (0.1, 0.01)}, "learning_rates must be positive and ascending"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"proxy_epochs": (21,)}, "proxy_epochs must be epochs from 1 to 20"),
    ],
)
def test_a_wrong_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(lr_adaptation.Config(), **change)


@pytest.mark.parametrize(
    "name", ["headline.jinja", "report.md.jinja", "published.md.jinja", "claims.md.jinja"]
)
def test_no_number_of_the_reports_is_typed_by_hand(name: str) -> None:
    template = (lr_adaptation_report.TEMPLATES / name).read_text(encoding="utf-8")
    assert not re.search(r"\d", re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", template, flags=re.DOTALL))


def content(folder: Path) -> dict[str, bytes]:
    files = [folder / "config.json", folder / "records.jsonl", *sorted(folder.glob("cells/*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("config", [SMALL, PUBLISHED], ids=["sound", "published"])
def test_a_run_ends_in_a_report_and_resumes_to_the_same_bytes(
    config: lr_adaptation.Config, tmp_path: Path
) -> None:
    report = run(lr_adaptation.STUDY, config, tmp_path / "run", quiet=True)
    text = report.read_text(encoding="utf-8")
    pictures = sorted(path.name for path in report.parent.glob("*.png"))
    assert sorted(re.findall(r"\]\((\w+\.png)\)", text)) == pictures
    assert not re.search(r"\{\w+\}|nan|None", text)
    found = json.loads((report.parent / "findings.json").read_text(encoding="utf-8"))
    assert lr_adaptation.STUDY.headline(found)
    records = (report.parent / "records.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in records.splitlines()]
    assert list(dict.fromkeys(row["cell"] for row in rows[1:])) == lr_adaptation.plan(config)
    arms = {row["arm"] for row in rows if row["table"] == "final"}
    assert arms == set(ARMS if config.protocol == "sound" else lr_adaptation.STUDIED)
    before = content(report.parent)
    for path in [report.parent / "records.jsonl", *sorted(report.parent.glob("cells/*"))[1::3]]:
        path.unlink()
    plain = replace(lr_adaptation.STUDY, figures=lambda records: {}, report=lambda found: "")
    run(plain, config, tmp_path / "run", resume=True, quiet=True)
    assert content(report.parent) == before
