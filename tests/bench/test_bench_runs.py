"""Runs of the benchmark suite: end to end, interrupted, resumed, and its memory measurements."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hvpfast.bench import command, gate, memory, peak, report, runner
from hvpfast.bench.cases import OPERATIONS, QUICK_CASES, build
from hvpfast.bench.providers import PROVIDERS

# Forward mode in torch compiles its decompositions with torch.jit.script.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]
QUICK = QUICK_CASES["quick"]
EAGER = ("torch-eager",)


def test_quick_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = ["--quick", "--rounds", "1", "--providers", "ours-reference", "torch-eager",
             "torch-plain", "--threads", "1", "--out", str(tmp_path)]  # fmt: skip
    before = torch.get_num_threads()
    assert command.main(words) == 0
    assert torch.get_num_threads() == before
    result = json.loads((tmp_path / "bench.json").read_text())
    assert {row["operation"] for row in result["rows"]} == set(OPERATIONS)
    assert {row["status"] for row in result["rows"]} <= {"timed", "screened"}
    assert not result["interrupted"]
    assert result["settings"]["threads"] == 1
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "bench.txt").read_text()
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert command.main(["--show", str(tmp_path / "bench.json")]) == 0
    assert capsys.readouterr().out == printed


def test_jax_forms_pass_the_gate() -> None:
    provider = PROVIDERS["jax"]
    if reason := provider.unavailable():
        pytest.skip(reason)
    judge = gate.Gate(build(QUICK, 2), "penalty")
    for form in ("vjp(grad) vmap", "grad(jvp(jvp)) loop"):
        verdict = judge.judge(provider.prepare(form, "penalty", judge.problem), "compiled")
        assert verdict.ok, (form, verdict.reason)


def test_missing_package_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = runner.run_bench(
        runner.Settings(quick=True, operations=("gradient",), providers=("jax",)), io.StringIO()
    )
    assert result["rows"] == []
    assert "skipped jax: jax is not installed" in report.render(result)


def test_interrupt_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = runner._cell
    cells: list[str] = []

    def interrupted(*arguments: Any) -> Any:
        cells.append(arguments[2])
        if len(cells) == 2:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(runner, "_cell", interrupted)
    settings = runner.Settings(
        quick=True, operations=("gradient", "hvp"), providers=EAGER, rounds=1, out=tmp_path
    )
    result = runner.run_bench(settings, io.StringIO())
    assert result["interrupted"]
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert stored["interrupted"]
    assert {row["operation"] for row in stored["rows"]} == {"gradient"}

    monkeypatch.setattr(runner, "_cell", honest)
    resumed = dataclasses.replace(settings, resume=True)
    finished = runner.run_bench(resumed, io.StringIO())
    assert finished["rows"][: len(stored["rows"])] == stored["rows"]
    assert {row["operation"] for row in finished["rows"][len(stored["rows"]) :]} == {"hvp"}
    assert not finished["interrupted"]
    assert finished["peak"] == stored["peak"]
    with pytest.raises(ValueError, match="other settings: rounds was 1, is 2"):
        runner.run_bench(dataclasses.replace(resumed, rounds=2), io.StringIO())


def test_resume_refuses_a_record_of_another_machine(tmp_path: Path) -> None:
    settings = runner.Settings(
        quick=True, operations=("gradient",), providers=EAGER, rounds=1, out=tmp_path, resume=True
    )
    assert runner.run_bench(settings, io.StringIO())["rows"]  # no record yet: it starts
    path = tmp_path / "bench.json"
    stored = json.loads(path.read_text())
    stored["environment"]["cpu_model"] = "another"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="other environment: cpu_model was 'another'"):
        runner.run_bench(settings, io.StringIO())
    assert json.loads(path.read_text()) == stored


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cases": ("none",)}, "unknown case 'none'"),
        ({"resume": True}, "name it by out"),
        ({"operations": ("none",)}, "unknown operation 'none'"),
        ({"providers": ("none",)}, "unknown provider 'none'"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"rounds": 0}, "rounds and threads must be >= 1"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runner.Settings(**wrong)


def test_cells_run_the_gradient_once_per_case() -> None:
    cells = [(case.name, K, op) for case, K, op in runner.Settings().cells()]
    assert cells.count(("40-32-10", 1, "gradient")) == 1
    assert ("40-32-10", 8, "gradient") not in cells
    assert ("784-128-128-10", 8, "penalty_normal") not in cells


def test_peak_is_measured_or_says_why() -> None:
    gflops, source = peak.fma_gflops(1, "float32", seconds=0.01)
    assert (gflops is None) == source.startswith("unmeasured")
    assert gflops is None or gflops > 0.1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    found = memory.measure(
        "784-128-128-10-n512", 1, "float32", "hvp", "torch-eager", "double backward", 1
    )
    kept = 512 * 128 * 4 * 4  # a_1, a_2 and their adjoints, at the very least
    assert kept < found["first"] < 200 * 2**20
    assert kept < found["steady"] < 200 * 2**20


def test_memory_reports_what_went_wrong() -> None:
    found = memory.measure("quick", 1, "float32", "hvp", "torch-eager", "no such form", 1)
    assert set(found) in ({"first", "steady"}, {"reason"})
