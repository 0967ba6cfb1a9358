"""Linear operators A (P, P): products in several formats, sums, products, scalings and shifts.

``A @ V`` takes tangents as columns (P, K), as linear algebra writes them; ``_apply`` takes and
returns rows (K, P), so that each tangent is one contiguous vector.
"""

from __future__ import annotations

import functools
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from hvpfast.operators.tangents import Layout, matrix_rows

if TYPE_CHECKING:
    import scipy.sparse.linalg


class LinearOperator(ABC):
    """A linear operator on vectors of P parameters, known by its products.

    ``A @ v`` takes tangents as (P,), as columns (P, K), as a list of tensors shaped like the
    parameters (or each with a trailing K), or as a dict of them by name, and returns the same
    format. ``v @ A`` takes (P,) or rows (K, P). Operators and numbers combine with ``+ - * / @``.
    Products take no part in autograd: results are detached, even where tangents require gradients.

    A subclass defines ``_apply``, and ``_apply_adjoint`` where ``self_adjoint`` is False.
    """

    __array_ufunc__ = None  # NumPy leaves numpy_number * A to A

    def __init__(
        self, size: int, dtype: torch.dtype, device: torch.device, layout: Layout | None
    ) -> None:
        self._size, self._dtype, self._device, self._layout = size, dtype, device, layout

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self._size, self._size

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of tangents and products."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of tangents and products."""
        return self._device

    @property
    def layout(self) -> Layout:
        """Names and shapes of the parameters, in the order of a flat vector (P,).

        Raises:
            TypeError: operators of different parameters are combined.
        """
        if self._layout is None:
            raise TypeError("operators of different parameters are combined: give (P,) or (P, K)")
        return self._layout

    @property
    @abstractmethod
    def self_adjoint(self) -> bool:
        """Whether A = A'."""

    @abstractmethod
    def explain(self) -> str:
        """Text that says what runs and why."""

    def agreed(self, number: int) -> int:
        """The least of the numbers that the processes with a part of A have; all must call it."""
        return number

    @abstractmethod
    def _apply(self, rows: Tensor) -> Tensor:
        """New rows A t_k (K, P) for contiguous rows t_k (K, P)."""

    def _apply_adjoint(self, rows: Tensor) -> Tensor:
        """New rows A' t_k (K, P) for contiguous rows t_k (K, P)."""
        if not self.self_adjoint:
            raise NotImplementedError(f"{type(self).__name__} gives no adjoint product")
        return self._apply(rows)

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...
    @overload
    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    @overload
    def __matmul__(self, other: Sequence[Tensor]) -> list[Tensor]: ...

    def __matmul__(self, other: Any) -> Any:
        """``A @ v`` in the formats of the class; ``A @ B``, the product of two operators.

        Raises:
            TypeError: tangents of another dtype, device or kind.
            ValueError: tangents of another shape.
        """
        if isinstance(other, Tensor):
            rows = self._apply(matrix_rows(other, 0, self._size, self._dtype, self._device))
            return rows.T if other.dim() == 2 else rows.reshape(-1)
        if isinstance(other, LinearOperator):
            return _Product(self, other)
        if isinstance(other, Mapping):
            products = self._apply_tensors(self.layout.ordered(other))
            return dict(zip(self.layout.names, products, strict=True))
        if isinstance(other, (list, tuple)):
            return self._apply_tensors(other)
        return _refuse_array(other)

    def __rmatmul__(self, other: Any) -> Any:
        """``v @ A``, that is ``(A' v')'``, for v (P,) or rows (K, P)."""
        if not isinstance(other, Tensor):
            return _refuse_array(other)
        given = matrix_rows(other, 1, self._size, self._dtype, self._device)
        rows = self._apply_adjoint(given)
        return rows if other.dim() == 2 else rows.reshape(-1)

    def _apply_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``A @ v`` for tensors shaped like the parameters, or each with a trailing K."""
        rows, stacked = self.layout.rows_of(tensors)
        rows = matrix_rows(rows, 1, self._size, self._dtype, self._device)
        return self.layout.split(self._apply(rows), stacked)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return _Sum(self, other) if isinstance(other, LinearOperator) else _refuse_number(other)

    def __radd__(self, other: Any) -> Any:
        return _refuse_number(other)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return _Sum(self, -other) if isinstance(other, LinearOperator) else _refuse_number(other)

    __rsub__ = __radd__

    def __neg__(self) -> LinearOperator:
        return Affine(self, -1.0, 0.0)

    def __mul__(self, number: float | Tensor) -> LinearOperator:
        return Affine(self, float(number), 0.0) if _is_number(number) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, number: float | Tensor) -> LinearOperator:
        return Affine(self, 1.0 / float(number), 0.0) if _is_number(number) else NotImplemented

    def shift(self, number: float | Tensor) -> LinearOperator:
        """``A + c I`` for a real number c, for instance a damping."""
        if not _is_number(number):
            raise TypeError(f"shift needs a real number; got {type(number).__name__}")
        return Affine(self, 1.0, float(number))

    def adjoint(self) -> LinearOperator:
        """``A'``: the operator itself where it is self-adjoint."""
        return self if self.self_adjoint else _Adjoint(self)

    @property
    def T(self) -> LinearOperator:
        """``A'``, as :meth:`adjoint`."""
        return self.adjoint()

    def __repr__(self) -> str:
        kind = type(self).__name__.lstrip("_")
        return f"<{self._size}x{self._size} {kind}, {self._dtype} on {self._device}>"

    def to_scipy(self, dtype: Any = None) -> scipy.sparse.linalg.LinearOperator:
        """This operator for SciPy, with ``matvec``, ``matmat`` (columns) and their adjoints.

        NumPy arrays go in and come out; products are computed in the operator's dtype.

        Args:
            dtype: NumPy dtype that the SciPy operator declares and returns; the operator's own
                if None (float32 for bfloat16, which NumPy does not have).
        """
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        portable = torch.float32 if self._dtype == torch.bfloat16 else self._dtype
        declared = np.dtype(str(portable).removeprefix("torch.") if dtype is None else dtype)

        def product(
            apply: Callable[[Tensor], Tensor], columns: np.ndarray[Any, Any]
        ) -> np.ndarray[Any, Any]:
            if np.iscomplexobj(columns):
                raise TypeError("the operator is real; got complex vectors: use .real and .imag")
            given = np.array(columns.reshape(self._size, -1).T, order="C")  # a copy: writable
            rows = apply(torch.from_numpy(given).to(self._device, self._dtype))
            out: np.ndarray[Any, Any] = rows.to("cpu", portable).numpy().T.reshape(columns.shape)
            return np.asarray(out, declared)

        forward = functools.partial(product, self._apply)
        backward = functools.partial(product, self._apply_adjoint)
        return ScipyOperator(
            self.shape,
            matvec=forward,
            matmat=forward,
            rmatvec=backward,
            rmatmat=backward,
            dtype=declared,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (
        isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex()
    )


def _refuse_number(other: Any) -> Any:
    if _is_number(other):
        raise TypeError("a number cannot be added to an operator; use A.shift(c) for A + c I")
    return NotImplemented


def _refuse_array(other: Any) -> Any:
    if isinstance(other, np.ndarray):
        raise TypeError(
            "tangents must be tensors; got a NumPy array: use torch.from_numpy, or A.to_scipy()"
        )
    return NotImplemented


class _Combined(LinearOperator):
    """A combination of operators of one size, dtype and device.

    It has the layout of the operands where they agree in it, and none otherwise. ``_formula`` is
    the combination as text, with A, B for its operands.
    """

    _formula: str

    def __init__(self, *operands: LinearOperator) -> None:
        first = operands[0]
        for other in operands[1:]:
            if (other.shape, other.dtype, other.device) != (first.shape, first.dtype, first.device):
                raise ValueError(
                    f"operators must agree in shape, dtype and device; got {first!r} and {other!r}"
                )
        same = all(other._layout == first._layout for other in operands[1:])
        super().__init__(first.shape[0], first.dtype, first.device, first._layout if same else None)
        self._operands = operands

    def agreed(self, number: int) -> int:
        return functools.reduce(lambda least, each: each.agreed(least), self._operands, number)

    @property
    def self_adjoint(self) -> bool:
        return all(operand.self_adjoint for operand in self._operands)

    def explain(self) -> str:
        lines = [f"{self._formula}, where"]
        for name, operand in zip("AB", self._operands, strict=False):
            lines += [f"{name} = " + operand.explain().replace("\n", "\n    ")]
        return "\n".join(lines)


class _Sum(_Combined):
    _formula = "A + B"

    def _apply(self, rows: Tensor) -> Tensor:
        return self._operands[0]._apply(rows).add_(self._operands[1]._apply(rows))

    def _apply_adjoint(self, rows: Tensor) -> Tensor:
        return self._operands[0]._apply_adjoint(rows).add_(self._operands[1]._apply_adjoint(rows))


class Affine(_Combined):
    """c A + s I."""

    def __init__(self, operand: LinearOperator, factor: float, shift: float) -> None:
        super().__init__(operand)
        self.operand, self._factor, self._shift = operand, factor, shift
        scaled = "A" if factor == 1 else f"{factor:g} A"
        self._formula = f"{scaled} + {shift:g} I" if shift else scaled

    def _finish(self, out: Tensor, rows: Tensor) -> Tensor:
        if self._factor != 1:
            out = out.mul_(self._factor)
        return out.add_(rows, alpha=self._shift) if self._shift else out

    def _apply(self, rows: Tensor) -> Tensor:
        return self._finish(self._operands[0]._apply(rows), rows)

    def _apply_adjoint(self, rows: Tensor) -> Tensor:
        return self._finish(self._operands[0]._apply_adjoint(rows), rows)


class _Product(_Combined):
    _formula = "A B"
    self_adjoint = False  # of self-adjoint operands too, unless they commute

    def _apply(self, rows: Tensor) -> Tensor:
        return self._operands[0]._apply(self._operands[1]._apply(rows).contiguous())

    def _apply_adjoint(self, rows: Tensor) -> Tensor:
        return self._operands[1]._apply_adjoint(self._operands[0]._apply_adjoint(rows).contiguous())


class _Adjoint(_Combined):
    _formula = "A'"

    def _apply(self, rows: Tensor) -> Tensor:
        return self._operands[0]._apply_adjoint(rows)

    def _apply_adjoint(self, rows: Tensor) -> Tensor:
        return self._operands[0]._apply(rows)

    def adjoint(self) -> LinearOperator:
        return self._operands[0]
