"""Products of a symmetric operator A (P, P) with rows, counted and checked, for algorithms.

A is anything with ``.shape`` and ``@`` on columns: operators of this library, a torch tensor, a
curvlinops operator, a NumPy array, a SciPy LinearOperator.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.operators.base import LinearOperator
from hvpfast.utils.memory import WORK_SHARE, available_bytes, bytes_text

_SMALL = 2**26  # bytes for which free memory is not checked


class NonFiniteProductError(FloatingPointError):
    """A product with the operator holds NaN or infinity."""


def all_finite(products: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    # a sum is finite unless an entry is not, or it overflows: only then every entry is checked
    return math.isfinite(float(products.sum())) or bool(torch.isfinite(products).all())


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for anything else: the dtype of sums, bases and projections."""
    return torch.promote_types(dtype, torch.float32)


class Products:
    """Products with a symmetric operator: rows in, rows out, as torch tensors.

    Args:
        operator: has ``.shape == (P, P)`` and ``@`` with columns (P, K), of torch or of NumPy.

    Attributes:
        operator: A as given.
        size: P.
        dtype, device: of the rows; float64 on the CPU where the operator has none.
        num_matvecs: products with one vector so far; a quadratic form counts as one.

    Raises:
        TypeError: no ``.shape`` or no ``@``, or a dtype that is not real floating point.
        ValueError: not square.
    """

    def __init__(self, operator: Any) -> None:
        shape = getattr(operator, "shape", None)
        if shape is None or not hasattr(operator, "__matmul__"):
            raise TypeError(
                "the operator needs .shape and @, as those of this library, of torch and of SciPy "
                f"have; got {type(operator).__name__}"
            )
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
            raise ValueError(f"the operator must be square (P, P); got {tuple(shape)}")
        self.operator, self.size, self.num_matvecs = operator, int(shape[0]), 0
        dtype = getattr(operator, "dtype", None)
        self._numpy = not isinstance(dtype, torch.dtype) and (
            dtype is not None or hasattr(operator, "matvec")
        )
        if self._numpy:
            dtype = torch.from_numpy(np.empty(0, dtype or np.float64)).dtype
        self.dtype: torch.dtype = dtype or torch.float64
        if not self.dtype.is_floating_point:
            raise TypeError(f"the operator must be real floating point; got {self.dtype}")
        self.device = torch.device("cpu" if self._numpy else getattr(operator, "device", "cpu"))

    def rows(self, rows: Tensor) -> Tensor:
        """A v_k (K, P), of ``self.dtype``, for rows v_k (K, P) of any floating-point dtype.

        Raises:
            NonFiniteProductError: a product holds NaN or infinity.
        """
        if rows.dtype != self.dtype or rows.device != self.device:
            rows = rows.to(self.device, self.dtype)
        if self._numpy:
            product = torch.from_numpy(np.ascontiguousarray(self.operator @ rows.T.numpy()))
        else:
            product = self.operator @ rows.T
        out: Tensor = product.detach().to(self.device, self.dtype).T
        return self._checked(out)

    def quadratic(self, rows: Tensor) -> Tensor:
        """v_k' A v_k (K,) for rows v_k (K, P), at half the work for operators that offer it.

        Raises:
            NonFiniteProductError: a value is NaN or infinite.
        """
        form = getattr(self.operator, "quadratic_form", None)
        if form is None:
            forms: Tensor = torch.linalg.vecdot(rows.to(self.device, self.dtype), self.rows(rows))
            return forms
        return self._checked(form(rows.to(self.device, self.dtype).T))

    def _checked(self, out: Tensor) -> Tensor:
        first, self.num_matvecs = self.num_matvecs, self.num_matvecs + out.shape[0]
        if not all_finite(out):
            wrong = ~torch.isfinite(out)
            index = wrong.nonzero()[0].tolist()
            where = f", at entry {index[1]} of {self.size}" if out.dim() == 2 else ""
            raise NonFiniteProductError(
                f"product {first + index[0]} with the operator holds NaN or infinity{where} "
                f"({int(wrong.sum())} entries in {out.shape[0]} products): look at the parameters "
                "and the data of the operator"
            )
        return out

    def agreed(self, number: int) -> int:
        """The least of the numbers of all processes with a part of the operator."""
        operator = self.operator
        return operator.agreed(number) if isinstance(operator, LinearOperator) else number

    def chunk(self, copies: int = 4) -> int:
        """Number of rows to process at once, when ``copies`` arrays of them are in memory."""
        share = WORK_SHARE * self.agreed(available_bytes(self.device, max_age=1.0))
        return max(1, int(share / (copies * self.size * self.dtype.itemsize)))

    def check_room(self, count: int, copies: int, what: str) -> None:
        """Raise MemoryError if ``copies`` arrays of ``count`` rows do not fit into memory."""
        size = count * copies * self.size * self.dtype.itemsize
        if size <= _SMALL:
            return
        free = self.agreed(available_bytes(self.device))
        if size > free:
            fits = free // (copies * self.size * self.dtype.itemsize)
            raise MemoryError(
                f"{what}: {count} vectors of {self.size:,} {self.dtype} entries, {copies} times, "
                f"take {bytes_text(size)}, and {bytes_text(free)} are available; {fits} fit"
            )

    def check_symmetric(self, seed: int = 0) -> None:
        """Raise ValueError if u'(Av) and v'(Au) differ for two random vectors u, v.

        Costs two products, and none for operators that are known to be self-adjoint. Up to
        rounding an asymmetric A passes with probability zero: the difference is u'(A - A')v.
        """
        if getattr(self.operator, "self_adjoint", False):
            return
        u, v = probe_rows(ProbeSource(2, "normal", seed), self.size, self.dtype, self.device)
        products = self.rows(torch.stack((u, v))).double()
        left, right = float(u.double() @ products[1]), float(v.double() @ products[0])
        scale = float(products.norm(dim=1).max()) * float(torch.stack((u, v)).norm(dim=1).max())
        bound = 100 * torch.finfo(self.dtype).eps * scale
        if abs(left - right) > bound:
            raise ValueError(
                f"the operator is not symmetric: u'(Av) = {left:.6g} and v'(Au) = {right:.6g} for "
                f"random u, v (rounding explains {bound:.1g}). Use (A + A.T) / 2, or an operator "
                "that is symmetric"
            )
