"""Exact curvature of a perceptron from per-sample Hessian cores, in plain torch: the specification.

H = sum_n H_n over samples, the loss's weights inside. A direction (V_l, v_l) acts on one sample
through u_l = V_l a_{l-1} + v_l and w_l = V_l' z_bar_l alone, and H_n is a small matrix in (u, w):

    B_L = d2 loss_n / dz_L2                                          S[u_L, u_L]
    B_l = s1_l W_{l+1}' B_{l+1} W_{l+1} s1_l + s2_l                  S[u_l, u_l], s1, s2 diagonal
    U_lm = s1_l W_{l+1}' U_{l+1,m},    U_mm = B_m                    S[u_l, u_m], l <= m
    M_lm = s1_l W_{l+1}' M_{l+1,m},    M_{m-1,m} = s1_{m-1}          S[u_l, w_m], l < m; else zero

with s1 = act'(z), s2 = act''(z) a_bar; the Gauss-Newton matrix has no s2 and no M. So block (l, m)
of H_n is a_{l-1} x (U_lm x a_{m-1} + M_lm x z_bar_m), a with a one appended for the bias, and with
alpha^l_nm = <a_{l-1,n}, a_{l-1,m}> (+ 1), beta^l_nm = <z_bar_{l,n}, z_bar_{l,m}>

    tr H     = sum_n sum_l alpha^l_nn tr B_l
    diag H   = sum_n diag(B_l)_i a_{l-1,j}^2 at W_l(i, j), sum_n diag(B_l)_i at b_l(i)
    tr H_a H_b = sum_{n in a, m in b} sum_l (alpha^l)^2 <B_l,n, B_l,m> + 2 sum_{l<k} alpha^l (
        alpha^k <U_n, U_m> + beta^k <M_n, M_m>
        + <U_n z_bar_{k,m}, M_m a_{k-1,n}> + <U_m z_bar_{k,n}, M_n a_{k-1,m}>)

Everything is differentiable in the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, func

from hvpfast.mlp.spec import ACTIVATION_TABLE, MLPSpec


@dataclass(frozen=True)
class Cores:
    """The cores of N samples; lists are indexed by the layer l = 1..L (entry 0 unused).

    Args:
        spec: the network.
        ggn: of the Gauss-Newton matrix.
        a: a[l] (N, D[l]), a[0] = x.
        z_bar: z_bar[l] (N, D[l]).
        U: U[l, m] (N, D[l], D[m]) for l <= m.
        M: M[l, m] (N, D[l], D[m-1]) for l < m; empty for the Gauss-Newton matrix.
    """

    spec: MLPSpec
    ggn: bool
    a: list[Tensor]
    z_bar: list[Tensor]
    U: dict[tuple[int, int], Tensor]
    M: dict[tuple[int, int], Tensor]


def cores(
    spec: MLPSpec,
    tensors: Sequence[Tensor],
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    ggn: bool,
) -> Cores:
    """The cores at parameters ``[W1, b1, ...]`` for x (N, D[0]) and the loss of z_L (N, D[L])."""
    L, step = spec.num_layers, 2 if spec.bias else 1
    W = [x, *tensors[::step]]  # W[l], l >= 1
    act = ACTIVATION_TABLE[spec.activation][0]
    d1 = _derivative(act)
    d2 = _derivative(d1)
    a, z = [x], [x]
    for layer in range(1, L + 1):
        z.append(a[-1] @ W[layer].T + (tensors[2 * layer - 1] if spec.bias else 0))
        a.append(act(z[-1]))
    slope = func.grad(loss)
    z_bar = [slope(z[L])]
    s1: list[Tensor] = [x] * L
    s2: list[Tensor] = [x] * L
    for layer in range(L - 1, 0, -1):
        a_bar = z_bar[0] @ W[layer + 1]
        s1[layer], s2[layer] = d1(z[layer]), d2(z[layer]) * a_bar
        z_bar.insert(0, s1[layer] * a_bar)
    # samples are independent: one pullback of unit vectors gives column c of every B_L
    pullback = func.vjp(slope, z[L])[1]
    units = torch.eye(spec.sizes[-1], dtype=x.dtype, device=x.device)
    columns = [pullback(unit.expand_as(z[L]).contiguous())[0] for unit in units]
    U = {(L, L): torch.stack(columns, 2)}
    M: dict[tuple[int, int], Tensor] = {}
    for layer in range(L - 1, 0, -1):
        down = s1[layer][:, :, None] * W[layer + 1].T  # s1_l W_{l+1}' (N, D[l], D[l+1])
        for m in range(layer + 1, L + 1):
            U[layer, m] = down @ U[layer + 1, m]
            if not ggn:
                M[layer, m] = (
                    torch.diag_embed(s1[layer]) if m == layer + 1 else down @ M[layer + 1, m]
                )
        own = U[layer, layer + 1] @ down.transpose(1, 2)
        U[layer, layer] = own if ggn else own + torch.diag_embed(s2[layer])
    return Cores(spec, ggn, a[:L], [x, *z_bar], U, M)


def _derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The derivative of an elementwise function."""
    slope: Callable[[Tensor], Tensor] = func.grad(lambda z: function(z).sum())
    return slope


