"""What the engines say in the same words."""

from __future__ import annotations

import torch

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
