"""Repeated eigenvalues are found as often as they are there, and no start vector hides a pair."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from spectra import expected, hessian_like, rotated
from torch import Tensor

from hvpfast.analysis.eigen.solver import eigsh

pytestmark = pytest.mark.usefixtures("single_threaded")

REPEATED = {
    "few": [4.0] * 4 + [3.0] * 3 + torch.linspace(-1, 1, 53).tolist(),
    "two": [0.0] * 40 + [1.0, 2.0],
    "projector": [1.0] * 10 + [0.0] * 50,
    "negative": [-7.0] * 5 + [2.0] * 3 + torch.linspace(0, 1, 42).tolist(),
    "near": [5.0, 5.0 - 1e-9, 5.0, 5.0 - 1e-9, *torch.linspace(-2, 2, 76).tolist()],
    "low rank": [3.0, 2.0, 1e-3] + [0.0] * 77,
    "identity": [2.5] * 30,
}


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_repeated_eigenvalues_are_found_as_often_as_they_are_there(
    name: str, which: str, block_size: int, k: int
) -> None:
    values = torch.tensor(REPEATED[name]).double()
    A = rotated(values)
    for seed in range(3):
        result = eigsh(A, k, which, tol=1e-8, block_size=block_size, seed=seed)
        assert result.stop_reason == "converged", result.message
        found, truth = result.eigenvalues, expected(values, k, which)
        if which == "LM":  # signs of equal magnitudes may come in any order
            found, truth = found.abs(), truth.abs()
        torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-12)
        gram = result.eigenvectors.T @ result.eigenvectors
        torch.testing.assert_close(gram, torch.eye(k).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-5])
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_a_start_from_other_eigenvectors_hides_no_pair(noise: float, which: str) -> None:
    values = torch.linspace(-40, 60, 101).double()
    A, E = torch.diag(values), torch.eye(101).double()
    generator = torch.Generator().manual_seed(0)
    for columns in ([50], [51, 53], [100, 40]):
        V0 = E[:, columns] + noise * torch.randn(101, len(columns), generator=generator).double()
        result = eigsh(A, 2, which, V0=V0, seed=0)
        assert result.stop_reason == "converged"
        torch.testing.assert_close(result.eigenvalues, expected(values, 2, which))


def test_repeated_eigenvalues_beyond_the_memory_of_one_basis() -> None:
    values = torch.tensor([4.0] * 5 + torch.linspace(-1, 3, 195).tolist()).double()
    A, row = rotated(values), 200 * 8
    result = eigsh(A, 5, "LA", tol=1e-6, memory_budget=12 * row, block_size=1, seed=0)
    assert result.num_restarts > 0 and result.stop_reason == "converged"
    torch.testing.assert_close(result.eigenvalues, values[:5])


def test_the_search_takes_the_memory_of_its_own_steps() -> None:
    diagonal = torch.linspace(0, 1, 20_000).square().double()

    class Diagonal:
        shape, dtype, device = (20_000, 20_000), diagonal.dtype, diagonal.device

        def __matmul__(self, V: Tensor) -> Tensor:
            return diagonal[:, None] * V

    tracemalloc.start()
    try:
        result = eigsh(Diagonal(), 2, tol=1e-3, memory_budget=8e9, block_size=1, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.stop_reason == "converged"
    assert (
        peak < 2**27
    )  # of NumPy's arrays; one entry per pair of rows of the budget would be 2**36


def test_a_budget_that_ends_before_the_search_is_said() -> None:
    A = rotated(hessian_like(100))
    full = eigsh(A, 2, seed=0, block_size=1)
    short = eigsh(A, 2, seed=0, block_size=1, max_matvecs=full.num_matvecs - 3)
    assert full.stop_reason == "converged" and full.converged.all()
    assert short.stop_reason == "max_matvecs" and short.converged.all()
    assert "before the search for others" in short.message