def _parts(spec: MLPSpec, layer: int, chosen: Sequence[bool]) -> tuple[bool, bool]:
    """Whether the weight and the bias of a layer are among the parameters of H."""
    if not spec.bias:
        return chosen[layer - 1], False
    return chosen[2 * layer - 2], chosen[2 * layer - 1]


def sample_traces(c: Cores, chosen: Sequence[bool]) -> Tensor:
    """tr H_n (N,) over the chosen tensors of [W1, b1, ...]."""
    total = torch.zeros_like(c.a[0][:, 0])
    for layer in range(1, c.spec.num_layers + 1):
        weight, bias = _parts(c.spec, layer, chosen)
        alpha = weight * c.a[layer - 1].square().sum(1) + bias
        total = total + alpha * c.U[layer, layer].diagonal(dim1=1, dim2=2).sum(1)
    return total


def diagonal(c: Cores) -> Tensor:
    """diag H (P,), of all parameters."""
    parts: list[Tensor] = []
    for layer in range(1, c.spec.num_layers + 1):
        diag = c.U[layer, layer].diagonal(dim1=1, dim2=2)
        parts.append((diag.T @ c.a[layer - 1].square()).reshape(-1))
        if c.spec.bias:
            parts.append(diag.sum(0))
    return torch.cat(parts)


def inner_product(p: Cores, q: Cores, chosen: Sequence[bool]) -> Tensor:
    """tr H_p H_q over the chosen tensors of [W1, b1, ...], for samples p and samples q, 0-dim."""
    L = p.spec.num_layers
    chosen_parts = [(False, False), *(_parts(p.spec, k, chosen) for k in range(1, L + 1))]
    alpha = [
        weight * (p.a[max(k, 1) - 1] @ q.a[max(k, 1) - 1].T) + bias
        for k, (weight, bias) in enumerate(chosen_parts)
    ]
    total = torch.zeros_like(alpha[0][0, 0])
    for k in range(1, L + 1):
        total = total + (alpha[k].square() * _gram(p.U[k, k], q.U[k, k])).sum()
        for m in range(k + 1, L + 1):
            pairs = alpha[m] * _gram(p.U[k, m], q.U[k, m])
            if not p.ggn and chosen_parts[m][0]:
                beta = p.z_bar[m] @ q.z_bar[m].T
                pairs = pairs + beta * _gram(p.M[k, m], q.M[k, m])
                pairs = pairs + _cross(p, q, k, m) + _cross(q, p, k, m).T
            total = total + 2 * (alpha[k] * pairs).sum()
    return total


def _gram(p: Tensor, q: Tensor) -> Tensor:
    """<p_n, q_m> (N, N')."""
    return p.flatten(1) @ q.flatten(1).T


def _cross(p: Cores, q: Cores, k: int, m: int) -> Tensor:
    """<U_n z_bar_m, M_m a_n> for samples n of p and m of q."""
    Uz = torch.einsum("nic,mc->nmi", p.U[k, m], q.z_bar[m])
    Ma = torch.einsum("mij,nj->nmi", q.M[k, m], p.a[m - 1])
    return (Uz * Ma).sum(2)
