"""PyHessian's class: ``hessian(model, criterion, data=..., dataloader=...)`` and its return forms.

What differs: eigenpairs come from block Lanczos, and a warning says if some do not converge; the
trace stops where its confidence interval is narrow, not where two running means agree; means over
batches are weighted exactly; the model's mode does not change, and no ``.grad`` is written.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hvpfast.analysis.density.quadrature import spectral_density
from hvpfast.analysis.eigen.solver import eigsh
from hvpfast.analysis.estimators.estimate import trace
from hvpfast.operators.hessian import HessianOperator

_FIRST_CHECK = 16  # samples before a tolerance is checked


class hessian:
    """Eigenvalues, trace and spectral density of the Hessian of ``criterion(model(x), y)``.

    A model in train mode is copied, and the copy put into eval mode, as PyHessian evaluates.

    Args:
        model: any module.
        criterion: the loss, called as ``criterion(outputs, targets)``.
        data: one batch (inputs, targets).
        dataloader: an iterable of batches; give exactly one of ``data`` and ``dataloader``.
        cuda: whether the model must be on a GPU; None allows both. Data are moved to the model.
        seed: of all random vectors; None takes fresh entropy for each call.
        **options: keyword arguments of :class:`hvpfast.HessianOperator`.

    Attributes:
        operator: the :class:`hvpfast.HessianOperator`.

    Raises:
        ValueError: not exactly one of ``data`` and ``dataloader``, or a model on another device.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any],
        data: Any = None,
        dataloader: Any = None,
        cuda: bool | None = None,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if (data is None) == (dataloader is None):
            raise ValueError("give data=(inputs, targets) or dataloader=, one of the two")
        device = next(model.parameters()).device.type
        if cuda is not None and cuda != (device == "cuda"):
            raise ValueError(
                f"cuda={cuda}, but the model is on {device}: move it with model.to(...), or leave "
                "cuda= out"
            )
        evaluated = copy.deepcopy(model).eval() if model.training else model
        given = tuple(data) if dataloader is None else dataloader
        self.operator = HessianOperator(evaluated, criterion, None, given, **options)
        self._seed = seed

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """The eigenvalues of largest magnitude, with eigenvectors.

        Args:
            maxIter: products per eigenvalue, at most.
            tol: residual norm relative to the eigenvalue.
            top_n: how many.

        Returns:
            (eigenvalues by decreasing magnitude, for each the list of tensors shaped like the
            parameters).

        Warns:
            RuntimeWarning: some did not converge.
        """
        budget = max(maxIter, 2) * top_n
        result = eigsh(self.operator, k=top_n, tol=tol, max_matvecs=budget, seed=self._seed)
        found = int(result.converged.sum())
        if found < top_n:
            warnings.warn(
                f"{found} of {top_n} eigenpairs converged to tol={tol:g} in {result.num_matvecs} "
                "products: raise maxIter",
                RuntimeWarning,
                stacklevel=2,
            )
        layout = self.operator.layout
        vectors = [layout.split(v.unsqueeze(0), stacked=False) for v in result.eigenvectors.T]
        return result.eigenvalues.tolist(), vectors

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Samples v'Hv with Rademacher v, whose mean estimates the trace.

        Args:
            maxIter: samples, at most.
            tol: half-width of the 95 % confidence interval, relative to the estimate, at which
                sampling stops, after 16 samples at the earliest; 0 takes ``maxIter`` samples.
        """
        count, limits = maxIter, dict[str, Any]()
        if tol > 0 and maxIter > _FIRST_CHECK:
            count, limits = _FIRST_CHECK, {"rtol": tol, "max_matvecs": maxIter}
        result = trace(self.operator, count, seed=self._seed, **limits)
        assert result.samples is not None
        return result.samples.tolist()

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Nodes and weights of stochastic Lanczos quadrature.

        Args:
            iter: Lanczos steps.
            n_v: random starting vectors.

        Returns:
            (eigenvalues, weights): for each starting vector a list of at most ``iter`` numbers;
            weights sum to one.
        """
        result = spectral_density(self.operator, iter, n_v, seed=self._seed)
        counts = result.num_nodes.tolist()
        rows = (
            [row[:count].tolist() for row, count in zip(table, counts, strict=True)]
            for table in (result.ritz_values, result.weights)
        )
        return next(rows), next(rows)
