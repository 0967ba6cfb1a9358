"""Ritz pairs of a projected matrix: solved, selected and ordered."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
WHICH = ("LM", "LA", "SA", "BE")


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues (m,), rising, and eigenvectors (m, m), columns, of a symmetric matrix.

    By torch, whose number of threads the caller sets: NumPy's threads wait actively for cores that
    other processes use, which can take a hundred times as long as the work.
    """
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), vectors.numpy()


def order_of(values: Array, which: str) -> NDArray[np.intp]:
    """Indices of all values, the most wanted first.

    "LM": by decreasing magnitude, "LA": decreasing, "SA": increasing, "BE": the largest, the
    smallest, the second largest, and so on.
    """
    down = np.argsort(-values, kind="stable")
    if which == "LM":
        return np.argsort(-np.abs(values), kind="stable")
    if which == "LA":
        return down
    if which == "SA":
        return down[::-1]
    half = (len(values) + 1) // 2
    alternating = np.empty(len(values), np.intp)
    alternating[0::2], alternating[1::2] = down[:half], down[half:][::-1]
    return alternating


def wanted(values: Array, k: int, which: str) -> NDArray[np.intp]:
    """Indices of the k wanted values in the order of results: "BE" by decreasing value."""
    first = order_of(values, which)[:k]
    return first[np.argsort(-values[first], kind="stable")] if which == "BE" else first
