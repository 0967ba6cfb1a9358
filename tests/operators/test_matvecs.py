"""Products with any operator: counted, checked for NaN, symmetric or refused, within memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from dense import tangents
from networks import small
from torch import Tensor

import hvpfast as hf
import hvpfast.operators.matvecs
from hvpfast.operators.base import LinearOperator
from hvpfast.operators.matvecs import NonFiniteProductError, Products


def symmetric(size: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    A = tangents(size, size, seed=4)
    return (A + A.T).to(dtype)


class Foreign:
    """What a peer's operator looks like: a shape, a dtype, @ on columns."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.shape, self.dtype, self.device = A, A.shape, A.dtype, A.device

    def __matmul__(self, columns: Tensor) -> Tensor:
        assert columns.dtype == self.dtype
        return self.A @ columns


KINDS = {
    "torch": lambda A: A,
    "numpy": lambda A: A.numpy(),
    "scipy": lambda A: scipy.sparse.linalg.aslinearoperator(A.numpy()),
    "scipy sparse": lambda A: scipy.sparse.csr_matrix(A.numpy()),
    "foreign": Foreign,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_any_operator(kind: str, dtype: torch.dtype) -> None:
    A = symmetric(dtype=dtype)
    products = Products(KINDS[kind](A))
    assert (products.size, products.dtype, products.device.type) == (9, dtype, "cpu")
    for K in (1, 4):
        rows = tangents(9, K).T.contiguous().to(dtype)
        tolerance = 50 * torch.finfo(dtype).eps
        torch.testing.assert_close(products.rows(rows), rows @ A, rtol=0, atol=tolerance)
        forms = products.quadratic(rows)
        torch.testing.assert_close(forms, (rows @ A * rows).sum(1), rtol=0, atol=9 * tolerance)
    assert products.num_matvecs == 10, "a quadratic form counts as one"


def test_an_operator_of_the_library_takes_its_quadratic_form() -> None:
    H = hf.HessianOperator(*small()[:2], None, small()[2])
    products, rows = Products(H), tangents(H.shape[0], 3).T.contiguous()
    calls = []
    H._apply = lambda rows: calls.append(rows)  # type: ignore[assignment, func-returns-value]
    forms = products.quadratic(rows)
    assert calls == [], "no product is formed"
    torch.testing.assert_close(forms, H.quadratic_form(rows.T))
    assert products.num_matvecs == 3


def test_rows_are_converted_to_the_operators_dtype() -> None:
    A = symmetric(dtype=torch.float32)
    rows = tangents(9, 2).T
    out = Products(A).rows(rows)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, rows.float() @ A)
    assert Products(A.bfloat16()).rows(rows).dtype == torch.bfloat16


def test_products_take_no_part_in_autograd() -> None:
    A = symmetric().requires_grad_()
    assert not Products(A).rows(torch.eye(9, dtype=torch.float64)).requires_grad


@pytest.mark.parametrize(
    ("operator", "error", "message"),
    [
        (3.0, TypeError, "needs .shape and @.*got float"),
        (torch.zeros(2, 3), ValueError, r"square \(P, P\); got \(2, 3\)"),
        (torch.zeros(3), ValueError, "square"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "real floating point; got torch.int64"),
        (np.zeros((2, 2), complex), TypeError, "real floating point; got torch.complex128"),
    ],
)
def test_refused_operators(operator: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Products(operator)


class Spoiled(Foreign):
    """Entry 6 of the product is not finite where entry 3 of the vector is not zero."""

    wrong = float("nan")

    def __matmul__(self, columns: Tensor) -> Tensor:
        out = super().__matmul__(columns)
        out[6, columns[3] != 0] = self.wrong
        return out


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["rows", "quadratic"])
def test_nonfinite_products_stop_with_their_place(wrong: float, form: str) -> None:
    operator = Spoiled(symmetric())
    operator.wrong = wrong
    products, eye = Products(operator), torch.eye(9, dtype=torch.float64)
    getattr(products, form)(eye[:2])
    message = "product 3 with the operator holds NaN or infinity, at entry 6 of 9 .1 entries in 2"
    with pytest.raises(NonFiniteProductError, match=message):
        getattr(products, form)(eye[[2, 3]])
    with pytest.raises(FloatingPointError):
        getattr(products, form)(eye[3:4])


def test_large_finite_products_pass() -> None:
    """A sum that overflows is no reason to refuse entries that do not."""
    A = torch.full((4, 4), 2e38)
    assert torch.isfinite(Products(A).rows(torch.eye(4))).all()


def test_symmetry_is_checked() -> None:
    products = Products(symmetric())
    products.check_symmetric()
    assert products.num_matvecs == 2
    skewed = symmetric()
    skewed[0, 1] += 1e-6
    with pytest.raises(ValueError, match=r"not symmetric: u'\(Av\).*\(A \+ A.T\) / 2"):
        Products(skewed).check_symmetric()
    H = hf.HessianOperator(*small()[:2], None, small()[2])
    own = Products(H)
    own.check_symmetric()
    assert own.num_matvecs == 0, "known to be self-adjoint"
    with pytest.raises(ValueError, match="not symmetric"):
        Products(H + Skew(H)).check_symmetric()


class Skew(LinearOperator):
    """An operator with A' = -A."""

    def __init__(self, like: Any) -> None:
        super().__init__(like.shape[0], like.dtype, like.device, None)

    self_adjoint = False

    def explain(self) -> str:
        return "skew"

    def _apply(self, rows: Tensor) -> Tensor:
        return rows.roll(1, 1) - rows.roll(-1, 1)


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    products = Products(symmetric())
    monkeypatch.setattr(
        hvpfast.operators.matvecs, "available_bytes", lambda *args, **kwargs: 10_000_000
    )
    products.check_room(1_000, 2, "a basis")  # too small to look at memory
    products.size = 1_000_000
    with pytest.raises(
        MemoryError, match=r"a basis: 5 vectors of 1,000,000 .* take 80 MB, and 10 MB.*; 0 fit"
    ):
        products.check_room(5, 2, "a basis")
    monkeypatch.setattr(hvpfast.operators.matvecs, "available_bytes", lambda *args, **kwargs: 2**40)
    products.check_room(5, 2, "a basis")
    assert products.chunk() >= 1
