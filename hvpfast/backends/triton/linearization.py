"""The primal passes, once per point, for M models at once, and what they leave.

    z_l = a_{l-1} W_l' + b_l,  a_l = act(z_l)                      l = 1..L, a_0 = x
    z_bar_L = dloss/dz_L
    a_bar_l = z_bar_{l+1} W_{l+1},  z_bar_l = s1_l * a_bar_l       l = L-1..1

with s1 = act'(z) and s2 = act''(z) * a_bar. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from hvpfast.backends.messages import class_weights
from hvpfast.backends.triton import gemm
from hvpfast.backends.triton.activations import JETS, PIECEWISE_LINEAR
from hvpfast.backends.triton.layers import primal_backward_layer, primal_forward_layer
from hvpfast.backends.triton.losses import (
    cross_entropy_gradient,
    squared_error_gradient,
    weigh_labels,
)
from hvpfast.backends.triton.network import Rows, given, layout_of, no_layers
from hvpfast.backends.triton.products import product_layer
from hvpfast.backends.triton.tiles import Tile, num_tiles, tile_of
from hvpfast.mlp.checks import label_message
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils.triton_launch import launch

LABEL_ROWS = 1024
# Per thread of a mixed kernel in float32: left alone, ptxas aims at 80 or 128 and spills a few.
MIXED_REGISTERS = 144


class Linearization:
    """M models of one network, each at its own parameters and data.

    Args:
        spec: the network.
        params: (M, P), or ``[W1, b1, ...]`` of one model.
        x: (M, N, D[0]), or (N, D[0]) for all models.
        y: (M, N) or (M, N, D[L]), or the same without M for all models.
        order: 2 or 3; 3 keeps what third-order products need.
        precision: of float32 products: "ieee", or "tf32x3" for three TF32 products a product.

    Attributes:
        a, s1, s2, z_bar: residuals (M, N, D[l]) per layer; a[0] is x, (1, N, D[0]) if shared.
        z, a_bar: the same, third order and smooth activations only.
        p, weight: softmax (M, N, D[L]) of cross-entropy, and the w (M, N) of losses.py.
        summary: (M, 4) float64, see losses.py.
        weights: of the classes, where there are any: a recorded CUDA graph reads them.
    """

    def __init__(
        self,
        spec: MLPSpec,
        params: Tensor | Sequence[Tensor],
        x: Tensor,
        y: Tensor,
        order: int,
        precision: str = "ieee",
    ) -> None:
        self.spec, self.layout, self.precision = spec, layout_of(spec), precision
        self.D, self.L, self.P = self.layout.D, self.layout.L, self.layout.P
        self.params = Rows(self.layout, params)
        self.M = len(params) if isinstance(params, Tensor) else 1
        self.N = x.shape[-2]
        self.like = x
        classes = max(16, triton.next_power_of_2(self.D[-1]))
        self._loss_tile = max(1, min(64, 2048 // classes)), classes
        self.smooth = spec.activation not in PIECEWISE_LINEAR
        self.jet = JETS[spec.activation]
        L = self.L
        self.a = no_layers(L)
        self.a[0] = x if x.dim() == 3 else x.unsqueeze(0)
        self.s1, self.s2, self.z_bar = no_layers(L), no_layers(L), no_layers(L)
        self.z, self.a_bar = no_layers(L), no_layers(L)
        keep = order == 3 and self.smooth
        for l in range(1, L):
            self.a[l], self.s1[l], self.z_bar[l] = (self.residual(l) for _ in range(3))
            if self.smooth:
                self.s2[l] = self.residual(l)
            if keep:
                self.z[l], self.a_bar[l] = self.residual(l), self.residual(l)
        self.z_bar[L] = self.residual(L)
        self.summary = torch.empty(self.M, 4, dtype=torch.float64, device=x.device)
        self.weight = torch.empty(self.M, self.N, dtype=x.dtype, device=x.device)
        self.weights: Tensor | None = None
        self.p = self.residual(L) if spec.loss == "cross_entropy" else None
        self._forward()
        self._loss_gradient(y)
        self._backward()

    def residual(self, l: int) -> Tensor:
        """A new (M, N, D[l])."""
        return self.empty(self.M, self.N, self.D[l])

    def empty(self, *shape: int) -> Tensor:
        """A new tensor of the dtype and device of all."""
        return torch.empty(shape, dtype=self.like.dtype, device=self.like.device)

    def tile(self, rows: int, columns: int, batch: int, *, mixed: bool = False) -> Tile:
        """The tile for ``batch`` outputs (rows, columns): as large as registers do not spill.

        Float64 takes two of them per entry, and the mixed passes sum three products.
        """
        small = mixed or self.like.dtype is torch.float64
        return tile_of(rows, columns, batch, 32 if small else 64)

    def launch_tiles(
        self, kernel: Any, shape: tuple[int, int, int], *args: Any, mixed: bool = False, **more: Any
    ) -> None:
        """Run a kernel that sums products, in tiles of its outputs (batch, rows, columns)."""
        batch, rows, columns = shape
        tile = self.tile(rows, columns, batch, mixed=mixed)
        more |= {
            "ROWS": tile.rows, "COLUMNS": tile.columns, "PRECISION": self.precision,
            "num_warps": tile.num_warps, "num_stages": 2 if mixed else 3,
        }  # fmt: skip
        if mixed and self.like.dtype is torch.float32 and self.precision == "ieee":
            more["maxnreg"] = MIXED_REGISTERS
        launch(kernel, batch * num_tiles(rows, columns, tile), *args, **more)

    def launch_losses(self, kernel: Any, batch: int, *args: Any, **more: Any) -> None:
        """Run a kernel on ``batch`` outputs (N, C), all classes of some samples in each program."""
        rows, classes = self._loss_tile
        per_thread = 4 if self.like.dtype is torch.float64 else 8
        warps = min(32, rows * classes // (32 * per_thread))
        more |= {"ROWS": rows, "CLASSES": classes, "num_warps": warps}
        launch(kernel, batch * triton.cdiv(self.N, rows), *args, **more)

    def parts(self, batch: int, rows: int, columns: int) -> Tensor:
        """A new float64 tensor (batch, tiles): a number of each program of :meth:`launch_tiles`."""
        tiles = num_tiles(rows, columns, self.tile(rows, columns, batch))
        return self.summary.new_empty(batch, tiles)

    def loss_parts(self, batch: int) -> Tensor:
        """The same for the programs of :meth:`launch_losses`."""
        return self.summary.new_empty(batch, triton.cdiv(self.N, self._loss_tile[0]))

    def torch_is_faster(self, rows: int, columns: int, depth: int, batch: int) -> bool:
        """Whether ``batch`` products (rows, depth) (depth, columns) are left to torch."""
        return gemm.torch_is_faster(rows, columns, depth, batch, self.like, self.precision)

    def below_m(self, l: int) -> int:
        """Entries between models of a_{l-1}."""
        below = given(self.a[l - 1])
        return 0 if len(below) == 1 else self.N * self.D[l - 1]

    @property
    def loss(self) -> Tensor:
        return self.summary[:, 0].to(self.like.dtype, copy=True)

    @property
    def normalizers(self) -> Tensor:
        return self.summary[:, 1]

    @property
    def kept(self) -> list[Tensor]:
        """The residuals."""
        layers = [*self.a[1:], *self.s1, *self.s2, *self.z_bar, *self.z, *self.a_bar]
        return [t for t in (*layers, self.p, self.weight, self.summary) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.kept)

    def loss_values(self, y: Tensor) -> list[float]:
        """The losses as numbers; waits for the device.

        Raises:
            ValueError: a label is out of range.
        """
        values = self.summary.tolist()
        if self.spec.loss == "cross_entropy":
            for m, (*_, first_wrong) in enumerate(values):
                if (n := int(first_wrong)) < self.N:
                    labels = y if y.dim() == 1 else y[m]
                    label, classes = int(labels[n]), self.D[self.L]
                    message = label_message(label, n, classes, self.spec.ignore_index)
                    raise ValueError(message if y.dim() == 1 else f"model {m}: {message}")
        return [loss for loss, *_ in values]

    def _forward(self) -> None:
        N, M, L = self.N, self.M, self.L
        logits = self.z_bar[L]  # until the loss gradient takes its place
        for l in range(1, L + 1):
            d, d_below, below = self.D[l], self.D[l - 1], given(self.a[l - 1])
            W = given(self.params.W[l])
            sums = None
            if self.torch_is_faster(N, d, d_below, M):
                sums = self.empty(1, M, N, d)
                gemm.multiply_shared(below, W.mT.unsqueeze(1), sums[0].unsqueeze(1))
            self.launch_tiles(
                primal_forward_layer, (M, N, d),
                below, W, self.params.b[l], sums, self.z[l] if l < L else logits,
                self.a[l], self.s1[l], self.s2[l],
                N, d_below, d, self.below_m(l), self.params.stride, *counts(sums),
                jet=self.jet if l < L else None,
            )  # fmt: skip

    def _loss_gradient(self, y: Tensor) -> None:
        """p, w, z_bar_L, and the summary."""
        spec, M, N, C = self.spec, self.M, self.N, self.D[self.L]
        z_bar = given(self.z_bar[self.L])
        parts = self.loss_parts(M)
        cross_entropy = spec.loss == "cross_entropy"
        y_m = y.stride(0) if y.dim() == (2 if cross_entropy else 3) else 0
        if cross_entropy:
            self.weights = weights = class_weights(spec, torch.float64, y.device)
            launch(
                weigh_labels, M, y, weights, self.summary, N, C, y_m, spec.ignore_index,
                MEAN=spec.reduction == "mean", ROWS=LABEL_ROWS,
            )  # fmt: skip
            total = C if spec.class_weights is None else sum(spec.class_weights)
            self.launch_losses(
                cross_entropy_gradient, M,
                z_bar, y, weights, self.summary, self.p, self.weight, z_bar, parts,
                N, C, y_m, spec.ignore_index,
                SMOOTHING=spec.label_smoothing, SMOOTH_MASS=spec.label_smoothing * total / C,
            )  # fmt: skip
        else:
            normalizer = N * C if spec.reduction == "mean" else 1
            self.summary[:, 1], self.summary[:, 2] = normalizer, 1 / normalizer
            self.launch_losses(
                squared_error_gradient, M,
                z_bar, y, self.summary, self.weight, z_bar, parts, N, C, y_m,
            )  # fmt: skip
        torch.div(parts.sum(1), self.summary[:, 1], out=self.summary[:, 0])

    def _backward(self) -> None:
        N, M = self.N, self.M
        for l in range(self.L - 1, 0, -1):
            d, d_above, above = self.D[l], self.D[l + 1], given(self.z_bar[l + 1])
            W = given(self.params.W[l + 1])
            sums = None
            if self.torch_is_faster(N, d, d_above, M):
                sums = self.empty(1, M, N, d)
                gemm.multiply_shared(above, W.unsqueeze(1), sums[0].unsqueeze(1))
            self.launch_tiles(
                primal_backward_layer, (M, N, d),
                above, W, sums, self.s1[l], self.s2[l], self.a_bar[l], self.z_bar[l],
                N, d_above, d, self.params.stride, *counts(sums),
            )  # fmt: skip

    def gradient(self) -> Tensor:
        """dloss/dparams, (M, P)."""
        out = self.empty(self.M, self.P)
        rows = Rows(self.layout, out)
        for l in range(1, self.L + 1):
            d, d_below = self.D[l], self.D[l - 1]
            below, z_bar, W, b = given(self.a[l - 1]), given(self.z_bar[l]), rows.W[l], rows.b[l]
            if self.torch_is_faster(d, d_below, self.N, self.M):
                for m in range(self.M):
                    gemm.sum_over_samples([(z_bar[m], below[m % len(below)])], given(W)[m])
                if b is not None:
                    torch.sum(z_bar, 1, out=b)
                continue
            self.launch_tiles(
                product_layer, (self.M, d, d_below),
                z_bar, below, None, None, W, b, None,
                self.N, d, d_below, 1, self.below_m(l), self.P,
            )  # fmt: skip
        return out


def counts(sums: Tensor | None) -> tuple[int, int]:
    """(num_sums, sums_t) of layers.py."""
    return (0, 0) if sums is None else (len(sums), sums.stride(0))
