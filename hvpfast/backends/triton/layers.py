"""Kernels of one layer: primal, tangent and mixed passes, each with its elementwise epilogue.

M models, N samples, widths D[l], K tangents; k counts the M K tangents of all models, and belongs
to model m = k // K. Streams are (M, K, N, D[l]), residuals (M, N, D[l]), contiguous. Strides, in
entries: ``params_m`` between the parameters of models (0: one model), ``P`` between tangents (mixed
passes: ``v_k`` and ``u_k``), ``below_m`` between models' activations below (0: a shared input).

A pointer that is None stands for a term that is absent. Where torch multiplied the matrices
(``gemm.py``), ``sums`` (num_sums, M or M K, N, D[l]) holds the products, ``sums_t`` entries apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hvpfast.backends.triton.tiles import add_product, load_sums, own_entries


@triton.jit
def primal_forward_layer(
    a_below, W, b, sums, z, a, s1, s2,
    N, d_below, d, below_m, params_m, num_sums, sums_t,
    jet: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = a_below W' + b, a = act(z), s1 = act'(z), s2 = act''(z); jet None (last layer): z."""
    m, n, i, at, inside = own_entries(N, d, ROWS, COLUMNS)
    own = m * N * d + at
    if sums is None:
        zi = tl.zeros((ROWS, COLUMNS), W.dtype.element_ty)
        zi = add_product(zi, a_below + m * below_m, d_below, 1, W + m * params_m, 1, d_below,
                         N, d, n, i, d_below, PRECISION)  # fmt: skip
    else:
        zi = load_sums(sums + m * N * d, num_sums, sums_t, at, inside, ROWS, COLUMNS)
    if b is not None:
        zi += tl.load(b + m * params_m + i, mask=i < d, other=0.0)[None, :]
    if z is not None:
        tl.store(z + own, zi, mask=inside)
    if jet is not None:
        value, d1, d2, _d3 = jet(zi)
        tl.store(a + own, value, mask=inside)
        tl.store(s1 + own, d1, mask=inside)
        if s2 is not None:
            tl.store(s2 + own, d2, mask=inside)


