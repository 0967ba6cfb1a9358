"""The names of curvlinops (3.0): change the import, keep the calls.

What differs: means over batches are weighted by the targets that count, not by batch sizes, so
class weights and ``ignore_index`` are exact; probes come from ``seed=``, not from torch's global
generator; Lanczos is orthogonalised in full. Estimators return tensors as there; the functions of
:mod:`hvpfast.analysis.estimators` return standard errors and intervals as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hvpfast.analysis.density.quadrature import spectral_density
from hvpfast.analysis.eigen.solver import eigsh
from hvpfast.analysis.estimators.estimate import diagonal, frobenius_sq, trace
from hvpfast.operators.hessian import CurvatureOperator, GGNOperator, HessianOperator
from hvpfast.operators.matvecs import Products

Boundaries = tuple[float | None, float | None]


class _CurvlinopsOperator(CurvatureOperator):
    """curvlinops' order of arguments."""

    SELF_ADJOINT = True

    def __init__(
        self,
        model_func: nn.Module,
        loss_func: Callable[..., Any],
        params: Any,
        data: Any,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        block_sizes: list[int] | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        **options: Any,
    ) -> None:
        if block_sizes is not None:
            raise NotImplementedError(
                "block_sizes= is not offered: H.blocks() gives the operators of the diagonal blocks"
            )
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            **options,
        )

    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """The gradient, as tensors shaped like the parameters, and the loss."""
        return self.layout.split(self.gradient().unsqueeze(0), stacked=False), self.loss


class HessianLinearOperator(_CurvlinopsOperator, HessianOperator):
    """The Hessian, with the arguments of ``curvlinops.HessianLinearOperator``.

    Args:
        model_func: a ``torch.nn.Module``.
        loss_func: called as ``loss_func(outputs, y)``.
        params: a list of parameters (curvlinops 3.0), or a dict of them by name (later).
        data: a list of batches (X, y), or a DataLoader.
        progressbar: show progress over the batches.
        check_deterministic: compare two evaluations of everything.
        num_data, batch_size_fn: accepted and not needed: batches are counted when they are read.
        block_sizes: refused; see :meth:`hvpfast.HessianOperator.blocks`.
        **options: the keyword arguments of :class:`hvpfast.HessianOperator`.

    Raises:
        NotImplementedError: ``block_sizes`` is given.
        Exception: as :class:`hvpfast.HessianOperator`.
    """


class GGNLinearOperator(_CurvlinopsOperator, GGNOperator):
    """The generalised Gauss-Newton matrix, as ``curvlinops.GGNLinearOperator``.

    Arguments and errors are those of :class:`HessianLinearOperator`.
    """


def hutchinson_trace(
    A: Any, num_matvecs: int, distribution: str = "rademacher", *, seed: int | None = None
) -> Tensor:
    """Tr(A), 0-dim, by Girard and Hutchinson's estimator; see :func:`hvpfast.trace`."""
    return _trace(A, num_matvecs, "hutchinson", distribution, seed)


def hutchpp_trace(
    A: Any, num_matvecs: int, distribution: str = "rademacher", *, seed: int | None = None
) -> Tensor:
    """Tr(A), 0-dim, by Hutch++; see :func:`hvpfast.trace`."""
    return _trace(A, num_matvecs, "hutch++", distribution, seed)


def xtrace(
    A: Any, num_matvecs: int, distribution: str = "rademacher", *, seed: int | None = None
) -> Tensor:
    """Tr(A), 0-dim, by XTrace; see :func:`hvpfast.trace`."""
    return _trace(A, num_matvecs, "xtrace", distribution, seed)


def _trace(A: Any, num_matvecs: int, method: str, distribution: str, seed: int | None) -> Tensor:
    result = trace(A, num_matvecs, method=method, distribution=distribution, seed=seed)
    return _scalar(A, result.estimate)


def hutchinson_diag(
    A: Any, num_matvecs: int, distribution: str = "rademacher", *, seed: int | None = None
) -> Tensor:
    """diag(A), (P,), by Hutchinson's estimator; see :func:`hvpfast.diagonal`."""
    return diagonal(A, num_matvecs, distribution=distribution, seed=seed).estimate


def xdiag(A: Any, num_matvecs: int, *, seed: int | None = None) -> Tensor:
    """diag(A), (P,), by XDiag; see :func:`hvpfast.diagonal`."""
    return diagonal(A, num_matvecs, method="xdiag", seed=seed).estimate


def hutchinson_squared_fro(
    A: Any, num_matvecs: int, distribution: str = "rademacher", *, seed: int | None = None
) -> Tensor:
    """Tr(A'A), 0-dim, for a symmetric A; see :func:`hvpfast.frobenius_sq`."""
    result = frobenius_sq(A, num_matvecs, distribution=distribution, seed=seed)
    return _scalar(A, result.estimate)


