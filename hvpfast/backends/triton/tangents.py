"""K tangents (V_l, v_l) of each model through the network and back.

forward   z_dot_l     = a_dot_{l-1} W_l' + a_{l-1} V_l' + v_l            a_dot_0 = 0
          a_dot_l     = s1_l * z_dot_l
loss      z_bar_dot_L = (d2 loss / dz2) z_dot_L
backward  a_bar_dot_l = z_bar_dot_{l+1} W_{l+1} + z_bar_{l+1} V_{l+1}    second term: Hessian only
          z_bar_dot_l = s1_l * a_bar_dot_l + s2_l * z_dot_l              second term: Hessian only
product   (Hv)_{W_l}  = z_bar_dot_l' a_{l-1} + z_bar_l' a_dot_{l-1}      second term: Hessian only
          (Hv)_{b_l}  = sum over samples of z_bar_dot_l
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvpfast.backends.triton import gemm
from hvpfast.backends.triton.layers import quadratic_layer, r_backward_layer, r_forward_layer
from hvpfast.backends.triton.linearization import Linearization, counts
from hvpfast.backends.triton.losses import loss_hvp
from hvpfast.backends.triton.network import Layers, Rows, given, no_layers
from hvpfast.backends.triton.products import product_layer


@dataclass
class Streams:
    """What K tangents of each model leave, (M, K, N, D[l]) per layer l = 1..L.

    z_dot of piecewise linear activations is not kept in hidden layers, nor a_bar_dot.
    """

    K: int
    z_dot: Layers
    a_dot: Layers
    a_bar_dot: Layers
    z_bar_dot: Layers


def r_forward(lin: Linearization, v: Rows, K: int, z_dot_1: Tensor | None = None) -> Streams:
    """The forward pass of tangents v (M K, P).

    z_dot_1 (M, K, N, D[1]) takes the place of the first layer's product where v lacks that layer.
    """
    M, N, L = lin.M, lin.N, lin.L
    s = Streams(K, no_layers(L), no_layers(L), no_layers(L), no_layers(L))
    for l in range(1, L + 1):
        d, d_below, below = lin.D[l], lin.D[l - 1], given(lin.a[l - 1])
        W, V = given(lin.params.W[l]), v.W[l]
        if l == L or lin.smooth:
            s.z_dot[l] = lin.empty(M, K, N, d)
        if l < L:
            s.a_dot[l] = lin.empty(M, K, N, d)
        a_dot_below = s.a_dot[l - 1]
        sums = None
        if l == 1 and z_dot_1 is not None:
            sums = z_dot_1.unsqueeze(0)
        elif lin.torch_is_faster(N, d, d_below, M * K):
            sums = lin.empty(1 if a_dot_below is None else 2, M, K, N, d)
            gemm.multiply_shared(below, v.W_of_models(l, M).mT, sums[0])
            if a_dot_below is not None:
                gemm.multiply_rows(a_dot_below, W.mT, sums[1])
        lin.launch_tiles(
            r_forward_layer, (M * K, N, d),
            a_dot_below, below, W, V, v.b[l], sums, lin.s1[l], s.z_dot[l], s.a_dot[l],
            N, d_below, d, K, lin.below_m(l), lin.params.stride, v.stride, *counts(sums),
        )  # fmt: skip
    return s


def r_backward(lin: Linearization, v: Rows, s: Streams, ggn: bool, keep: bool) -> None:
    """The loss and the backward pass of tangents v.

    With ``keep`` z_dot and, for smooth activations, a_bar_dot stay for third-order products;
    otherwise z_bar_dot takes the place of z_dot.
    """
    M, N, K, L = lin.M, lin.N, s.K, lin.L
    z_dot = given(s.z_dot[L])
    s.z_bar_dot[L] = torch.empty_like(z_dot) if keep else z_dot
    lin.launch_losses(
        loss_hvp, M * K, lin.p, lin.weight, z_dot, s.z_bar_dot[L], None, N, lin.D[L], K
    )
    for l in range(L - 1, 0, -1):
        d, d_above = lin.D[l], lin.D[l + 1]
        above, W = given(s.z_bar_dot[l + 1]), given(lin.params.W[l + 1])
        z_bar_above, V = lin.z_bar[l + 1], given(v.W[l + 1])
        sums = None
        if lin.torch_is_faster(N, d, d_above, M * K):
            sums = lin.empty(1 if ggn else 2, M, K, N, d)
            gemm.multiply_rows(above, W, sums[0])
            if not ggn:
                gemm.multiply_shared(given(z_bar_above), v.W_of_models(l + 1, M), sums[1])
        in_place = s.z_dot[l] if not keep else None
        s.z_bar_dot[l] = lin.empty(M, K, N, d) if in_place is None else in_place
        if keep and lin.smooth:
            s.a_bar_dot[l] = lin.empty(M, K, N, d)
        lin.launch_tiles(
            r_backward_layer, (M * K, N, d),
            above, None if ggn else z_bar_above, W, V, sums,
            lin.s1[l], None if ggn else lin.s2[l], s.z_dot[l], s.a_bar_dot[l], s.z_bar_dot[l],
            N, d_above, d, K, lin.params.stride, v.stride, *counts(sums),
        )  # fmt: skip


def products(lin: Linearization, s: Streams, out: Rows, ggn: bool, first: int = 1) -> Tensor:
    """The products of layers ``first``..L to ``out`` (M K, P); returns their ||.||^2, (M, K)."""
    M, N, K = lin.M, lin.N, s.K
    norms = []
    for l in range(first, lin.L + 1):
        d, d_below, below = lin.D[l], lin.D[l - 1], given(lin.a[l - 1])
        W, b, z_bar_dot = given(out.W[l]), out.b[l], given(s.z_bar_dot[l])
        z_bar, a_dot = (None, None) if ggn or l == 1 else (lin.z_bar[l], s.a_dot[l - 1])
        if lin.torch_is_faster(d, d_below, N, M * K):
            for row in range(M * K):
                m, k = divmod(row, K)
                terms = [(z_bar_dot[m, k], below[m % len(below)])]
                if z_bar is not None:
                    terms.append((z_bar[m], given(a_dot)[m, k]))
                gemm.sum_over_samples(terms, W[row])
            norms.append(torch.linalg.vector_norm(W, dim=(1, 2), dtype=torch.float64)[:, None] ** 2)
            if b is not None:
                torch.sum(z_bar_dot.flatten(0, 1), 1, out=b)
                norms.append(torch.linalg.vector_norm(b, dim=1, dtype=torch.float64)[:, None] ** 2)
            continue
        parts = lin.parts(M * K, d, d_below)
        lin.launch_tiles(
            product_layer, (M * K, d, d_below),
            z_bar_dot, below, z_bar, a_dot, W, b, parts,
            N, d, d_below, K, lin.below_m(l), out.stride,
        )  # fmt: skip
        norms.append(parts)
    return torch.cat(norms, 1).sum(1).view(M, K)


def hvp(lin: Linearization, tangents: Tensor, ggn: bool) -> Tensor:
    """H v_k, or with ``ggn`` G v_k, for tangents (M, K, P)."""
    K, out = tangents.shape[1], torch.empty_like(tangents)
    if K == 0:
        return out
    v = Rows(lin.layout, tangents.flatten(0, 1))
    s = r_forward(lin, v, K)
    r_backward(lin, v, s, ggn, keep=False)
    products(lin, s, Rows(lin.layout, out.flatten(0, 1)), ggn)
    return out


def quadratic(lin: Linearization, tangents: Tensor, ggn: bool) -> Tensor:
    """v_k' H v_k (M, K) for tangents (M, K, P), without the backward pass or Hv.

    <z_dot_L, D2[z_dot_L]> + sum_{l<L} <s2_l, z_dot_l^2> + 2 sum_{l>=2} <z_bar_l, a_dot_{l-1} V_l'>
    with the last two for the Hessian only.
    """
    M, N, K, L = lin.M, lin.N, tangents.shape[1], lin.L
    if K == 0:
        return lin.empty(M, 0)
    v = Rows(lin.layout, tangents.flatten(0, 1))
    s = r_forward(lin, v, K)
    parts = [lin.loss_parts(M * K)]
    lin.launch_losses(
        loss_hvp, M * K, lin.p, lin.weight, s.z_dot[L], None, parts[0], N, lin.D[L], K
    )
    for l in range(1, L + 1):
        if ggn or (l == 1 and lin.s2[l] is None):
            continue
        d, d_below, V, a_dot_below = lin.D[l], lin.D[l - 1], given(v.W[l]), s.a_dot[l - 1]
        sums = None
        if a_dot_below is not None and lin.torch_is_faster(N, d, d_below, M * K):
            sums = lin.empty(1, M, K, N, d)
            gemm.multiply_each(a_dot_below, v.W_of_models(l, M).mT, sums[0])
        parts.append(lin.parts(M * K, N, d))
        lin.launch_tiles(
            quadratic_layer, (M * K, N, d),
            a_dot_below, V, sums, lin.s2[l], s.z_dot[l], lin.z_bar[l], parts[-1],
            N, d_below, d, K, v.stride, *counts(sums),
        )  # fmt: skip
    return torch.cat(parts, 1).sum(1).view(M, K).to(tangents.dtype)