@triton.jit
def primal_backward_layer(
    z_bar_above, W_above, sums, s1, s2, a_bar, z_bar,
    N, d_above, d, params_m, num_sums, sums_t,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a_bar = z_bar_above W_above, z_bar = s1 * a_bar; s2 becomes act''(z) * a_bar."""
    m, n, i, at, inside = own_entries(N, d, ROWS, COLUMNS)
    own = m * N * d + at
    if sums is None:
        bar = tl.zeros((ROWS, COLUMNS), z_bar.dtype.element_ty)
        bar = add_product(bar, z_bar_above + m * N * d_above, d_above, 1, W_above + m * params_m,
                          d, 1, N, d, n, i, d_above, PRECISION)  # fmt: skip
    else:
        bar = load_sums(sums + m * N * d, num_sums, sums_t, at, inside, ROWS, COLUMNS)
    if a_bar is not None:
        tl.store(a_bar + own, bar, mask=inside)
    if s2 is not None:
        d2 = tl.load(s2 + own, mask=inside, other=0.0)
        tl.store(s2 + own, d2 * bar, mask=inside)
    tl.store(z_bar + own, tl.load(s1 + own, mask=inside, other=0.0) * bar, mask=inside)


@triton.jit
def r_forward_layer(
    a_dot_below, a_below, W, V, v, sums, s1, z_dot, a_dot,
    N, d_below, d, K, below_m, params_m, P, num_sums, sums_t,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z_dot = a_dot_below W' + a_below V' + v, a_dot = s1 * z_dot; a_dot_below None: first layer.

    Stores z_dot where it is given, and a_dot likewise (None: last layer).
    """
    k, n, i, at, inside = own_entries(N, d, ROWS, COLUMNS)
    m = k // K
    own = k * N * d + at
    if sums is None:
        dot = tl.zeros((ROWS, COLUMNS), V.dtype.element_ty)
        dot = add_product(dot, a_below + m * below_m, d_below, 1, V + k * P, 1, d_below,
                          N, d, n, i, d_below, PRECISION)  # fmt: skip
        if a_dot_below is not None:
            dot = add_product(dot, a_dot_below + k * N * d_below, d_below, 1, W + m * params_m,
                              1, d_below, N, d, n, i, d_below, PRECISION)  # fmt: skip
    else:
        dot = load_sums(sums + k * N * d, num_sums, sums_t, at, inside, ROWS, COLUMNS)
    if v is not None:
        dot += tl.load(v + k * P + i, mask=i < d, other=0.0)[None, :]
    if z_dot is not None:
        tl.store(z_dot + own, dot, mask=inside)
    if a_dot is not None:
        slope = tl.load(s1 + m * N * d + at, mask=inside, other=0.0)
        tl.store(a_dot + own, slope * dot, mask=inside)


@triton.jit
def r_backward_layer(
    z_bar_dot_above, z_bar_above, W_above, V_above, sums, s1, s2, z_dot, a_bar_dot, z_bar_dot,
    N, d_above, d, K, params_m, P, num_sums, sums_t,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a_bar_dot = z_bar_dot_above W_above + z_bar_above V_above.

    z_bar_dot = s1 * a_bar_dot + s2 * z_dot. The second terms belong to the Hessian: for the ggn
    z_bar_above and s2 are None.
    """
    k, n, i, at, inside = own_entries(N, d, ROWS, COLUMNS)
    m = k // K
    own = k * N * d + at
    if sums is None:
        bar = tl.zeros((ROWS, COLUMNS), z_bar_dot.dtype.element_ty)
        bar = add_product(bar, z_bar_dot_above + k * N * d_above, d_above, 1,
                          W_above + m * params_m, d, 1, N, d, n, i, d_above, PRECISION)  # fmt: skip
        if z_bar_above is not None:
            bar = add_product(bar, z_bar_above + m * N * d_above, d_above, 1, V_above + k * P, d, 1,
                              N, d, n, i, d_above, PRECISION)  # fmt: skip
    else:
        bar = load_sums(sums + k * N * d, num_sums, sums_t, at, inside, ROWS, COLUMNS)
    if a_bar_dot is not None:
        tl.store(a_bar_dot + own, bar, mask=inside)
    bar *= tl.load(s1 + m * N * d + at, mask=inside, other=0.0)
    if s2 is not None:
        bend = tl.load(s2 + m * N * d + at, mask=inside, other=0.0)
        bar += bend * tl.load(z_dot + own, mask=inside, other=0.0)
    tl.store(z_bar_dot + own, bar, mask=inside)


@triton.jit
def quadratic_layer(
    a_dot_below, V, sums, s2, z_dot, z_bar, parts,
    N, d_below, d, K, P, num_sums, sums_t,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts (M K, tiles) of sum 2 z_bar * (a_dot_below V') + s2 * z_dot^2.

    a_dot_below None: without the first term (first layer); s2 None: without the second (last
    layer, or act'' = 0).
    """
    k, n, i, at, inside = own_entries(N, d, ROWS, COLUMNS)
    m = k // K
    form = tl.zeros((ROWS, COLUMNS), V.dtype.element_ty)
    if a_dot_below is not None:
        if sums is None:
            form = add_product(form, a_dot_below + k * N * d_below, d_below, 1, V + k * P, 1,
                               d_below, N, d, n, i, d_below, PRECISION)  # fmt: skip
        else:
            form = load_sums(sums + k * N * d, num_sums, sums_t, at, inside, ROWS, COLUMNS)
        form *= 2 * tl.load(z_bar + m * N * d + at, mask=inside, other=0.0)
    if s2 is not None:
        dot = tl.load(z_dot + k * N * d + at, mask=inside, other=0.0)
        form += tl.load(s2 + m * N * d + at, mask=inside, other=0.0) * dot * dot
    tl.store(parts + tl.program_id(0), tl.sum(tl.sum(form, 1), 0).to(tl.float64))


@triton.jit
def mixed_forward_layer(
    a_uv_below, a_v_below, a_u_below, W, V, U, sums, z, s1, z_v, z_u, z_uv, a_uv,
    N, d_below, d, K, params_m, v_k, u_k, num_sums, sums_t,
    jet: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z_uv = a_uv_below W' + sum_k (a_v_below U' + a_u_below V'), collapsed over the tangents.

    a_uv = s1 * z_uv + sum_k act''(z) * z_v * z_u, without the last term where jet is None. First
    layer (a_v_below None): z_uv = 0. a_uv_below None: it is zero.
    """
    m, n, i, at, inside = own_entries(N, d, ROWS, COLUMNS)
    own = m * N * d + at
    zi = tl.zeros((ROWS, COLUMNS), z_uv.dtype.element_ty)
    if sums is not None:
        zi = load_sums(sums + m * N * d, num_sums, sums_t, at, inside, ROWS, COLUMNS)
    elif a_v_below is not None:
        if a_uv_below is not None:
            zi = add_product(zi, a_uv_below + m * N * d_below, d_below, 1, W + m * params_m, 1,
                             d_below, N, d, n, i, d_below, PRECISION)  # fmt: skip
        for k in range(m * K, m * K + K):
            zi = add_product(zi, a_v_below + k * N * d_below, d_below, 1, U + k * u_k, 1, d_below,
                             N, d, n, i, d_below, PRECISION)  # fmt: skip
            zi = add_product(zi, a_u_below + k * N * d_below, d_below, 1, V + k * v_k, 1, d_below,
                             N, d, n, i, d_below, PRECISION)  # fmt: skip
    tl.store(z_uv + own, zi, mask=inside)
    if a_uv is not None:
        ai = tl.load(s1 + own, mask=inside, other=0.0) * zi
        if jet is not None:
            product = tl.zeros((ROWS, COLUMNS), z_uv.dtype.element_ty)
            for k in range(m * K, m * K + K):
                dot = tl.load(z_v + k * N * d + at, mask=inside, other=0.0)
                product += dot * tl.load(z_u + k * N * d + at, mask=inside, other=0.0)
            _value, _d1, d2, _d3 = jet(tl.load(z + own, mask=inside, other=0.0))
            ai += d2 * product
        tl.store(a_uv + own, ai, mask=inside)


@triton.jit
def mixed_backward_layer(
    z_bar_uv_above, z_bar_v_above, z_bar_u_above, W_above, V_above, U_above, sums,
    z, a_bar, s1, s2, z_v, z_u, a_bar_v, a_bar_u, z_uv, z_bar_uv,
    N, d_above, d, K, params_m, v_k, u_k, num_sums, sums_t,
    jet: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a_bar_uv = z_bar_uv_above W_above + sum_k (z_bar_u_above V_above + z_bar_v_above U_above).

    z_bar_uv = s1 * a_bar_uv + sum_k act'' * (a_bar_u * z_v + a_bar_v * z_u)
               + s2 * z_uv + sum_k act''' * a_bar * z_v * z_u
    with act'' and act''' at z. jet None: the first term only; z_uv None (ggn): the first line only.
    """
    m, n, i, at, inside = own_entries(N, d, ROWS, COLUMNS)
    own = m * N * d + at
    if sums is None:
        bar = tl.zeros((ROWS, COLUMNS), z_bar_uv.dtype.element_ty)
        bar = add_product(bar, z_bar_uv_above + m * N * d_above, d_above, 1, W_above + m * params_m,
                          d, 1, N, d, n, i, d_above, PRECISION)  # fmt: skip
        for k in range(m * K, m * K + K):
            bar = add_product(bar, z_bar_u_above + k * N * d_above, d_above, 1, V_above + k * v_k,
                              d, 1, N, d, n, i, d_above, PRECISION)  # fmt: skip
            bar = add_product(bar, z_bar_v_above + k * N * d_above, d_above, 1, U_above + k * u_k,
                              d, 1, N, d, n, i, d_above, PRECISION)  # fmt: skip
    else:
        bar = load_sums(sums + m * N * d, num_sums, sums_t, at, inside, ROWS, COLUMNS)
    bar *= tl.load(s1 + own, mask=inside, other=0.0)
    if jet is not None:
        cross = tl.zeros((ROWS, COLUMNS), z_bar_uv.dtype.element_ty)
        product = tl.zeros((ROWS, COLUMNS), z_bar_uv.dtype.element_ty)
        for k in range(m * K, m * K + K):
            stream = k * N * d + at
            dot_v = tl.load(z_v + stream, mask=inside, other=0.0)
            dot_u = tl.load(z_u + stream, mask=inside, other=0.0)
            cross += tl.load(a_bar_u + stream, mask=inside, other=0.0) * dot_v
            cross += tl.load(a_bar_v + stream, mask=inside, other=0.0) * dot_u
            product += dot_v * dot_u
        _value, _d1, d2, d3 = jet(tl.load(z + own, mask=inside, other=0.0))
        bar += d2 * cross
        if z_uv is not None:
            bend = tl.load(s2 + own, mask=inside, other=0.0)
            bar += bend * tl.load(z_uv + own, mask=inside, other=0.0)
            bar += d3 * tl.load(a_bar + own, mask=inside, other=0.0) * product
    tl.store(z_bar_uv + own, bar, mask=inside)
