"""The backend ``triton`` with products in tf32x3: float32 on the tensor cores of a GPU.

Each factor is split into two TF32 numbers, a = a1 + a2 and b = b1 + b2 with 11 bits each, and
a b is taken as a1 b1 + a1 b2 + a2 b1: to about 2^-22 of itself, where float32 has 2^-24 and plain
TF32 2^-11 (Ootomo and Yokota 2022, doi:10.1177/10943420221090256). Sums, activations and losses
are those of ``triton``.
"""

from __future__ import annotations

import functools

import torch

from hvpfast.backends.triton import state as triton
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils import triton_launch

NAME = "triton_tf32x3"
NAMED_ONLY = "its products are not full float32; name it to mean it"


def unavailable() -> str | None:
    """None, or why Triton cannot multiply so here."""
    if triton_launch.INTERPRETED:
        return "Triton's interpreter multiplies in full precision"
    return triton.unavailable()


def unsupported(spec: MLPSpec | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why the kernels cannot take this case."""
    if dtype is not torch.float32:
        return f"tf32x3 is a way to multiply in float32; these are {dtype}"
    return triton.unsupported(spec, device, dtype)


linearize = functools.partial(triton.linearize, precision="tf32x3")
linearize_models = functools.partial(triton.linearize_models, precision="tf32x3")
