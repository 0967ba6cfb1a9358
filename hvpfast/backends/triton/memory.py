"""What operations allocate, for the error where the device has less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils.memory import available_bytes, bytes_text

# Arrays (N, D[1..L]) and rows (P,) of each model and tangent, at most.
_PER_TANGENT = {
    "hvp": (2, 1),
    "quadratic": (2, 0),
    "hvp_vjp": (8, 0),
    "penalty": (4, 2),
    "penalty gradient": (4, 1),
}
_RESIDUALS = 6  # arrays (N, D[1..L]) of each model, at most


@contextmanager
def explained(spec: MLPSpec, M: int, x: Tensor, operation: str, K: int = 0) -> Iterator[None]:
    """Around an operation with K tangents of M models on samples x (.., N, D[0]).

    Raises:
        MemoryError: the device's memory ran out; the message says about how much was wanted, how
            much is free, and how many tangents, or samples of a linearization, fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        N, widths = x.shape[-2], sum(spec.sizes[1:])
        if operation == "linearize":
            name, count, each = "samples", N, _RESIDUALS * M * widths
        else:
            arrays, rows = _PER_TANGENT[operation]
            name, count, each = "tangents", K, M * (arrays * N * widths + rows * spec.num_params)
        each *= x.itemsize
        free = available_bytes(x.device)
        raise MemoryError(
            f"{operation} of {M} model(s) with {count} {name} ran out of memory: it allocates "
            f"about {bytes_text(count * each)}, {bytes_text(free)} of {x.device} are free, enough "
            f"for about {free // each} {name}; take fewer at once"
        ) from error
