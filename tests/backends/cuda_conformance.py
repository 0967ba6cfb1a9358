"""Run by test_cuda_emulated.py: every conformance case on every path of the CUDA engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cases import CASES, Case
from conformance import assert_conforms, assert_kernels_ran
from cuda_emulated import STAND_IN, set_shared_bytes, stand_in, use_blas

# Shared memory, and names of cuBLAS. Without shared memory no network is small: every operation
# goes pass by pass, its products by the engine's tiles or by the library that stands in for cuBLAS.
PATHS: dict[str, tuple[int, list[str]]] = {
    "small": (96 << 10, []),
    "general": (0, []),
    "cublas": (0, [str(STAND_IN)]),
}


@contextmanager
def on_path(path: str) -> Iterator[None]:
    """Use this path; who computes the products proves it."""
    shared_bytes, names = PATHS[path]
    set_shared_bytes(shared_bytes)
    use_blas(names)
    before = stand_in.stand_in_products()
    yield
    assert (stand_in.stand_in_products() > before) == (path == "cublas")


@pytest.mark.parametrize("path", PATHS)  # neighbours share the oracle of their case
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case, path: str) -> None:
    with on_path(path):
        assert_conforms("cuda", case)


@pytest.mark.parametrize("path", PATHS)
def test_kernels_ran(path: str) -> None:
    with on_path(path):
        assert_kernels_ran("cuda")
