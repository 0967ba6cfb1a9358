"""Registers, shared memory and spills of every GPU kernel, compiled ahead of time: no GPU needed.

Triton's kernels are compiled in the variants that representative problems launch; the CUDA engine's
sources by nvcc, from a checkout. A kernel that spills registers to local memory makes the suite
fail: its inner loop would wait for memory. ``spills`` are instructions that store or load spilled
registers in the code of a Triton kernel, and bytes, as ptxas tells them, in one of nvcc's.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvpfast.bench import record, tables

DESCRIPTION = "Registers, shared memory and spills of the GPU kernels, compiled ahead of time."
BACKENDS = ("triton", "cuda")
CAPABILITIES = (80, 90)
USES = ("registers", "shared_bytes", "spills")
FIGURES = "hvpfast.bench.suites.kernels.cuda"  # builds the engine and reads what ptxas says


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), metavar="BACKEND",
        help=f"default: all of {', '.join(BACKENDS)}")  # fmt: skip
    add("--capabilities", nargs="+", type=int, default=list(CAPABILITIES), metavar="SM",
        help="default: 80 90")  # fmt: skip
    record.add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """The exit status is 1 when a kernel spills or does not compile, else 0."""
    started = time.perf_counter()
    result: dict[str, Any] = {
        **record.head("kernels"),
        "compilers": {"triton": _version_of_triton(), "nvcc": _version_of_nvcc()},
        "skipped": {},
        "failed": {},
        "rows": [],
    }
    for backend in arguments.backends:
        if reason := unavailable(backend):
            result["skipped"][backend] = reason
            continue
        try:
            result["rows"] += RECORDS[backend](arguments.capabilities)
        except Exception as error:  # a compiler's own type: the other backend goes on
            result["failed"][backend] = f"{type(error).__name__}: {error}"[:2000]
    result["seconds"] = round(time.perf_counter() - started, 1)
    record.publish(result, render(result), arguments.out)
    return int(bool(result["failed"]) or any(row["spills"] for row in result["rows"]))


def unavailable(backend: str) -> str | None:
    """Why the kernels of a backend cannot be compiled here, or None."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "kernels are not compiled under TRITON_INTERPRET=1"
        return None
    if importlib.util.find_spec(FIGURES) is None:
        return "this version has no CUDA engine"
    return None if shutil.which("nvcc") else "nvcc is not on the PATH"


def triton_rows(capabilities: Sequence[int]) -> list[dict[str, Any]]:
    """One row per variant of a Triton kernel and architecture."""
    from hvpfast.backends.triton.compilation import kernel_records

    return [
        {"backend": "triton", **row, "spills": row["spill_stores"] + row["spill_loads"]}
        for row in kernel_records(capabilities=capabilities)
    ]


def cuda_rows(capabilities: Sequence[int]) -> list[dict[str, Any]]:
    """One row per kernel of the CUDA engine, and per function that it calls, and architecture.

    Raises:
        RuntimeError: the build fails, or has no kernel for one of the architectures.
    """
    figures_of: Any = importlib.import_module(FIGURES)
    with tempfile.TemporaryDirectory() as folder:
        _, figures = figures_of.build(Path(folder))
    rows = [
        {
            "backend": "cuda",
            "kernel": found.name,
            "entry": found.entry,
            "capability": int(found.architecture.removeprefix("sm_")),
            "registers": found.registers or 0,
            "shared_bytes": found.shared_bytes or 0,
            "stack_bytes": found.stack_bytes,
            "spills": found.spill_bytes,
        }
        for found in figures
    ]
    missing = set(capabilities) - {row["capability"] for row in rows}
    if missing:
        raise RuntimeError(f"the build has no kernel for {sorted(missing)}")
    return [row for row in rows if row["capability"] in capabilities]


RECORDS = {"triton": triton_rows, "cuda": cuda_rows}


def _version_of_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def _version_of_nvcc() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release [^\n]*", done.stdout)
    return release[0] if release else None


def render(result: dict[str, Any]) -> str:
    """The record as text: per kernel and architecture the most that any variant uses.

    Functions that kernels call have no registers and no shared memory of their own.
    """
    most: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in result["rows"]:
        key = (row["backend"], row["kernel"], row["capability"])
        entry = most.setdefault(key, dict.fromkeys(("count", "kernels", *USES), 0))
        entry["count"] += 1
        entry["kernels"] += row.get("entry", True)
        for name in USES:
            entry[name] = max(entry[name], row[name])
    lines = [
        {"backend": backend, "kernel": kernel, "capability": capability, **entry}
        for (backend, kernel, capability), entry in sorted(most.items())
    ]
    compilers = ", ".join(f"{k} {v}" for k, v in result["compilers"].items() if v)
    parts = [f"compiled ahead of time by {compilers}; the most that any variant of a kernel uses"]
    parts += [tables.fitted(COLUMNS, lines)] if lines else []
    spilling = [row for row in result["rows"] if row["spills"]]
    parts += [
        f"SPILLS: {row['backend']} {row['kernel']} sm_{row['capability']}: {row['spills']} "
        f"{row.get('dtype', '')} {row.get('variant', '')}".rstrip()
        for row in spilling
    ]
    parts += [f"skipped {name}: {reason}" for name, reason in result["skipped"].items()]
    parts += [f"FAILED {name}: {reason}" for name, reason in result["failed"].items()]
    if result["rows"] and not spilling:
        parts.append(f"no kernel spills, of {len(result['rows'])} compiled variants")
    return "\n".join(parts)


def _of_kernels(name: str) -> tables.Show:
    return lambda entry: str(entry[name]) if entry["kernels"] else "-"


COLUMNS: tables.Columns = (
    ("backend", "backend"),
    ("kernel", "kernel"),
    ("sm", "capability"),
    ("variants", "count"),
    ("registers", _of_kernels("registers")),
    ("shared bytes", _of_kernels("shared_bytes")),
    ("spills", "spills"),
)
