"""What a Krylov space has not seen: eigenpairs outside that are more wanted than those found.

A Krylov space of b start vectors holds at most b eigenvectors of a repeated eigenvalue, and one
that starts from eigenvectors holds no others. So Lanczos runs once more, from random vectors, on

    (I - Z' Z) A (I - Z' Z)         Z: rows of the basis

A Ritz value of it that is more wanted than a pair found shows that one is missing, whatever its
residual. That none is missing follows, for random start vectors in p dimensions, from the largest
Ritz value mu after j steps: with probability 1 - delta

    lambda_max - mu <= (lambda_max - lambda_min) (ln(1.648 sqrt(p) / delta) / (2 j - 1))^2

Where memory holds no basis of j vectors, mu has to converge instead.

References:
    Kuczynski, Wozniakowski (1992), doi:10.1137/0613066, theorem 4.2.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from hvpfast.analysis.eigen.lanczos import RELATIVE_NOISE, Lanczos
from hvpfast.analysis.eigen.ritz import Array
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.operators.matvecs import Products

FAILURE = 1e-3  # delta
ROOM = 40  # rows of the basis of a search, where memory allows


def unwanted(theta: Array, which: str) -> tuple[float, float]:
    """The least and the largest value that an eigenvalue beside the wanted ``theta`` may have."""
    if which == "LA":
        return -math.inf, float(theta.min())
    if which == "SA":
        return float(theta.max()), math.inf
    if which == "LM":
        least = float(np.abs(theta).min())
        return -least, least
    largest = theta[: (len(theta) + 1) // 2]  # "BE", in decreasing order
    smallest = theta[len(largest) :]
    return float(smallest.max()) if len(smallest) else -math.inf, float(largest.min())


class Outside:
    """(I - Z'Z) A (I - Z'Z) on columns orthogonal to Z, as an operator."""

    def __init__(self, products: Products, Z: Tensor) -> None:
        self._products, self._Z = products, Z
        self.shape = (products.size, products.size)
        self.dtype, self.device = products.dtype, products.device

    def project(self, rows: Tensor) -> Tensor:
        """``rows - rows Z' Z``, twice: the second time removes what rounding left."""
        for _ in range(2):
            rows = rows - (rows.to(self._Z) @ self._Z.T) @ self._Z
        return rows

    def __matmul__(self, columns: Tensor) -> Tensor:
        return self.project(self._products.rows(columns.T)).T


def search(
    lanczos: Lanczos, theta: Array, which: str, tol: float, width: int, budget: int
) -> tuple[Tensor, bool]:
    """Look for eigenpairs outside the basis that are more wanted than ``theta``.

    Args:
        lanczos: the run whose pairs these are; it stays as it is. The basis of the search takes no
            more rows than its own leaves, but 4 in any case.
        theta: eigenvalues of the wanted pairs, in the order of results.
        which: as in eigsh.
        tol: as in eigsh; values within tol of one of theta are not more wanted.
        width: random vectors to start from.
        budget: products that may have been made at the end.

    Returns:
        Ritz vectors (j, P) that are more wanted, orthogonal to the basis; and whether the search
        came to an end within the budget.
    """
    products, basis = lanczos.products, lanczos.basis
    left = products.size - basis.count
    limit = min(left, max(lanczos.room, 4))
    width = min(width, max(1, limit // 4))
    outside = Outside(products, basis.rows)
    source = ProbeSource(width, "normal", lanczos.seed, 2**29 + products.num_matvecs)
    start = outside.project(probe_rows(source, products.size, basis.rows.dtype, products.device))
    run = Lanczos(Products(outside), start, lanczos.seed, min(ROOM, limit), limit, lanczos.scale)
    low, high = unwanted(theta, which)
    steps, log = 0, math.log(1.648 * math.sqrt(left) / FAILURE)
    while products.num_matvecs + run.next_size <= budget:
        run.step()
        steps += 1
        mu, S, residuals = run.ritz()
        rounding = RELATIVE_NOISE * run.floor
        found = mu > high + max(tol * abs(high), rounding)
        found |= mu < low - max(tol * abs(low), rounding)
        if found.any():
            order = np.argsort(-np.abs(mu - np.clip(mu, low, high)), kind="stable")
            return run.basis.combine(S[:, order[: found.sum()]].T), True
        if run.invariant or run.basis.count == left:
            return basis.rows[:0], True
        share = math.inf if run.num_restarts else (log / (2 * steps - 1)) ** 2
        settled = residuals <= np.maximum(tol * np.abs(mu), rounding)
        above = settled[-1] or high - mu[-1] > share * (high - mu[0] + residuals[0])
        below = settled[0] or mu[0] - low > share * (mu[-1] + residuals[-1] - low)
        if above and below:
            return basis.rows[:0], True
        if run.full:
            run.restart(mu, S, 2 * width, "BE")
    return basis.rows[:0], False
