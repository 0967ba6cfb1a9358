"""The comparator and the oracle must reject what is wrong; otherwise no other test means much."""

from __future__ import annotations

import pytest
import torch
from cases import FEW, problem
from oracle import assert_within_reference_error, dense_ggn, dense_hessian, oracle
from torch import Tensor

TRUTH = torch.linspace(-3, 4, 30, dtype=torch.float64).reshape(10, 3)


def _perturb_one(t: Tensor) -> None:
    t[7, 1] *= 1 + 1e-3


def _drop_row(t: Tensor) -> None:
    t[4] = 0


def _flip_sign(t: Tensor) -> None:
    t[2, 2] *= -1


def _nan(t: Tensor) -> None:
    t[0, 0] = torch.nan


def _inf(t: Tensor) -> None:
    t[0, 0] = torch.inf


def _swap_rows(t: Tensor) -> None:
    t[[0, 1]] = t[[1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accepts_rounding(dtype: torch.dtype) -> None:
    rounded = TRUTH.to(dtype)
    assert_within_reference_error(rounded, TRUTH, rounded, "rounded")
    assert_within_reference_error(rounded * (1 + torch.finfo(dtype).eps), TRUTH, rounded, "1 ulp")


@pytest.mark.parametrize("wrong", [_perturb_one, _drop_row, _flip_sign, _nan, _inf, _swap_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rejects_wrong_values(wrong, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    actual = TRUTH.to(dtype).clone()
    wrong(actual)
    with pytest.raises(AssertionError, match=r"cpu hvp.*error"):
        assert_within_reference_error(actual, TRUTH, TRUTH.to(dtype), "cpu hvp")


def test_rejects_wrong_shape_dtype_and_oracle() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_within_reference_error(TRUTH[:9], TRUTH, TRUTH, "case")
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_reference_error(TRUTH.float(), TRUTH, TRUTH, "case")
    with pytest.raises(AssertionError, match="oracle"):
        assert_within_reference_error(TRUTH.float(), TRUTH.float(), TRUTH.float(), "case")
    with pytest.raises(AssertionError, match="oracle"):
        assert_within_reference_error(TRUTH, TRUTH / 0, TRUTH, "case")


def test_message_names_the_worst_entry() -> None:
    actual = TRUTH.clone()
    actual[3, 1] += 1
    with pytest.raises(AssertionError, match=r"cpu K2 hvp.*flat index 10"):
        assert_within_reference_error(actual, TRUTH, TRUTH, "cpu K2 hvp")


def test_one_bad_entry_is_not_hidden_by_large_ones() -> None:
    truth = torch.ones(1000, dtype=torch.float64)
    actual = truth.clone()
    actual[5] += 1e-10
    with pytest.raises(AssertionError, match="max error"):
        assert_within_reference_error(actual, truth, truth, "case")


@pytest.mark.parametrize("case", FEW, ids=str)
def test_oracle_agrees_with_dense_matrices(case) -> None:  # type: ignore[no-untyped-def]
    q = problem(case)
    results = oracle(case.spec, q.flat, q.x, q.y, q.tangents, q.cotangents)
    for curvature, dense in (("hessian", dense_hessian), ("ggn", dense_ggn)):
        H = dense(case.spec, q.flat, q.x, q.y)
        torch.testing.assert_close(H, H.T, rtol=1e-10, atol=1e-13)
        expected = {
            "product": H @ q.tangents,
            "quadratic": (q.tangents * (H @ q.tangents)).sum(0),
            "penalty": (H @ q.tangents).square().sum(0).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(
                results[f"{curvature} {name}"], value, rtol=1e-10, atol=1e-12
            )
