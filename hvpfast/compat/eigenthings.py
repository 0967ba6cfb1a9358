"""The names of hessian-eigenthings: 1.0's operators and algorithms, and 0.x's one function.

    op = HessianOperator(model, dataloader, supervised_loss(nn.CrossEntropyLoss()))
    result = lanczos(op, k=10)             result.eigenvectors (k, n): as rows, unlike hvpfast.eigsh

A loss made by :func:`supervised_loss` keeps the fast backends for perceptrons; any other
``loss_fn(model, batch)`` runs on the reference backend. What differs: batches are weighted by their
numbers of targets, so a smaller last batch is exact; Lanczos restarts and is orthogonalised in
full; the Gauss-Newton product is exact; ``seed=None`` is fresh entropy.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvpfast.analysis.density import quadrature
from hvpfast.analysis.eigen.solver import eigsh
from hvpfast.analysis.estimators import estimate
from hvpfast.analysis.estimators.result import Estimate
from hvpfast.operators import hessian

ParamFilter = Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class supervised_loss:
    """``loss_fn(model, (x, y)) = criterion(model(x), y)``."""

    criterion: Callable[..., Any]

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """The loss of a batch (x, y)."""
        x, y = batch
        return self.criterion(model(x), y)


def supervised_forward(model: nn.Module, batch: Any) -> Any:
    """``model(x)`` for a batch (x, y)."""
    return model(batch[0])


@dataclass(frozen=True)
class supervised_loss_of_output:
    """``loss_of_output_fn(output, (x, y)) = criterion(output, y)``."""

    criterion: Callable[..., Any]

    def __call__(self, output: Any, batch: Any) -> Any:
        """The loss of the outputs for a batch (x, y)."""
        return self.criterion(output, batch[1])


def match_names(*patterns: str) -> ParamFilter:
    """A ``param_filter`` for parameters whose names match a glob pattern."""
    return lambda name, _: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class _Applied(nn.Module):
    """A model as a function of whole batches."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)


class _Named(hessian.CurvatureOperator):
    """hessian-eigenthings' ``size`` and ``matvec``."""

    @property
    def size(self) -> int:
        """P."""
        return self.shape[0]

    def matvec(self, v: Tensor) -> Tensor:
        """``A @ v``, (P,)."""
        return self @ v


class HessianOperator(_Named, hessian.HessianOperator):
    """The Hessian of ``loss_fn(model, batch)`` over a data loader.

    Args:
        model: any module.
        dataloader: an iterable of batches.
        loss_fn: called as ``loss_fn(model, batch)``, the mean loss of the batch.
        param_filter: called as ``param_filter(name, parameter)``; whether to include it. None
            includes all that require gradients.
        num_batches: how many batches to read; None for all. They are held in memory, and so are
            all batches of a loss not made by :func:`supervised_loss`.
        **options: keyword arguments of :class:`hvpfast.HessianOperator`.

    Raises:
        ValueError: ``param_filter`` takes no parameter.
        Exception: as :class:`hvpfast.HessianOperator`.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        loss_fn: Callable[[nn.Module, Any], Any],
        *,
        param_filter: ParamFilter | None = None,
        num_batches: int | None = None,
        **options: Any,
    ) -> None:
        data, params = _read(dataloader, num_batches), _chosen(model, param_filter)
        if isinstance(loss_fn, supervised_loss):
            super().__init__(model, loss_fn.criterion, params, data, **options)
            return
        pairs = [(batch, ()) for batch in data]
        options.setdefault("reduction", "mean")
        super().__init__(_Applied(model, loss_fn), _first, params, pairs, **options)


class GGNOperator(_Named, hessian.GGNOperator):
    """The Gauss-Newton matrix of ``loss_of_output_fn(forward_fn(model, batch), batch)``.

    Other arguments and errors are those of :class:`HessianOperator`. The pair
    :func:`supervised_forward`, :func:`supervised_loss_of_output` keeps the fast backends.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        forward_fn: Callable[[nn.Module, Any], Any],
        loss_of_output_fn: Callable[[Any, Any], Any],
        *,
        param_filter: ParamFilter | None = None,
        num_batches: int | None = None,
        **options: Any,
    ) -> None:
        data, params = _read(dataloader, num_batches), _chosen(model, param_filter)
        of_output = loss_of_output_fn
        if isinstance(of_output, supervised_loss_of_output) and forward_fn is supervised_forward:
            super().__init__(model, of_output.criterion, params, data, **options)
            return
        pairs = [(batch, batch) for batch in data]
        options.setdefault("reduction", "mean")
        super().__init__(_Applied(model, forward_fn), of_output, params, pairs, **options)


def _first(outputs: Any, _: Any) -> Any:
    return outputs


def _read(dataloader: Iterable[Any], num_batches: int | None) -> Any:
    return dataloader if num_batches is None else list(itertools.islice(dataloader, num_batches))


def _chosen(model: nn.Module, param_filter: ParamFilter | None) -> list[nn.Parameter]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = [p for name, p in named if param_filter is None or param_filter(name, p)]
    if not chosen:
        raise ValueError(
            "param_filter takes no parameter; there are " + ", ".join(name for name, _ in named)
        )
    return chosen


