"""The frozen description of a multilayer perceptron and its loss: :class:`MLPSpec`.

    a_0 = x,   z_l = a_{l-1} W_l' + b_l,   a_l = act(z_l) for l < L
    loss = mean or sum over samples of loss(z_L, y)

Shapes: x (N, D[0]); W_l (D[l], D[l-1]); b_l (D[l],); z_l, a_l (N, D[l]).  Flat order of the P
parameters: W_1 (row major), b_1, W_2, b_2, ... which is the order of ``module.parameters()``;
without biases the b_l are absent.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast.utils.choice import check_choice


def _gelu_tanh(z: Tensor) -> Tensor:
    # F.gelu(z, approximate="tanh"), whose third derivative in torch is NaN where tanh saturates
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


# One row per activation: the function, and the nn.Module with the attributes that computes it.
ACTIVATION_TABLE: dict[str, tuple[Callable[[Tensor], Tensor], type[nn.Module], dict[str, Any]]] = {
    "relu": (torch.relu, nn.ReLU, {}),
    "sigmoid": (torch.sigmoid, nn.Sigmoid, {}),
    "tanh": (torch.tanh, nn.Tanh, {}),
    "gelu": (F.gelu, nn.GELU, {"approximate": "none"}),
    "gelu_tanh": (_gelu_tanh, nn.GELU, {"approximate": "tanh"}),
    "silu": (F.silu, nn.SiLU, {}),
    "softplus": (F.softplus, nn.Softplus, {"beta": 1.0, "threshold": 20.0}),
    "identity": (lambda z: z, nn.Identity, {}),
}
ACTIVATIONS = tuple(ACTIVATION_TABLE)
LOSSES = ("cross_entropy", "mse")
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class MLPSpec:
    """A multilayer perceptron and its loss: everything but the numbers.

    Args:
        sizes: widths ``(D[0], ..., D[L])``, ``L >= 1``, from the input to the output.
        activation: one of ``ACTIVATIONS``, between layers, none after the last; softplus has
            beta 1 (and torch's linear branch above 20).
        loss: ``"cross_entropy"`` (softmax; targets ``y`` (N,) int64) or ``"mse"`` (targets
            (N, D[L]) of the parameters' dtype).
        reduction: ``"mean"`` or ``"sum"`` with torch's meaning: the mean of mse divides by
            ``N * D[L]``, that of cross-entropy by the sum of the class weights of the targets
            that count.
        bias: whether the layers have biases (all or none).
        class_weights: one weight >= 0 per class; cross-entropy only.
        ignore_index: targets with this value do not count; cross-entropy only.
        label_smoothing: in [0, 1], as in ``torch.nn.CrossEntropyLoss``; cross-entropy only.

    Raises:
        ValueError: a field is not as described above.
    """

    sizes: tuple[int, ...]
    activation: str = "relu"
    loss: str = "cross_entropy"
    reduction: str = "mean"
    bias: bool = True
    class_weights: tuple[float, ...] | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        assign = functools.partial(object.__setattr__, self)
        assign("sizes", check_sizes(self.sizes))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("reduction", self.reduction, REDUCTIONS)
        if type(self.bias) is not bool:
            raise ValueError(f"bias must be True or False; got {self.bias!r}")
        if self.class_weights is not None:
            assign("class_weights", _check_class_weights(self.class_weights, self.sizes[-1]))
        if type(self.ignore_index) is not int:
            raise ValueError(f"ignore_index must be an int; got {self.ignore_index!r}")
        assign("label_smoothing", float(self.label_smoothing))
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1]; got {self.label_smoothing}")
        extras = (self.class_weights, self.ignore_index, self.label_smoothing)
        if self.loss == "mse" and extras != (None, -100, 0.0):
            raise ValueError(
                "class_weights, ignore_index and label_smoothing belong to loss='cross_entropy'; "
                "got them with loss='mse'"
            )
        key = json.dumps(asdict(self), separators=(",", ":"))
        assign("_key", key)
        assign("_hash", hash(key))  # specs are dictionary keys on the hot path: hash once

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __reduce__(self) -> tuple[Callable[[str], MLPSpec], tuple[str]]:
        return _spec_from_key, (self.key,)  # string hashes differ between processes

    @property
    def key(self) -> str:
        """The specification as one string; :meth:`from_key` inverts it."""
        return self._key  # type: ignore[attr-defined, no-any-return]

    @classmethod
    def from_key(cls, key: str) -> MLPSpec:
        """The specification whose :attr:`key` this is; the same object for the same string."""
        return _spec_from_key(key)

    @property
    def num_layers(self) -> int:
        """Number of linear layers L."""
        return len(self.sizes) - 1

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes in flat order: ``((D1, D0), (D1,), (D2, D1), (D2,), ...)``."""
        return tuple(layer_shapes(self.sizes, self.bias))

    @functools.cached_property
    def numels(self) -> tuple[int, ...]:
        """Number of entries of each of :attr:`shapes`."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @functools.cached_property
    def num_params(self) -> int:
        """Number of parameters P."""
        return sum(self.numels)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names in flat order, by linear layer: ``("0.weight", "0.bias", "1.weight", ...)``."""
        kinds = ("weight", "bias") if self.bias else ("weight",)
        return tuple(f"{layer}.{kind}" for layer in range(self.num_layers) for kind in kinds)

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Views ``[W1, b1, W2, ...]`` of a flat tensor (P,)."""
        if flat.shape != (self.num_params,):
            raise ValueError(
                f"flat must be ({self.num_params},) for sizes {self.sizes}; got {tuple(flat.shape)}"
            )
        return split_flat(flat, self.shapes, self.numels)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """One new flat tensor (P,) from ``[W1, b1, W2, ...]``."""
        shapes = tuple(tuple(t.shape) for t in tensors)
        if shapes != self.shapes:
            raise ValueError(f"tensors must have the shapes {self.shapes}; got {shapes}")
        return torch.cat([t.reshape(-1) for t in tensors])

    def outputs(self, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        """Network outputs z_L (N, D[L]) for ``[W1, b1, ...]`` and x (N, D[0]), in plain torch."""
        return forward(tensors, x, self.activation, self.bias)


@functools.lru_cache(maxsize=1024)
def _spec_from_key(key: str) -> MLPSpec:
    fields = json.loads(key)
    fields["sizes"] = tuple(fields["sizes"])
    return MLPSpec(**fields)


def check_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """The widths (D[0], ..., D[L]) as a tuple; ValueError unless integers >= 1, two or more."""
    sizes = tuple(sizes)
    if len(sizes) < 2 or not all(type(d) is int and d >= 1 for d in sizes):
        raise ValueError(f"sizes must be two or more widths, integers >= 1; got {sizes}")
    return sizes


def _check_class_weights(weights: Sequence[float], classes: int) -> tuple[float, ...]:
    weights = tuple(float(w) for w in weights)
    if len(weights) != classes or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ValueError(f"class_weights must be {classes} finite weights >= 0; got {weights}")
    return weights


def layer_shapes(sizes: Sequence[int], bias: bool) -> Iterator[tuple[int, ...]]:
    """Parameter shapes in flat order."""
    for d_in, d_out in itertools.pairwise(sizes):
        yield (d_out, d_in)
        if bias:
            yield (d_out,)


def split_flat(
    flat: Tensor, shapes: Sequence[tuple[int, ...]], numels: Sequence[int]
) -> list[Tensor]:
    """Views of a flat tensor, one per shape."""
    # one split: its backward is one concatenation, where slices would add P-sized buffers
    parts = flat.split_with_sizes(list(numels))
    return [
        part if len(shape) == 1 else part.view(shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def forward(tensors: Sequence[Tensor], x: Tensor, activation: str, bias: bool) -> Tensor:
    """Outputs z_L of the perceptron with parameters ``[W1, b1, ...]``, in plain torch."""
    act = ACTIVATION_TABLE[activation][0]
    step = 2 if bias else 1
    a = x
    for i in range(0, len(tensors), step):
        if i:
            a = act(a)
        a = F.linear(a, tensors[i], tensors[i + 1] if bias else None)
    return a
