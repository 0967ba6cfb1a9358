"""Linear systems by conjugate gradients: :func:`cg_solve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvpfast.operators.matvecs import Products
from hvpfast.operators.tangents import given_rows

DELAYS = 3  # times that a true residual may exceed the tolerance that the recurrence has met


@dataclass(frozen=True, eq=False)
class CGResult:
    """An approximate solution of ``A x = b``, or of K systems.

    Attributes:
        solution: x, shaped as b, in the dtype of A.
        residual_norms: ``||b - A x||`` of this x, computed with a separate product; 0-dim or (K,)
            float64 on the CPU, like relative_residuals.
        relative_residuals: residual_norms / ||b|| (zero for b = 0).
        converged: whether relative_residuals <= tol, 0-dim or (K,) bool.
        history: relative residuals (T + 1,) or (T + 1, K) of the recurrence, from the start.
        num_iterations: T.
        num_matvecs: products with one vector, including those for true residuals.
        stop_reason: "converged"; "max_matvecs", the budget ended; "indefinite", a direction p with
            p'A p <= 0 was met; "precision", rounding keeps the true residual above the tolerance.
        message: the reason as a sentence, with numbers.
    """

    solution: Tensor
    residual_norms: Tensor
    relative_residuals: Tensor
    converged: Tensor
    history: Tensor
    num_iterations: int
    num_matvecs: int
    stop_reason: str
    message: str


def cg_solve(
    A: Any,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    tol: float = 1e-5,
    max_matvecs: int | None = None,
) -> CGResult:
    """Solve ``A x = b`` for a symmetric positive definite operator by conjugate gradients.

    For curvature use a damping: ``cg_solve(H.shift(damping), gradient)``. K right-hand sides are K
    separate runs whose products are computed together.

    Args:
        A: anything with ``.shape`` (P, P) and ``@`` on columns; symmetric, positive definite.
        b: (P,) or columns (P, K).
        x0: first guess, shaped as b; zero if None.
        tol: relative residual ``||b - A x|| <= tol ||b||`` that ends a run.
        max_matvecs: budget of products with one vector; None is ``max(100, 10 sqrt(P)) (K + 1)``
            rounded down. When it ends, the solutions so far are returned.

    Returns:
        The solution with its true residual and the history. A run that does not converge raises
        no error: ``.stop_reason`` and ``.message`` say why. An indefinite A is detected when a
        direction of curvature <= 0 is met, and the solution before that direction is returned.

    Raises:
        ValueError: an argument out of range.
        TypeError: not an operator, or not a tensor.
        NonFiniteProductError: a product holds NaN or infinity.

    References:
        Hestenes, Stiefel (1952), doi:10.6028/jres.049.044.
    """
    products = Products(A)
    rows = _rows(products, "b", b)
    x = torch.zeros_like(rows) if x0 is None else _rows(products, "x0", x0).clone()
    if x.shape != rows.shape:
        raise ValueError(f"x0 must be shaped as b, {tuple(b.shape)}")
    if not 0 < tol < 1:
        raise ValueError(f"tol is a relative residual in (0, 1), such as 1e-5; got {tol!r}")
    least = 3 * len(rows)
    if max_matvecs is None:
        max_matvecs = max(least, int(max(100, 10 * products.size**0.5) * (len(rows) + 1)))
    if type(max_matvecs) is not int or max_matvecs < least:
        raise ValueError(f"max_matvecs must be an integer >= {least} here; got {max_matvecs!r}")
    run = _Run(products, rows, x, tol, max_matvecs, guessed=x0 is not None)
    reason = run.solve()
    residuals = run.true_norms
    relative = residuals / run.lengths
    converged = relative <= tol
    history = torch.stack(run.history)
    one = b.dim() == 1
    return CGResult(
        solution=run.x[0] if one else run.x.T,
        residual_norms=residuals[0] if one else residuals,
        relative_residuals=relative[0] if one else relative,
        converged=converged[0] if one else converged,
        history=history[:, 0] if one else history,
        num_iterations=len(run.history) - 1,
        num_matvecs=products.num_matvecs,
        stop_reason=reason,
        message=_message(reason, run, relative, tol),
    )


class _Run:
    """K runs side by side: rows x (the solutions so far), r, p (K, P); scalars (K,) float64.

        a = r'r / p'A p,   x <- x + a p,   r <- r - a A p,   p <- r + (r'r / old r'r) p

    When the recurrence meets the tolerance, r is recomputed as b - A x. If that is too long, the
    run restarts from it, as long as this helps.
    """

    def __init__(
        self, products: Products, b: Tensor, x: Tensor, tol: float, budget: int, guessed: bool
    ) -> None:
        self._products, self._b, self.x, self._tol, self._budget = products, b, x, tol, budget
        norms = _squares(b).sqrt()
        self.lengths = torch.where(norms > 0, norms, 1.0)
        self._guessed = guessed
        self.history: list[Tensor] = []
        self.true_norms = norms
        self.curvature = 0.0

    def solve(self) -> str:
        """Run to the end; returns the reason why it ended."""
        count = len(self._b)
        r = self._b - self._products.rows(self.x) if self._guessed else self._b.clone()
        squares = _squares(r)
        self._record(squares)
        best, delays, p = self.true_norms.clone(), 0, r.clone()
        while True:
            active = (squares.sqrt() > self._tol * self.lengths).nonzero().flatten()
            # one more product per system is reserved for the true residuals
            spent = self._products.num_matvecs + len(active) + count > self._budget
            reason = "max_matvecs" if spent else ""
            if len(active) and not spent:
                reason = self._advance(r, p, squares, active)
            if len(active) and not reason:
                continue
            r = self._b - self._products.rows(self.x)
            squares = _squares(r)
            self.true_norms = squares.sqrt()
            late = self.true_norms > self._tol * self.lengths
            if reason or not bool(late.any()):
                return reason if bool(late.any()) else "converged"
            delays += 1
            if delays > DELAYS or bool((self.true_norms > 0.5 * best)[late].all()):
                return "precision"
            best, p = self.true_norms.clone(), r.clone()
            if self._products.num_matvecs + len(late.nonzero()) + count > self._budget:
                return "max_matvecs"

    def _advance(self, r: Tensor, p: Tensor, squares: Tensor, active: Tensor) -> str:
        """One step of the active systems, in place; returns "indefinite" if it is impossible."""
        whole = len(active) == len(r)
        direction = p if whole else p[active]
        product = self._products.rows(direction)
        curvature: Tensor = torch.linalg.vecdot(direction.double(), product.double()).cpu()
        if bool((curvature <= 0).any()):
            self.curvature = float((curvature / _squares(direction)).min())
            return "indefinite"
        step = squares[active] / curvature
        self.x[active] += step.to(r)[:, None] * direction
        r[active] -= step.to(r)[:, None] * product
        new = _squares(r[active])
        p[active] = r[active] + (new / squares[active]).to(r)[:, None] * direction
        squares[active] = new
        self._record(squares)
        return ""

    def _record(self, squares: Tensor) -> None:
        self.true_norms = squares.sqrt()
        self.history.append(self.true_norms / self.lengths)


def _rows(products: Products, name: str, columns: Tensor) -> Tensor:
    size = products.size
    rows = given_rows(name, columns, size, {1: f"({size},)", 2: f"({size}, K)"})
    if columns.dtype != products.dtype or columns.device != products.device:
        raise TypeError(
            f"{name} must be {products.dtype} on {products.device}, as the operator; got "
            f"{columns.dtype} on {columns.device}"
        )
    if not bool(torch.isfinite(columns).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return rows.contiguous()


def _squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu()
    return norms.square()


def _message(reason: str, run: _Run, relative: Tensor, tol: float) -> str:
    text = f"relative residual {float(relative.max()):.2e} after {len(run.history) - 1} iterations"
    if reason == "max_matvecs":
        return f"{text}, above tol = {tol:g}: the budget of products ended; raise max_matvecs"
    if reason == "indefinite":
        return (
            f"{text}: the operator is not positive definite, a direction p with p'A p = "
            f"{run.curvature:.3g} p'p was met; use a damping larger than "
            f"{max(0.0, -run.curvature):.3g}, A.shift(damping), or the Gauss-Newton matrix"
        )
    if reason == "precision":
        return (
            f"{text}: rounding in {run.x.dtype} keeps it above tol = {tol:g}; use float64 or a "
            "larger tol or damping"
        )
    return f"{text}, within tol = {tol:g}"
