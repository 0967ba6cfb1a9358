"""What a GPU can do: its nominal rate of multiply-adds, torch's matrix product, a copy."""

from __future__ import annotations

import re
from typing import Any

import torch

from hvpfast.lab.environment import gpu_with_clocks
from hvpfast.lab.measure import timing

COPY_BYTES = 2**31  # far beyond any L2
PRODUCT_SIZE = 8192
# Units per multiprocessor that do one fused multiply-add per clock, by compute capability.
_LANES = {
    "float32": {"7.0": 64, "7.5": 64, "8.0": 64, "8.6": 128, "8.9": 128, "9.0": 128, "10.0": 128},
    "float64": {"7.0": 32, "7.5": 2, "8.0": 32, "8.6": 2, "8.9": 2, "9.0": 64, "10.0": 64},
}


def nominal(device: dict[str, Any], dtype: str) -> tuple[float | None, str]:
    """Peak GFLOP/s outside the matrix units at the highest clock, and how it was found.

    ``device`` is the record of :func:`hvpfast.lab.environment.gpu_with_clocks`.
    """
    lanes = _LANES[dtype].get(device["capability"])
    clock = re.match(r"(\d+) MHz", str(device.get("clocks.max.sm", "")))
    if lanes is None:
        return None, f"unknown: no {dtype} units on record for capability {device['capability']}"
    if clock is None:
        return None, "unknown: nvidia-smi does not tell the highest clock"
    count, mhz = device["multiprocessors"], int(clock[1])
    rate = 2 * lanes * count * mhz / 1e3
    return rate, f"{count} multiprocessors x {lanes} {dtype} units x 2 x {mhz} MHz, nominal"


def measure(dtype: str) -> dict[str, Any]:
    """The limits as a record; the keys are those of :mod:`hvpfast.bench.peak`, and the product's.

    Raises:
        RuntimeError: torch sees no GPU.
    """
    device = gpu_with_clocks()
    if device is None:
        raise RuntimeError("torch sees no GPU")
    rate, source = nominal(device, dtype)
    return {
        "dtype": dtype,
        "threads": None,
        "fma_gflops_1": None,
        "fma_gflops_all": rate,
        "fma_source": source,
        "gemm_gflops": _product_gflops(getattr(torch, dtype)),
        "copy_gbytes_per_s": _copy_gbytes(),
    }


def _best(call: Any, repeats: int = 5) -> float:
    timing.event_seconds(call, 2)
    return min(timing.event_seconds(call, 1) for _ in range(repeats))


def _product_gflops(dtype: torch.dtype) -> float:
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * PRODUCT_SIZE**3 / _best(lambda: torch.mm(a, b, out=out)) / 1e9


def _copy_gbytes() -> float:
    """GB/s, read plus written."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _best(lambda: target.copy_(source)) / 1e9
