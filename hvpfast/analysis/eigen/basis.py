"""An orthonormal basis that grows by blocks: rows Q (m, P), Q Q' = I.

A block W (b, P) is orthogonalised by block Gram-Schmidt, twice or more, in two products each time:

    C = W Q',   W <- W - C Q,   W W' = L L',   W <- L^-1 W          W_given = C_total Q + R W_final

The first pass removes components along the last rows of Q only, from ``near`` on: where A is
symmetric, a product with the newest rows has large components along the two newest blocks alone.
Later passes take all of Q, until what they remove is small; usually the first of them finds it so.

Rows are held in the dtype of the products; C_total and R are summed in float64. This loses nothing:
the rows as stored are the vectors that are multiplied, so their rounding is no error of the
recurrence, and after the last pass the inner products between rows are as small as the rounding of
one inner product, far below the noise of the products themselves.

References:
    Giraud, Langou, Rozloznik, van den Eshof (2005), doi:10.1007/s00211-005-0615-4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvpfast.analysis.eigen.ritz import Array, eigh

NOISE = 0.25  # a direction of length 1 that a later pass makes shorter than this was rounding
SMALL = 1e-3  # components of rows of length 1 after whose removal no further pass is needed
MOST = 4  # passes
_TILE = 2**16  # columns that are rotated at once


class Basis:
    """Rows Q (m, P) with room to grow.

    Args:
        size: P.
        dtype, device: of the rows.
        capacity: rows to allocate initially.
        limit: rows at most.
    """

    def __init__(
        self, size: int, dtype: torch.dtype, device: torch.device, capacity: int, limit: int
    ) -> None:
        self._limit = limit
        self._rows = torch.empty(min(capacity, limit), size, dtype=dtype, device=device)
        self.count = 0

    @property
    def rows(self) -> Tensor:
        """Q (m, P), a view."""
        return self._rows[: self.count]

    def append(self, rows: Tensor) -> None:
        """Add orthonormal rows (r, P), which are orthogonal to Q."""
        end = self.count + rows.shape[0]
        if end > self._rows.shape[0]:
            room = min(self._limit, max(end, 3 * self._rows.shape[0] // 2))
            larger = self._rows.new_empty(room, self._rows.shape[1])
            larger[: self.count] = self.rows
            self._rows = larger
        self._rows[self.count : end] = rows
        self.count = end

    def combine(self, coefficients: Array) -> Tensor:
        """New rows ``coefficients @ Q`` (j, P) for coefficients (j, m)."""
        return self._like(coefficients) @ self.rows

    def rotate(self, coefficients: Array) -> None:
        """Replace Q by ``coefficients @ Q`` for orthonormal rows of coefficients (j, m), j <= m."""
        factor, kept = self._like(coefficients), coefficients.shape[0]
        for start in range(0, self._rows.shape[1], _TILE):
            tile = self.rows[:, start : start + _TILE]
            self._rows[:kept, start : start + _TILE] = factor @ tile
        self.count = kept

    def orthonormalize(
        self, block: Tensor, negligible: float, near: int = 0
    ) -> tuple[Array, Array, Tensor]:
        """Split W (b, P), which is overwritten, into ``W = C Q + R V`` with orthonormal V.

        Args:
            block: W, of the dtype of Q.
            negligible: directions of W outside of Q that are no longer than this are left out.
            near: index of the first row of Q that W has large components along.

        Returns:
            C (b, m), R (b, r), V (r, P), r <= b.
        """
        C, R = np.zeros((block.shape[0], self.count)), np.eye(block.shape[0])
        for time in range(MOST):
            start = near if time == 0 else 0
            rows = self.rows[start:]
            inner = block @ rows.T
            block = block.addmm_(inner, rows, alpha=-1.0)
            removed = _array(inner)
            C[:, start:] += R @ removed
            L, inverse = _factor(block, negligible)
            R, negligible = R @ L, NOISE
            one = inverse.shape == (1, 1)
            block = block.mul_(inverse[0, 0]) if one else self._like(inverse) @ block
            if time > 0 and (removed.size == 0 or np.abs(removed).max() < SMALL):
                break
        return C, R, block

    def _like(self, array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._rows)


def _factor(block: Tensor, negligible: float) -> tuple[Array, Array]:
    """L (b, r) and a left inverse (r, b): W = L V, V V' = I, up to negligible directions."""
    if block.shape[0] == 1:
        norm = float(torch.linalg.vector_norm(block, dtype=torch.float64))
        kept = int(norm > negligible)
        return np.full((1, kept), norm), np.full((kept, 1), 1.0 / (norm or 1.0))
    wide = block.double()
    squares, U = eigh(_array(wide @ wide.T))
    lengths = np.sqrt(np.maximum(squares, 0.0))
    long = lengths > negligible
    return U[:, long] * lengths[long], U[:, long].T / lengths[long, None]


def _array(tensor: Tensor) -> Any:
    return tensor.double().cpu().numpy()
