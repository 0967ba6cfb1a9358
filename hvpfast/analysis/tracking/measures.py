"""The quantities of one line of a curvature log, from as few products as they need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvpfast.analysis.eigen.solver import eigsh
from hvpfast.analysis.estimators.estimate import estimate_all, trace
from hvpfast.operators.hessian import GGNOperator, HessianOperator
from hvpfast.operators.matvecs import Products

_ESTIMATED = ("trace", "frobenius_sq", "diagonal_norm")
_EIGEN = ("top_eigenvalues", "sharpness")
_ALONG = ("gradient_curvature", "update_curvature")
QUANTITIES = ("loss", "gradient_norm", *_ESTIMATED, *_EIGEN, *_ALONG)


@dataclass
class Measurement:
    """Measures chosen quantities of an operator; keeps eigenvectors as starts of the next search.

    Attributes:
        vectors: the eigenvectors of the last search (P, k), or None.
    """

    quantities: tuple[str, ...]
    num_matvecs: int
    num_eigenvalues: int
    tol: float
    max_matvecs: int
    vectors: Tensor | None = None

    def __call__(
        self, A: HessianOperator | GGNOperator, update: Tensor | None, seed: int
    ) -> dict[str, Any]:
        """The values by name, with ``num_matvecs``; in the order of ``QUANTITIES``."""
        wanted = self.quantities
        found: dict[str, Any] = {"num_matvecs": 0}
        if "loss" in wanted:
            found["loss"] = float(A.loss)
        gradient = A.gradient() if {"gradient_norm", "gradient_curvature"} & set(wanted) else None
        if "gradient_norm" in wanted and gradient is not None:
            found["gradient_norm"] = float(gradient.double().norm())
        if set(_ESTIMATED) & set(wanted):
            self._estimate(A, seed, found)
        if set(_EIGEN) & set(wanted):
            self._search(A, seed, found)
        directions = {"gradient_curvature": gradient, "update_curvature": update}
        along = {name: v for name, v in directions.items() if name in wanted}
        self._curvatures(A, along, found)
        return found

    def nothing(self, error: str) -> dict[str, Any]:
        """Nulls for all quantities, with the error."""
        return {"num_matvecs": 0, **dict.fromkeys(self.quantities), "error": error}

    def _estimate(self, A: Any, seed: int, found: dict[str, Any]) -> None:
        if not {"frobenius_sq", "diagonal_norm"} & set(self.quantities):
            result = trace(A, self.num_matvecs, seed=seed)  # v'Av alone, at half the price
            found["trace"], found["trace_stderr"] = float(result), float(result.stderr)
            found["num_matvecs"] += result.num_matvecs
            return
        joint = estimate_all(A, self.num_matvecs, seed=seed)
        found["num_matvecs"] += joint.trace.num_matvecs
        for name in ("trace", "frobenius_sq"):
            if name in self.quantities:
                value = getattr(joint, name)
                found[name], found[f"{name}_stderr"] = float(value), float(value.stderr)
        if "diagonal_norm" in self.quantities:
            d, s = joint.diagonal.estimate.double(), joint.diagonal.stderr.double()
            # E d_i^2 = A_ii^2 + s_i^2
            norm = math.sqrt(max(0.0, float((d.square() - s.square()).sum())))
            found["diagonal_norm"] = norm
            spread = float((d * s).norm())
            found["diagonal_norm_stderr"] = spread / norm if norm > 0 else math.nan

    def _search(self, A: Any, seed: int, found: dict[str, Any]) -> None:
        count = self.num_eigenvalues if "top_eigenvalues" in self.quantities else 1
        limits: dict[str, Any] = {"tol": self.tol, "max_matvecs": self.max_matvecs}
        result = eigsh(A, count, "LA", V0=self.vectors, seed=seed, **limits)
        self.vectors = result.eigenvectors
        found["num_matvecs"] += result.num_matvecs
        values, residuals = result.eigenvalues.tolist(), result.residual_norms.tolist()
        if "top_eigenvalues" in self.quantities:
            found["top_eigenvalues"], found["top_residuals"] = values, residuals
        if "sharpness" in self.quantities:
            found["sharpness"] = values[0] if values else None

    def _curvatures(self, A: Any, along: dict[str, Tensor | None], found: dict[str, Any]) -> None:
        """Rayleigh quotients v'Av / v'v; None where there is no direction."""
        found |= dict.fromkeys(along)
        given = {
            name: v.double()
            for name, v in along.items()
            if v is not None and bool(v.any()) and bool(torch.isfinite(v).all())
        }
        if not given:
            return
        units = torch.stack([v / v.norm() for v in given.values()])
        products = Products(A)
        values = products.quadratic(units).tolist()
        found |= dict(zip(given, values, strict=True))
        found["num_matvecs"] += products.num_matvecs
