"""Probes by torch operations, on any device: the bits of ``numpy.py``.

The number of the first probe lies on the device, so that every replay of a CUDA graph draws new
probes. Words are int64, everything after them is float32 arithmetic; each product and each sum is
rounded on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.backends.probes.numpy import COS_COEFFICIENTS, LOG_COEFFICIENTS, SIN_COEFFICIENTS

_MASK = 0xFFFFFFFF


def draw_by_torch(out: Tensor, distribution: str, seed: int, first: Tensor) -> None:
    """Write probes ``first`` ... ``first + K - 1`` of a seed into rows, as ``draw.draw`` does."""
    K, P = out.shape
    rademacher = distribution == "rademacher"
    blocks = -(-P // (128 if rademacher else 4))
    words = _words(blocks, first + torch.arange(K, device=out.device), int(not rademacher), seed)
    rows = _signs(words) if rademacher else _normal(words)
    out.copy_(rows.reshape(K, -1)[:, :P])


def _words(blocks: int, probes: Tensor, stream: int, seed: int) -> Tensor:
    """Philox4x32-10: words (K, blocks, 4) as int64 in [0, 2**32), for probes (K,)."""
    block = torch.arange(blocks, device=probes.device).expand(len(probes), -1)
    c0, c1 = block & _MASK, block >> 32
    c2, c3 = probes[:, None].expand_as(block), torch.full_like(block, stream)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits; the sign is masked away below
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _signs(words: Tensor) -> Tensor:
    """Bits to signs (.., 4, 32): +1 where the bit is clear, -1 where it is set."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1
    return 1.0 - 2.0 * bits.float()


def _normal(words: Tensor) -> Tensor:
    """Box-Muller pairs: words (0, 1) give entries (0, 1), words (2, 3) give (2, 3)."""
    radius = _radius(words[..., 0::2])
    cos, sin = _cos_sin(words[..., 1::2])
    return torch.stack([radius * cos, radius * sin], dim=-1)


def _horner(t: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """The polynomial by Horner's rule, highest coefficient first; two roundings a step."""
    p = torch.full_like(t, coefficients[0])
    for c in coefficients[1:]:
        p = p * t
        p = p + c  # two operations: a fused multiply-add would round once
    return p


def _radius(words: Tensor) -> Tensor:
    """sqrt(-2 log u) for u = ((w >> 8) + 1) / 2^24 in (0, 1]."""
    bits = ((words >> 8) + 1).float().view(torch.int32)
    e = (bits >> 23) - 127
    m = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32)
    large = m > 1.41421356
    m, e = torch.where(large, m * 0.5, m), torch.where(large, e + 1, e)
    f = m - 1.0
    t = f * f
    cubic, square = t * (f * _horner(f, LOG_COEFFICIENTS)), -0.5 * t
    log_m = f + (cubic + square)
    scaled = (24 - e).float() * 0.693147180559945
    minus_log_u = scaled - log_m
    # The root is taken in float64 and rounded: not every float32 root is correctly rounded.
    return (2.0 * minus_log_u.clamp_min(0.0)).double().sqrt().float()


def _cos_sin(words: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi (w >> 8) / 2^24, reduced exactly to [-pi/4, pi/4]."""
    v = words >> 8
    quadrant = (v + (1 << 21)) >> 22
    t = (v - (quadrant << 22)).float() * 3.7450704e-07
    t2 = t * t
    odd = _horner(t2, SIN_COEFFICIENTS) * t2 * t
    s = odd + t
    even, half = _horner(t2, COS_COEFFICIENTS) * t2 * t2, 0.5 * t2
    c = (even - half) + 1.0
    swap = (quadrant & 1) == 1
    cos, sin = torch.where(swap, s, c), torch.where(swap, c, s)
    cos = torch.where(((quadrant + 1) & 2) == 2, -cos, cos)
    return cos, torch.where((quadrant & 2) == 2, -sin, sin)
