"""Records: what ran where, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import hvpfast
from hvpfast.lab.environment import source, usable_cores, version
from hvpfast.utils.files import write_whole

PACKAGES = ("hvpfast", "torch", "triton", "numpy", "scipy", "jax", "jaxlib", "scipy-openblas32")
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "TORCHINDUCTOR_CPP_WRAPPER",
)
# The flags that decide which kernels can run; the rest of /proc/cpuinfo's list says nothing here.
INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512_bf16",
                    "avx512_vnni", "amx_tile", "asimd", "sve")  # fmt: skip


def environment() -> dict[str, Any]:
    """The machine, the versions and the settings that times depend on, ready for JSON."""
    model, flags = _processor()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "system": platform.system(),
        "kernel": platform.release(),
        "cpu_model": model,
        "cpu_flags": flags,
        "cpu_count": os.cpu_count(),
        "cpu_affinity": usable_cores(),
        "memory_bytes": _memory(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "torch_threads": torch.get_num_threads(),
        "torch_interop_threads": torch.get_num_interop_threads(),
        "torch_config": torch.__config__.show(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "gpu": gpu(),
        "backends": hvpfast.available(),
        "commit": source(),
    }


def gpu() -> dict[str, Any] | None:
    """The first GPU as torch and the driver describe it, or None."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    fields = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        told = dict(zip(fields, done.stdout.strip().split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        told = {"nvidia-smi": str(error)[:200]}
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
        "cuda": torch.version.cuda,
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        **told,
    }


def _processor() -> tuple[str, list[str]]:
    model, flags = platform.processor(), list[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() in ("flags", "Features"):
                flags = [f for f in value.split() if f in INSTRUCTION_SETS]
                break
    return model or "unknown", flags


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def failure(error: Exception) -> dict[str, Any]:
    """What a row says of a form that broke."""
    reason = f"{type(error).__name__}: {error}"[:500]
    return {"status": "failed", "reason": reason, "median_s": None}


def finite(value: float) -> float | None:
    """A number as JSON can hold it: None for infinity and NaN."""
    return value if math.isfinite(value) else None


def write_json(path: Path, content: Any) -> None:
    """``content`` as JSON by :func:`write_whole`; NaN and infinity are refused."""
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def keep(folder: Path, content: Any, text: str) -> None:
    """A record as bench.json, and as the table that was printed, bench.txt."""
    write_json(folder / "bench.json", content)
    write_whole(folder / "bench.txt", text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a record."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def check_same(path: Path, what: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError where a stored part of a record and the present one differ but in date."""
    for name in sorted({*stored, *now} - {"date"}):
        if stored.get(name) != now.get(name):
            raise ValueError(
                f"{path} was begun with other {what}: {name} was {stored.get(name)!r}, is "
                f"{now.get(name)!r}. Go on there, or choose another folder"
            )


def command_line() -> str:
    """The command as typed, without folders of this machine."""
    program = Path(sys.argv[0]).name
    return " ".join(["hvpfast" if program == "__main__.py" else program, *sys.argv[1:]])