def _scalar(A: Any, value: float) -> Tensor:
    like = Products(A)
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def lanczos_approximate_spectrum(
    A: Any,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 3.0,
    boundaries: Boundaries | None = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    *,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Spectral density of a symmetric A on a grid, by Lanczos quadrature with Gaussian bumps.

    Args:
        A: the operator.
        ncv: Lanczos steps.
        num_points: points of the grid.
        num_repeats: random starting vectors that the density is averaged over.
        kappa: a bump falls to 1/kappa half-way to where the next node would be, if ``ncv`` nodes
            were spread evenly; > 1.
        boundaries: (least, largest eigenvalue); None, or None for one, estimates it.
        margin: of the grid beyond the boundaries, relative to their distance.
        boundaries_tol: relative tolerance of estimated boundaries.
        seed: of the starting vectors; None takes fresh entropy.

    Returns:
        (eigenvalues, density), both (num_points,); :func:`hvpfast.spectral_density` keeps the nodes
        and weights that other grids and widths can be drawn from.

    Raises:
        ValueError: ``kappa`` <= 1, or ``ncv`` < 2.

    References:
        Papyan (2020), JMLR 21(252), algorithm 2.
    """
    low, high = _boundaries(A, boundaries, boundaries_tol, seed)
    nodes, weights = _nodes(A, ncv, num_repeats, seed)
    return _bumps(A, nodes, weights, (low, high), num_points, kappa, margin, ncv)


def lanczos_approximate_log_spectrum(
    A: Any,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 1.04,
    boundaries: Boundaries | None = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    epsilon: float = 1e-5,
    *,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Density of |A| + epsilon on a logarithmic grid; its bumps are Gaussian in the logarithm.

    Other arguments are those of :func:`lanczos_approximate_spectrum`; ``boundaries`` are the least
    and the largest magnitude of an eigenvalue, None takes the nodes' least and estimates the other.
    ``epsilon`` > 0 is added to magnitudes.

    Returns:
        (magnitudes, density per unit of magnitude), both (num_points,).

    References:
        Papyan (2020), JMLR 21(252), section C.7.
    """
    nodes, weights = _nodes(A, ncv, num_repeats, seed)
    low, high = (None, None) if boundaries is None else boundaries
    if high is None:
        high = max(map(abs, _boundaries(A, None, boundaries_tol, seed)))
    if low is None:
        low = float(nodes.abs().min())
    logs, ends = (nodes.abs() + epsilon).log(), (math.log(low + epsilon), math.log(high + epsilon))
    grid, density = _bumps(A, logs, weights, ends, num_points, kappa, margin, ncv)
    return grid.exp(), density / grid.exp()


def _nodes(A: Any, ncv: int, num_repeats: int, seed: int | None) -> tuple[Tensor, Tensor]:
    if ncv < 2:
        raise ValueError(f"ncv must be >= 2, as bumps are spread over ncv - 1 gaps; got {ncv}")
    result = spectral_density(A, ncv, num_repeats, distribution="normal", seed=seed)
    return result.ritz_values.reshape(-1), result.weights.reshape(-1) / num_repeats


def _boundaries(
    A: Any, given: Boundaries | None, tol: float, seed: int | None
) -> tuple[float, float]:
    low, high = (None, None) if given is None else given
    if low is None or high is None:
        ends = eigsh(A, k=2, which="BE", tol=tol, seed=seed).eigenvalues
        low = float(ends.min()) if low is None else low
        high = float(ends.max()) if high is None else high
    return low, high


def _bumps(
    A: Any,
    nodes: Tensor,
    weights: Tensor,
    ends: tuple[float, float],
    num_points: int,
    kappa: float,
    margin: float,
    ncv: int,
) -> tuple[Tensor, Tensor]:
    """Sum of Gaussians at nodes (n,), on [-1, 1] of width 2 / (ncv - 1) / sqrt(8 log kappa)."""
    if not kappa > 1:
        raise ValueError(f"kappa must be > 1; got {kappa!r}")
    padding = margin * (ends[1] - ends[0])
    low, high = ends[0] - padding, ends[1] + padding
    sigma = (high - low) / (ncv - 1) / math.sqrt(8 * math.log(kappa))
    grid = torch.linspace(low, high, num_points, dtype=torch.float64, device="cpu")
    offsets = (grid[:, None] - nodes) / sigma
    bumps = torch.exp(-offsets.square() / 2) / (sigma * math.sqrt(2 * math.pi))
    like = Products(A)
    return tuple(t.to(like.device, like.dtype) for t in (grid, bumps @ weights))  # type: ignore[return-value]
