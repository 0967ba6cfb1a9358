"""Conjugate gradients: solutions against dense ones, histories, and why a run ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import classes, dense, perceptron, tangents
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.analysis.eigen.cg import cg_solve
from hvpfast.operators.matvecs import NonFiniteProductError

pytestmark = pytest.mark.usefixtures("single_threaded")

LOSS = nn.CrossEntropyLoss()


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    Q = torch.linalg.qr(tangents(len(values), len(values), seed))[0]
    A = (Q * values.double()) @ Q.T
    return (A + A.T) / 2


def test_damped_curvature() -> None:
    model, (x, y) = perceptron(), classes(9, 4)
    H = hf.HessianOperator(model, LOSS, None, (x, y))
    A = dense(model, LOSS, x, y) + 2.0 * torch.eye(H.shape[0])
    b = tangents(H.shape[0], 3)
    result = cg_solve(H.shift(2.0), b, tol=1e-10)
    torch.testing.assert_close(result.solution, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)
    assert result.stop_reason == "converged" and result.converged.all()
    one = cg_solve(H.shift(2.0), b[:, 1], tol=1e-10)
    torch.testing.assert_close(one.solution, result.solution[:, 1], rtol=1e-8, atol=1e-9)
    assert one.solution.shape == b[:, 1].shape and one.residual_norms.dim() == 0


@pytest.mark.parametrize("count", [None, 3])
def test_history_and_residuals(count: int | None) -> None:
    A = matrix(torch.linspace(0.1, 2, 120))
    b = tangents(120, 1)[:, 0] if count is None else tangents(120, count)
    result = cg_solve(A, b, tol=1e-8)
    residuals = torch.linalg.vector_norm(b - A @ result.solution, dim=0)
    torch.testing.assert_close(result.residual_norms, residuals)
    lengths = torch.linalg.vector_norm(b, dim=0)
    torch.testing.assert_close(result.relative_residuals, residuals / lengths)
    assert len(result.history) == result.num_iterations + 1
    torch.testing.assert_close(result.history[0], torch.ones_like(lengths))
    assert bool((result.history[-1] <= 1e-8).all())
    torch.testing.assert_close(result.history[-1], result.relative_residuals, rtol=1e-3, atol=1e-14)
    # Chebyshev's bound on the error in the norm of A, sqrt(20) on the residual
    rate = (20**0.5 - 1) / (20**0.5 + 1)
    bound = 2 * 20**0.5 * rate ** torch.arange(len(result.history)).double()
    history = result.history if count is None else result.history.max(dim=1).values
    assert bool((history <= bound).all())


def test_exact_after_as_many_steps_as_eigenvalues() -> None:
    values = torch.tensor([1.0, 3, 7]).repeat(20)
    result = cg_solve(matrix(values), tangents(60, 1)[:, 0], tol=1e-11)
    assert result.num_iterations == 3


def test_guess() -> None:
    A, x = matrix(torch.linspace(1, 2, 50)), tangents(50, 2)
    b = A @ x
    assert cg_solve(A, b, x0=x, tol=1e-8).num_iterations == 0
    near = cg_solve(A, b, x0=x + 1e-6 * tangents(50, 2, 9), tol=1e-8)
    assert near.num_iterations < cg_solve(A, b, tol=1e-8).num_iterations
    torch.testing.assert_close(near.solution, x, rtol=1e-6, atol=1e-6)
    mixed = torch.stack([b[:, 0], torch.zeros(50).double()], 1)
    result = cg_solve(A, mixed)
    assert result.converged.all() and not result.solution[:, 1].any()


def test_indefinite_operators_are_said() -> None:
    A = matrix(torch.linspace(-0.5, 2, 80))
    result = cg_solve(A, tangents(80, 1)[:, 0])
    assert result.stop_reason == "indefinite" and not result.converged
    assert "not positive definite" in result.message and "damping" in result.message
    curvature = float(result.message.split("p'A p = ")[1].split()[0])
    assert -0.5 <= curvature <= 0
    assert cg_solve(A + 0.6 * torch.eye(80), tangents(80, 1)[:, 0]).stop_reason == "converged"
    # what is returned solves as well as the steps before allow
    residual = torch.linalg.vector_norm(tangents(80, 1)[:, 0] - A @ result.solution)
    torch.testing.assert_close(result.residual_norms, residual)
    zero = cg_solve(torch.zeros(5, 5), torch.ones(5))
    assert zero.stop_reason == "indefinite"


def test_the_budget_ends() -> None:
    A = matrix(torch.logspace(-4, 0, 200))
    result = cg_solve(A, tangents(200, 2), max_matvecs=30, tol=1e-10)
    assert result.stop_reason == "max_matvecs" and result.num_matvecs <= 30
    assert not result.converged.any() and "max_matvecs" in result.message
    residuals = torch.linalg.vector_norm(tangents(200, 2) - A @ result.solution, dim=0)
    torch.testing.assert_close(result.residual_norms, residuals)


def test_rounding_is_said() -> None:
    A = matrix(torch.logspace(-5, 0, 200)).float()
    b = tangents(200, 1, dtype=torch.float32)[:, 0]
    good = cg_solve(A + 0.1 * torch.eye(200), b, tol=1e-9, max_matvecs=5000)
    assert good.stop_reason == "precision" and "float64" in good.message
    assert float(good.relative_residuals) < 1e-5


def test_products_that_are_not_finite_stop() -> None:
    A = torch.eye(4)
    A[1, 2] = float("inf")
    with pytest.raises(NonFiniteProductError):
        cg_solve(A, torch.ones(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b": torch.ones(3)}, r"b must be \(4,\)"),
        ({"b": torch.full((4,), float("nan"))}, "b holds NaN"),
        ({"tol": 0.0}, "tol is a relative residual"),
        ({"max_matvecs": 2}, "max_matvecs must be an integer >= 3"),
        ({"x0": torch.ones(4, 2)}, "x0 must be shaped as b"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cg_solve(torch.eye(4), **{"b": torch.ones(4), **arguments})


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="b must be a tensor"):
        cg_solve(torch.eye(4), [1.0] * 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"b must be torch\.float32"):
        cg_solve(torch.eye(4), torch.ones(4).double())
