"""The spectral density of a symmetric operator by stochastic Lanczos quadrature.

    mu = (1/P) sum_i delta(lambda_i)                            the density of A (P, P), unit mass
    v'f(A)v / v'v  ~  sum_j w_j f(theta_j)                      m steps of Lanczos from v
    A Q = Q T + beta_m q_{m+1} e_m',  T = U diag(theta) U'      w_j = U_{1j}^2, sum_j w_j = 1
    mu  ~  (1/K) sum_k sum_j w_kj delta(theta_kj)               over K random probes v_k

A quadrature is exact for polynomials of degree below 2 m; with probes such that E[vv'] = I its mean
over probes is unbiased for all of the spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hvpfast.analysis.density.spectrum import SpectralDensity
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource, fresh_seed
from hvpfast.operators.matvecs import Products, at_least_single
from hvpfast.utils.memory import WORK_SHARE, available_bytes, bytes_text

_EXHAUSTED = 16  # residuals below this many eps times the operator's norm are rounding


def spectral_density(
    A: Any,
    num_steps: int = 100,
    num_probes: int = 10,
    *,
    distribution: str = "rademacher",
    seed: int | None = None,
    progressbar: bool = False,
) -> SpectralDensity:
    """The density of the eigenvalues of a symmetric A (P, P), from products alone.

    The probes advance together, one batched product per step, each with a basis of its own that
    is orthogonalised in full, twice. Nodes and weights are kept per probe, so every number computed
    from them has a standard error over probes. That error measures the randomness of the probes
    only; what the steps do not resolve is a bias, which falls with ``num_steps``.

    Args:
        A: an operator of this library, or anything with ``.shape`` and ``@`` on columns.
        num_steps: Lanczos steps m >= 1, at most P of which are taken. A probe whose Krylov space is
            exhausted takes fewer, and its quadrature is then exact.
        num_probes: probes K >= 1; an error band needs two.
        distribution: ``"rademacher"`` or ``"normal"``.
        seed: of the probes, in [0, 2**64); None takes fresh entropy.
        progressbar: show one over the steps.

    Returns:
        A :class:`SpectralDensity`; at most K m products, counted in its ``num_matvecs``.

    Raises:
        ValueError: a number out of range, or an operator that is not symmetric.
        MemoryError: the basis of one probe does not fit; the message says how many steps do.
        NonFiniteProductError: a product holds NaN or infinity.

    References:
        Golub, Welsch (1969), doi:10.1090/S0025-5718-69-99647-1; Ubaru, Chen, Saad (2017),
        doi:10.1137/16M1104974; Ghorbani, Krishnan, Xiao (2019), arXiv:1901.10159.
    """
    for name, value in (("num_steps", num_steps), ("num_probes", num_probes)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer >= 1; got {value!r}")
    products = Products(A)
    seed = products.agreed(fresh_seed() if seed is None else seed)
    ProbeSource(num_probes, distribution, seed)  # raises for bad arguments before any product
    products.check_symmetric()
    steps = min(num_steps, products.size)
    group = min(num_probes, _probes_at_once(products, steps))
    nodes = torch.zeros(num_probes, steps, dtype=torch.float64, device="cpu")
    weights = torch.zeros_like(nodes)
    num_nodes = torch.zeros(num_probes, dtype=torch.int64, device="cpu")
    dtype, total = at_least_single(products.dtype), -(-num_probes // group) * steps
    with tqdm(total=total, unit="step", desc="Lanczos", disable=not progressbar) as bar:
        for first in range(0, num_probes, group):
            source = ProbeSource(min(group, num_probes - first), distribution, seed, first)
            starts = probe_rows(source, products.size, dtype, products.device)
            diagonal, beside, counts = _tridiagonalise(products, starts, steps, bar.update)
            for k, count in enumerate(counts.tolist(), start=first):
                own = k - first
                theta, weight = _quadrature(diagonal[own, :count], beside[own, : count - 1])
                nodes[k, :count], weights[k, :count], num_nodes[k] = theta, weight, count
                nodes[k, count:] = theta[0]  # of weight 0, and where f is defined
    return SpectralDensity(
        ritz_values=nodes,
        weights=weights,
        num_nodes=num_nodes,
        size=products.size,
        num_matvecs=products.num_matvecs,
        seed=seed,
        distribution=distribution,
    )


def _tridiagonalise(
    products: Products, starts: Tensor, steps: int, advance: Callable[[int], object]
) -> tuple[Tensor, Tensor, Tensor]:
    """Lanczos from rows v_k (K, P): diagonals (K, m), their neighbours (K, m), and steps (K,)."""
    count, size = starts.shape
    basis = starts.new_zeros(count, steps, size)
    diagonal, beside = torch.zeros(2, count, steps, dtype=torch.float64, device="cpu")
    taken = torch.zeros(count, dtype=torch.int64, device="cpu")
    active = torch.arange(count, device=starts.device)
    rows = starts / torch.linalg.vector_norm(starts, dim=1, keepdim=True)
    scale = torch.zeros(count, dtype=torch.float64, device="cpu")  # a lower bound of the norm of A
    for j in range(steps):
        basis[active, j] = rows
        where = active.cpu()
        taken[where] = j + 1
        rows = products.rows(rows).to(basis.dtype)
        diagonal[where, j] = torch.linalg.vecdot(basis[active, j], rows).double().cpu()
        for k, row in zip(active.tolist(), rows, strict=True):
            own = basis[k, : j + 1]
            for _ in range(2):  # after one pass rounding leaves components along the basis
                row -= (own @ row) @ own
        norms = torch.linalg.vector_norm(rows, dim=1)
        beside[where, j] = norms.double().cpu()
        scale[where] = torch.maximum(scale[where], diagonal[where, j].abs() + beside[where, j])
        advance(1)
        rounding = _EXHAUSTED * torch.finfo(products.dtype).eps * scale[where]
        go_on = (beside[where, j] > rounding).to(active.device)
        active, rows = active[go_on], rows[go_on] / norms[go_on, None]
        if active.numel() == 0:
            break
    return diagonal, beside, taken


def _quadrature(diagonal: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes theta (m,) and weights (m,) of the Jacobi matrix T, ascending."""
    T = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
    theta, vectors = torch.linalg.eigh(T)
    weights = vectors[0].square()
    return theta, weights / weights.sum()


def _probes_at_once(products: Products, steps: int) -> int:
    """Number of probes whose bases fit into the share of memory for work."""
    row = products.size * at_least_single(products.dtype).itemsize
    free = products.agreed(available_bytes(products.device))
    need = (steps + 4) * row  # the basis, the row, its product, and orthogonalisation
    if need > free:
        fits = max(0, free // row - 4)
        raise MemoryError(
            f"a basis of num_steps={steps} vectors of {products.size:,} entries takes "
            f"{bytes_text(need)}, and {bytes_text(free)} are available; num_steps={fits} fits"
        )
    return max(1, math.floor(WORK_SHARE * free / need))
