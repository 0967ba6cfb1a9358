"""Block Lanczos with full orthogonalisation and thick restart.

    A Q' = Q' H + N' B          Q (m, P) the basis, N (r, P) the next block, both orthonormal rows

H = Q A Q' (m, m) is computed in full, not assumed tridiagonal: if A is symmetric the other entries
are rounding, and if it is not, H shows that. Ritz pairs H s = theta s give y = Q' s with the
residual A y - theta y = N' B s, whose norm is that of B s.

Thick restart keeps the leading Ritz vectors S (m, p): Q <- S' Q, H <- diag(theta), B <- B S.

References:
    Golub, Underwood (1977), doi:10.1016/B978-0-12-587260-7.50018-2;
    Wu, Simon (2000), doi:10.1137/S0895479898334605.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from hvpfast.analysis.eigen.basis import Basis
from hvpfast.analysis.eigen.ritz import Array, eigh, order_of
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.operators.matvecs import Products, at_least_single

RELATIVE_NOISE = 16.0  # times eps |theta|: rounding of a product with an outlying eigenvector
NEGLIGIBLE = 4.0  # times eps ||A||: a shorter remainder of a product is rounding


class Lanczos:
    """The state of one run: basis, projected matrix, next block.

    Args:
        products: with A.
        start: the first block (b, P), any rows that are not all zero; overwritten.
        seed: of the random rows that replace a start block without rank, and that continue after
            an invariant subspace is complete.
        capacity: rows of the basis to allocate initially.
        limit: rows of the basis at most.
        scale: ||A|| as far as it is known.

    Attributes:
        products, seed: as given.
        basis: Q.
        invariant: whether Q spans an invariant subspace, B = 0 and the next block is random.
        eps: rounding unit of the products.
        scale: largest norm of a product so far, at most ||A||.
        num_restarts: thick restarts so far.
    """

    def __init__(
        self,
        products: Products,
        start: Tensor,
        seed: int,
        capacity: int,
        limit: int,
        scale: float = 0.0,
    ) -> None:
        self.products, self.seed, self._drawn = products, seed, 0
        dtype = at_least_single(products.dtype)
        self.eps = torch.finfo(products.dtype).eps
        self.block_size, self._limit = start.shape[0], min(limit, products.size)
        self.basis = Basis(products.size, dtype, products.device, capacity, self._limit)
        self._room = np.zeros((2 * capacity, 2 * capacity))
        self.scale, self.num_restarts = scale, 0
        self._near = 0  # first row of the last block but one; 0, all rows, after a restart
        self._tridiagonal = self.block_size == 1  # up to rounding
        lengths = torch.linalg.vector_norm(start, dim=1, keepdim=True)
        tiny = torch.finfo(dtype).tiny
        _, _, self._next = self.basis.orthonormalize(start / lengths.clamp(min=tiny), 1e-3)
        self._B = np.zeros((self._next.shape[0], 0))
        self._fill()

    @property
    def floor(self) -> float:
        """eps ||A||: smaller residuals are rounding."""
        return self.eps * self.scale

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.basis.count == self.products.size

    @property
    def next_size(self) -> int:
        """Number of products of the next step."""
        return self._next.shape[0]

    @property
    def room(self) -> int:
        """Number of further rows that the basis may have beside the next block."""
        return self._limit - self.basis.count - self.next_size

    @property
    def full(self) -> bool:
        """Whether the next block does not fit into the basis."""
        return self.room < 0

    def _fill(self) -> None:
        """Fill an empty next block with random directions, unless the basis is complete."""
        self.invariant = self._next.shape[0] == 0
        while self._next.shape[0] == 0 and not self.complete:
            count = min(self.block_size, self.products.size - self.basis.count)
            source = ProbeSource(count, "normal", self.seed, 2**31 + self._drawn)
            self._drawn += count
            like = self.basis.rows
            rows = probe_rows(source, self.products.size, like.dtype, like.device)
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            _, _, self._next = self.basis.orthonormalize(rows, 1e-3)
            self._B = np.zeros((self._next.shape[0], self.basis.count))

    def step(self) -> None:
        """Multiply the next block and take it into the basis.

        Raises:
            ValueError: the operator is not symmetric.
        """
        old, r = self.basis.count, self._next.shape[0]
        self.basis.append(self._next)
        block = self.basis.rows[old:]
        W = self.products.rows(block).to(block.dtype).contiguous()
        if W.untyped_storage().data_ptr() == block.untyped_storage().data_ptr():
            W = W.clone()  # an operator that returns its argument
        self.scale = max(self.scale, float(torch.linalg.vector_norm(W, dim=1).max()))
        C, R, self._next = self.basis.orthonormalize(W, NEGLIGIBLE * self.floor, self._near)
        self._near = old
        if old + r > len(self._room):
            self._room = np.pad(self._room[:old, :old], (0, old + 2 * r))
        H = self._room[: old + r, : old + r]
        H[:, old:] = C.T
        H[old:, :old] = self._B
        self._check_symmetric(H, old)
        self._B = np.zeros((R.shape[1], old + r))
        self._B[:, old:] = R.T
        self._fill()

    def _check_symmetric(self, H: Array, old: int) -> None:
        new = H[:, old:]
        asymmetry = float(np.abs(new - H[old:].T).max())
        bound = self.eps ** (1 / 3) * self.scale  # products of reduced precision pass
        if asymmetry > bound:
            raise ValueError(
                f"the operator is not symmetric: u'(A v) and v'(A u) differ by {asymmetry:.3g} for "
                f"two orthonormal vectors of the basis, and rounding explains {bound:.1g}. Use "
                "(A + A.T) / 2, or an operator that is symmetric"
            )

    def ritz(self) -> tuple[Array, Array, Array]:
        """theta (m,) increasing, S (m, m) with columns s, and the residual norms ||B s|| (m,)."""
        count = self.basis.count
        H, B = self._room[:count, :count], self._B
        if self._tridiagonal:
            beside = (H.diagonal(1) + H.diagonal(-1)) / 2
            theta, S = scipy.linalg.eigh_tridiagonal(H.diagonal(), beside)
            return theta, S, np.abs(B[:, -1:]).sum() * np.abs(S[-1])
        theta, S = eigh((H + H.T) / 2)
        beyond = torch.from_numpy(B) @ torch.from_numpy(S)
        return theta, S, torch.linalg.vector_norm(beyond, dim=0).numpy()

    def residual_rows(self, S: Array) -> Tensor:
        """Rows (B S)' N: residuals of the Ritz vectors S (m, j), as (j, P)."""
        factor = torch.from_numpy(np.ascontiguousarray((self._B @ S).T)).to(self._next)
        return factor @ self._next

    def restart(self, theta: Array, S: Array, k: int, which: str, spare: int | None = None) -> None:
        """Cut the basis back to the k wanted Ritz vectors and ``spare`` others in that order.

        None is half of the room that the k leave.
        """
        spare = (self._limit - k) // 2 if spare is None else spare
        kept = min(k + spare, max(k, self._limit - 2 * self.next_size))
        chosen = order_of(theta, which)[:kept]
        self.basis.rotate(S[:, chosen].T)
        self._room[:kept, :kept] = np.diag(theta[chosen])
        self._B = self._B @ S[:, chosen]
        self.num_restarts, self._near, self._tridiagonal = self.num_restarts + 1, 0, False

    def take(self, rows: Tensor) -> None:
        """Make rows (j, P) that are orthogonal to Q directions of the next block."""
        have = 0 if self.invariant else self.next_size
        block = torch.cat([self._next[:have], rows.to(self._next)])
        # N = R V with the new block V: N' B = V' (R' B)
        _, R, self._next = self.basis.orthonormalize(block, 1e-3)
        self._B = R[:have].T @ self._B[:have]
        self.invariant, self._tridiagonal, self._near = False, False, 0
