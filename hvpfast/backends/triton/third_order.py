"""d/dparams sum_k <u_k, H v_k>, with tangents v_k and cotangents u_k held fixed, collapsed over k.

Write z_v, z_u for the streams of the two tangents and z_uv for the mixed one; the mixed stream is
linear, so it is summed over k as it is formed and meets every W once:

    forward   z_uv_l     = a_uv_{l-1} W_l' + sum_k (a_v_{l-1} U_l' + a_u_{l-1} V_l')     z_uv_1 = 0
              a_uv_l     = s1 * z_uv_l + sum_k act'' * z_v_l * z_u_l
    loss      z_bar_uv_L = D2[z_uv_L] + sum_k D3[z_v_L, z_u_L]
    backward  a_bar_uv_l = z_bar_uv_{l+1} W_{l+1}
                           + sum_k (z_bar_u_{l+1} V_{l+1} + z_bar_v_{l+1} U_{l+1})
              z_bar_uv_l = s1 * a_bar_uv_l + sum_k act'' * (a_bar_u * z_v + a_bar_v * z_u)
                           + s2 * z_uv + sum_k act''' * a_bar * z_v * z_u
    product   out_W_l    = z_bar_uv_l' a_{l-1} + z_bar_l' a_uv_{l-1}
                           + sum_k (z_bar_u_l' a_v_{l-1} + z_bar_v_l' a_u_{l-1})
              out_b_l    = sum over samples of z_bar_uv_l

For the ggn the forward pass and all terms with z_uv, a_uv, a_bar or s2 are absent. Adding
g z_bar_L to z_bar_uv_L adds g dloss/dparams to the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvpfast.backends.triton import gemm
from hvpfast.backends.triton.layers import mixed_backward_layer, mixed_forward_layer
from hvpfast.backends.triton.linearization import Linearization, counts
from hvpfast.backends.triton.losses import loss_mixed
from hvpfast.backends.triton.network import Layers, Rows, given, no_layers
from hvpfast.backends.triton.products import mixed_product_layer
from hvpfast.backends.triton.tangents import Streams, r_backward, r_forward


@dataclass
class Mixed:
    """The mixed stream, (M, N, D[l]) per layer; None where it is zero."""

    z: Layers
    a: Layers
    z_bar: Layers


def third_order(
    lin: Linearization,
    v: Rows,
    s_v: Streams,
    u: Rows,
    z_dot_u1: Tensor | None,
    loss_bar: Tensor | None,
    ggn: bool,
) -> Tensor:
    """d/dparams sum_k <u_k, H v_k> (M, P).

    Args:
        lin: at order 3.
        v: the tangents (M K, P).
        s_v: their streams, kept.
        u: the cotangents (M K, P), or all but their first layer.
        z_dot_u1: (M, K, N, D[1]) where u lacks the first layer.
        loss_bar: g z_bar_L (M, N, D[L]), which adds g dloss/dparams.
        ggn: the third order of the ggn, J differentiated too.
    """
    s_u = r_forward(lin, u, s_v.K, z_dot_u1)
    r_backward(lin, u, s_u, ggn, keep=True)
    mixed = Mixed(no_layers(lin.L), no_layers(lin.L), no_layers(lin.L))
    if not ggn:
        _forward(lin, v, u, s_v, s_u, mixed)
    _loss(lin, s_v, s_u, loss_bar, mixed)
    _backward(lin, v, u, s_v, s_u, mixed)
    return _products(lin, s_v, s_u, mixed)


def _forward(
    lin: Linearization, v: Rows, u: Rows, s_v: Streams, s_u: Streams, mixed: Mixed
) -> None:
    M, N, K, L = lin.M, lin.N, s_v.K, lin.L
    for l in range(1 if lin.smooth else 2, L + 1):
        d, d_below = lin.D[l], lin.D[l - 1]
        if l == L == 1:
            break  # z_uv_1 = 0
        W, V, U = lin.params.W[l], v.W[l], u.W[l]
        a_uv, a_v, a_u = mixed.a[l - 1], s_v.a_dot[l - 1], s_u.a_dot[l - 1]
        sums = None
        if l > 1 and lin.torch_is_faster(N, d, 2 * K * d_below, M):
            own = 0 if a_uv is None else 1
            sums = lin.empty(own + 2 * K, M, N, d)
            if a_uv is not None:
                gemm.multiply_shared(a_uv, given(W).mT.unsqueeze(1), sums[0].unsqueeze(1))
            for a, rows, at in ((a_v, u, own), (a_u, v, own + K)):
                factor = rows.W_of_models(l, M).mT
                gemm.multiply_each(given(a), factor, sums[at : at + K].transpose(0, 1))
        mixed.z[l] = lin.residual(l)
        if l < L:
            mixed.a[l] = lin.residual(l)
        lin.launch_tiles(
            mixed_forward_layer, (M, N, d),
            a_uv, a_v, a_u, W, V, U, sums,
            lin.z[l], lin.s1[l], s_v.z_dot[l], s_u.z_dot[l], mixed.z[l], mixed.a[l],
            N, d_below, d, K, lin.params.stride, v.stride, u.stride, *counts(sums),
            jet=lin.jet if lin.smooth and l < L else None, mixed=True,
        )  # fmt: skip


def _loss(
    lin: Linearization, s_v: Streams, s_u: Streams, loss_bar: Tensor | None, mixed: Mixed
) -> None:
    L = lin.L
    mixed.z_bar[L] = lin.residual(L)
    lin.launch_losses(
        loss_mixed, lin.M,
        lin.p, lin.weight, mixed.z[L], s_v.z_dot[L], s_u.z_dot[L], loss_bar, mixed.z_bar[L],
        lin.N, lin.D[L], s_v.K,
    )  # fmt: skip


def _backward(
    lin: Linearization, v: Rows, u: Rows, s_v: Streams, s_u: Streams, mixed: Mixed
) -> None:
    M, N, K = lin.M, lin.N, s_v.K
    for l in range(lin.L - 1, 0, -1):
        d, d_above = lin.D[l], lin.D[l + 1]
        W, V, U = given(lin.params.W[l + 1]), given(v.W[l + 1]), given(u.W[l + 1])
        bar_uv = given(mixed.z_bar[l + 1])
        bar_v, bar_u = given(s_v.z_bar_dot[l + 1]), given(s_u.z_bar_dot[l + 1])
        sums = None
        if lin.torch_is_faster(N, d, (2 * K + 1) * d_above, M):
            sums = lin.empty(1 + 2 * K, M, N, d)
            gemm.multiply_shared(bar_uv, W.unsqueeze(1), sums[0].unsqueeze(1))
            for bar, rows, at in ((bar_u, v, 1), (bar_v, u, 1 + K)):
                factor = rows.W_of_models(l + 1, M)
                gemm.multiply_each(bar, factor, sums[at : at + K].transpose(0, 1))
        mixed.z_bar[l] = lin.residual(l)
        lin.launch_tiles(
            mixed_backward_layer, (M, N, d),
            bar_uv, bar_v, bar_u, W, V, U, sums,
            lin.z[l], lin.a_bar[l], lin.s1[l], lin.s2[l], s_v.z_dot[l], s_u.z_dot[l],
            s_v.a_bar_dot[l], s_u.a_bar_dot[l], mixed.z[l], mixed.z_bar[l],
            N, d_above, d, K, lin.params.stride, v.stride, u.stride, *counts(sums),
            jet=lin.jet if lin.smooth else None, mixed=True,
        )  # fmt: skip


def _products(lin: Linearization, s_v: Streams, s_u: Streams, mixed: Mixed) -> Tensor:
    M, N, K = lin.M, lin.N, s_v.K
    out = lin.empty(M, lin.P)
    rows = Rows(lin.layout, out)
    for l in range(1, lin.L + 1):
        d, d_below, below = lin.D[l], lin.D[l - 1], given(lin.a[l - 1])
        W, b, bar_uv = given(rows.W[l]), rows.b[l], given(mixed.z_bar[l])
        a_uv, a_v, a_u = mixed.a[l - 1], s_v.a_dot[l - 1], s_u.a_dot[l - 1]
        z_bar = None if a_uv is None else given(lin.z_bar[l])
        bar_v, bar_u = given(s_v.z_bar_dot[l]), given(s_u.z_bar_dot[l])
        if lin.torch_is_faster(d, d_below, (1 if l == 1 else 2 * K + 1) * N, M):
            for m in range(M):
                terms = [(bar_uv[m], below[m % len(below)])]
                if z_bar is not None and a_uv is not None:
                    terms.append((z_bar[m], a_uv[m]))
                if a_v is not None and a_u is not None:
                    terms.append((bar_u[m].flatten(0, 1), a_v[m].flatten(0, 1)))
                    terms.append((bar_v[m].flatten(0, 1), a_u[m].flatten(0, 1)))
                gemm.sum_over_samples(terms, W[m])
            if b is not None:
                torch.sum(bar_uv, 1, out=b)
            continue
        lin.launch_tiles(
            mixed_product_layer, (M, d, d_below),
            bar_uv, below, z_bar, a_uv, bar_v, bar_u, a_v, a_u, W, b,
            N, d, d_below, K, lin.below_m(l), lin.P,
        )  # fmt: skip
    return out


def hvp_vjp(lin: Linearization, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
    """d sum_k <u_k, H v_k> / d params (M, P) for tangents, cotangents (M, K, P)."""
    K = tangents.shape[1]
    if K == 0:
        return torch.zeros(lin.M, lin.P, dtype=lin.like.dtype, device=lin.like.device)
    v, u = (Rows(lin.layout, t.flatten(0, 1)) for t in (tangents, cotangents))
    s_v = r_forward(lin, v, K)
    r_backward(lin, v, s_v, ggn, keep=True)
    return third_order(lin, v, s_v, u, None, None, ggn)
