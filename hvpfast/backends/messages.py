"""What the engines have in common: the words for what they refuse, and how a network is told."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hvpfast.mlp.spec import MLPSpec

PERCEPTRONS_ONLY = "it runs multilayer perceptrons only"


def dtype_reason(dtype: torch.dtype) -> str | None:
    """None for float32 and float64, else why an engine of these two cannot take ``dtype``."""
    if dtype in (torch.float32, torch.float64):
        return None
    return f"it computes in float32 and float64; these are {dtype}"


def exact_text(spec: MLPSpec, kind: str, gradient: bool = False) -> str:
    """The name of an exact value, tr H (kind "trace") or tr H^2 ("fro2"), or of its gradient."""
    of = "tr H" if kind == "trace" else "tr H^2"
    network = "-".join(str(d) for d in spec.sizes)
    return f"the {'gradient of the ' if gradient else ''}exact {of} of a {network} perceptron"


def plan_arguments(
    spec: MLPSpec,
) -> tuple[list[int], str, str, bool, bool, list[float], int, float]:
    """A network as the plans of the compiled engines take it."""
    return (
        list(spec.sizes),
        spec.activation,
        spec.loss,
        spec.reduction == "mean",
        spec.bias,
        list(spec.class_weights or ()),
        spec.ignore_index,
        spec.label_smoothing,
    )


@functools.lru_cache(maxsize=256)
def class_weights(spec: MLPSpec, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The class weights (C,), on the device once and for all: recorded CUDA graphs read them."""
    weights = spec.class_weights
    return None if weights is None else torch.tensor(weights, dtype=dtype, device=device)
