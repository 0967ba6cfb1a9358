"""The Hessians of many models as one operator (M, P, P)."""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.functional.linearization import Linearization
from hvpfast.functional.many_models import ModelsLinearization
from hvpfast.mlp.checks import check_curvature


class ModelsOperator:
    """The Hessians, or Gauss-Newton matrices, of M models as one operator (M, P, P).

    ``A @ V`` takes V (M, P), or columns (M, P, K), and multiplies each model's part by its own
    matrix. ``hvpfast.trace``, ``frobenius_sq``, ``frobenius_norm``, ``diagonal``, ``row_norms_sq``
    and ``estimate_all`` take it with ``method="hutchinson"``: results have M in front.

    Args:
        lin: from :func:`hvpfast.linearize` with parameters (M, P); ``order=2`` is enough.
        curvature: ``"hessian"`` or ``"ggn"``.

    Raises:
        TypeError: ``lin`` is not of many models.
        ValueError: no such curvature.
    """

    __array_ufunc__ = None  # NumPy leaves numpy_array @ A to A, which refuses it

    def __init__(self, lin: Linearization, curvature: str = "hessian") -> None:
        self._ggn = check_curvature(curvature)
        if not isinstance(lin, ModelsLinearization):
            raise TypeError(
                "ModelsOperator takes what linearize returns for parameters (M, P); got "
                f"{type(lin).__name__}. For one model use HessianOperator or GGNOperator"
            )
        self._lin = lin

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, P, P)."""
        return self._lin.num_models, self._lin.num_params, self._lin.num_params

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of tangents and products."""
        return self._lin.dtype

    @property
    def device(self) -> torch.device:
        """Device of tangents and products."""
        return self._lin.device

    @property
    def backend(self) -> str:
        """Name of the backend that runs."""
        return self._lin.backend

    def __matmul__(self, tangents: Tensor) -> Tensor:
        """``A @ V``, shaped as V.

        Raises:
            TypeError: tangents of another kind, dtype or device.
            ValueError: tangents of another shape.
            RuntimeError: the point was changed in place after linearize.
        """
        return self._lin.product(tangents, self._ggn)

    def quadratic_form(self, tangents: Tensor) -> Tensor:
        """``v' A v`` without forming ``A v``: (M,) for (M, P), (M, K) for (M, P, K)."""
        return self._lin.quadratic(tangents, self._ggn)

    def product_rows(self, rows: Tensor) -> Tensor:
        """Rows A t_mk for contiguous rows (M, K, P)."""
        return self._lin.product_rows(rows, self._ggn)

    def quadratic_rows(self, rows: Tensor) -> Tensor:
        """t_mk' A t_mk, (M, K), for contiguous rows (M, K, P)."""
        return self._lin.quadratic_rows(rows, self._ggn)

    def explain(self) -> str:
        """Text: what runs where and why."""
        kind = "generalised Gauss-Newton matrices" if self._ggn else "Hessians"
        return f"{kind} of {self._lin.explain()}"

    def __repr__(self) -> str:
        M, P, _ = self.shape
        return f"<ModelsOperator, {M} models of {P}x{P}, {self.dtype} on {self.device}>"
