"""Probes from a counter on the device: what a recorded CUDA graph draws anew at every replay."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hvpfast.backends.triton_kernels.launch import launch
from hvpfast.backends.triton_kernels.penalty import _signed
from hvpfast.backends.triton_kernels.probes import BLOCKS, draw_normal, draw_rademacher


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def draw_rademacher_from(out, P, seed_low, seed_high, first, BLOCKS: tl.constexpr):
    """draw_rademacher with the number of the first probe read from memory (int64)."""
    draw_rademacher(out, P, seed_low, seed_high, tl.load(first).to(tl.int32), BLOCKS)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def draw_normal_from(out, P, seed_low, seed_high, first, BLOCKS: tl.constexpr):
    """draw_normal with the number of the first probe read from memory (int64)."""
    draw_normal(out, P, seed_low, seed_high, tl.load(first).to(tl.int32), BLOCKS)


def draw(out: Tensor, distribution: str, seed: int, first: Tensor) -> None:
    """Write probes ``first`` ... ``first + K - 1`` of a seed into rows (K, P), contiguous."""
    K, P = out.shape
    rademacher = distribution == "rademacher"
    kernel, per_block = (draw_rademacher_from, 128) if rademacher else (draw_normal_from, 4)
    launch(
        kernel, K * triton.cdiv(P, per_block * BLOCKS), out, P,
        _signed(seed), _signed(seed >> 32), first,
        BLOCKS=BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip
