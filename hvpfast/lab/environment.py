"""What this machine and this installation are: processor, memory, GPU, versions, kernels."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hvpfast import backends
from hvpfast.backends.cuda import many as cuda_models

SOURCES = ("hvpfast", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml")  # in a checkout
PACKAGES = ("hvpfast", "torch", "triton", "numpy", "scipy", "optuna", "mnist1d", "scikit-learn",
            "matplotlib", "jax")  # fmt: skip
TIMED_PACKAGES = ("hvpfast", "torch", "triton", "numpy", "scipy", "jax", "jaxlib",
                  "scipy-openblas32")  # fmt: skip
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY",
             "XLA_FLAGS", "JAX_PLATFORMS", "TORCHINDUCTOR_CPP_WRAPPER")  # fmt: skip
# The flags that decide which kernels can run; the rest of /proc/cpuinfo's list says nothing here.
INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512_bf16",
                    "avx512_vnni", "amx_tile", "asimd", "sve")  # fmt: skip


def collect() -> dict[str, Any]:
    """Return what ``hvpfast info`` and the studies' records tell, nested and ready for JSON.

    None stands for what cannot be found out.
    """
    memory = memory_bytes()
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
            "memory GiB": None if memory is None else round(memory / 2**30, 1),
        },
        "threads": torch.get_num_threads(),
        "gpu": gpus(),
    }


def timing_conditions() -> dict[str, Any]:
    """Return what times depend on, as benchmarks record it: flat and ready for JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "system": platform.system(),
        "kernel": platform.release(),
        "cpu_model": processor() or "unknown",
        "cpu_flags": instruction_sets(),
        "cpu_count": os.cpu_count(),
        "cpu_affinity": usable_cores(),
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in TIMED_PACKAGES},
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "torch_threads": torch.get_num_threads(),
        "torch_interop_threads": torch.get_num_interop_threads(),
        "torch_config": torch.__config__.show(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "gpu": gpu_with_clocks(),
        "backends": backends.available(),
        "commit": source(),
    }


def version(package: str) -> str | None:
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

    def git(*words: str) -> str:
        command, unseen = ["git", "-C", str(root), *words], subprocess.DEVNULL
        return subprocess.check_output(command, stderr=unseen, text=True, timeout=10).strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *SOURCES)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def kernels() -> dict[str, Any]:
    """Return what the compiled CPU kernels say of themselves; empty where they are missing."""
    try:
        module = importlib.import_module("hvpfast.backends._cpu")
    except ImportError:
        return {}
    sets = {"instruction set": module.isa(), "instruction sets": list(module.isas())}
    return {**sets, **module.build_info()}


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
    return _cpuinfo("model name") or platform.processor() or None


def instruction_sets() -> list[str]:
    """Return those of ``INSTRUCTION_SETS`` that the processor has; none where it does not say."""
    flags = _cpuinfo("flags", "Features")  # x86, ARM
    return [flag for flag in flags.split() if flag in INSTRUCTION_SETS]


def _cpuinfo(*names: str) -> str:
    """Return the first entry of /proc/cpuinfo under one of the names; "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    entries = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in entries if name.strip() in names), "")


def usable_cores() -> int:
    """Return the number of logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def gpus() -> list[dict[str, Any]]:
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


def gpu_with_clocks() -> dict[str, Any] | None:
    """Return the first GPU as torch and its driver describe it, clocks and power included."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    fields = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20)
        told = dict(zip(fields, answer.strip().split(", "), strict=True))
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


def text(facts: dict[str, Any]) -> str:
    """Return the facts of `collect` as aligned lines."""
    versions, git = facts["versions"], facts["source"]
    lines = [("hvpfast", versions["hvpfast"])]
    if git:
        lines.append(("commit", git["commit"] + ", with changes" * git["dirty"]))
    for name, reason in facts["backends"].items():
        state = "available" if reason is None else f"not available: {reason}"
        lines.append((f"backend {name}", state))
    for name, value in facts["cpu kernels"].items():
        words = value if isinstance(value, list) else [value]
        lines.append((f"kernels: {name}", ", ".join(map(str, words))))
    lines += [(f"CUDA kernels: {name}", value) for name, value in facts["cuda kernels"].items()]
    lines += [(name, value) for name, value in facts["machine"].items() if value is not None]
    lines.append(("threads", f"{facts['threads']} (torch's number, which the kernels follow)"))
    device = "{name}, compute capability {compute capability}, {memory GiB} GiB"
    devices = [device.format(**found) for found in facts["gpu"]]
    lines += [("gpu", told) for told in devices or ["none that torch can use"]]
    installed = [f"{k} {v}" for k, v in versions.items() if v is not None and k != "hvpfast"]
    missing = [k for k, v in versions.items() if v is None]
    lines.append(("versions", ", ".join(installed)))
    if missing:
        lines.append(("not installed", ", ".join(missing)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines)
