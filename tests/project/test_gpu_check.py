"""``benchmarks/gpu_check``: its logic, without a GPU. What goes wrong stands in the record."""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hvpfast.bench import command as bench
from hvpfast.bench.cases import KNOWN_CASES
from hvpfast.bench.providers import PROVIDERS
from hvpfast.bench.suites.models import suite as models

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu_check"))
import builder  # noqa: E402
import steps as table  # noqa: E402
import summary  # noqa: E402
from processes import Check, Step  # noqa: E402


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def step(name: str, code: str = "", group: str = "", limit: float = 20.0, **more: Any) -> Step:
    return Step(name, group or name, python(code), limit, **more)


def checked(tmp_path: Path, *steps: Step, budget: float = 60.0) -> dict[str, Any]:
    """Run the steps; the record as it lies on disk."""
    Check(steps, tmp_path / "out", tmp_path / "work", budget).run()
    return json.loads((tmp_path / "out" / "gpu_check.json").read_text(encoding="utf-8"))


# ---- processes ------------------------------------------------------------------------------


def test_every_ending_is_recorded(tmp_path: Path) -> None:
    result = checked(
        tmp_path,
        step("good", "print('fine')", read=lambda: {"rows": []}),
        step("bad", "import sys; print('the reason'); sys.exit(3)"),
        step("after", needs="bad"),
        step("gone", missing="no such tool"),
        Step("nowhere", "nowhere", ["/no/such/program"], 20.0),
        step("unreadable", read=lambda: {}[0]),
    )
    found = {name: (e["status"], e["exit"], e["reason"]) for name, e in result["steps"].items()}
    assert found["good"] == ("ok", 0, "")
    assert found["bad"] == ("failed", 3, "exit status 3")
    assert found["after"] == ("skipped", None, "it needs bad, which is failed")
    assert found["gone"] == ("unavailable", None, "no such tool")
    assert found["nowhere"][0] == "failed" and "could not be started" in found["nowhere"][2]
    assert (
        found["unreadable"][0] == "failed" and "cannot be read: KeyError" in found["unreadable"][2]
    )
    assert "the reason" in result["steps"]["bad"]["tail"]
    assert not result["ok"]
    assert "fine" in (tmp_path / "out" / "gpu_check.log").read_text(encoding="utf-8")
    text = summary.render(result)
    for word in ("failed", "skipped", "unavailable", "the reason", "NOT everything succeeded"):
        assert word in text


def test_all_good_is_ok(tmp_path: Path) -> None:
    result = checked(tmp_path, step("one"), step("two"))
    assert result["ok"] and "everything succeeded" in summary.render(result)


def test_a_step_out_of_time_is_killed_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import pathlib, time\nwhile 1: pathlib.Path({str(alive)!r}).touch(); time.sleep(.05)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    result = checked(tmp_path, step("slow", code, limit=1.5, read=lambda: {"far": 7}))
    entry = result["steps"]["slow"]
    assert (entry["status"], entry["reason"]) == ("timeout", "stopped after 2 s")
    assert entry["facts"] == {"far": 7}  # what it had written by then
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists(), "a child of the step still runs"


def test_steps_that_no_longer_fit_are_dropped_and_said(tmp_path: Path) -> None:
    result = checked(
        tmp_path, step("first", "import time; time.sleep(1)"), step("second"), budget=10.5
    )
    assert result["steps"]["first"]["status"] == "ok"
    assert result["steps"]["second"]["status"] == "dropped"
    assert "10 s were left" in result["steps"]["second"]["reason"]
    assert not result["ok"]


def test_a_group_runs_together_and_in_the_plan_s_order(tmp_path: Path) -> None:
    nap = "import time; time.sleep(1)"
    began = time.monotonic()
    result = checked(
        tmp_path,
        *(step(name, nap, group="all") for name in "ab"),
        step("gone", group="all", missing="no"),
        *(step(name, nap, group="all") for name in "cd"),
    )
    assert time.monotonic() - began < 3.0
    assert list(result["steps"]) == ["a", "b", "gone", "c", "d"]


# ---- bars -----------------------------------------------------------------------------------


def mark(provider: str, reached: float | None, met: bool | None) -> dict[str, Any]:
    return {
        "case": "net", "operation": "hvp", "against": "floor", "wanted": 1.5,
        "provider": provider, "reached": reached, "met": met,
    }  # fmt: skip


def entry(*marks: dict[str, Any], rows: tuple[str, ...] = ()) -> dict[str, Any]:
    made = [{"kind": "ours", "provider": "ours-cuda", "form": "flat", "status": s} for s in rows]
    return {"facts": {"marks": list(marks), "rows": made}}


def test_a_bar_is_met_by_the_better_engine() -> None:
    (bar,) = summary.bars(
        {"bench": entry(mark("ours-cuda", 1.4, True), mark("ours-triton", 1.9, False))}
    )
    assert bar["met"] is True and bar["reached"] == {"ours-cuda": 1.4, "ours-triton": 1.9}
    (bar,) = summary.bars({"bench": entry(mark("ours-cuda", None, None), mark("t", 1.9, False))})
    assert bar["met"] is False
    (bar,) = summary.bars({"bench": entry(mark("ours-cuda", None, None))})
    assert bar["met"] is None


