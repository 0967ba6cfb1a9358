"""Eigenpairs of symmetric operators: :func:`eigsh`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvpfast.analysis.eigen import compression
from hvpfast.analysis.eigen.compression import CompressedOperator, NotCompressibleError
from hvpfast.analysis.eigen.cost import auto_block_size
from hvpfast.analysis.eigen.lanczos import Lanczos
from hvpfast.analysis.eigen.pairs import Pairs, find_pairs
from hvpfast.analysis.eigen.result import EigenResult
from hvpfast.analysis.eigen.ritz import WHICH, wanted
from hvpfast.analysis.eigen.starts import start_rows
from hvpfast.backends.probes.source import fresh_seed
from hvpfast.operators.matvecs import Products, at_least_single
from hvpfast.operators.tangents import given_rows
from hvpfast.utils.choice import check_choice
from hvpfast.utils.memory import available_bytes, budget_of, bytes_text


def eigsh(
    A: Any,
    k: int = 6,
    which: str = "LM",
    *,
    v0: Tensor | None = None,
    V0: Tensor | None = None,
    tol: float = 1e-4,
    max_matvecs: int | None = None,
    block_size: int | str = "auto",
    memory_budget: int | float | str = "auto",
    compress: bool | str = "auto",
    exact_residuals: bool = False,
    seed: int | None = None,
) -> EigenResult:
    """k eigenpairs ``A y = theta y`` of a symmetric operator, by block Lanczos.

    The basis is orthogonalised in full, twice; it is restarted (thick restarts) only where it would
    exceed the memory budget. Before pairs are accepted, random directions outside of the basis are
    searched for others, so that repeated eigenvalues are found as often as they are there, up to k,
    and no start vector hides a pair; this takes about ten products, more where the spectrum is
    dense at the last wanted eigenvalue. Products are computed in the dtype of A, the projected
    problem is solved in float64. The result depends on ``seed``, the block size and the products
    only.

    Args:
        A: anything with ``.shape`` (P, P) and ``@`` on columns (P, K): operators of this library,
            torch tensors, curvlinops, NumPy, SciPy.
        k: number of eigenpairs, 1 <= k <= P.
        which: ``"LM"`` largest magnitude, ``"LA"`` largest, ``"SA"`` smallest, ``"BE"`` k/2 from
            each end (one more of the largest for odd k): SciPy's meanings. The most wanted pair
            comes first; see :class:`EigenResult` for the order.
        v0: start vector (P,). Random if neither it nor V0 is given.
        V0: guess (P, j) of eigenvectors, for instance ``.eigenvectors`` of a similar operator.
        tol: relative residual ``||A y - theta y|| <= tol * |theta|`` that makes a pair converged.
            Separated eigenvalues are then far more accurate than tol.
        max_matvecs: budget of products with one vector; when it ends, the pairs so far are
            returned. None is ``max(1000, 50 k)``.
        block_size: vectors multiplied at once. 1 takes the fewest products, more make a product
            cheaper per vector; ``"auto"`` chooses by counts of operations.
        memory_budget: bytes that the basis may take; ``"auto"`` is half of the free memory.
        compress: row-space compression, exact to rounding, for the Hessian or Gauss-Newton matrix
            of a perceptron whose inputs have a rank below their number of columns, above all with
            fewer samples than columns. ``"auto"``: if possible; True: or it raises; False: never.
        exact_residuals: compute the true residual of every pair, with k more products. Otherwise
            one more product measures what rounding adds to the residuals, over all pairs.
        seed: in [0, 2**64); None takes fresh entropy. It is recorded in the result.

    Returns:
        The pairs with their residuals. A budget that ends, or a tolerance that rounding does not
        allow, raises no error: ``.stop_reason`` and ``.message`` say so, ``.converged`` per pair.

    Raises:
        ValueError: an argument out of range, k > P, or an operator that is not symmetric.
        TypeError: not an operator, or not a tensor.
        MemoryError: not even the least basis fits the memory budget.
        NonFiniteProductError: a product holds NaN or infinity.

    References:
        Golub, Underwood (1977), doi:10.1016/B978-0-12-587260-7.50018-2;
        Wu, Simon (2000), doi:10.1137/S0895479898334605;
        Kuczynski, Wozniakowski (1992), doi:10.1137/0613066.
    """
    given = Products(A)
    _check(given.size, k, which, tol, block_size, compress)
    least = k + 1 if exact_residuals else 2
    budget = max(1000, 50 * k) if max_matvecs is None else max_matvecs
    if type(budget) is not int or budget < least:
        raise ValueError(f"max_matvecs must be an integer >= {least} here; got {max_matvecs!r}")
    seed = given.agreed(fresh_seed() if seed is None else seed)
    start = _start(given, v0, V0)
    smaller = _compressed(A, compress)
    products = given if smaller is None else Products(smaller.operator)
    if smaller is not None and start is not None:
        start = smaller.project(start)
    count = min(k, products.size)
    block = auto_block_size(products, count) if block_size == "auto" else int(block_size)
    block = products.agreed(block)
    block = min(block, count, budget - (count if exact_residuals else 1))
    limit = _basis_limit(products, count, block, memory_budget)
    dtype = at_least_single(products.dtype)
    rows = start_rows(start, products.size, block, seed, dtype, products.device)
    lanczos = Lanczos(products, rows, seed, capacity=4 * count + 4 * block, limit=limit)
    pairs = find_pairs(lanczos, count, which, tol, budget, exact_residuals)
    if smaller is not None:
        pairs = _lifted(pairs, smaller, k, which)
    floor = max(lanczos.floor, float(pairs.noise.max()))
    return EigenResult(
        eigenvalues=torch.from_numpy(pairs.theta),
        eigenvectors=pairs.rows.to(given.dtype).T,
        residual_norms=torch.from_numpy(pairs.residuals),
        converged=torch.from_numpy(pairs.converged),
        residual_floor=floor,
        num_matvecs=products.num_matvecs,
        stop_reason=pairs.stop_reason,
        message=_message(pairs, k, tol, floor, products),
        which=which,
        tol=tol,
        seed=seed,
        block_size=block,
        num_restarts=lanczos.num_restarts,
        compressed=None if smaller is None else smaller.text,
    )


def _check(
    size: int, k: int, which: str, tol: float, block_size: int | str, compress: bool | str
) -> None:
    """Raise ValueError for arguments out of range."""
    check_choice("which", which, WHICH)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer >= 1; got {k!r}")
    if k > size:
        raise ValueError(
            f"k = {k} eigenpairs were asked for, and the operator has {size} in all; "
            f"give k <= {size}"
        )
    if not 0 < tol < 1:
        raise ValueError(
            f"tol is a relative residual in (0, 1), such as 1e-4; got {tol!r}. What rounding "
            "allows is found for any tol below it, and said in the result"
        )
    if block_size != "auto" and (type(block_size) is not int or block_size < 1):
        raise ValueError(f'block_size must be "auto" or an integer >= 1; got {block_size!r}')
    if compress not in ("auto", True, False):
        raise ValueError(f'compress must be "auto", True or False; got {compress!r}')


def _start(products: Products, v0: Tensor | None, V0: Tensor | None) -> Tensor | None:
    """The given start vectors as rows (j, P)."""
    if v0 is not None and V0 is not None:
        raise ValueError("give v0 (P,) or V0 (P, j), not both")
    name, columns = ("v0", v0) if V0 is None else ("V0", V0)
    if columns is None:
        return None
    size = products.size
    shapes = {1: f"({size},)"} if name == "v0" else {2: f"({size}, j), j >= 1"}
    rows = given_rows(name, columns, size, shapes).to(products.device, products.dtype)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    if not bool(rows.any()):
        raise ValueError(f"{name} is zero; leave it out for a random start")
    return rows


def _compressed(A: Any, choice: bool | str) -> CompressedOperator | None:
    if choice is False:
        return None
    try:
        return compression.compress(A)
    except NotCompressibleError as error:
        if choice is True:
            raise ValueError(f"compress=True is impossible for this operator: {error}") from None
        return None


def _basis_limit(products: Products, k: int, block: int, memory_budget: object) -> int:
    """Largest number of rows of the basis."""
    free = products.agreed(available_bytes(products.device))
    room = budget_of(memory_budget, free)
    row = products.size * at_least_single(products.dtype).itemsize
    limit, least = room // row, min(products.size, k + 3 * block + 2)
    if limit < least:
        raise MemoryError(
            f"k = {k} pairs need a basis of {least} vectors of {products.size:,} entries at least, "
            f"{bytes_text(least * row)}, and the memory budget is {bytes_text(room)}: raise "
            "memory_budget, or ask for fewer pairs"
        )
    return int(min(limit, products.size))


def _lifted(pairs: Pairs, smaller: CompressedOperator, k: int, which: str) -> Pairs:
    """The pairs of the given operator: lifted, with pairs of its null space where these come first.

    If the run found fewer pairs than wanted, none of the null space are added.
    """
    have = len(pairs.theta)
    complete = have == min(k, smaller.operator.shape[0])
    values = np.append(pairs.theta, np.zeros(min(k, smaller.num_null)))
    chosen = wanted(values, k if complete else have, which)
    rows, zeros = smaller.lift(pairs.rows), chosen >= have
    if zeros.any():
        null = smaller.null_rows(int(zeros.sum()), rows)
        index = np.where(zeros, have + np.cumsum(zeros) - 1, chosen)
        rows = torch.cat([rows, null])[torch.from_numpy(index).to(rows.device)]

    def pick(own: Any, zero: Any) -> Any:
        return np.append(own, np.full(len(values) - have, zero))[chosen]

    converged = pick(pairs.converged, True)
    return Pairs(
        theta=values[chosen],
        rows=rows,
        residuals=pick(pairs.residuals, 0.0),
        noise=pick(pairs.noise, 0.0),
        converged=converged,
        sure=pairs.sure,
        stop_reason=(
            "converged" if converged.all() and complete and pairs.sure else pairs.stop_reason
        ),
    )


def _message(pairs: Pairs, k: int, tol: float, floor: float, products: Products) -> str:
    have, good = len(pairs.theta), int(pairs.converged.sum())
    text = f"{good} of {k} pairs have residuals within {tol:g} |theta|"
    text += f", after {products.num_matvecs} products"
    if pairs.stop_reason == "max_matvecs" and good == k:
        text += "; the budget of products ended before the search for others: raise max_matvecs"
    elif pairs.stop_reason == "max_matvecs":
        text += "; the budget of products ended: raise max_matvecs"
        text += f" (only {have} pairs are there)" if have < k else ""
    if pairs.stop_reason == "precision":
        worst = float(np.abs(pairs.theta[~pairs.converged]).min())
        text += (
            f"; rounding in {products.dtype} leaves residuals of {floor:.1e}, and {tol:g} |theta| "
            f"is {tol * worst:.1e} for the smallest of the others: use float64, or a larger tol"
        )
    return text
