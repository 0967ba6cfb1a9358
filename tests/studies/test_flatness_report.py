"""The flatness study's findings and report, and the files of a whole run."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvpfast.lab.runs.folder import StudyError
from hvpfast.studies.flatness import artefacts as flatness_artefacts
from hvpfast.studies.flatness import experiment as flatness
from hvpfast.studies.flatness import findings as flatness_findings
from hvpfast.studies.flatness import report as flatness_report

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "run"
    return flatness.run(flatness.PRESETS["smoke"], out, quiet=True).parent


# findings


def synthetic(shift: float, flat: float, num_seeds: int = 10) -> list[Any]:
    """Records of a run whose penalised accuracy differs by `shift`, its Tr(H^2) by a factor."""
    rng = np.random.default_rng(0)
    config = json.loads(json.dumps(vars(flatness.Config())))
    config = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in config.items()}
    rows: list[Any] = [
        {"table": "config", "study": "flatness", **config},
        {"table": "data", "dataset": "cifar-like", "inputs": "3072", "num_classes": 100,
         "num_train": 2400, "num_val": 600, "num_test": 16, "held_out_is_test": False,
         "check": "made", "own_network": False},
        {"table": "constant", "test_loss": 4.6, "test_accuracy": 0.01},
        {"table": "linear", "test_loss": 3.0, "test_accuracy": 0.3},
    ]  # fmt: skip
    for seed in range(num_seeds):
        base = rng.uniform(0.5, 0.6)
        for arm in ("0", "0.001", "0.01", "0.1", "1"):
            own = 0.0 if arm == "0" else 1.0
            filed = {"cell": "", "arm": arm, "lambda": float(arm), "seed": seed}
            accuracy = base + own * shift + rng.normal(0, 0.004)
            for epoch in range(4):
                rows.append({
                    "table": "epoch", **filed, "epoch": epoch, "loss": 3.0 - 0.1 * epoch,
                    "accuracy": accuracy * epoch / 3, "flatness": 3.0,
                    "train_ce": 2.0 / (1 + epoch), "train_penalty": 0.5 * own,
                })  # fmt: skip
            fro2 = 5.0 * (flat if own else 1.0) * rng.uniform(0.99, 1.01)
            rows.append({
                "table": "final", **filed, "diverged": False, "num_params": 10,
                "test_accuracy": accuracy, "val_accuracy": accuracy, "train_accuracy": 1.0,
                "test_loss": 2.0, "train_loss": 0.1, "gap": 1.9, "hessian_fro2": fro2,
                "hessian_fro2_probes": fro2, "held_out_fro2": fro2, "part_fro2": fro2,
                "part_ggn_fro2": fro2,
                "hessian_trace": fro2, "filter_curvature": fro2, "flatness_same": fro2,
                "flatness_fresh": fro2, "flatness_unseen": fro2, "params_norm": 2.0,
                "first_norm": 1.0, "test_right": "ff00" if own else "f0f0",
            })  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("shift", "seeds", "start"),
    [
        (0.05, 10, "Yes: the test accuracy is higher for λ = 0.001"),
        (-0.05, 10, "No, and worse for λ = 0.001"),
        (0.0, 10, "No evidence. The test accuracy differs"),
        (0.05, 1, "No evidence: 1 seed cannot show"),
        (0.05, 6, "No evidence: 6 seeds cannot show"),
    ],
)
def test_the_answer_follows_from_corrected_evidence(shift: float, seeds: int, start: str) -> None:
    found = flatness_findings.findings(synthetic(shift, 0.5, seeds), {})
    assert flatness_report.headline(found).startswith(start)
    text = " ".join(flatness_report.report(found).split())
    assert "Steps were not timed" in text
    assert "beaten by the mean of every λ" in text


def test_predictions_are_held_contradicted_or_open() -> None:
    def outcomes(shift: float, flat: float, seeds: int = 10) -> list[str]:
        found = flatness_findings.findings(synthetic(shift, flat, seeds), {})
        return [p["outcome"] for p in found["predictions"]]

    lower, higher, nothing = "held", "contradicted", "no evidence"
    assert outcomes(-0.05, 0.5) == [lower, lower, "held", "held"]
    assert outcomes(0.05, 2.0) == [higher, higher, "contradicted", "contradicted"]
    assert outcomes(0.0, 1.0)[0] == nothing
    assert outcomes(0.0, 1.0)[3] == nothing
    assert outcomes(-0.05, 0.5, seeds=3) == [nothing] * 4


def test_single_networks_are_compared_by_mcnemar() -> None:
    found = flatness_findings.findings(synthetic(0.0, 1.0), {})["mcnemar"]["0.1"]
    assert (found["won"], found["lost"]) == (4, 4)
    assert found["p"] == 1.0
    records = synthetic(0.0, 1.0)
    for row in records:
        if row["table"] == "final" and row["arm"] == "0.1":
            row["test_right"] = "fff0"  # won 4, lost 0: p = 2 / 2^4
    found = flatness_findings.findings(records, {})["mcnemar"]["0.1"]
    assert (found["won"], found["lost"], found["p"]) == (4, 0, 0.125)


def test_convergence_and_stability_come_from_the_curves() -> None:
    finals = flatness_findings.with_curves(synthetic(0.0, 1.0, 2))
    row = finals[0]
    assert row["epochs_to_target"] == 3
    assert row["late_loss_variance"] == pytest.approx(np.var([2.9, 2.8, 2.7]))
    assert row["best_accuracy"] == row["test_accuracy"]


def test_costs_are_ratios_of_the_timed_steps() -> None:
    times = {"plain": 2e-3, "penalised": 3e-3, "torch-plain": 2e-3, "torch-penalised": 30e-3}
    timings = {f"steps/{name}": seconds for name, seconds in times.items()}
    cost = flatness_findings.findings(synthetic(0.0, 1.0), timings)["cost"]
    assert cost["penalised_over_plain"] == pytest.approx(1.5)
    assert cost["torch_over_penalised"] == pytest.approx(10)


@pytest.mark.parametrize("name", ["headline.jinja", "report.md.jinja"])
def test_no_number_of_the_report_is_typed_by_hand(name: str) -> None:
    template = (flatness_report.TEMPLATES / name).read_text(encoding="utf-8")
    words = re.sub(r"\{[{%#].*?[}%#]\}", "", template, flags=re.DOTALL).replace("CIFAR-100", "")
    assert not re.search(r"\d", words)


# the whole study


class Plain(pickle.Unpickler):
    """Loads containers, numbers, strings and NumPy arrays; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("numpy", "ndarray"), ("numpy", "dtype")}
        if (module, name) in allowed or module in ("numpy._core.multiarray", "numpy._core.numeric"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is neither a container nor an array")


def test_the_files_of_the_original_are_there(finished: Path) -> None:
    names = {"FA_regularization_results.pkl", "experiment_report.md", "training_comparison.png",
             "loss_landscapes_1.png", "comparison.png", "flatness.png", "report.md", "report.html",
             "findings.json", "records.jsonl"}  # fmt: skip
    assert names <= {path.name for path in finished.iterdir()}
    content = Plain(io.BytesIO((finished / flatness_artefacts.RESULTS).read_bytes())).load()
    assert content["lambda_values"] == [0.0, 0.01, 1.0]
    one = content["results"][0.01]
    assert one["history"]["flatness"].shape == (2, 4)
    assert np.isfinite(one["final"]["hessian_fro2"]).all()
    assert [a.shape for a in one["weights"].values()] == [(16, 10), (16,), (5, 16), (5,)]
    assert set(content["landscapes"][0]) == {0.0, 0.01}
    assert content["landscapes"][0][0.01]["losses"].shape == (5, 5)
    assert content["config"]["batch_size"] == 64


def test_flatness_is_measured_for_lambda_zero_too(finished: Path) -> None:
    found = json.loads((finished / "findings.json").read_text(encoding="utf-8"))
    for name in ("hessian_fro2", "hessian_fro2_probes", "held_out_fro2", "flatness_fresh"):
        assert found["by_arm"]["0"][name]["mean"] > 0
    assert found["agreement"][0]["gradient_error"] < 1e-5
    assert found["cost"]["torch_over_penalised"] > 0


def test_the_report_says_what_was_found(finished: Path) -> None:
    text = (finished / "report.md").read_text(encoding="utf-8")
    assert "No evidence: 2 seeds cannot show a difference" in text
    assert "{" not in text
    assert (finished / "experiment_report.md").read_text(encoding="utf-8") in text
    for heading in ("Predictions", "Performance", "Stability", "Convergence", "Flatness", "Cost"):
        assert f"## {heading}" in text


def test_a_resumed_run_has_the_same_records_and_results(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(finished, again)
    names = ("records.jsonl", flatness_artefacts.RESULTS, "experiment_report.md")
    before = {name: (again / name).read_bytes() for name in names}
    for name in names:
        (again / name).unlink()
    for key in ("lambda-0-seed-000", "lambda-1-seed-001", "data"):
        (again / "cells" / f"{key}.jsonl").unlink()
    flatness.run(flatness.PRESETS["smoke"], again, resume=True, quiet=True)
    assert {name: (again / name).read_bytes() for name in names} == before


def test_lost_weights_are_named_with_their_cure(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(finished, again)
    (again / "weights" / "lambda-1.npz").write_bytes(b"not an archive")
    with pytest.raises(StudyError, match=r"lambda-1\.npz cannot be read.*Delete the cells"):
        flatness.run(flatness.PRESETS["smoke"], again, resume=True, quiet=True)


def test_a_study_whose_trainings_all_diverge_says_so(tmp_path: Path) -> None:
    config = replace(flatness.PRESETS["smoke"], learning_rate=1e30, timing_rounds=0)
    text = flatness.run(config, tmp_path / "run", quiet=True).read_text(encoding="utf-8")
    assert "6 of 6 trainings diverged" in text
    assert "Every training diverged." in text
    assert "No evidence: 2 seeds cannot show" in text
