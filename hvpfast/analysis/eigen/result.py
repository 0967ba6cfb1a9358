"""What :func:`hvpfast.eigsh` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class EigenResult:
    """Eigenpairs ``A y_i = theta_i y_i`` of a symmetric operator, the most wanted first.

    There are j <= k pairs, fewer than k only if the budget of products ended before the subspace
    had k dimensions. Residuals are those of these vectors, including the rounding of the products.

    Attributes:
        eigenvalues: theta (j,) float64 on the CPU. "LM": by decreasing magnitude; "LA" and "BE":
            decreasing; "SA": increasing.
        eigenvectors: y_i as columns (P, j), orthonormal, in the dtype and on the device of A.
        residual_norms: ``||A y_i - theta_i y_i||`` (j,) float64 on the CPU. An eigenvalue of A is
            within this distance of theta_i.
        converged: whether residual_norms <= tol * |theta|, (j,) bool; an eigenvalue that is zero to
            rounding counts as converged when its residual is.
        residual_floor: the measured residual norm that rounding of products leaves; the least
            that any pair can reach in this dtype.
        num_matvecs: products with one vector.
        stop_reason: "converged", and none that is more wanted was found outside; "max_matvecs", the
            budget ended before; "precision", what is not converged cannot be in this dtype.
        message: the reason as a sentence, with numbers.
        which, tol, seed, block_size: the arguments, with "auto" and None resolved.
        num_restarts: number of times the basis was cut back to fit into memory.
        compressed: None, or the sentence that says how the operator was made smaller.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residual_norms: Tensor
    converged: Tensor
    residual_floor: float
    num_matvecs: int
    stop_reason: str
    message: str
    which: str
    tol: float
    seed: int
    block_size: int
    num_restarts: int
    compressed: str | None
