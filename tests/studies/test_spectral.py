"""The spectral study: its files, a whole run, and its findings."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvpfast.lab.report.records import table
from hvpfast.lab.runs.config import field_docs
from hvpfast.lab.runs.folder import StudyError, read_rows
from hvpfast.studies.spectral import artefacts as spectral_files
from hvpfast.studies.spectral import data as spectral_data
from hvpfast.studies.spectral import experiment as spectral
from hvpfast.studies.spectral import findings as spectral_findings
from hvpfast.studies.spectral import measure as spectral_measures
from hvpfast.studies.spectral import report as spectral_report
from hvpfast.studies.spectral.data import Problem

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

SMOKE = replace(spectral.PRESETS["smoke"], backend="reference")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "run"
    return spectral.run(SMOKE, out, quiet=True).parent


def test_a_run_leaves_the_published_files(finished: Path) -> None:
    folder = finished / "test_data"
    names = {path.name for path in folder.iterdir()}
    lambdas = ["0.00000", "0.00400", "0.00800", "0.01200", "0.08000"]
    expected = {"Model-0.csv", "Model-0_split_accuracy.csv"}
    for lam in lambdas:
        expected |= {f"Hessian-eigenvalues-0-{lam}.csv", f"model_weights-0-{lam}.pth"}
        expected |= {f"Hessian-effective-eigenvalues-0-{lam}.csv"}
    for lam in (lambdas[0], lambdas[-1]):
        expected |= {f"Hessian-eigenvectors-0-{lam}.npy", f"gradients-0-{lam}.csv"}
    assert names == expected
    with open(folder / "Model-0.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["L2_strength"] for row in rows] == lambdas
    assert list(rows[0])[1:] == ["Train_Loss", "Train_Reg_Loss", "Test_Loss", "Test_Accuracy(%)"]
    with open(folder / "Model-0_split_accuracy.csv", newline="") as file:
        assert list(next(csv.DictReader(file)))[5:] == [f"Class_{c}_Accuracy" for c in range(10)]


def test_the_files_belong_together(finished: Path) -> None:
    """Vectors are eigenvectors of the stored network, with the stored values and gradient."""
    folder, lam = finished / "test_data", "0.08000"
    state = torch.load(folder / f"model_weights-0-{lam}.pth", weights_only=True)
    config = replace(SMOKE, backend="reference")
    problem = Problem.of(config, spectral_data.load(config))
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    values = np.loadtxt(folder / f"Hessian-eigenvalues-0-{lam}.csv")
    assert (np.diff(values) >= 0).all() and len(values) == SMOKE.pairs
    shifted = np.loadtxt(folder / f"Hessian-effective-eigenvalues-0-{lam}.csv")
    assert shifted == pytest.approx(values + 2 * 0.08, rel=1e-6)
    rows = torch.from_numpy(np.load(folder / f"Hessian-eigenvectors-0-{lam}.npy"))
    assert rows.shape == (SMOKE.pairs, problem.spec.num_params)
    H = problem.hessian(flat, reduced=False)
    residuals = (H @ rows.T - rows.T * torch.from_numpy(values).float()).norm(dim=0)
    assert (residuals[-9:] <= 1.2e-4 * torch.from_numpy(values)[-9:]).all()
    lines = (folder / f"gradients-0-{lam}.csv").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"dL/d{name}" for name in problem.spec.names]
    stored = [float(v) for line in lines for v in line.split(": ")[1].split(", ")]
    gradient = problem.gradient(flat)
    rounding = 16 * torch.finfo(torch.float32).eps * float(gradient.abs().max())
    assert (torch.tensor(stored, dtype=torch.float64) - gradient).abs().max() <= rounding


def test_collapsed_networks_of_a_run_agree_with_analysis(finished: Path) -> None:
    found = json.loads((finished / "findings.json").read_text())
    assert found["oracle"]["num"] >= 1
    assert found["oracle"]["worst"] < 1e-3
    assert found["collapse"]["ascending"]["first"] == pytest.approx(0.08)
    assert found["residuals"]["unexplained"] == 0
    report = (finished / "report.md").read_text()
    for words in ("Predictions registered", "Collapse oracle", "Stationarity", "hysteresis"):
        assert words.lower() in report.lower()
    for picture in ("spectrum", "sweeps", "subspaces", "density"):
        assert (finished / f"{picture}.png").stat().st_size > 10_000
        assert f"{picture}.png" in report


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []
    measure = spectral_measures.eigen_rows

    def interrupted(*args: Any) -> Any:
        solved.append(args)
        if len(solved) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(spectral_measures, "eigen_rows", interrupted)
    with pytest.raises(KeyboardInterrupt, match="Interrupted"):
        spectral.run(SMOKE, tmp_path / "run", quiet=True)
    spectral.run(SMOKE, tmp_path / "run", quiet=True, resume=True)
    names = [
        "records.jsonl",
        "test_data/Model-0.csv",
        "test_data/Hessian-eigenvalues-0-0.00400.csv",
    ]
    names += [
        "test_data/model_weights-0-0.08000.pth",
        "test_data/Hessian-eigenvectors-0-0.08000.npy",
    ]
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_records_do_not_depend_on_the_number_of_threads(finished: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        spectral.run(SMOKE, tmp_path / "run", quiet=True)
    finally:
        torch.set_num_threads(before)
    mine, other = (path / "records.jsonl" for path in (tmp_path / "run", finished))
    assert mine.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("sweep", ["descending", "fresh"])
def test_the_other_sweeps_run(sweep: Any, tmp_path: Path) -> None:
    config = replace(
        SMOKE, sweep=sweep, indices=(0, 1, 20), epochs=2, branch_every=0, keep=(1,), density=(),
        keep_format="csv", penalty="coupled", stopping="running-ce", polish=0,
    )  # fmt: skip
    folder = spectral.run(config, tmp_path / "run", quiet=True).parent
    rows = table(read_rows(folder / "records.jsonl"), "train")
    assert [row["index"] for row in rows] == ([20, 1, 0] if sweep == "descending" else [0, 1, 20])
    assert {row["polish_steps"] for row in rows} == {0}
    vectors = np.loadtxt(folder / "test_data" / "Hessian-eigenvectors-0-0.00400.csv", delimiter=",")
    assert np.allclose(vectors @ vectors.T, np.eye(len(vectors)), atol=1e-5)
    assert "No evidence: only one sweep" in (folder / "report.md").read_text()


def test_lost_weights_are_asked_for(finished: Path, tmp_path: Path) -> None:
    problem = Problem.of(SMOKE, spectral_data.load(SMOKE))
    with pytest.raises(StudyError, match=r"Delete the cells/train-"):
        list(spectral_measures.eigen_rows(SMOKE, problem, tmp_path, None, [1]))


# findings


def train(index: int, collapsed: bool, spread: float, **more: Any) -> dict[str, Any]:
    return {
        "index": index, "lambda": 0.001 * index, "collapsed": collapsed, "spread": spread,
        "test_accuracy": 0.1 if collapsed else 0.9, "params_norm": spread, **more,
    }  # fmt: skip


def said(finished: Path, **changes: Any) -> str:
    """The report of the finished run with other findings, in one line."""
    found = json.loads((finished / "findings.json").read_text())
    return " ".join(spectral_report.report(found | changes).split())


@pytest.mark.parametrize(("last", "answer"), [(0.9, "Yes: at lambda 0.01"), (0.11, "No evidence")])
def test_a_jump_is_told_from_a_gradual_collapse(finished: Path, last: float, answer: str) -> None:
    rows = {i: train(i, False, 1 - (1 - last) * i / 9) for i in range(10)}
    rows |= {i: train(i, True, 0.0) for i in range(10, 15)}
    found = spectral_findings.collapse(rows)
    assert found["first"] == pytest.approx(0.01)
    text = said(finished, collapse={"ascending": found})
    assert f"**A collapse of first order.** {answer}" in text


def test_hysteresis_is_found_where_one_sweep_has_collapsed(finished: Path) -> None:
    up = {i: train(i, i > 7, 1.0) for i in range(10)}
    down = {i: train(i, i > 3, 1.0) for i in range(0, 10, 2)}
    found = spectral_findings.hysteresis(up, down)
    assert found["alive_only_main"] == 2 and found["alive_only_other"] == 0
    assert found["range_main"] == pytest.approx([0.004, 0.006])
    text = said(finished, hysteresis={"descending": found})
    assert "**Hysteresis.** Yes: at 2 of 5 common lambdas" in text
    text = said(finished, hysteresis={"fresh": spectral_findings.hysteresis(up, up)})
    assert "**Hysteresis.** No evidence" in text


def test_residuals_are_counted_with_their_reasons() -> None:
    row = {"num_within": 1, "by_rounding": 1, "largest_beyond": 1e-8, "worst_within": 5e-5}
    row |= {"residual_1": 0.0, "residual_2": 0.0, "residual_3": 0.0, "residual_floor": 0.0}
    found = spectral_findings.residuals([row], {"tol": 1e-4})
    assert (found["num"], found["within"], found["rounding"], found["unexplained"]) == (3, 1, 1, 1)


def test_times_are_extrapolated_with_their_spread() -> None:
    timings = {"train-ascending-000": 5.0, "eigen-000": 3.0}
    timings |= {f"train-ascending-000/fit-{i}": s for i, s in enumerate((1.0, 2.0, 3.0))}
    timings |= {f"eigen-000/pairs-{i}": 1.0 for i in range(3)}
    found = spectral_findings.times(timings, {"sweep": "ascending"})
    assert found["total"] == pytest.approx(451 * 3.0)
    assert found["total_half"] == pytest.approx(2 * math.sqrt(451 + 451**2 / 3))
    assert found["whole"] == 8.0


# configuration


def test_the_grid_is_the_published_one() -> None:
    config = spectral.Config()
    assert len(config.indices) == 451
    assert config.step * config.indices[-1] == pytest.approx(0.09)
    assert spectral_files.name_of(config, "gradients", 1) == "gradients-0-0.00020.csv"
    assert "20.0 GB" in spectral_files.size_text(spectral.PRESETS["published"])
    assert set(field_docs(spectral.Config)) == set(vars(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": (1, 0)}, "rising integers"),
        ({"indices": ()}, "rising integers"),
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"polish": -1}, "must not be negative"),
        ({"step": 1e-6}, "five decimals"),
        ({"density_probes": 1}, "at least 2"),
        ({"data": "mnist"}, "--data-dir"),
        ({"num_train": -1}, "numbers of samples"),
    ],
)
def test_impossible_configurations_say_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StudyError), match=message):
        spectral.Config(**changes)


def test_mnist_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    config = replace(spectral.PRESETS["published"], data_dir=str(tmp_path))
    with pytest.raises(StudyError, match="digits"):
        spectral_data.load(config)


def test_synthetic_images_have_mnists_shape() -> None:
    made = spectral_data.load_synthetic(300, 50)
    assert made.x.shape == (300, 784) and made.x.dtype == np.uint8
    assert np.array_equal(made.x, spectral_data.load_synthetic(300, 50).x)
    assert set(made.y) == set(range(10)) and 0.3 < (made.x == 0).mean() < 0.9
