"""Curvature backends for laplace-torch: ``Laplace(..., backend=HvpfastGGN)``.

Full and diagonal structure, Hessian and generalised Gauss-Newton matrix, for all weights, the last
layer or a subnetwork. The diagonal of a multilayer perceptron comes from per-sample cores, without
Jacobians. Kronecker factors are not offered: ``kron`` raises NotImplementedError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hvpfast.analysis.estimators.estimate import diagonal
from hvpfast.operators.hessian import CurvatureOperator, GGNOperator, HessianOperator

try:
    from laplace.curvature import CurvatureInterface, GGNInterface
except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError
    raise ImportError(
        "hvpfast.compat.laplace needs laplace-torch, and the torchvision that fits your torch (pip "
        f"install laplace-torch torch=={torch.__version__}); importing it failed: {error}"
    ) from error

_COLUMNS = 2**24  # entries of identity columns that are multiplied at once


class _Backend:
    """``full`` and ``diag`` of one batch; the operator comes from ``_operator``."""

    _kind: type[CurvatureOperator]
    # set by laplace's interfaces
    model: Any
    lossfunc: Any
    factor: float
    last_layer: bool
    params: list[nn.Parameter]
    subnetwork_indices: Tensor | None

    def _operator(self, x: Any, y: Tensor) -> CurvatureOperator:
        """The curvature of one batch for the parameters that require gradients."""
        model, inputs = self.model, x
        if self.last_layer:
            with torch.no_grad():
                _, inputs = model.forward_with_features(x)
            model = nn.Sequential(_without_hooks(model.last_layer))
        return self._kind(model, self.lossfunc, self.params, (inputs, y), check_deterministic=False)

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss, 0-dim, and the curvature (P, P), or (S, S) for S subnetwork indices."""
        A = self._operator(x, y)
        indices = self._indices(A)
        rows = max(1, _COLUMNS // A.shape[0])
        columns = []
        for part in torch.split(indices, rows):
            unit = torch.zeros(A.shape[0], len(part), dtype=A.dtype, device=A.device)
            unit[part, torch.arange(len(part), device=A.device)] = 1
            columns.append((A @ unit)[indices])
        return self.factor * A.loss, self.factor * torch.cat(columns, dim=1)

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss, 0-dim, and the diagonal (P,), or (S,) for S subnetwork indices."""
        A = self._operator(x, y)
        exact: Tensor = diagonal(A, method="exact").estimate
        return self.factor * A.loss, self.factor * exact[self._indices(A)]

    def _indices(self, A: CurvatureOperator) -> Tensor:
        if self.subnetwork_indices is None:
            return torch.arange(A.shape[0], device=A.device)
        return self.subnetwork_indices.to(A.device)


def _without_hooks(layer: nn.Module) -> nn.Module:
    """A linear layer with the same parameters: laplace's own has a hook that keeps its inputs."""
    if type(layer) is not nn.Linear:
        return layer
    size: dict[str, Any] = {"in_features": layer.in_features, "out_features": layer.out_features}
    bare = nn.Linear(**size, bias=layer.bias is not None, device="meta")
    bare.weight, bare.bias = layer.weight, layer.bias
    return bare


class HvpfastHessian(_Backend, CurvatureInterface):  # type: ignore[misc]
    """The Hessian, as a backend of laplace-torch; arguments of ``CurvatureInterface``."""

    _kind = HessianOperator


class HvpfastGGN(_Backend, GGNInterface):  # type: ignore[misc]
    """The generalised Gauss-Newton matrix, as a backend; arguments of ``GGNInterface``.

    Raises:
        NotImplementedError: ``stochastic=True``.
    """

    _kind = GGNOperator

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.stochastic:
            raise NotImplementedError("stochastic=True is not offered; the exact matrix is")
