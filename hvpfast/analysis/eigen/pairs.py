"""Wanted eigenpairs by Lanczos: when to check, when to stop, and what the true residuals are.

Pairs whose residuals are small enough are accepted when a search outside of the basis (unseen.py)
finds none that is more wanted; what it finds goes into the next block.

The recurrence gives the residual norm ||B s_i|| of every Ritz pair for the products as computed.
What their rounding adds is measured at the end, with one more product:

    x = sum_i g_i y_i,  g_i = +-1 / |theta_i|        e = A x - sum_i g_i (theta_i y_i + N' B s_i)
    noise_i^2 = ||e||^2 / ||g||^2 + (16 eps theta_i)^2   residual_i^2 = ||B s_i||^2 + noise_i^2

This weighs all pairs equally relative to their eigenvalues, and also detects an operator whose
products change; the second term stands for what the small g_i hide. With k more products instead,
residuals are computed pair by pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvpfast.analysis.eigen import unseen
from hvpfast.analysis.eigen.lanczos import RELATIVE_NOISE, Lanczos
from hvpfast.analysis.eigen.ritz import Array, wanted
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource


@dataclass(frozen=True)
class Pairs:
    """theta (j,), rows y (j, P); per pair its residual norm, the rounding in it, converged.

    ``sure``: a search outside of them has found no pair that is more wanted.
    """

    theta: Array
    rows: Tensor
    residuals: Array
    noise: Array
    converged: NDArray[np.bool_]
    sure: bool
    stop_reason: str


def find_pairs(
    lanczos: Lanczos, k: int, which: str, tol: float, max_matvecs: int, by_pair: bool
) -> Pairs:
    """Run Lanczos until the k wanted pairs converge or the budget of products ends.

    ``by_pair``: compute residuals with k products rather than measure rounding with one.
    """
    products, budget = lanczos.products, max_matvecs - (k if by_pair else 1)
    schedule, share, width = _Schedule(k), 0.95, 1
    sure = False  # no pair is missing
    while True:
        ended = lanczos.complete or products.num_matvecs + lanczos.next_size > budget
        if products.num_matvecs >= schedule.next or ended or lanczos.full:
            theta, S, estimates = lanczos.ritz()
            chosen = wanted(theta, k, which)
            targets = np.maximum(share * tol * np.abs(theta[chosen]), lanczos.floor)
            ratio = float(np.max(estimates[chosen] / np.maximum(targets, 1e-300)))
            small = len(chosen) == k and ratio <= 1.0
            if small and not (ended or sure):
                if lanczos.room < unseen.ROOM:
                    lanczos.restart(theta, S, k, which, spare=0)
                    theta, S, estimates = lanczos.ritz()
                    chosen = wanted(theta, k, which)
                rows, finished = unseen.search(lanczos, theta[chosen], which, tol, width, budget)
                sure, ended = finished and len(rows) == 0, not finished
                if len(rows):
                    lanczos.take(rows[: max(1, lanczos.room // 2)])
                    width = min(2 * width, k)
            if ended or (small and sure):
                found = theta[chosen], S[:, chosen], estimates[chosen]
                pairs = _measured(lanczos, *found, tol, by_pair, sure or lanczos.complete)
                share /= 2  # the estimates meet the target, but maybe not with rounding added
                if ended or pairs.stop_reason != "max_matvecs" or share < 0.1:
                    return pairs
            if lanczos.full:
                lanczos.restart(theta, S, k, which)
            schedule.checked(products.num_matvecs, ratio)
        lanczos.step()


class _Schedule:
    """When to solve the small problem again: predicted from residuals that fall geometrically."""

    def __init__(self, first: int) -> None:
        self.next = first
        self._last: tuple[int, float] | None = None

    def checked(self, done: int, ratio: float) -> None:
        """Set the next check: after ``done`` products the worst residual is ratio * target."""
        wait, now = done / 32, math.log(max(ratio, 1e-300))
        if self._last is not None and now < self._last[1]:
            rate = (self._last[1] - now) / max(1, done - self._last[0])
            wait = min(done / 16, 0.5 * max(0.0, now) / rate)
        self._last = done, now
        self.next = done + max(1, int(wait))


def _measured(
    lanczos: Lanczos,
    theta: Array,
    S: Array,
    estimates: Array,
    tol: float,
    by_pair: bool,
    sure: bool,
) -> Pairs:
    """The Ritz pairs with their residuals and whether these are within the tolerance."""
    products, basis, floor, size = lanczos.products, lanczos.basis, lanczos.floor, np.abs(theta)
    rows = basis.combine(S.T)
    if by_pair:
        difference = products.rows(rows).to(rows.dtype)
        difference -= torch.from_numpy(theta).to(rows)[:, None] * rows
        residuals = _norms(difference)
        difference -= lanczos.residual_rows(S)
        noise = np.maximum(_norms(difference), floor)
    else:
        source = ProbeSource(1, "rademacher", lanczos.seed, 2**30)
        signs = probe_rows(source, len(theta), torch.float64)
        g = signs[0].numpy() / np.maximum(size, floor or 1.0)
        g /= np.linalg.norm(g)
        difference = products.rows(basis.combine((S @ g)[None])).to(rows.dtype)
        difference -= basis.combine((S @ (g * theta))[None])
        difference -= lanczos.residual_rows((S @ g)[:, None])
        noise = np.hypot(_norms(difference)[0], RELATIVE_NOISE * lanczos.eps * size)
        residuals = np.hypot(estimates, noise)
    # a zero eigenvalue has no relative residual: rounding alone decides
    least = 4 * RELATIVE_NOISE * floor
    zero = (size <= least) & (residuals <= least)
    converged = (residuals <= tol * size) | zero
    if converged.all():
        reason = "converged" if sure else "max_matvecs"
    else:
        hopeless = np.maximum(noise, floor) > 0.7 * tol * size
        rounding = lanczos.complete or hopeless[~converged].all()
        reason = "precision" if rounding else "max_matvecs"
    return Pairs(theta, rows, residuals, noise, converged, sure, reason)


def _norms(rows: Tensor) -> Array:
    norms: Array = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()
    return norms
