"""One row per activation: act(z) and its first three derivatives, from the pre-activation z.

The same formulas as csrc/common/activations.h; a jet is (act, act', act'', act''').
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

PIECEWISE_LINEAR = ("identity", "relu")  # act'' = act''' = 0 almost everywhere


@triton.jit
def identity_jet(z):
    """The identity: ``act(z) = z``."""
    one, zero = tl.full(z.shape, 1, z.dtype), tl.full(z.shape, 0, z.dtype)
    return z, one, zero, zero


@triton.jit
def relu_jet(z):
    """max(z, 0); NaN stays, act'(0) = 0 as in PyTorch."""
    one, zero = tl.full(z.shape, 1, z.dtype), tl.full(z.shape, 0, z.dtype)
    return tl.where(z < 0, zero, z), tl.where(z > 0, one, zero), zero, zero


@triton.jit
def sigmoid_jet(z):
    """``s = 1 / (1 + exp(-z))``; e = exp(-|z|), s' = e / (1 + e)^2, |1 - 2 s| = (1 - e) / (1 + e).

    Never from s itself: s (1 - s) loses the small digits of a saturated unit.
    """
    e = tl.exp(-tl.abs(z))
    inverse = 1 / (1 + e)
    s = tl.where(z < 0, e * inverse, inverse)
    d1 = e * inverse * inverse
    t = (1 - e) * inverse
    return s, d1, tl.where(z < 0, t, -t) * d1, d1 * (1 - 6 * d1)


@triton.jit
def tanh_jet(z):
    """``t = tanh(z)``, e = exp(-2 |z|); near 0 a rational form keeps the relative error small."""
    e = tl.exp(-2 * tl.abs(z))
    far = (1 - e) / (1 + e)
    z2 = z * z  # Cephes: |z| < 0.625
    p = (-9.64399179425052238628e-1 * z2 - 9.92877231001918586564e1) * z2 - 1.61468768441708447952e3
    q = ((z2 + 1.12811678491632931402e2) * z2 + 2.23548839060100448583e3) * z2
    near = z + z * z2 * (p / (q + 4.84406305325125486048e3))
    t = tl.where(tl.abs(z) < 0.625, near, tl.where(z < 0, -far, far))
    d1 = 4 * e / ((1 + e) * (1 + e))  # 1 - t^2
    return t, d1, -2 * t * d1, d1 * (4 - 6 * d1)


@triton.jit
def gelu_jet(z):
    """``z Phi(z)``, Phi(z) = (1 + erf(z / sqrt 2)) / 2, phi = Phi'."""
    cdf = 0.5 * (1 + tl.erf(z * 0.70710678118654752440))
    c = tl.minimum(tl.maximum(z, -40.0), 40.0)  # phi(40) underflows; larger z would give inf * 0
    z2 = c * c
    pdf = 0.39894228040143267794 * tl.exp(-0.5 * z2)
    return z * cdf, cdf + c * pdf, pdf * (2 - z2), pdf * c * (z2 - 4)


@triton.jit
def gelu_tanh_jet(z):
    """``z (1 + tanh g) / 2``, g = c (z + k z^3), c = sqrt(2 / pi), k = 0.044715."""
    c: tl.constexpr = 0.79788456080286535588
    ck: tl.constexpr = 0.79788456080286535588 * 0.044715
    x = tl.minimum(tl.maximum(z, -40.0), 40.0)  # 1 - tanh(g)^2 underflows beyond
    g = x * (c + ck * x * x)
    g1 = c + 3 * ck * x * x
    g2 = 6 * ck * x
    t, d1, d2, d3 = tanh_jet(g)
    t1 = d1 * g1
    t2 = d2 * g1 * g1 + d1 * g2
    t3 = d3 * g1 * g1 * g1 + 3 * d2 * g1 * g2 + d1 * (6 * ck)
    gate = 0.5 + 0.5 * t
    return z * gate, gate + 0.5 * x * t1, t1 + 0.5 * x * t2, 1.5 * t2 + 0.5 * x * t3


@triton.jit
def silu_jet(z):
    """``z s(z)``, s the logistic function."""
    s, d1, d2, d3 = sigmoid_jet(z)
    return z * s, s + z * d1, 2 * d1 + z * d2, 3 * d2 + z * d3


@triton.jit
def softplus_jet(z):
    """``log(1 + exp z)``; z itself beyond 20, the threshold of torch.nn.Softplus."""
    s, d1, d2, _d3 = sigmoid_jet(z)
    # log(1 + e) = 2 artanh(r), r = e / (2 + e) <= 1/3: no digits of a small e are lost
    e = tl.exp(-tl.abs(z))
    r = e / (2 + e)
    r2 = r * r
    TERMS: tl.constexpr = 17 if z.dtype == tl.float64 else 8
    series = tl.full(z.shape, 0, z.dtype)
    for i in tl.static_range(TERMS):
        series = series * r2 + 2.0 / (2 * (TERMS - 1 - i) + 1)
    value = tl.maximum(z, 0.0) + r * series
    one, zero = tl.full(z.shape, 1, z.dtype), tl.full(z.shape, 0, z.dtype)
    linear = z > 20
    return (
        tl.where(linear, z, value),
        tl.where(linear, one, s),
        tl.where(linear, zero, d1),
        tl.where(linear, zero, d2),
    )


JETS: dict[str, Any] = {
    "identity": identity_jet,
    "relu": relu_jet,
    "sigmoid": sigmoid_jet,
    "tanh": tanh_jet,
    "gelu": gelu_jet,
    "gelu_tanh": gelu_tanh_jet,
    "silu": silu_jet,
    "softplus": softplus_jet,
}
