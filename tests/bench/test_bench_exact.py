"""``hvpfast bench exact``: it runs, records, and does not let wrong values through."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from hvpfast.bench.suites.exact import suite as exact

pytestmark = pytest.mark.usefixtures("single_threaded")


def run(monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[int, dict[str, Any]]:
    """Exit status and record of a quick run of our own forms."""
    forms = exact.forms

    def ours(problem: Any, operation: str) -> Any:
        return {k: v for k, v in forms(problem, operation).items() if k[0] == "hvpfast"}

    monkeypatch.setattr(exact, "forms", ours)
    parser = argparse.ArgumentParser()
    exact.add_arguments(parser)
    status = exact.run(parser.parse_args(["--quick", "--threads", "1", "--out", str(out)]))
    return status, json.loads((out / "bench.json").read_text(encoding="utf-8"))


def test_quick_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, result = run(monkeypatch, tmp_path)
    assert status == 0 and "exact" in (tmp_path / "bench.txt").read_text(encoding="utf-8")
    forms = {(row["operation"], row["form"]) for row in result["rows"]}
    assert {("value", "exact"), ("value", "8 probes"), ("gradient", "exact, autograd")} <= forms
    for row in result["rows"]:
        assert row["status"] in ("timed", "screened") and max(row["errors"]) < exact.TOLERANCE
        assert (row["relative_std"] is None) == row["exact"]


def test_wrong_values_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    truth = exact.truth
    monkeypatch.setattr(exact, "truth", lambda *given: tuple(1.01 * t for t in truth(*given)))
    status, result = run(monkeypatch, tmp_path)
    assert status == 1 and {row["status"] for row in result["rows"]} == {"wrong"}
