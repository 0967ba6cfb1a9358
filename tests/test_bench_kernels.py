"""``hvpfast bench kernels``: what the assembler says is read right, and a spill is a failure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from hvpfast.bench.suites import kernels

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90'
ptxas info    : Function properties for _Z3addPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 2048 bytes smem, 384 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3mulPf' for 'sm_90'
ptxas info    : Function properties for _Z3mulPf
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, 384 bytes cmem[0]
"""


def row(spill: int, kernel: str = "layer") -> dict[str, Any]:
    return {
        "backend": "triton", "kernel": kernel, "variant": "X=1", "dtype": "fp32", "capability": 90,
        "registers": 40 + spill, "shared_bytes": 0, "spill_stores": spill, "spill_loads": 0,
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


def test_ptxas_is_read() -> None:
    add, mul = kernels.parse_ptxas(PTXAS)
    assert add == {
        "kernel": "_Z3addPf", "registers": 10, "shared_bytes": 2048, "stack_bytes": 0,
        "spill_stores": 0, "spill_loads": 0,
    }  # fmt: skip
    assert (mul["registers"], mul["shared_bytes"]) == (255, 0)
    assert (mul["stack_bytes"], mul["spill_stores"], mul["spill_loads"]) == (16, 12, 20)
    assert kernels.spills(mul) == 20 and kernels.spills(add) == 0
    assert kernels.parse_ptxas("ptxas info : 0 bytes gmem") == []
    with pytest.raises(RuntimeError, match="ptxas does not say what _Z3addPf uses"):
        kernels.parse_ptxas("Compiling entry function '_Z3addPf' for 'sm_90'\nnothing more")


def test_a_spill_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, text, result = run(monkeypatch, tmp_path, row(0), row(0, "other"))
    assert status == 0 and "no kernel spills, of 2 compiled variants" in text
    assert result["skipped"] == {"cuda": "none"} and "skipped cuda: none" in text
    status, text, _ = run(monkeypatch, tmp_path, row(0), row(8))
    assert status == 1 and "SPILLS: triton layer sm_90: 8 fp32 X=1" in text


def test_a_kernel_that_does_not_compile_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, text, result = run(monkeypatch, tmp_path)
    assert status == 1 and "FAILED triton: RuntimeError: it does not compile" in text
    assert result["rows"] == []


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    monkeypatch.setattr(kernels, "SOURCES", tmp_path)
    assert kernels.unavailable("cuda") == "nvcc is not on the PATH"
    monkeypatch.setattr(kernels, "SOURCES", tmp_path / "none")
    assert "does not run from a checkout" in str(kernels.unavailable("cuda"))
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1" in str(kernels.unavailable("triton"))
