"""The Hessian-norm study: what it chooses, finds and says."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvpfast.lab.runs.config import field_docs
from hvpfast.lab.runs.folder import StudyError
from hvpfast.lab.runs.run import run
from hvpfast.studies.hessian_norm import experiment as hessian_norm
from hvpfast.studies.hessian_norm import findings as reporting
from hvpfast.studies.hessian_norm import report as hessian_norm_report
from hvpfast.studies.hessian_norm.train import train

for package in ("mnist1d", "matplotlib"):
    pytest.importorskip(package)

SMOKE = hessian_norm.PRESETS["smoke"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke run of the sound protocol; tests only read it."""
    out = tmp_path_factory.mktemp("sound") / "run"
    return hessian_norm.run(SMOKE, out, quiet=True).parent


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
