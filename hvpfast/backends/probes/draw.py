"""Probes drawn by the fastest that can: a GPU for itself, the compiled generator, or NumPy.

All give the same bits.
"""

from __future__ import annotations

import numpy as np
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
    given = None if out is None else out.unsqueeze(0)
    return probes_of_models(source, 0, 1, num_params, dtype, device, given)[0]


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
    if num_models > 1:
        source.of_model(num_models - 1, stride)  # raises where its probes are out of range
    compiled = dtype in _KERNEL_DTYPES
    if compiled and device is not None and kernels_run_on(there := torch.device(device)):
        return rows_of_models(source, stride, num_models, num_params, dtype, there)
    if _cpu is None or not compiled:
        sources = [source.of_model(m, stride) for m in range(num_models)]
        drawn = np.stack([numpy_rows(own, num_params) for own in sources])
        rows = torch.from_numpy(drawn).to(device=device, dtype=dtype)
        return rows if out is None else out.copy_(rows)
    shape = num_models, source.num_probes, num_params
    rows = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out
    _cpu.draw(
        source.distribution, source.seed, source.first, stride, num_models, source.num_probes, 0,
        num_params, rows.data_ptr(), dtype is torch.float64, torch.get_num_threads(),
    )  # fmt: skip
    return rows.to(device)


def kernels_run_on(device: torch.device) -> bool:
    """Whether the device is a GPU on which Triton's kernels draw."""
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
    """What :func:`probes_of_models` returns, on a device where the kernels run.

    The dtype is float32 or float64.
    """
    from hvpfast.backends.probes.triton import draw_by_triton

    rows = torch.empty(num_models, source.num_probes, num_params, dtype=dtype, device=device)
    draw_by_triton(rows, source.distribution, source.seed, source.first, stride)
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
        from hvpfast.backends.probes.triton import draw_by_triton

        draw_by_triton(out.unsqueeze(0), distribution, seed, first)
    else:
        draw_by_torch(out, distribution, seed, first)
