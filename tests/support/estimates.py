"""The estimators with their methods, and what they estimate of a dense matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvpfast.analysis.estimators.estimate import (
    diagonal,
    frobenius_norm,
    frobenius_sq,
    row_norms_sq,
    trace,
)

TRUTH = {
    "trace": lambda A: A.trace(),
    "frobenius_sq": lambda A: A.square().sum(),
    "frobenius_norm": lambda A: A.norm(),
    "diagonal": lambda A: A.diagonal(),
    "row_norms_sq": lambda A: A.square().sum(1),
}
METHODS = [
    (trace, "hutchinson"),
    (trace, "hutch++"),
    (trace, "na-hutch++"),
    (trace, "xtrace"),
    (frobenius_sq, "hutchinson"),
    (frobenius_sq, "deflated"),
    (frobenius_norm, "hutchinson"),
    (frobenius_norm, "deflated"),
    (diagonal, "hutchinson"),
    (diagonal, "xdiag"),
    (row_norms_sq, "hutchinson"),
]


def number(value: Any) -> Tensor:
    """A float or a tensor as a float64 tensor."""
    return torch.as_tensor(value, dtype=torch.float64)
