"""``hvpfast bench models``: what it times is right, and what is wrong is not timed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hvpfast as hf
from hvpfast.bench.cases import QUICK_CASES
from hvpfast.bench.suites.models import forms
from hvpfast.bench.suites.models import suite as models

pytestmark = [
    pytest.mark.usefixtures("single_threaded"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]
CHEAP = ("ours-reference", "ours-loop", "torch-func", "torch-bmm")
if hf.available()["cpu"] is None:
    CHEAP = ("ours-cpu", *CHEAP)


@pytest.fixture
def problem() -> forms.Models:
    return forms.Models.build(QUICK_CASES["quick"], 3, 2, "cpu")


def run(
    monkeypatch: pytest.MonkeyPatch, out: Path, *words: str, wrong: float = 0.0
) -> tuple[int, dict[str, Any]]:
    """Exit status and record of a quick run of the cheap forms; ``wrong`` distorts ours."""
    honest = forms.forms

    def cheap(problem: Any) -> Any:
        return {k: v for k, v in honest(problem).items() if k[0] in CHEAP}

    if wrong:
        products = models.worst
        monkeypatch.setattr(models, "worst", lambda f, e: products(f * (1 + wrong), e))
    monkeypatch.setattr(models, "forms", cheap)
    parser = argparse.ArgumentParser()
    models.add_arguments(parser)
    status = models.run(parser.parse_args(["--quick", "--threads", "1", "--out", str(out), *words]))
    return status, json.loads((out / "bench.json").read_text(encoding="utf-8"))


def test_quick_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, result = run(monkeypatch, tmp_path)
    assert status == 0
    assert {row["provider"] for row in result["rows"]} == set(CHEAP)
    assert {row["status"] for row in result["rows"]} <= {"timed", "screened"}
    for row in result["rows"]:
        error, allowed = row["errors"]["product"]
        assert 0 < error <= allowed < 1e-4
    assert "3 models x 2 tangents" in (tmp_path / "bench.txt").read_text(encoding="utf-8")
    assert result["marks"] == []  # they are about the full size on a GPU


def test_wrong_products_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, result = run(monkeypatch, tmp_path, wrong=1e-3)
    assert status == 1
    assert {row["status"] for row in result["rows"]} == {"wrong"}
    assert {row["median_s"] for row in result["rows"]} == {None}


def test_what_a_deadline_leaves_out_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, result = run(monkeypatch, tmp_path, "--deadline", "0")
    assert {(row["status"], row["reason"]) for row in result["rows"]} == {
        ("left out", "the run's 0 s were spent")
    }


def test_one_wrong_model_among_many_is_seen(problem: forms.Models) -> None:
    exact, allowed = forms.truth(problem)
    small = exact.clone()
    small[1] *= 1e-6  # a model whose products are small has its own scale
    found = small.clone()
    found[1, 0, 3] += 1e-3 * small[1].abs().max()
    assert models.worst(small, small) == 0.0
    assert models.worst(found, small) == pytest.approx(1e-3)
    assert models.worst(found, small) > allowed
    assert models.worst(found[:, :1], small) == float("inf")
    found[0, 0, 0] = torch.nan
    assert not models.worst(found, small) <= allowed


def test_models_differ(problem: forms.Models) -> None:
    for t in (problem.params, problem.x, problem.tangents):
        assert not torch.equal(t[0], t[1])
    assert problem.to(torch.float64).part(1, 2).x.shape == (1, 8, 6)


def test_marks_of_the_full_size() -> None:
    settings = {"case": "40-32-10", "models": 451, "probes": 100, "device": "cuda"}

    def row(provider: str, kind: str, form: str, seconds: float) -> dict[str, Any]:
        return {
            "provider": provider, "kind": kind, "form": form, "status": "timed",
            "median_s": seconds,
        }  # fmt: skip

    rows = [
        row("ours-cuda", "ours", "models at once", 2e-3),
        row("ours-loop", "loop", "one model at a time", 1e-6),
        row("torch-bmm", "eager", "bmm, batched tangents", 0.1),
        row("torch-func", "eager", "vmap vjp(grad)", 0.3),
        row("torch-graphs", "graphed", "bmm, batched tangents", 0.05),
    ]
    found = {
        (m["provider"], m["against"]): (m["reached"], m["met"])
        for m in models.judge({"settings": settings, "rows": rows})
    }
    assert found["ours-cuda", "seconds"] == (2e-3, True)
    assert found["ours-cuda", "eager vmap and bmm"] == (pytest.approx(50.0), False)
    assert found["ours-triton", "seconds"] == (None, None)
    settings["models"] = 450
    assert models.judge({"settings": settings, "rows": rows}) == []
