"""Where each layer's parameters lie: the layout of csrc/common/mlp.h, as strided views."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from torch import Tensor

from hvpfast.mlp.spec import MLPSpec

Layers = list[Tensor | None]  # one entry per layer l = 0..L; None where there is nothing


def no_layers(L: int) -> Layers:
    """One None per layer 0..L."""
    return [None] * (L + 1)


def given(t: Tensor | None) -> Tensor:
    """The tensor, which is there by construction."""
    assert t is not None
    return t


class Layout:
    """Offsets in the flat parameters (P,): W_1 (D[1], D[0]), b_1 (D[1]), W_2, ..., l = 1..L."""

    def __init__(self, spec: MLPSpec) -> None:
        self.D, self.L, self.P = spec.sizes, spec.num_layers, spec.num_params
        step = 2 if spec.bias else 1
        starts = list(itertools.accumulate(spec.numels, initial=0))[:-1]
        self.weight = [0, *starts[::step]]
        self.bias = [-1, *(starts[1::2] if spec.bias else [-1] * self.L)]


@functools.lru_cache(maxsize=1024)
def layout_of(spec: MLPSpec) -> Layout:
    """The layout of a network."""
    return Layout(spec)


class Rows:
    """Parameters, tangents or results as rows (R, P), layer by layer.

    Args:
        layout: of the network.
        values: (R, P) contiguous, or the tensors ``[W1, b1, ...]`` of one row.
        first: number of leading entries that the rows lack: they are (R, P - first).

    Attributes:
        W, b: per layer l = 1..L (R, D[l], D[l-1]) and (R, D[l]) or None; entry 0 is not used.
        stride: entries between rows, 0 for one row.
    """

    def __init__(self, layout: Layout, values: Tensor | Sequence[Tensor], first: int = 0) -> None:
        self.W: Layers = [None]
        self.b: Layers = [None]
        D, L = layout.D, layout.L
        if not isinstance(values, Tensor):
            step = 2 if layout.bias[1] >= 0 else 1
            self.stride = 0
            self.W += [W.unsqueeze(0) for W in values[::step]]
            self.b += [b.unsqueeze(0) for b in values[1::2]] if step == 2 else [None] * L
            return
        R, P = values.shape
        self.stride = P if R > 1 else 0
        origin = values.storage_offset() - first
        for l in range(1, L + 1):
            at = origin + layout.weight[l]
            inside = layout.weight[l] >= first
            self.W.append(
                values.as_strided((R, D[l], D[l - 1]), (P, D[l - 1], 1), at) if inside else None
            )
            self.b.append(
                values.as_strided((R, D[l]), (P, 1), origin + layout.bias[l])
                if inside and layout.bias[l] >= 0
                else None
            )

    def W_of_models(self, l: int, M: int) -> Tensor:
        """W[l] as (M, R / M, D[l], D[l-1])."""
        W = given(self.W[l])
        return W.view(M, len(W) // M, *W.shape[1:])
