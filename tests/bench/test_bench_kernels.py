"""``hvpfast bench kernels``: what the assembler says is read right, and a spill is a failure."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvpfast.bench.suites.kernels import suite as kernels


def row(spill: int, kernel: str = "layer") -> dict[str, Any]:
    return {
        "backend": "triton", "kernel": kernel, "variant": "X=1", "dtype": "fp32", "capability": 90,
        "registers": 40 + spill, "shared_bytes": 0, "spills": spill,
    }  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *rows: Any) -> tuple[int, str, dict[str, Any]]:
    """Exit status, text and record where Triton's kernels use what ``rows`` say."""

    def records(capabilities: Any) -> list[dict[str, Any]]:
        if not rows:
            raise RuntimeError("it does not compile")
        return list(rows)

    monkeypatch.setitem(kernels.RECORDS, "triton", records)
    monkeypatch.setattr(kernels, "unavailable", lambda name: None if name == "triton" else "none")
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    status = kernels.run(parser.parse_args(["--out", str(out)]))
    text = (out / "bench.txt").read_text(encoding="utf-8")
    return status, text, json.loads((out / "bench.json").read_text(encoding="utf-8"))


def test_figures_of_the_cuda_engine_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def figure(architecture: str, spill: int, registers: int | None = 40) -> SimpleNamespace:
        return SimpleNamespace(
            name="layer<float>", architecture=architecture, entry=registers is not None,
            registers=registers, shared_bytes=None, stack_bytes=8, spill_bytes=spill,
        )  # fmt: skip

    found = [figure("sm_80", 0), figure("sm_90", 12), figure("sm_90", 0, None)]
    fake = SimpleNamespace(build=lambda folder: (folder, found))
    monkeypatch.setitem(sys.modules, kernels.FIGURES, fake)
    rows = kernels.cuda_rows([90])
    assert [(r["registers"], r["spills"], r["entry"]) for r in rows] == [
        (40, 12, True),
        (0, 0, False),
    ]
    with pytest.raises(RuntimeError, match=r"no kernel for \[100\]"):
        kernels.cuda_rows([90, 100])


def test_variants_of_triton_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"kernel": "layer", "spill_stores": 2, "spill_loads": 3}
    fake = SimpleNamespace(kernel_records=lambda capabilities: [record])
    monkeypatch.setitem(sys.modules, "hvpfast.backends.triton.compilation", fake)
    assert kernels.triton_rows([90]) == [{"backend": "triton", **record, "spills": 5}]


def test_a_spill_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, text, result = run(monkeypatch, tmp_path, row(0), row(0, "other"))
    assert status == 0 and "no kernel spills, of 2 compiled variants" in text
    assert result["skipped"] == {"cuda": "none"} and "skipped cuda: none" in text
    status, text, _ = run(monkeypatch, tmp_path, row(0), row(8))
    assert status == 1 and "SPILLS: triton layer sm_90: 8 fp32 X=1" in text


def test_functions_have_no_registers_of_their_own() -> None:
    called = {**row(0, "called"), "registers": 0, "entry": False}
    text = kernels.render({"rows": [row(0), called], "compilers": {}, "skipped": {}, "failed": {}})
    lines = [line.split() for line in text.splitlines() if line.startswith("triton")]
    assert lines == [
        ["triton", "called", "90", "1", "-", "-", "0"],
        ["triton", "layer", "90", "1", "40", "0", "0"],
    ]


def test_a_kernel_that_does_not_compile_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, text, result = run(monkeypatch, tmp_path)
    assert status == 1 and "FAILED triton: RuntimeError: it does not compile" in text
    assert result["rows"] == []


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert kernels.unavailable("cuda") == "this version has no CUDA engine"
    assert kernels.unavailable("triton") == "Triton is not installed"
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert kernels.unavailable("cuda") == "nvcc is not on the PATH"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1" in str(kernels.unavailable("triton"))