@dataclass(frozen=True, eq=False)
class EigenResult:
    """Eigenpairs: eigenvalues (k,), eigenvectors (k, n) as rows, residuals (k,), converged (k,)."""

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    iterations: int
    converged: Tensor


def lanczos(
    operator: Any,
    *,
    k: int = 10,
    max_iter: int | None = None,
    tol: float = 1e-4,
    which: str = "LM",
    seed: int | None = None,
) -> EigenResult:
    """k eigenpairs by :func:`hvpfast.eigsh`.

    Args:
        operator: symmetric, with ``.shape`` and ``@``.
        k: number of pairs.
        max_iter: products to spend at most; None is eigsh's own budget.
        tol: residual norm relative to the eigenvalue.
        which: ``"LM"``, ``"LA"`` or ``"SA"``.
        seed: of the start vector.
    """
    result = eigsh(operator, k=k, which=which, tol=tol, max_matvecs=max_iter, seed=seed)
    vectors = result.eigenvectors.T.contiguous()
    values, residuals = (t.to(vectors) for t in (result.eigenvalues, result.residual_norms))
    return EigenResult(values, vectors, residuals, result.num_matvecs, result.converged)


def trace(
    operator: Any,
    *,
    num_matvecs: int = 100,
    method: str = "hutch++",
    distribution: str = "rademacher",
    seed: int | None = None,
) -> Estimate[float]:
    """Tr(A) by :func:`hvpfast.trace`, with ``.estimate``, ``.stderr`` and ``.samples``."""
    options: dict[str, Any] = {"method": method, "distribution": distribution, "seed": seed}
    return estimate.trace(operator, num_matvecs, **options)


@dataclass(frozen=True, eq=False)
class SpectralDensityResult:
    """A density (G,) on a grid (G,); nodes and weights (num_runs, m), NaN and 0 beyond a run's.

    Tensors are float64, on the CPU.
    """

    grid: Tensor
    density: Tensor
    raw_eigenvalues: Tensor
    raw_weights: Tensor
    sigma: float


def spectral_density(
    operator: Any,
    *,
    num_runs: int = 10,
    lanczos_steps: int = 80,
    num_grid_points: int = 10000,
    sigma: float | None = None,
    grid_padding: float = 0.1,
    seed: int | None = None,
) -> SpectralDensityResult:
    """The density of eigenvalues by :func:`hvpfast.spectral_density`, smoothed by Gaussians.

    Args:
        operator: symmetric, with ``.shape`` and ``@``.
        num_runs: random starting vectors.
        lanczos_steps: steps from each.
        num_grid_points: G.
        sigma: width of the Gaussians; None is the spread of the nodes over ``lanczos_steps``.
        grid_padding: of the grid beyond the nodes, relative to their spread.
        seed: of the starting vectors; None takes fresh entropy.
    """
    result = quadrature.spectral_density(operator, lanczos_steps, num_runs, seed=seed)
    nodes, weights = result.ritz_values, result.weights
    low, high = float(nodes.min()), float(nodes.max())
    spread = max(high - low, 1e-9)
    width = spread / lanczos_steps if sigma is None else sigma
    padding = grid_padding * spread
    grid = torch.linspace(
        low - padding, high + padding, num_grid_points, dtype=torch.float64, device="cpu"
    )
    density = torch.zeros_like(grid)
    for theta, weight in zip(nodes, weights, strict=True):
        bumps = torch.exp(-((grid[:, None] - theta) / width).square() / 2)
        density += bumps @ weight / (num_runs * width * math.sqrt(2 * math.pi))
    beyond = torch.arange(nodes.shape[1], device="cpu") >= result.num_nodes[:, None]
    return SpectralDensityResult(
        grid=grid,
        density=density,
        raw_eigenvalues=nodes.masked_fill(beyond, torch.nan),
        raw_weights=weights,
        sigma=width,
    )


def compute_hessian_eigenthings(
    model: nn.Module,
    dataloader: Iterable[Any],
    loss: Callable[..., Any],
    num_eigenthings: int = 10,
    *,
    tol: float = 1e-4,
    max_matvecs: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """0.x's function: eigenvalues (k,) by decreasing magnitude, eigenvectors (k, n) as rows.

    Over all batches of the loader, with products of the whole data set. ``mode``, ``use_gpu`` and
    the settings of power iteration have no counterpart: the model's device is used, by Lanczos.

    Args:
        model: any module.
        dataloader: an iterable of batches (x, y).
        loss: called as ``loss(outputs, y)``.
        num_eigenthings: k.
        tol: residual norm relative to the eigenvalue.
        max_matvecs: products to spend at most.
        seed: of the start vector.
        **options: keyword arguments of :class:`hvpfast.HessianOperator`.

    Returns:
        NumPy arrays.
    """
    H = hessian.HessianOperator(model, loss, None, dataloader, **options)
    result = lanczos(H, k=num_eigenthings, max_iter=max_matvecs, tol=tol, seed=seed)
    return result.eigenvalues.cpu().numpy(), result.eigenvectors.cpu().numpy()
