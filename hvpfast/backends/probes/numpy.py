"""Probes by NumPy: the bits that every other implementation must equal.

Everything after the words is float32 arithmetic; each product and each sum is rounded on its own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hvpfast.backends.probes.source import ProbeSource

_Words = npt.NDArray[np.uint32]
_Floats = npt.NDArray[np.float32]

# log(1 + f) = f - f^2/2 + f^3 p(f) for 1 + f in [sqrt(1/2), sqrt(2)]: the coefficients of p.
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
# sin t = t + t^3 p(t^2) and cos t = 1 - t^2/2 + t^4 p(t^2) for t in [-pi/4, pi/4].
SIN_COEFFICIENTS = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_COEFFICIENTS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def numpy_rows(source: ProbeSource, num_params: int) -> _Floats:
    """The probes of a source as rows (K, P)."""
    rademacher = source.distribution == "rademacher"
    blocks = -(-num_params // (128 if rademacher else 4))
    rows = np.empty((source.num_probes, num_params), np.float32)
    for k in range(source.num_probes):
        words = _words(blocks, source.first + k, int(not rademacher), source.seed)
        entries = _signs(words) if rademacher else _normal(words)
        rows[k] = entries.reshape(-1)[:num_params]
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


def _words(blocks: int, probe: int, stream: int, seed: int) -> _Words:
    """Philox4x32-10: words (blocks, 4) of one probe."""
    block = np.arange(blocks, dtype=np.uint64)
    counter = np.empty((blocks, 4), np.uint32)
    counter[:, 0] = block & np.uint64(0xFFFFFFFF)
    counter[:, 1] = block >> np.uint64(32)
    counter[:, 2] = probe
    counter[:, 3] = stream
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def _signs(words: _Words) -> _Floats:
    """Bits to signs (.., 4, 32): +1 where the bit is clear, -1 where it is set."""
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    signs: _Floats = np.float32(1) - np.float32(2) * bits.astype(np.float32)
    return signs


def _normal(words: _Words) -> _Floats:
    """Box-Muller pairs: words (0, 1) give entries (0, 1), words (2, 3) give (2, 3)."""
    radius = _radius(words[..., 0::2])
    cos, sin = _cos_sin(words[..., 1::2])
    return np.stack([radius * cos, radius * sin], axis=-1)


def _horner(t: _Floats, coefficients: tuple[float, ...]) -> _Floats:
    """The polynomial by Horner's rule, highest coefficient first; two roundings a step."""
    p = np.full_like(t, coefficients[0])
    for c in coefficients[1:]:
        p = p * t + np.float32(c)
    return p


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
    log_m = f + (t * (f * _horner(f, LOG_COEFFICIENTS)) + np.float32(-0.5) * t)
    minus_log_u = (24 - e).astype(np.float32) * np.float32(0.693147180559945) - log_m
    radius: _Floats = np.sqrt(np.float32(2) * np.maximum(minus_log_u, np.float32(0)))
    return radius


def _cos_sin(words: _Words) -> tuple[_Floats, _Floats]:
    """Cosine and sine of 2 pi (w >> 8) / 2^24, reduced exactly to [-pi/4, pi/4]."""
    v = (words >> np.uint32(8)).astype(np.int32)
    quadrant = (v + (1 << 21)) >> 22
    t = (v - (quadrant << 22)).astype(np.float32) * np.float32(3.7450704e-07)
    t2 = t * t
    s = _horner(t2, SIN_COEFFICIENTS) * t2 * t + t
    c = _horner(t2, COS_COEFFICIENTS) * t2 * t2 - np.float32(0.5) * t2 + np.float32(1)
    turns = quadrant & 3
    cos = np.choose(turns, [c, -s, -c, s])
    sin = np.choose(turns, [s, c, -s, -c])
    return cos, sin