def test_one_wrong_form_breaks_the_bar_of_errors(tmp_path: Path) -> None:
    (bar,) = summary.bars({"a": entry(rows=("timed", "screened")), "b": entry(rows=("timed",))})
    assert bar["met"] is True
    wrong = entry(rows=("timed", "wrong"))["facts"]
    (bar,) = summary.bars({"a": {"facts": wrong}})
    assert bar["met"] is False
    result = checked(tmp_path, step("bench", read=lambda: {"marks": [mark("c", 2.0, False)]}))
    assert result["steps"]["bench"]["status"] == "ok" and not result["ok"]
    assert "NOT met" in summary.render(result)


# ---- the plan -------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [False, True])
def test_plan_is_sound(tmp_path: Path, dry: bool) -> None:
    plan = table.plan(tmp_path, dry=dry)
    names = [s.name for s in plan]
    assert len(set(names)) == len(names)
    for s in plan:
        assert not s.needs or s.needs in names[: names.index(s.name)]
    groups = [s.group for s in plan]
    in_order = [group for group, _ in itertools.groupby(groups)]
    assert len(set(in_order)) == len(in_order), "the steps of a group stand together"
    longest = {g: max(s.limit for s in plan if s.group == g) for g in groups}
    assert all(limit <= 170 for limit in longest.values())
    if not dry:
        timed = [s for s in plan if s.name.startswith("bench-")]
        assert len({s.group for s in timed}) == len(timed), "a benchmark has the machine alone"


@pytest.mark.parametrize("dry", [False, True])
def test_benchmark_commands_are_understood(tmp_path: Path, dry: bool) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    seen = []
    for s in table.plan(tmp_path, dry=dry):
        if s.name.startswith("bench-"):
            arguments = parser.parse_args(s.words(s.limit)[3:])
            assert 10 < arguments.deadline < s.limit
            assert parser.parse_args(s.words(s.least)[3:]).deadline < s.least
            assert (arguments.run_suite is models.run) == (s.name == "bench-models")
            assert arguments.device == ("cpu" if dry else "cuda")
            seen += getattr(arguments, "cases", [])
    assert dry or seen == [table.FULL, table.DEEP, table.STEP]


def test_patterns_of_forms_match_what_they_name() -> None:
    for case, patterns in (
        (table.DEEP, table.DEEP_FORMS),
        (table.STEP, table.STEP_FORMS),
        (table.FULL, table.FULL_FORMS),
    ):
        known = {
            f"{name}: {form}"
            for operation in KNOWN_CASES[case].operations
            for K in KNOWN_CASES[case].num_tangents
            for name, provider in PROVIDERS.items()
            for form in provider.forms(operation, K)
        }
        for pattern in patterns:
            assert any(fnmatch.fnmatchcase(key, pattern) for key in known), pattern


def test_outcomes_of_a_run_that_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    lines = [
        {"collected": 5},
        {"test": "a", "outcome": "passed", "reason": ""},
        {"test": "b", "outcome": "failed", "reason": ""},
        {"test": "c", "outcome": "skipped", "reason": "Skipped: no"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = table._outcomes(path)
    assert (found["collected"], found["passed"], found["failed"], found["skipped"]) == (5, 1, 1, 1)
    assert (found["failures"], found["reasons"]) == (["b"], ["Skipped: no"])
    assert "1 passed, 1 failed, 1 skipped of 5" in summary._said(found)
    assert table._outcomes(tmp_path / "none")["collected"] is None


def test_pytest_writes_its_outcomes(tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes.jsonl"
    words = [f"{ROOT}/tests/backends/test_comparators.py", "-k", "rejects_wrong_shape"]
    command, _ = table._pytest("x", tmp_path, "cpu", words, 1)
    command[command.index("--outcomes") + 1] = str(outcomes)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = table._outcomes(outcomes)
    assert (found["collected"], found["passed"], found["failed"]) == (1, 1, 0)


# ---- the build and the command --------------------------------------------------------------


def test_headers_that_torch_carries_take_the_place_of_pybind11(tmp_path: Path) -> None:
    folder = builder.pybind11_dir(tmp_path, bundled=True)
    config = (folder / "pybind11Config.cmake").read_text(encoding="utf-8")
    assert "function(pybind11_add_module name)" in config
    include = config.partition('INTERFACE "')[2].partition('"')[0]
    assert (Path(include) / "pybind11" / "pybind11.h").exists()


def test_command_lists_and_refuses(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check")]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert {
        "build-cuda",
        "conformance-triton",
        "cuda-tests",
        "memcheck-cuda",
        "bench-models",
    } <= set(names)
    wrong = subprocess.run(
        [*command, "--only", "nothing"], capture_output=True, text=True, cwd=tmp_path
    )
    assert wrong.returncode == 2 and "no such step: nothing" in wrong.stderr
