"""Registers, shared memory and spills of every GPU kernel, compiled ahead of time: no GPU needed.

Triton's kernels are compiled in the variants that representative problems launch; the CUDA engine's
sources by nvcc, from a checkout. A kernel that spills registers to local memory makes the suite
fail: its inner loop would wait for memory. Spills are counted as ``spill_stores`` and
``spill_loads``: instructions in the code of a Triton kernel, bytes as ptxas tells them of nvcc's.
"""

from __future__ import annotations

import argparse
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

import hvpfast
from hvpfast.bench import record
from hvpfast.bench.report import table

DESCRIPTION = "Registers, shared memory and spills of the GPU kernels, compiled ahead of time."
BACKENDS = ("triton", "cuda")
CAPABILITIES = (80, 90)
SOURCES = Path(hvpfast.__file__).resolve().parents[1] / "csrc" / "cuda"
# As CMakeLists.txt compiles them: normal draws have no fused multiply-adds (csrc/probes.h).
OPTIONS = {"draw.cu": ("--fmad=false",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hvpfast bench kernels`` to a parser."""
    add = parser.add_argument
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), metavar="BACKEND",
        help=f"default: all of {', '.join(BACKENDS)}")  # fmt: skip
    add("--capabilities", nargs="+", type=int, default=list(CAPABILITIES), metavar="SM",
        help="default: 80 90")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder for bench.json and bench.txt")


def run(arguments: argparse.Namespace) -> int:
    """Run the suite.

    Returns:
        The exit status: 1 when a kernel spills or does not compile, else 0.
    """
    started = time.perf_counter()
    result: dict[str, Any] = {
        "suite": "kernels",
        "command": record.command_line(),
        "environment": record.environment(),
        "compilers": {"triton": _version_of_triton(), "nvcc": _version_of_nvcc()},
        "skipped": {},
        "failed": {},
        "rows": [],
    }
    for backend in arguments.backends:
        reason = unavailable(backend)
        if reason is not None:
            result["skipped"][backend] = reason
            continue
        try:
            result["rows"] += RECORDS[backend](arguments.capabilities)
        except Exception as error:  # a compiler's own type: the other backend goes on
            result["failed"][backend] = f"{type(error).__name__}: {error}"[:2000]
    result["seconds"] = round(time.perf_counter() - started, 1)
    text = render(result)
    print(text)
    if arguments.out is not None:
        record.keep(arguments.out, result, text)
    return int(bool(result["failed"]) or any(map(spills, result["rows"])))


def unavailable(backend: str) -> str | None:
    """Why the kernels of a backend cannot be compiled here, or None."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "kernels are not compiled under TRITON_INTERPRET=1"
        return None
    if not SOURCES.is_dir():
        return "the CUDA sources are not here: the package does not run from a checkout"
    return None if shutil.which("nvcc") else "nvcc is not on the PATH"


def triton_rows(capabilities: Sequence[int]) -> list[dict[str, Any]]:
    """One row per variant of a Triton kernel and architecture."""
    from hvpfast.backends.triton_kernels.compilation import kernel_records

    return [{"backend": "triton", **row} for row in kernel_records(capabilities=capabilities)]


def cuda_rows(capabilities: Sequence[int]) -> list[dict[str, Any]]:
    """One row per kernel of ``csrc/cuda/*.cu`` and architecture.

    Raises:
        RuntimeError: nvcc fails; the message has the end of what it says.
    """
    rows = []
    for source in sorted(SOURCES.glob("*.cu")):
        for capability in capabilities:
            found = parse_ptxas(_ptxas(source, capability))
            rows += [
                {"backend": "cuda", "source": source.name, "capability": capability, **row}
                for row in found
            ]
    names = _demangled([row["kernel"] for row in rows])
    return [{**row, "kernel": name} for row, name in zip(rows, names, strict=True)]


RECORDS = {"triton": triton_rows, "cuda": cuda_rows}


def spills(row: dict[str, Any]) -> int:
    """The larger of a kernel's spill counts."""
    return max(int(row["spill_stores"]), int(row["spill_loads"]))


def _ptxas(source: Path, capability: int) -> str:
    """What the assembler says of the kernels of one source."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{capability}", "-cubin", "-Xptxas", "-v"]
        command += [f"-I{SOURCES}", f"-I{SOURCES.parent}", *OPTIONS.get(source.name, ())]
        command += [str(source), "-o", str(Path(folder) / "kernels.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc fails on {source.name}: {done.stderr.strip()[-1500:]}")
    return done.stderr


_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_ptxas(text: str) -> list[dict[str, Any]]:
    """Kernels with their registers, static shared memory, stack and spills, from ``ptxas -v``.

    Raises:
        RuntimeError: a kernel is named whose figures are not there.
    """
    rows = []
    parts = _ENTRY.split(text)
    for name, said in zip(parts[1::2], parts[2::2], strict=True):
        spills, used, shared = _SPILLS.search(said), _USED.search(said), _SHARED.search(said)
        if spills is None or used is None:
            raise RuntimeError(f"ptxas does not say what {name} uses: {said.strip()[:300]}")
        stack, stores, loads = map(int, spills.groups())
        rows.append(
            {
                "kernel": name,
                "registers": int(used[1]),
                "shared_bytes": int(shared[1]) if shared else 0,
                "stack_bytes": stack,
                "spill_stores": stores,
                "spill_loads": loads,
            }
        )
    return rows


def _demangled(names: Sequence[str]) -> list[str]:
    """The names as C++ writes them, where c++filt is there."""
    if not names or shutil.which("c++filt") is None:
        return list(names)
    done = subprocess.run(
        ["c++filt", "--no-params"], input="\n".join(names), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


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
    """The record as text: per kernel and architecture the most that any variant uses."""
    most: dict[tuple[str, str, int], dict[str, int]] = {}
    for row in result["rows"]:
        key = (row["backend"], row["kernel"], row["capability"])
        entry = most.setdefault(key, dict.fromkeys(("count", *COLUMNS), 0))
        entry["count"] += 1
        for name in COLUMNS:
            entry[name] = max(entry[name], spills(row) if name == "spills" else row[name])
    lines: list[tuple[str, ...]] = [
        ("backend", "kernel", "sm", "variants", "registers", "shared bytes", "spills")
    ]
    lines += [
        (key[0], key[1], str(key[2]), str(entry["count"]), *(str(entry[name]) for name in COLUMNS))
        for key, entry in sorted(most.items())
    ]
    compilers = ", ".join(f"{k} {v}" for k, v in result["compilers"].items() if v)
    parts = [f"compiled ahead of time by {compilers}; the most that any variant of a kernel uses"]
    parts += [table(lines)] if len(lines) > 1 else []
    spilling = [row for row in result["rows"] if spills(row)]
    parts += [
        f"SPILLS: {row['backend']} {row['kernel']} sm_{row['capability']}: {spills(row)} "
        f"{row.get('dtype', '')} {row.get('variant', '')}".rstrip()
        for row in spilling
    ]
    parts += [f"skipped {name}: {reason}" for name, reason in result["skipped"].items()]
    parts += [f"FAILED {name}: {reason}" for name, reason in result["failed"].items()]
    if result["rows"] and not spilling:
        parts.append(f"no kernel spills, of {len(result['rows'])} compiled variants")
    return "\n".join(parts)


COLUMNS = ("registers", "shared_bytes", "spills")
