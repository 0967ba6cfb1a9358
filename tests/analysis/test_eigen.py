"""Eigenpairs by Lanczos: prescribed spectra, dense Hessians, budgets, restarts, wrong operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from dense import classes, convnet, dense, perceptron
from spectra import expected, hessian_like, rotated
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.analysis.eigen.result import EigenResult
from hvpfast.analysis.eigen.solver import eigsh
from hvpfast.analysis.eigen.starts import class_gradients
from hvpfast.operators.matvecs import NonFiniteProductError

pytestmark = pytest.mark.usefixtures("single_threaded")

LOSS = nn.CrossEntropyLoss()


def true_residuals(A: Any, result: EigenResult) -> Tensor:
    """||A y - theta y|| from products with A, one for each pair."""
    Y = result.eigenvectors
    theta = result.eigenvalues.to(Y.dtype)
    return torch.linalg.vector_norm(A @ Y - Y * theta, dim=0, dtype=torch.float64)


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("block_size", [1, 3, "auto"])
@pytest.mark.parametrize("k", [1, 5])
def test_prescribed_spectrum(which: str, block_size: Any, k: int) -> None:
    values = hessian_like(200)
    A = rotated(values)
    result = eigsh(A, k, which, tol=1e-8, block_size=block_size, seed=0)
    assert result.converged.all() and result.stop_reason == "converged", result.message
    torch.testing.assert_close(
        result.eigenvalues, expected(values, k, which), rtol=1e-12, atol=1e-13
    )
    assert bool((true_residuals(A, result) <= 1.01e-8 * result.eigenvalues.abs()).all())
    gram = result.eigenvectors.T @ result.eigenvectors
    torch.testing.assert_close(gram, torch.eye(k).double(), rtol=0, atol=1e-12)
    assert result.num_matvecs < 200


def test_wrong_answers_are_seen() -> None:
    """The residual tells a pair of another operator from one of this operator."""
    result = eigsh(rotated(hessian_like(60)), 3, seed=0)
    other = rotated(hessian_like(60) * 1.01)
    assert bool((true_residuals(other, result) > 1e-3 * result.eigenvalues.abs()).all())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_whole_spectrum_of_a_small_matrix(size: int) -> None:
    values = torch.arange(1.0, size + 1).double()
    result = eigsh(rotated(values), size, "SA", seed=0, max_matvecs=size + 1)
    assert result.converged.all()
    torch.testing.assert_close(result.eigenvalues, values)


@pytest.mark.parametrize("values", [[0.0] * 20, [1.0] * 20, [5.0, 4.0, 3.0] + [0.0] * 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_size", [1, 4])
def test_invariant_subspaces(values: list[float], dtype: torch.dtype, block_size: int) -> None:
    A = torch.diag(torch.tensor(values, dtype=dtype))
    result = eigsh(A, 6, seed=0, block_size=block_size)
    assert result.converged.all(), result.message
    atol = 50 * torch.finfo(dtype).eps * max(values)
    torch.testing.assert_close(
        result.eigenvalues, torch.tensor(values[:6]).double(), rtol=0, atol=atol
    )


@pytest.mark.parametrize("ggn", [False, True])
@pytest.mark.parametrize("which", ["LM", "SA"])
def test_hessian_of_a_perceptron(which: str, ggn: bool) -> None:
    model, (x, y) = perceptron(), classes(9, 4)
    H = (hf.GGNOperator if ggn else hf.HessianOperator)(model, LOSS, None, (x, y))
    truth = torch.linalg.eigvalsh(dense(model, LOSS, x, y, ggn=ggn))
    result = eigsh(H, 4, which, tol=1e-7, seed=0, compress=False)
    torch.testing.assert_close(
        result.eigenvalues, expected(truth, 4, which), rtol=1e-10, atol=1e-13
    )


def test_any_module() -> None:
    model, (x, y) = convnet(), classes(6, 1, 4, 4)
    H = hf.HessianOperator(model, LOSS, None, (x, y), backend="reference")
    truth = torch.linalg.eigvalsh(dense(model, LOSS, x, y))
    result = eigsh(H, 3, "LA", tol=1e-7, seed=0)
    torch.testing.assert_close(result.eigenvalues, expected(truth, 3, "LA"))


def test_any_kind_of_operator() -> None:
    A = rotated(hessian_like(80))
    wanted = eigsh(A, 4, tol=1e-9, seed=0, block_size=1).eigenvalues
    numpy = A.numpy()
    for other in (
        numpy,
        scipy.sparse.linalg.aslinearoperator(numpy),
        scipy.sparse.csr_array(numpy),
    ):
        result = eigsh(other, 4, tol=1e-9, seed=0)
        torch.testing.assert_close(result.eigenvalues, wanted)
        assert isinstance(result.eigenvectors, Tensor)


def test_agrees_with_scipy_in_float32() -> None:
    A = rotated(hessian_like(300)).float()
    result = eigsh(A, 6, tol=1e-5, seed=0)
    theirs = scipy.sparse.linalg.eigsh(A.numpy(), 6, which="LM", tol=1e-5)[0]
    ours = np.sort(result.eigenvalues.numpy())
    np.testing.assert_allclose(ours, np.sort(theirs), rtol=2e-6)
    gram = result.eigenvectors.double().T @ result.eigenvectors.double()
    torch.testing.assert_close(gram, torch.eye(6).double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("block_size", [1, 4])
def test_float32_basis_stays_orthonormal(block_size: int) -> None:
    """Inner products of basis rows stay at one rounding, though the spectrum spans 1e6."""
    from hvpfast.analysis.eigen.lanczos import Lanczos
    from hvpfast.operators.matvecs import Products

    A = rotated(torch.logspace(3, -3, 400)).float()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(block_size, 400, generator=generator)
    lanczos = Lanczos(Products(A), start, 0, capacity=4, limit=400)
    while lanczos.basis.count < 200:
        lanczos.step()
    rows = lanczos.basis.rows.double()
    error = rows @ rows.T - torch.eye(len(rows)).double()
    assert float(error.abs().max()) < 4 * torch.finfo(torch.float32).eps
    theta = lanczos.ritz()[0]
    truth = torch.linalg.eigvalsh(A.double()).flip(0)[:20].numpy()
    np.testing.assert_allclose(theta[::-1][:20], truth, rtol=1e-4, atol=1e-6 * 1e3)


def test_reported_residuals_are_true() -> None:
    A = rotated(hessian_like(400)).float()
    for exact in (False, True):
        result = eigsh(A, 8, tol=1e-3, seed=1, exact_residuals=exact)
        ratio = result.residual_norms / true_residuals(A, result)
        assert float(ratio.min()) > 0.8, ratio
        assert exact is False or float(ratio.max()) < 1.2, ratio
        # where the recurrence dominates rounding the two agree
        large = result.residual_norms > 20 * result.residual_floor
        assert float((ratio[large] - 1).abs().max() if large.any() else 0) < 0.05


def test_float32_floor_is_said() -> None:
    A = rotated(hessian_like(200)).float()
    result = eigsh(A, 4, tol=1e-9, seed=0)
    assert result.stop_reason == "precision" and not result.converged.any()
    assert "float64" in result.message and f"{result.residual_floor:.1e}" in result.message
    assert 1e-7 < result.residual_floor < 1e-3
    assert eigsh(A.double(), 4, tol=1e-9, seed=0).stop_reason == "converged"


def test_noise_of_an_operator_that_does_not_repeat_itself_is_seen() -> None:
    A = rotated(hessian_like(200))
    generator = torch.Generator().manual_seed(0)

    class Noisy:
        shape, dtype, device = A.shape, A.dtype, A.device

        def __matmul__(self, V: Tensor) -> Tensor:
            noise = torch.randn(V.shape, generator=generator, dtype=V.dtype)
            return A @ V + 1e-9 * noise

    result = eigsh(Noisy(), 4, tol=1e-10, seed=0)
    assert result.stop_reason == "precision"
    assert 0.2 < result.residual_floor / (1e-9 * 200**0.5) < 5


@pytest.mark.parametrize("budget", [3, 12, 40])
def test_the_budget_ends_with_what_is_there(budget: int) -> None:
    A = rotated(torch.linspace(0.5, 1, 300).double())
    result = eigsh(A, 6, tol=1e-8, max_matvecs=budget, seed=0, block_size=1)
    assert result.num_matvecs == budget and result.stop_reason == "max_matvecs"
    assert result.eigenvalues.shape == (min(6, budget - 1),)
    assert result.eigenvectors.shape == (300, len(result.eigenvalues))
    assert not result.converged.all() and "max_matvecs" in result.message
    ratio = result.residual_norms / true_residuals(A, result)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0.02, atol=0)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("which", ["LM", "BE"])
def test_thick_restart_finds_the_same(which: str, block_size: int) -> None:
    order = torch.arange(400).double()
    A = rotated(0.97**order * (-1) ** order)
    budget = 26 * 400 * 8
    result = eigsh(
        A, 8, which, tol=1e-8, memory_budget=budget, seed=0, block_size=block_size,
        max_matvecs=3000,
    )  # fmt: skip
    free = eigsh(A, 8, which, tol=1e-8, seed=0, block_size=block_size)
    assert result.num_restarts > 0 and free.num_restarts == 0
    assert result.num_matvecs > free.num_matvecs
    assert result.converged.all()
    torch.testing.assert_close(result.eigenvalues, free.eigenvalues, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        true_residuals(A, result), result.residual_norms, rtol=0.05, atol=1e-13
    )


def test_memory_that_holds_no_basis() -> None:
    with pytest.raises(MemoryError, match="memory budget is 16 kB"):
        eigsh(rotated(hessian_like(200)), 10, memory_budget=16000, seed=0)


def test_seeds() -> None:
    A = rotated(hessian_like(100)).float()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second, other = (eigsh(A, 3, seed=s) for s in (5, 5, 6))
    assert torch.equal(first.eigenvectors, second.eigenvectors)
    assert not torch.equal(first.eigenvectors, other.eigenvectors)
    fresh = eigsh(A, 3)
    assert torch.equal(eigsh(A, 3, seed=fresh.seed).eigenvectors, fresh.eigenvectors)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


def test_warm_starts_take_fewer_products() -> None:
    values = hessian_like(400)
    A, E = rotated(values), rotated(torch.linspace(-1, 1, 400), seed=2)
    cold = eigsh(A, 6, tol=1e-6, seed=0, block_size=1)
    near = A + 1e-5 * E
    again = eigsh(near, 6, tol=1e-6, seed=0, block_size=1)
    warm = eigsh(near, 6, tol=1e-6, seed=0, V0=cold.eigenvectors, block_size=1)
    torch.testing.assert_close(warm.eigenvalues, again.eigenvalues, rtol=1e-10, atol=0)
    assert warm.num_matvecs < 0.85 * again.num_matvecs  # both with the search for others
    exact = eigsh(A, 1, "LA", v0=cold.eigenvectors[:, 0], seed=0)
    assert exact.num_matvecs <= 15 and exact.converged.all()  # two, and the search for others


def test_start_block_of_several_columns() -> None:
    A = rotated(hessian_like(100))
    for columns in (1, 2, 5):
        V0 = torch.eye(100).double()[:, :columns]
        result = eigsh(A, 3, V0=V0, block_size=2, tol=1e-9, seed=0)
        torch.testing.assert_close(result.eigenvalues, torch.tensor([9.0, 7, 5]).double())
    # a block without full rank is filled up
    V0 = torch.ones(100, 2).double()
    assert eigsh(A, 3, V0=V0, block_size=2, seed=0).converged.all()


def test_class_gradients_span_the_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(3, 6, generator=generator)
    y = torch.arange(60) % 3
    x = means[y] + 0.05 * torch.randn(60, 6, generator=generator)
    model = hf.MLP((6, 8, 3), "tanh", generator=generator)
    for _ in range(100):
        lin = hf.linearize(hf.spec_of(model, LOSS), model.flat, x, y)
        with torch.no_grad():
            model.flat.sub_(0.3 * lin.grad)
    H = hf.GGNOperator(model, LOSS, None, [(x[:25], y[:25]), (x[25:], y[25:])])
    guess = class_gradients(H)
    assert guess.shape == (H.shape[0], 9)
    basis = torch.linalg.qr(guess.double())[0]
    top = eigsh(H, 2, "LA", seed=0, tol=1e-5).eigenvectors.double()
    assert float((basis.T @ top).norm(dim=0).min()) > 0.9
    # one column by hand: the mean over class 1 of d z_0 / d p
    p = model.flat.detach().clone().requires_grad_()
    z = torch.func.functional_call(model, {"flat": p}, (x[y == 1],))
    (by_hand,) = torch.autograd.grad(z[:, 0].mean(), p)
    torch.testing.assert_close(guess[:, 3], by_hand / by_hand.norm(), rtol=1e-4, atol=1e-6)
    assert eigsh(H, 2, "LA", V0=guess, seed=0).converged.all()
    with pytest.raises(TypeError, match="HessianOperator"):
        class_gradients(torch.eye(3))


def test_class_gradients_of_any_module_and_of_chosen_parameters() -> None:
    model, (x, y) = convnet(), classes(6, 1, 4, 4)
    H = hf.HessianOperator(model, LOSS, "head.*", (x, y), backend="reference")
    guess = class_gradients(H)
    assert guess.shape[0] == H.shape[0] == sum(p.numel() for p in model.head.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_asymmetric_operators_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    A = rotated(hessian_like(100))
    skew = torch.randn(100, 100, generator=generator).double()
    for wrong in (skew, A + 1e-3 * (skew - skew.T)):
        for block_size in (1, 3):
            with pytest.raises(ValueError, match="not symmetric"):
                eigsh(wrong, 4, seed=0, block_size=block_size)


def test_products_that_are_not_finite_stop() -> None:
    A = rotated(hessian_like(50))
    A[3, 4] = float("nan")
    with pytest.raises(NonFiniteProductError, match="NaN"):
        eigsh(A, 2, seed=0)


def test_the_operator_may_return_what_it_was_given() -> None:
    class Identity:
        shape, dtype, device = (30, 30), torch.float64, torch.device("cpu")

        def __matmul__(self, V: Tensor) -> Tensor:
            return V

    result = eigsh(Identity(), 3, seed=0)
    torch.testing.assert_close(result.eigenvalues, torch.ones(3).double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 51}, "the operator has 50 in all"),
        ({"k": 0}, "k must be an integer >= 1"),
        ({"which": "SM"}, "which must be one of"),
        ({"tol": 0.0}, "tol is a relative residual"),
        ({"max_matvecs": 1}, "max_matvecs must be an integer >= 2"),
        ({"exact_residuals": True, "max_matvecs": 6}, "max_matvecs must be an integer >= 7"),
        ({"block_size": 0}, "block_size must be"),
        ({"compress": "yes"}, "compress must be"),
        ({"compress": True}, "needs the HessianOperator or GGNOperator of a perceptron"),
        ({"memory_budget": -1}, "memory_budget must be"),
        ({"v0": torch.ones(3)}, r"v0 must be \(50,\)"),
        ({"V0": torch.ones(50)}, r"V0 must be \(50, j\)"),
        ({"v0": torch.zeros(50)}, "v0 is zero"),
        ({"v0": torch.full((50,), float("nan"))}, "v0 holds NaN"),
        ({"v0": torch.ones(50), "V0": torch.ones(50, 1)}, "not both"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eigsh(rotated(hessian_like(50)), **{"seed": 0, **arguments})


def test_not_an_operator() -> None:
    with pytest.raises(TypeError, match=r"needs \.shape and @"):
        eigsh("H", 2)
    with pytest.raises(TypeError, match="v0 must be a tensor"):
        eigsh(torch.eye(3), 1, v0=[1, 0, 0])  # type: ignore[arg-type]
