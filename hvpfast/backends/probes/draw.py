"""Probes drawn: by the compiled generator, by a GPU for itself, or by NumPy; the same bits each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hvpfast.backends.probes.numpy import numpy_rows
from hvpfast.backends.probes.source import ProbeSource, fresh_seed
from hvpfast.backends.probes.torch import draw_by_torch
from hvpfast.utils import triton_launch

try:
    from hvpfast.backends import _cpu
except ImportError:  # not built: NumPy draws the same bits, slowly
    _cpu = None  # type: ignore[assignment]

_KERNEL_DTYPES = (torch.float32, torch.float64)  # of the compiled generators


def probes(
    num_params: int,
    num_probes: int = 1,
    *,
    distribution: str = "rademacher",
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    first: int = 0,
) -> Tensor:
    """Random probes as columns: V (P, K) with independent entries of mean 0 and variance 1.

    Args:
        num_params: number of entries P of each probe.
        num_probes: number of probes K.
        distribution: ``"rademacher"`` or ``"normal"``.
        seed: in [0, 2**64); None takes fresh entropy. torch's and NumPy's generators are not used.
        dtype: floating-point type of the result; the numbers are float32 numbers in any case.
        device: where the result lives.
        first: index of the first probe: ``probes(P, 2, first=3)`` are probes 3 and 4.

    Returns:
        Tensor (P, K) whose transpose is contiguous.

    Raises:
        ValueError: an argument is out of range.
    """
    seed = fresh_seed() if seed is None else seed
    source = ProbeSource(num_probes, distribution, seed, first)
    return probe_rows(source, num_params, dtype, device).T


def probe_rows(
    source: ProbeSource,
    num_params: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The probes of a source as rows (K, P).

    They are written to ``out`` where it is given: contiguous, with that dtype, on the CPU.
    A GPU draws its own where Triton's kernels run there; otherwise they are copied to it.
    """
    if type(num_params) is not int or num_params < 0:
        raise ValueError(f"num_params must be an integer >= 0; got {num_params!r}")
    if not dtype.is_floating_point:
        raise TypeError(f"probes need a floating-point dtype; got {dtype}")
    if (there := _drawn_there(source, 0, 1, num_params, dtype, device)) is not None:
        return there[0]
    if _cpu is None or dtype not in _KERNEL_DTYPES or num_params == 0:
        rows = torch.from_numpy(numpy_rows(source, num_params)).to(device=device, dtype=dtype)
        return rows if out is None else out.copy_(rows)
    rows = torch.empty(source.num_probes, num_params, dtype=dtype) if out is None else out
    _draw(source, 0, rows.unsqueeze(0))
    return rows.to(device)


def probes_of_models(
    source: ProbeSource,
    stride: int,
    num_models: int,
    num_params: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows (M, K, P): model m has the K probes of the seed from ``first + m stride`` on.

    They are written to ``out`` where it is given; they are drawn where :func:`probe_rows` draws.
    """
    firsts = [source.first + m * stride for m in range(num_models)]
    ProbeSource(source.num_probes, source.distribution, source.seed, firsts[-1])  # in range
    there = _drawn_there(source, stride, num_models, num_params, dtype, device)
    if there is not None:
        return there
    if _cpu is None or dtype not in _KERNEL_DTYPES:
        sources = [replace(source, first=first) for first in firsts]
        drawn = torch.stack([probe_rows(s, num_params, dtype, device) for s in sources])
        return drawn if out is None else out.copy_(drawn)
    shape = num_models, source.num_probes, num_params
    rows = torch.empty(shape, dtype=dtype) if out is None else out
    _draw(source, stride, rows)
    return rows.to(device)


def _drawn_there(
    source: ProbeSource,
    stride: int,
    num_models: int,
    num_params: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor | None:
    """Rows (M, K, P) drawn by the GPU that they are for; None where it is none, or cannot."""
    if device is None or torch.device(device).type != "cuda" or dtype not in _KERNEL_DTYPES:
        return None
    device = torch.device(device)
    if not kernels_run_on(device):
        return None
    return rows_of_models(source, stride, num_models, num_params, dtype, device)


def _draw(source: ProbeSource, stride: int, rows: Tensor) -> None:
    """Write rows (M, K, P), float32 or float64 on the CPU, with the compiled generator."""
    num_models, num_probes, num_params = rows.shape
    _cpu.draw(
        source.distribution, source.seed, source.first, stride, num_models, num_probes, 0,
        num_params, rows.data_ptr(), rows.dtype is torch.float64, torch.get_num_threads(),
    )  # fmt: skip


def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton's kernels draw on a device."""
    return (
        device.type == "cuda"
        and triton_launch.unavailable() is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def rows_of_models(
    source: ProbeSource,
    stride: int,
    num_models: int,
    num_params: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Rows (M, K, P): model m has the K probes of the seed from ``first + m stride`` on.

    On a device where the kernels run; float32 and float64.
    """
    from hvpfast.backends.probes.triton import draw as draw_rows

    rows = torch.empty(num_models, source.num_probes, num_params, dtype=dtype, device=device)
    draw_rows(rows, source.distribution, source.seed, source.first, stride)
    return rows


def draw(out: Tensor, distribution: str, seed: int, first: Tensor) -> None:
    """Write probes ``first`` ... ``first + K - 1`` of a seed into rows.

    Args:
        out: (K, P), floating point.
        distribution: ``"rademacher"`` or ``"normal"``.
        seed: in [0, 2**64).
        first: 0-dim int64 on the device of ``out``; first + K <= 2**32.
    """
    if kernels_run_on(out.device):
        from hvpfast.backends.probes.triton import draw as draw_rows

        draw_rows(out.unsqueeze(0), distribution, seed, first)
    else:
        draw_by_torch(out, distribution, seed, first)
