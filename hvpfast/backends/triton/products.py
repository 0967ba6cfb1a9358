"""Kernels of the last step of every gradient and product: sums over the samples.

    out_W (D[l], D[l-1]) = sum over terms, samples n of A(n, :)' B(n, :),    out_b = sum_n A_0(n, :)

Indices and strides are those of layers.py; outputs lie ``P`` entries apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hvpfast.backends.triton.tiles import DEPTH, add_product, own_tile


@triton.jit
def _add_samples(sum, a, b, rows, columns, i, j, N, PRECISION: tl.constexpr):
    """``sum`` + A' B for A (N, rows) at a, B (N, columns) at b."""
    return add_product(sum, a, 1, rows, b, columns, 1, rows, columns, i, j, N, PRECISION)


@triton.jit
def _sum_of_samples(a, rows, i, N, ROWS: tl.constexpr):
    """sum_n A(n, :) for A (N, rows) at a."""
    inner = tl.arange(0, DEPTH)
    tile = a + inner[None, :] * rows + i[:, None]
    sums = tl.zeros((ROWS, DEPTH), a.dtype.element_ty)
    for start in range(0, N, DEPTH):
        mask = (i[:, None] < rows) & (inner[None, :] < N - start)
        sums += tl.load(tile, mask=mask, other=0.0)
        tile += DEPTH * rows
    return tl.sum(sums, 1)


@triton.jit
def product_layer(
    z_bar_dot, a_below, z_bar, a_dot_below, out_W, out_b, norms,
    N, d, d_below, K, below_m, P,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_W = z_bar_dot' a_below + z_bar' a_dot_below, out_b = sum_n z_bar_dot for each tangent.

    z_bar None: without the second term (ggn, first layer, or the loss gradient). norms, where
    given, (M K, tiles) takes each tile's sum of squares of out_W and out_b.
    """
    k, i, j = own_tile(d, d_below, ROWS, COLUMNS)
    m = k // K
    out = tl.zeros((ROWS, COLUMNS), out_W.dtype.element_ty)
    out = _add_samples(
        out, z_bar_dot + k * N * d, a_below + m * below_m, d, d_below, i, j, N, PRECISION
    )
    if z_bar is not None:
        out = _add_samples(
            out, z_bar + m * N * d, a_dot_below + k * N * d_below, d, d_below, i, j, N, PRECISION
        )
    inside = (i[:, None] < d) & (j[None, :] < d_below)
    tl.store(out_W + k * P + i[:, None].to(tl.int64) * d_below + j[None, :], out, mask=inside)
    squares = tl.sum(tl.sum(out * out, 1), 0)
    if out_b is not None:  # noqa: SIM102  (known when compiled, not when run)
        if tl.program_id(0) % tl.cdiv(d_below, COLUMNS) == 0:
            bias = _sum_of_samples(z_bar_dot + k * N * d, d, i, N, ROWS)
            tl.store(out_b + k * P + i, bias, mask=i < d)
            squares += tl.sum(bias * bias, 0)
    if norms is not None:
        tl.store(norms + tl.program_id(0), squares.to(tl.float64))


@triton.jit
def mixed_product_layer(
    z_bar_uv, a_below, z_bar, a_uv_below, z_bar_v, z_bar_u, a_v_below, a_u_below, out_W, out_b,
    N, d, d_below, K, below_m, P,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The collapsed product of the mixed stream of each model.

    out_W = z_bar_uv' a_below + z_bar' a_uv_below + sum_k (z_bar_u' a_v_below + z_bar_v' a_u_below)
    out_b = sum_n z_bar_uv
    z_bar None: without the second term; a_v_below None: first layer, without the sum over k.
    """
    m, i, j = own_tile(d, d_below, ROWS, COLUMNS)
    out = tl.zeros((ROWS, COLUMNS), out_W.dtype.element_ty)
    out = _add_samples(
        out, z_bar_uv + m * N * d, a_below + m * below_m, d, d_below, i, j, N, PRECISION
    )
    if z_bar is not None:
        out = _add_samples(
            out, z_bar + m * N * d, a_uv_below + m * N * d_below, d, d_below, i, j, N, PRECISION
        )
    if a_v_below is not None:  # the K N rows of a model's streams are one long sum
        k = m * K
        out = _add_samples(out, z_bar_u + k * N * d, a_v_below + k * N * d_below, d, d_below, i, j,
                           K * N, PRECISION)  # fmt: skip
        out = _add_samples(out, z_bar_v + k * N * d, a_u_below + k * N * d_below, d, d_below, i, j,
                           K * N, PRECISION)  # fmt: skip
    inside = (i[:, None] < d) & (j[None, :] < d_below)
    tl.store(out_W + m * P + i[:, None].to(tl.int64) * d_below + j[None, :], out, mask=inside)
    if out_b is not None:  # noqa: SIM102  (known when compiled, not when run)
        if tl.program_id(0) % tl.cdiv(d_below, COLUMNS) == 0:
            bias = _sum_of_samples(z_bar_uv + m * N * d, d, i, N, ROWS)
            tl.store(out_b + m * P + i, bias, mask=i < d)


@triton.jit
def gram_layer(
    gram, z_bar_dot, out, norms,
    N, d, K, gram_m,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out`` = Gamma z_bar_dot_1 for Gamma = X X' + 1 1' (N, N), ``gram_m`` apart: u_1 [x; 1].

    norms (M K, tiles) takes each tile's part of ||u_1||^2 = <z_bar_dot_1, Gamma z_bar_dot_1>.
    """
    k, n, i = own_tile(N, d, ROWS, COLUMNS)
    m = k // K
    dot = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    dot = add_product(
        dot, gram + m * gram_m, N, 1, z_bar_dot + k * N * d, d, 1, N, d, n, i, N, PRECISION
    )
    inside = (n[:, None] < N) & (i[None, :] < d)
    own = k * N * d + n.to(tl.int64)[:, None] * d + i[None, :]
    tl.store(out + own, dot, mask=inside)
    bar = tl.load(z_bar_dot + own, mask=inside, other=0.0)
    tl.store(norms + tl.program_id(0), tl.sum(tl.sum(bar * dot, 1), 0).to(tl.float64))
