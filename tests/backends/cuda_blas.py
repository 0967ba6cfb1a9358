"""Run by test_cuda_emulated.py: the CUDA engine with a library in the place of cuBLAS.

No network is small here: every product is a launch of its own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import DTYPES, Case, problem, with_dtype
from cuda_emulated import STAND_IN, set_shared_bytes, stand_in, use_blas
from cuda_problems import LAUNCH, SPECS, WIDE, models, operations
from torch import Tensor

import hvpfast as hf
from hvpfast.backends.cuda import many as cuda_models
from hvpfast.backends.cuda import state as cuda
from hvpfast.backends.probes.source import ProbeSource

ENGINE = cuda_models.engine()
assert not isinstance(ENGINE, str)
set_shared_bytes(0)
NAMES = [str(STAND_IN)]
# cublasStatus_t
STATUSES = {
    1: "CUBLAS_STATUS_NOT_INITIALIZED",
    3: "CUBLAS_STATUS_ALLOC_FAILED",
    7: "CUBLAS_STATUS_INVALID_VALUE",
    8: "CUBLAS_STATUS_ARCH_MISMATCH",
    11: "CUBLAS_STATUS_MAPPING_ERROR",
    13: "CUBLAS_STATUS_EXECUTION_FAILED",
    14: "CUBLAS_STATUS_INTERNAL_ERROR",
    15: "CUBLAS_STATUS_NOT_SUPPORTED",
    16: "CUBLAS_STATUS_LICENSE_ERROR",
    99: "an unknown status",
}


@pytest.fixture(autouse=True)
def nothing_fails() -> Iterator[None]:
    yield
    stand_in.stand_in_fail(-1, 0)
    ENGINE.fail_call(-1, 0)
    use_blas([])


def results(spec: hf.MLPSpec, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Every operation on M models."""
    params, x, y, V, U = tensors
    state = cuda.linearize_models(spec, params, x, y, 3)
    drawn = state.penalty(ProbeSource(2, "normal", 5, 11), True)
    return {
        "loss": state.loss,
        "gradient": state.gradient(),
        "hvp": state.hvp(V, False),
        "ggn": state.hvp(V, True),
        "quadratic": state.quadratic(V, False),
        "hvp_vjp": state.hvp_vjp(V, U, False),
        "ggn vjp": state.hvp_vjp(V, U, True),
        "penalty": state.penalty(V, False).penalty,
        "penalty gradient": state.penalty(V, False).gradient(0.7, 0.3),
        "drawn": drawn.gradient(0.0, 1.0),
    }


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, s.sizes)))
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("M", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_kinds_of_products_agree(
    spec: hf.MLPSpec, shared: bool, M: int, dtype: torch.dtype
) -> None:
    """Products over models and tangents (K = 3), each shared or not: every way to batch them."""
    tensors = models(M, shared, dtype, spec)
    expected = results(spec, tensors)
    use_blas(NAMES)
    before = stand_in.stand_in_products()
    for name, value in results(spec, tensors).items():
        difference = (value - expected[name]).norm()  # sums are divided otherwise
        assert difference <= 200 * torch.finfo(dtype).eps * expected[name].norm(), name
    assert stand_in.stand_in_products() > before


def test_the_rule() -> None:
    """Products below either limit are the engine's own."""
    q = problem(WIDE)  # 300-70-5, N = 20

    def products(least_macs: int, least_side: int) -> int:
        use_blas(NAMES, least_macs, least_side)
        before = stand_in.stand_in_products()
        cuda.linearize(WIDE.spec, q.flat, q.x, q.y, 3)
        return int(stand_in.stand_in_products() - before)

    assert products(0, 0) == 3  # two layers forward, one backward
    assert products(20 * 300 * 70, 0) == 1
    assert products(20 * 300 * 70 + 1, 0) == 0
    assert products(0, 20) == 1
    assert products(0, 21) == 0


def failing_calls(case: Case, status: int, count: int) -> set[str]:
    """The functions that failed, each call of the first ``count`` operations once."""
    error = MemoryError if status == 3 else RuntimeError
    seen = set()
    for name, run in operations(case)[:count]:
        use_blas(NAMES)
        stand_in.stand_in_fail(-1, 0)
        right = run()
        for index in range(stand_in.stand_in_fail(-1, 0)):
            use_blas(NAMES)  # without a handle, as in a new process
            stand_in.stand_in_fail(index, status)
            with pytest.raises(error, match=r"cuBLAS failed in cublas\w+: ") as raised:
                run()
            assert f": {STATUSES[status]} ({status})" in str(raised.value)
            seen |= set(re.findall(r"failed in (cublas\w+)", str(raised.value)))
        stand_in.stand_in_fail(-1, 0)
        assert torch.equal(run(), right), name
    use_blas([])
    assert stand_in.stand_in_handles() == 0  # also after a failure while one was made
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("status", [3, 13])
def test_every_failing_call_raises(dtype: torch.dtype, status: int) -> None:
    """Each call of cuBLAS fails once: Python's error names it, and the next run is right."""
    assert failing_calls(with_dtype(WIDE, dtype), status, 6) == {
        "cublasCreate_v2",
        "cublasSetMathMode",
        "cublasSetStream_v2",
        "cublasSetWorkspace_v2",
        f"cublas{'S' if dtype == torch.float32 else 'D'}gemmStridedBatched",
    }


@pytest.mark.parametrize("status", sorted(set(STATUSES) - {3, 13}))
def test_every_status_is_named(status: int) -> None:
    assert len(failing_calls(WIDE, status, 1)) == 5


def test_every_failing_call_of_the_runtime_raises() -> None:
    for name, run in operations(WIDE):
        use_blas(NAMES)
        ENGINE.fail_call(-1, 0)
        right = run()
        for index in range(ENGINE.fail_call(-1, 0)):
            use_blas(NAMES)
            ENGINE.fail_call(index, LAUNCH)
            with pytest.raises(RuntimeError, match=r"CUDA failed in .*cudaErrorLaunch"):
                run()
        ENGINE.fail_call(-1, 0)
        assert torch.equal(run(), right), name


def explained() -> str:
    q = problem(WIDE)
    lin = hf.linearize(WIDE.spec, q.flat, q.x, q.y, backend="cuda")
    return lin.explain().splitlines()[-1]


def test_what_runs_is_said() -> None:
    assert ENGINE.matrix_products().startswith("own tiles; cuBLAS is not found")
    use_blas(NAMES, 1 << 26, 32)
    text = ENGINE.matrix_products()
    assert text == (
        f"cuBLAS ({STAND_IN}, already loaded) from 67108864 multiply-adds on with every side at "
        "least 32, else own tiles"
    )
    assert explained() == f"matrix products: {text}"
    use_blas(["libnowhere.so.13", "libnowhere.so.12"])
    text = ENGINE.matrix_products()
    assert re.match(
        r"own tiles; cuBLAS is not found \(libnowhere.so.13: .*; libnowhere.so.12", text
    )
    assert explained() == f"matrix products: {text}"
    use_blas(["libm.so.6"])
    assert "of no use (libm.so.6 lacks cublasCreate_v2)" in ENGINE.matrix_products()


def test_a_loaded_library_comes_first(tmp_path: Path) -> None:
    other = shutil.copy(STAND_IN, tmp_path / "libother.so")
    use_blas([str(other), str(STAND_IN)])
    assert f"cuBLAS ({STAND_IN}, already loaded)" in ENGINE.matrix_products()
    use_blas([str(other)])
    assert f"cuBLAS ({other}) from" in ENGINE.matrix_products()


def test_workspace_is_asked_for_where_it_is_needed() -> None:
    q = problem(WIDE)
    state = cuda.linearize(WIDE.spec, q.flat, q.x, q.y, 3)
    own = sum(state._models._point.num_bytes("gradient", 1, False))
    use_blas(NAMES)
    assert sum(state._models._point.num_bytes("gradient", 1, False)) >= own + 4096
