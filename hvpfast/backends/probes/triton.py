"""Probes by Triton kernels, on a GPU: the bits of ``numpy.py``, whatever the grid.

Everything after the words is float32 arithmetic, compiled without contraction: each product and
each sum is rounded on its own. A kernel of its own writes probes once; the tiles of the products
do not draw them again. An entry of V is used in several tiles and passes: reading it takes a
quarter of an instruction, its share of the Philox blocks that a tile's rows touch and its
transformation take ten to forty.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hvpfast.utils.triton_launch import launch

BLOCKS = 32  # counters of one program
_NUMBERS = ["first", "K", "stride", "seed_low", "seed_high"]


def draw_by_triton(
    out: Tensor, distribution: str, seed: int, first: int | Tensor, stride: int | None = None
) -> None:
    """Write rows (M, K, P), contiguous: probe k of model m is first + m stride + k of the seed.

    ``first`` is a number, or 0-dim int64 on the device, which a recorded CUDA graph reads at every
    replay. ``stride`` None is K: the probes of one model follow those of the model before.
    """
    M, K, P = out.shape
    kernel, per_block = {"rademacher": (draw_rademacher, 128), "normal": (draw_normal, 4)}[
        distribution
    ]
    counter, first = (first, 0) if isinstance(first, Tensor) else (None, first)
    launch(
        kernel, M * K * triton.cdiv(P, per_block * BLOCKS),
        out, counter, P, _signed(first), K, _signed(K if stride is None else stride),
        _signed(seed), _signed(seed >> 32), BLOCKS=BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip


def _signed(word: int) -> int:
    """The low 32 bits as the signed number with the same bits."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


@triton.jit
def _number(row, counter, first, K, stride):
    """The number of the probe, modulo 2^32, in a row of out (M K, P)."""
    number = row // K * stride + row % K + first
    if counter is not None:
        number += tl.load(counter)
    return number


@triton.jit
def _words(block, probe, stream: tl.constexpr, seed_low, seed_high):
    """Philox4x32-10 of the counters (block, probe, stream): four words (BLOCKS,) of uint32."""
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + probe.to(tl.uint32)
    c3 = tl.full(c0.shape, stream, tl.uint32)
    return tl.philox_impl(
        c0, c1, c2, c3, seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    )


@triton.jit(do_not_specialize=_NUMBERS)
def draw_rademacher(
    out, counter, P, first, K, stride, seed_low, seed_high, BLOCKS: tl.constexpr
):  # fmt: skip
    """Rows of out (M K, P): entry i is bit i % 128 of block i / 128, +1 if clear, -1 if set."""
    programs = tl.cdiv(P, 128 * BLOCKS)
    k = (tl.program_id(0) // programs).to(tl.int64)
    block = (tl.program_id(0) % programs).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    words = _words(block, _number(k, counter, first, K, stride), 0, seed_low, seed_high)
    bit = tl.arange(0, 32)
    for w in tl.static_range(4):
        i = block[:, None] * 128 + 32 * w + bit[None, :]
        set = (words[w][:, None] >> bit[None, :].to(tl.uint32)) & 1
        tl.store(out + k * P + i, 1 - 2 * set.to(tl.int32), mask=i < P)


@triton.jit
def _radius(words):
    """sqrt(-2 log u) for u = ((w >> 8) + 1) / 2^24 in (0, 1]."""
    x = ((words >> 8) + 1).to(tl.float32)
    bits = x.to(tl.uint32, bitcast=True)
    e = (bits >> 23).to(tl.int32) - 127
    m = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    large = m > 1.41421356
    m = tl.where(large, m * 0.5, m)
    e = tl.where(large, e + 1, e)
    f = m - 1.0
    t = f * f
    p = 7.0376836292e-2 * f + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    log_m = f + (t * (f * p) + -0.5 * t)
    minus_log_u = (24 - e).to(tl.float32) * 0.693147180559945 - log_m
    return tl.sqrt_rn(2.0 * tl.maximum(minus_log_u, 0.0))


@triton.jit
def _cos_sin(words):
    """Cosine and sine of 2 pi (w >> 8) / 2^24, reduced exactly to [-pi/4, pi/4]."""
    v = (words >> 8).to(tl.int32)
    quadrant = (v + (1 << 21)) >> 22
    t = (v - (quadrant << 22)).to(tl.float32) * 3.7450704e-07
    t2 = t * t
    s = -1.9515295891e-4 * t2 + 8.3321608736e-3
    s = s * t2 + -1.6666654611e-1
    s = s * t2
    s = s * t
    s = s + t
    c = 2.443315711809948e-5 * t2 + -1.388731625493765e-3
    c = c * t2 + 4.166664568298827e-2
    c = c * t2
    c = c * t2
    c = c - 0.5 * t2
    c = c + 1.0
    swap = (quadrant & 1) != 0
    cos, sin = tl.where(swap, s, c), tl.where(swap, c, s)
    cos = tl.where(((quadrant + 1) & 2) != 0, -cos, cos)
    return cos, tl.where((quadrant & 2) != 0, -sin, sin)


@triton.jit
def _normal_pair(w0, w1):
    """Two independent normal numbers from 24 bits each of two words (Box and Muller 1958)."""
    radius = _radius(w0)
    cos, sin = _cos_sin(w1)
    return radius * cos, radius * sin


@triton.jit(do_not_specialize=_NUMBERS)
def draw_normal(
    out, counter, P, first, K, stride, seed_low, seed_high, BLOCKS: tl.constexpr
):  # fmt: skip
    """Rows of out (M K, P): block b has entries 4 b to 4 b + 3, pairs of words 0, 1 and 2, 3."""
    programs = tl.cdiv(P, 4 * BLOCKS)
    k = (tl.program_id(0) // programs).to(tl.int64)
    block = (tl.program_id(0) % programs).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    number = _number(k, counter, first, K, stride)
    w0, w1, w2, w3 = _words(block, number, 1, seed_low, seed_high)
    v0, v1 = _normal_pair(w0, w1)
    v2, v3 = _normal_pair(w2, w3)
    i = block * 4
    row = out + k * P + i
    tl.store(row, v0, mask=i < P)
    tl.store(row + 1, v1, mask=i + 1 < P)
    tl.store(row + 2, v2, mask=i + 2 < P)
    tl.store(row + 3, v3, mask=i + 3 < P)
