"""What this installation can do: backends with reasons, kernels, threads, GPU, versions."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from hvpfast import backends
from hvpfast.backends.cuda import many as cuda_models

SOURCES = ("hvpfast", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml")  # in a checkout
PACKAGES = (
    "hvpfast",
    "torch",
    "triton",
    "numpy",
    "scipy",
    "optuna",
    "mnist1d",
    "scikit-learn",
    "matplotlib",
    "jax",
)


def collect() -> dict[str, Any]:
    """Return the facts, nested and ready for JSON; None for what cannot be found out."""
    return {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "source": source(),
        "backends": backends.available(),
        "cpu kernels": kernels(),
        "cuda kernels": cuda_kernels(),
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "processor": processor(),
            "cores": usable_cores(),
            "memory GiB": memory_gib(),
        },
        "threads": torch.get_num_threads(),
        "gpu": gpu(),
    }


def version(package: str) -> str | None:
    """Return the version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def checkout() -> Path:
    """Return the folder that holds the package: of a checkout or of site-packages."""
    return Path(__file__).resolve().parents[2]


def source() -> dict[str, Any] | None:
    """Return the commit of the git checkout the package runs from; None elsewhere.

    ``dirty``: whether the sources differ from it; results that lie in the checkout do not count.
    """
    root = checkout()
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *SOURCES])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def kernels() -> dict[str, Any]:
    """Return what the compiled CPU kernels say of themselves; empty where they are missing."""
    try:
        module = importlib.import_module("hvpfast.backends._cpu")
    except ImportError:
        return {}
    return {
        "instruction set": module.isa(),
        "instruction sets": list(module.isas()),
        **module.build_info(),
    }


def cuda_kernels() -> dict[str, Any]:
    """Return what the compiled CUDA kernels say of themselves; empty where they are missing."""
    module = cuda_models.engine()
    if isinstance(module, str):
        return {}
    number = module.cuda_version  # 13020 is 13.2
    return {
        "toolkit": f"CUDA {number // 1000}.{number % 1000 // 10}",
        "matrix products": module.matrix_products(),
    }


def processor() -> str | None:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def usable_cores() -> int:
    """Return the number of logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Return the machine's memory in GiB."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def gpu() -> list[dict[str, Any]]:
    """Return the CUDA devices that torch sees."""
    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [
        {
            "name": d.name,
            "compute capability": f"{d.major}.{d.minor}",
            "memory GiB": round(d.total_memory / 2**30, 1),
        }
        for d in devices
    ]


def text(facts: dict[str, Any]) -> str:
    """Return the facts of `collect` as aligned lines."""
    lines: list[tuple[str, str]] = [("hvpfast", str(facts["versions"]["hvpfast"]))]
    if facts["source"]:
        changed = ", with changes" if facts["source"]["dirty"] else ""
        lines.append(("commit", facts["source"]["commit"] + changed))
    for name, reason in facts["backends"].items():
        lines.append(
            (f"backend {name}", "available" if reason is None else f"not available: {reason}")
        )
    for name, value in facts["cpu kernels"].items():
        lines.append(
            (
                f"kernels: {name}",
                ", ".join(map(str, value)) if isinstance(value, list) else str(value),
            )
        )
    lines += [(f"CUDA kernels: {name}", value) for name, value in facts["cuda kernels"].items()]
    lines += [(name, str(value)) for name, value in facts["machine"].items() if value is not None]
    lines.append(("threads", f"{facts['threads']} (torch's number, which the kernels follow)"))
    devices = [
        f"{d['name']}, compute capability {d['compute capability']}, {d['memory GiB']} GiB"
        for d in facts["gpu"]
    ]
    lines += [("gpu", device) for device in devices or ["none that torch can use"]]
    installed = [
        f"{k} {v}" for k, v in facts["versions"].items() if v is not None and k != "hvpfast"
    ]
    missing = [k for k, v in facts["versions"].items() if v is None]
    lines.append(("versions", ", ".join(installed)))
    if missing:
        lines.append(("not installed", ", ".join(missing)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines)
