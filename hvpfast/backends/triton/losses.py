"""Kernels of the loss on the logits z (N, C): value, gradient, second and third derivatives.

The formulas of csrc/common/losses.h. Softmax cross-entropy with target mass q (C) and total mass
m = sum q (label smoothing, class weights and ignored targets are choices of q), p = softmax(z),
w = m / normalizer:

    loss      m logsumexp(z) - <q, z>
    gradient  w p - q / normalizer
    D2[u]     w p * (u - <p, u>)
    D3[u, v]  w p * ((u - <p, u>) (v - <p, v>) - <p, (u - <p, u>) (v - <p, v>)>)

Squared error: D2[u] = w u, D3 = 0; there p is None. ``summary`` (M, 4) of float64 holds the loss,
its normalizer, the inverse of that (1 where nothing counts: there the loss is 0 / 0) and the first
label out of range (N: none); the loss is summed up from ``parts``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_samples(N, C, ROWS: tl.constexpr, CLASSES: tl.constexpr):
    """This program's (index in the batch, samples n, classes c, entries of (N, C), which exist)."""
    tiles = tl.cdiv(N, ROWS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CLASSES)
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    return batch, n, c, at, (n[:, None] < N) & (c[None, :] < C)


@triton.jit
def weigh_labels(
    y, class_weights, summary,
    N, C, y_m, ignore_index,
    MEAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The normalizer sum_n c_{y_n} (1 for a sum), and the first label out of range."""
    m = tl.program_id(0).to(tl.int64)
    counted = tl.zeros((ROWS,), tl.float64)
    first_wrong = tl.zeros((ROWS,), tl.int64) + N
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        label = tl.load(y + m * y_m + n, mask=n < N, other=0)
        counts = (n < N) & (label != ignore_index)
        in_range = (label >= 0) & (label < C)
        first_wrong = tl.minimum(first_wrong, tl.where(counts & ~in_range, n.to(tl.int64), N))
        if class_weights is None:
            counted += tl.where(counts, 1.0, 0.0)
        else:
            counted += tl.load(class_weights + label, mask=counts & in_range, other=0.0)
    normalizer = tl.sum(counted, 0) if MEAN else tl.full((), 1, tl.float64)
    tl.store(summary + 4 * m + 1, normalizer)
    tl.store(summary + 4 * m + 2, 1 / tl.where(normalizer > 0, normalizer, 1.0))
    tl.store(summary + 4 * m + 3, tl.min(first_wrong, 0).to(tl.float64))


@triton.jit
def cross_entropy_gradient(
    z, y, class_weights, summary, p, weight, z_bar, parts,
    N, C, y_m, ignore_index,
    SMOOTHING: tl.constexpr, SMOOTH_MASS: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """p, w, z_bar = w p - q / normalizer, and the parts (M, tiles) of normalizer * loss."""
    m, n, c, at, inside = own_samples(N, C, ROWS, CLASSES)
    own = m * N * C + at
    inverse = tl.load(summary + 4 * m + 2)
    label = tl.load(y + m * y_m + n, mask=n < N, other=0)
    in_range = (label >= 0) & (label < C)
    counts = (n < N) & (label != ignore_index) & in_range
    wrong = (n < N) & (label != ignore_index) & ~in_range
    logits = tl.load(z + own, mask=inside, other=0.0)
    logits = tl.where(c[None, :] < C, logits, -float("inf"))
    top = tl.max(logits, 1)  # exp overflows above 88 in float32
    e = tl.exp(logits - top[:, None])
    total = tl.sum(e, 1)
    probability = e / total[:, None]
    log_sum = (tl.log(total) + top).to(tl.float64)

    # Masses in float64: (1 - smoothing) c_y on the label, smoothing c / C on every class.
    label_mass = tl.where(counts, 1.0, 0.0).to(tl.float64)
    if class_weights is not None:
        label_mass = tl.load(class_weights + label, mask=counts, other=0.0)
    label_mass *= 1 - SMOOTHING
    at_label = (c[None, :] == label[:, None]) & counts[:, None]
    logit = tl.sum(tl.where(at_label, logits, 0.0), 1)
    loss = tl.where(counts, label_mass * (log_sum - logit.to(tl.float64)), 0.0)
    mass = tl.where(counts, (label_mass + SMOOTH_MASS) * inverse, 0.0)
    w = mass.to(z.dtype.element_ty)
    bar = w[:, None] * probability
    if SMOOTHING > 0:
        share = tl.full((CLASSES,), SMOOTHING, tl.float64) / C
        if class_weights is not None:
            share *= tl.load(class_weights + c, mask=c < C, other=0.0)
        gaps = log_sum[:, None] - logits.to(tl.float64)
        gaps = tl.where(counts[:, None] & (c[None, :] < C), gaps, 0.0)
        loss += tl.sum(share[None, :] * gaps, 1)
        bar -= tl.where(counts[:, None], (share * inverse)[None, :], 0.0).to(bar.dtype)
    bar -= tl.where(at_label, (label_mass * inverse)[:, None], 0.0).to(bar.dtype)
    tl.store(p + own, probability, mask=inside)
    tl.store(weight + m * N + n, w, mask=n < N)
    tl.store(z_bar + own, bar, mask=inside)
    loss = tl.where(wrong, float("nan"), loss)  # never a number, read or not
    tl.store(parts + tl.program_id(0), tl.sum(loss, 0))


@triton.jit
def squared_error_gradient(
    z, y, summary, weight, z_bar, parts,
    N, C, y_m,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """w = 2 / normalizer, z_bar = w (z - y), and the parts (M, tiles) of normalizer * loss."""
    m, n, _c, at, inside = own_samples(N, C, ROWS, CLASSES)
    inverse = tl.load(summary + 4 * m + 2)
    error = tl.load(z + m * N * C + at, mask=inside, other=0.0)
    error -= tl.load(y + m * y_m + at, mask=inside, other=0.0)
    w = (2 * inverse).to(z.dtype.element_ty)
    tl.store(weight + m * N + n, w + tl.zeros((ROWS,), w.dtype), mask=n < N)
    tl.store(z_bar + m * N * C + at, w * error, mask=inside)
    squares = tl.sum(tl.sum((error * error).to(tl.float64), 1), 0)
    tl.store(parts + tl.program_id(0), squares)


@triton.jit
def _d2(p, w, u):
    """D2[u] for rows u (ROWS, CLASSES), weights w (ROWS,)."""
    if p is not None:
        u = p * (u - tl.sum(p * u, 1)[:, None])
    return w[:, None] * u


@triton.jit
def loss_hvp(
    p, weight, z_dot, z_bar_dot, parts,
    N, C, K,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """z_bar_dot_L = D2[z_dot_L], or where z_bar_dot is None parts (M K, tiles) of <z_dot_L, D2>."""
    k, n, _c, at, inside = own_samples(N, C, ROWS, CLASSES)
    m = k // K
    u = tl.load(z_dot + k * N * C + at, mask=inside, other=0.0)
    w = tl.load(weight + m * N + n, mask=n < N, other=0.0)
    probability = p
    if p is not None:
        probability = tl.load(p + m * N * C + at, mask=inside, other=0.0)
    bar = _d2(probability, w, u)
    if z_bar_dot is not None:
        tl.store(z_bar_dot + k * N * C + at, bar, mask=inside)
    else:
        tl.store(parts + tl.program_id(0), tl.sum(tl.sum(u * bar, 1), 0).to(tl.float64))


@triton.jit
def loss_mixed(
    p, weight, z_uv, z_v, z_u, loss_bar, z_bar_uv,
    N, C, K,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """z_bar_uv_L = D2[z_uv_L] + sum_k D3[z_v_L, z_u_L] + loss_bar; z_uv None: no first term (ggn).

    loss_bar, g z_bar_L where it is given, adds g times the loss gradient: the passes are linear.
    """
    m, n, _c, at, inside = own_samples(N, C, ROWS, CLASSES)
    own = m * N * C + at
    w = tl.load(weight + m * N + n, mask=n < N, other=0.0)
    bar = tl.zeros((ROWS, CLASSES), z_bar_uv.dtype.element_ty)
    probability = p
    if p is not None:
        probability = tl.load(p + own, mask=inside, other=0.0)
        for k in range(m * K, m * K + K):
            v = tl.load(z_v + k * N * C + at, mask=inside, other=0.0)
            u = tl.load(z_u + k * N * C + at, mask=inside, other=0.0)
            v -= tl.sum(probability * v, 1)[:, None]
            u -= tl.sum(probability * u, 1)[:, None]
            bar += u * v - tl.sum(probability * u * v, 1)[:, None]
        bar *= w[:, None] * probability
    if z_uv is not None:
        bar += _d2(probability, w, tl.load(z_uv + own, mask=inside, other=0.0))
    if loss_bar is not None:
        bar += tl.load(loss_bar + own, mask=inside, other=0.0)
    tl.store(z_bar_uv + own, bar, mask=inside)
