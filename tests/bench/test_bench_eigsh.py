"""The suite ``eigsh`` of the benchmark: its quick form, what it records, what it calls wrong."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from hvpfast.bench.suites.eigsh import suite as suite
from hvpfast.bench.suites.eigsh import trained

pytestmark = pytest.mark.usefixtures("single_threaded")


def test_quick_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    arguments = ["--quick", "--threads", "1", "--out", str(tmp_path)]
    assert suite.run(parser.parse_args(arguments)) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [row["case"] for row in result["rows"]] == list(suite.QUICK_CASES)
    for row in result["rows"]:
        assert row["wrong"] == [] and row["least_products"] >= row["k"]
        assert row["solvers"]["hvpfast"]["ratio"] == 1.0
        assert row["solvers"]["hvpfast"]["relative_residual"] <= suite.TOL
    assert "hvpfast, compress=False" in result["rows"][1]["solvers"]
    (sweep,) = result["sweeps"]
    assert sweep["rows"][0]["warm"] is None
    assert all(row["eigenvalue_difference"] < 1e-5 for row in sweep["rows"][1:])
    text = (tmp_path / "bench.txt").read_text()
    assert "scipy, torch" in text and "warm starts take" in text
    assert capsys.readouterr().out.strip() == text.strip()


def test_wrong_results_are_said() -> None:
    good = {"eigenvalue_difference": 1e-6, "relative_residual": 5e-5}
    row = {"solvers": {"hvpfast": good, "scipy, torch": {**good, "relative_residual": 1.0}}}
    assert suite._wrong(row) == []
    row["solvers"]["hvpfast"] = {"eigenvalue_difference": 2e-5, "relative_residual": 2e-4}
    assert len(suite._wrong(row)) == 2


def test_training_is_repeatable_and_goes_on() -> None:
    data = trained.synthetic(40, 6, 3)
    state = torch.get_rng_state()
    one, two = (trained.train((6, 5, 3), "relu", data, steps=5, batch=16) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(p, q)
    start = trained.train((6, 5, 3), "relu", data, steps=0, model=one.model)
    assert start.loss == one.loss
    assert trained.train((6, 5, 3), "relu", data, steps=300, batch=16).loss < one.loss
