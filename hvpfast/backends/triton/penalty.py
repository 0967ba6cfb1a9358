"""mean_k ||H v_k||^2 and its gradient 2/K sum_k T[v_k, H v_k] (T: the third derivative).

The gradient is merged with that of the loss. With few samples, N < D[0], the first layer's block
of u = H v is never formed: G = z_bar_dot_1 gives u_1 = [X 1]' G, and

    ||u_1||^2 = <G, Gamma G>,   u_1 [x; 1] = Gamma G,   Gamma = X X' + 1 1'   (exact)

Normal probes are drawn for all layers; csrc/cpu/penalty-inl.h draws N(0, Gamma) for the first one.
Factoring Gamma takes N steps one after the other, each a microsecond or more on a GPU: at N = 64,
3072-256 as long as drawing V_1 and multiplying by it take for some fifteen probes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.backends.triton import gemm
from hvpfast.backends.triton.linearization import Linearization
from hvpfast.backends.triton.network import Rows, given
from hvpfast.backends.triton.products import gram_layer
from hvpfast.backends.triton.tangents import Streams, products, r_backward, r_forward
from hvpfast.backends.triton.third_order import third_order

MOST_GRAM_SAMPLES = 256
LEAST_GRAM_WEIGHTS = 16384  # of the first layer, from which Gamma is worth its launches


class Penalty:
    """The penalties (M,) of M models at their points, for probes (M, K, P), K >= 1."""

    def __init__(self, lin: Linearization, probes: Tensor, ggn: bool) -> None:
        self._lin, self._ggn = lin, ggn
        M, K, P = probes.shape
        self.K = K
        self._v = Rows(lin.layout, probes.flatten(0, 1))
        self._s = r_forward(lin, self._v, K)
        r_backward(lin, self._v, self._s, ggn, keep=True)
        self._z_dot_u1: Tensor | None = None
        self._first = 0
        norms = None
        if _gram_pays(lin):
            self._first = lin.layout.weight[2]
            self._z_dot_u1, norms = _first_layer(lin, self._s)
        self._u = lin.empty(M, K, P - self._first)
        rest = products(lin, self._s, self._rows(self._u), ggn, first=1 if norms is None else 2)
        self.value = (rest if norms is None else rest + norms).mean(1)  # (M,) float64

    @property
    def kept(self) -> list[Tensor]:
        """What the gradient needs, and the value."""
        s = self._s
        layers = [*self._v.W, *s.z_dot, *s.a_dot, *s.a_bar_dot, *s.z_bar_dot]
        return [t for t in (*layers, self._u, self._z_dot_u1, self.value) if t is not None]

    def _rows(self, u: Tensor) -> Rows:
        return Rows(self._lin.layout, u.flatten(0, 1), self._first)

    def gradient(self, g_loss: float | Tensor, g_penalty: float | Tensor) -> Tensor:
        """d(g_loss * loss + g_penalty * penalty) / d params (M, P), for numbers or (M,)."""
        # The cotangents are scaled, not the result: the loss gradient joins the same sums.
        lin = self._lin
        scale = g_penalty * (2.0 / self.K)
        u = self._rows(self._u * _per_model(scale, 3))
        z_dot_u1 = None if self._z_dot_u1 is None else self._z_dot_u1 * _per_model(scale, 4)
        loss_bar = given(lin.z_bar[lin.L]) * _per_model(g_loss, 3)
        return third_order(lin, self._v, self._s, u, z_dot_u1, loss_bar, self._ggn)


def _per_model(g: float | Tensor, dims: int) -> float | Tensor:
    """A number as it is, numbers (M,) for a tensor of ``dims`` dimensions (M, ...)."""
    return g.reshape(-1, *[1] * (dims - 1)) if isinstance(g, Tensor) else g


def _gram_pays(lin: Linearization) -> bool:
    return (
        lin.L >= 2
        and lin.N <= MOST_GRAM_SAMPLES
        and lin.D[0] > lin.N
        and lin.D[0] * lin.D[1] >= LEAST_GRAM_WEIGHTS
        and gemm.full_precision(lin.like)
    )


def _first_layer(lin: Linearization, s: Streams) -> tuple[Tensor, Tensor]:
    """u_1 [x; 1] (M, K, N, D[1]) and ||u_1||^2 (M, K)."""
    M, N, K, d, x = lin.M, lin.N, s.K, lin.D[1], given(lin.a[0])
    gram = torch.bmm(x, x.mT)
    if lin.spec.bias:
        gram += 1
    z_bar_dot, out = given(s.z_bar_dot[1]), lin.empty(M, K, N, d)
    norms = lin.parts(M * K, N, d)
    lin.launch_tiles(
        gram_layer, (M * K, N, d), gram, z_bar_dot, out, norms,
        N, d, K, 0 if len(x) == 1 else N * N,
    )  # fmt: skip
    return out, norms.view(M, K, -1).sum(2)
