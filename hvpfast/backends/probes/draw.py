"""Random probes from a counter-based generator: the same numbers for (seed, probe, entry) anywhere.

Philox4x32-10 maps a 128-bit counter and a 64-bit key to four 32-bit words w_0..w_3:

    key = (seed mod 2^32, seed div 2^32)       counter = (block mod 2^32, block div 2^32, probe, s)

Rademacher probes are stream s = 0: entry i is +1 where bit i mod 32 of word (i mod 128) div 32 of
block i div 128 is clear, -1 where it is set. Normal probes are stream s = 1: entries 0, 1 of block
i div 4 are the Box-Muller pair (cos, sin) of words 0, 1; entries 2, 3 that of words 2, 3.
Everything after the integers is float32 arithmetic in a fixed order without fused multiply-adds, so
that every implementation gives the same bits. float64 probes are the float32 numbers, cast.

References: Salmon, Moraes, Dror, Shaw (2011), doi:10.1145/2063384.2063405; the polynomials for log,
sine and cosine are those of Moshier's Cephes library (single precision).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hvpfast.mlp.spec import check_choice

try:
    from hvpfast.backends import _cpu
except ImportError:  # not built: NumPy draws the same bits, slowly
    _cpu = None  # type: ignore[assignment]

DISTRIBUTIONS = ("rademacher", "normal")
_KERNEL_DTYPES = (torch.float32, torch.float64)  # of the compiled generators

_Words = npt.NDArray[np.uint32]
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ProbeSource:
    """Probes described, not drawn: a backend may generate them where it needs them.

    Args:
        num_probes: number of probes K >= 0.
        distribution: ``"rademacher"`` (entries +-1) or ``"normal"`` (standard normal).
        seed: in [0, 2**64).
        first: index of the first probe, so that probes can be drawn in parts; first + K <= 2**32.

    Raises:
        ValueError: an argument is out of range.
    """

    num_probes: int
    distribution: str
    seed: int
    first: int = 0

    def __post_init__(self) -> None:
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        for name in ("num_probes", "seed", "first"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name} must be an integer >= 0; got {getattr(self, name)!r}")
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64; got {self.seed}")
        if self.first + self.num_probes > 2**32:
            raise ValueError(f"probe indices must stay below 2**32; got first={self.first}")

    def of_model(self, m: int) -> ProbeSource:
        """The K probes of model m of many, which have the probes one model after the other."""
        first = self.first + m * self.num_probes
        return ProbeSource(self.num_probes, self.distribution, self.seed, first)


def fresh_seed() -> int:
    """A seed from the operating system's entropy, in [0, 2**63)."""
    return secrets.randbits(63)


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
    from hvpfast.backends.probes import torch as device_probes

    device = torch.device(device)
    if not device_probes.kernels_run_on(device):
        return None
    return device_probes.rows_of_models(source, stride, num_models, num_params, dtype, device)


def _draw(source: ProbeSource, stride: int, rows: Tensor) -> None:
    """Write rows (M, K, P), float32 or float64 on the CPU, with the compiled generator."""
    num_models, num_probes, num_params = rows.shape
    _cpu.draw(
        source.distribution, source.seed, source.first, stride, num_models, num_probes, 0,
        num_params, rows.data_ptr(), rows.dtype is torch.float64, torch.get_num_threads(),
    )  # fmt: skip


def numpy_rows(source: ProbeSource, num_params: int) -> _Floats:
    """The probes of a source as rows (K, P) by NumPy, which every implementation must equal."""
    draw = _rademacher if source.distribution == "rademacher" else _normal
    rows = np.empty((source.num_probes, num_params), np.float32)
    for k in range(source.num_probes):
        rows[k] = draw(num_params, source.first + k, source.seed)
    return rows


def philox(counter: _Words, key: tuple[int, int]) -> _Words:
    """Philox4x32-10: counters (..., 4) and a key of two words to random words (..., 4)."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0 = (p1 >> shift) ^ c1 ^ np.uint64(k0)
        c2 = (p0 >> shift) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & low, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def _words(num_blocks: int, probe: int, stream: int, seed: int) -> _Words:
    blocks = np.arange(num_blocks, dtype=np.uint64)
    counter = np.empty((num_blocks, 4), np.uint32)
    counter[:, 0] = blocks & np.uint64(0xFFFFFFFF)
    counter[:, 1] = blocks >> np.uint64(32)
    counter[:, 2] = probe
    counter[:, 3] = stream
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def _rademacher(num_params: int, probe: int, seed: int) -> _Floats:
    words = _words(-(-num_params // 128), probe, 0, seed)
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    signs: _Floats = np.float32(1) - np.float32(2) * bits.astype(np.float32)
    return signs.reshape(-1)[:num_params]


def _normal(num_params: int, probe: int, seed: int) -> _Floats:
    words = _words(-(-num_params // 4), probe, 1, seed)
    radius = _radius(words[:, 0::2])
    cos, sin = _cos_sin(words[:, 1::2])
    return np.stack([radius * cos, radius * sin], axis=-1).reshape(-1)[:num_params]


def _horner(t: _Floats, *coefficients: float) -> _Floats:
    """Polynomial by Horner's rule in float32, highest coefficient first, each step rounded."""
    p = np.full_like(t, coefficients[0])
    for c in coefficients[1:]:
        p = p * t + np.float32(c)
    return p


# log(1 + f) = f - f^2/2 + f^3 p(f) for 1 + f in [sqrt(1/2), sqrt(2)]
LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
SIN_COEFFICIENTS = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_COEFFICIENTS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def _radius(words: _Words) -> _Floats:
    """sqrt(-2 log u) for u = ((w >> 8) + 1) / 2^24 in (0, 1]."""
    x = ((words >> np.uint32(8)) + np.uint32(1)).astype(np.float32)
    bits = x.view(np.uint32)
    e = (bits >> np.uint32(23)).astype(np.int32) - 127
    m = ((bits & np.uint32(0x007FFFFF)) | np.uint32(0x3F800000)).view(np.float32)
    large = m > np.float32(1.41421356)
    m = np.where(large, m * np.float32(0.5), m)
    e = np.where(large, e + 1, e)
    f = m - np.float32(1)
    t = f * f
    lnm = f + (t * (f * _horner(f, *LOG_COEFFICIENTS)) + np.float32(-0.5) * t)
    neglog = (24 - e).astype(np.float32) * np.float32(0.693147180559945) - lnm
    radius: _Floats = np.sqrt(np.float32(2) * np.maximum(neglog, np.float32(0)))
    return radius


def _cos_sin(words: _Words) -> tuple[_Floats, _Floats]:
    """Cosine and sine of the angle 2 pi (w >> 8) / 2^24, reduced exactly to [-pi/4, pi/4]."""
    v = (words >> np.uint32(8)).astype(np.int32)
    quadrant = (v + (1 << 21)) >> 22
    t = (v - (quadrant << 22)).astype(np.float32) * np.float32(3.7450704e-07)
    t2 = t * t
    s = _horner(t2, *SIN_COEFFICIENTS) * t2 * t + t
    c = _horner(t2, *COS_COEFFICIENTS) * t2 * t2 - np.float32(0.5) * t2 + np.float32(1)
    turns = quadrant & 3
    cos = np.choose(turns, [c, -s, -c, s])
    sin = np.choose(turns, [s, c, -s, -c])
    return cos, sin
