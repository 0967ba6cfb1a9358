"""What the machine can do, measured in the same run: multiply-adds and bytes per second."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any

import torch

from hvpfast.bench import gpu_peak

COPY_BYTES = 256 * 2**20  # far beyond any last-level cache


def fma_gflops(threads: int, dtype: str, seconds: float = 0.2) -> tuple[float | None, str]:
    """Peak GFLOP/s of fused multiply-adds on registers, the best of three, and where it comes from.

    None, and the reason, where the extension is missing. ``seconds``: of one measurement.
    """
    try:
        extension = importlib.import_module("hvpfast.backends._cpu")
    except ImportError as error:
        return None, f"unmeasured: the cpu extension cannot be imported ({error})"
    measure: Any = getattr(extension, "fma_peak", None)
    if measure is None:
        return None, "unmeasured: this build of the cpu extension has no fma_peak"
    return max(float(measure(seconds, threads, dtype)) for _ in range(3)), "hvpfast._cpu.fma_peak"


def copy_gbytes(repeats: int = 5) -> float:
    """GB/s, read plus written, of copying a large float32 tensor; the best of ``repeats``."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / best / 1e9


def rate(macs: float, seconds: float | None, limits: Mapping[str, Any]) -> dict[str, float | None]:
    """GFLOP/s of so many multiply-adds, and the share of the peak; None where they are unknown."""
    gflops = 2 * macs / seconds / 1e9 if seconds else None
    peak = limits["fma_gflops_all"]
    return {"gflops": gflops, "peak_fraction": gflops / peak if gflops and peak else None}


def limits(device: str, threads: int, dtype: str, *, quick: bool) -> dict[str, Any]:
    """The limits of the device that a run is on, as a record; ``quick`` measures for less time."""
    if device != "cpu":
        return gpu_peak.measure(dtype)
    return measure(threads, dtype, 0.02 if quick else 0.2)


def measure(threads: int, dtype: str, seconds: float = 0.2) -> dict[str, Any]:
    one, source = fma_gflops(1, dtype, seconds)
    every, _ = (one, source) if threads == 1 else fma_gflops(threads, dtype, seconds)
    return {
        "dtype": dtype,
        "threads": threads,
        "fma_gflops_1": one,
        "fma_gflops_all": every,
        "fma_source": source,
        "copy_gbytes_per_s": copy_gbytes(),
    }
