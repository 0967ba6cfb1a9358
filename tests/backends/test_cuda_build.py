"""The CUDA engine as nvcc builds it, without a GPU: warnings, spills, what importing it says."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

import hvpfast as hf
from hvpfast.backends.cuda import state as cuda
from hvpfast.bench.suites.kernels import cuda as cuda_kernels
from hvpfast.bench.suites.kernels.cuda import ARCHITECTURES, KernelFigures, figures

LOG = """
ptxas info    : Compiling entry function 'void hvpfast::cuda::(anonymous namespace)::kernel<float, (hvpfast::cuda::Form)1>(int, f<(int)0>(*)(int))' for 'sm_90'
ptxas info    : Function properties for void hvpfast::cuda::(anonymous namespace)::kernel<float, (hvpfast::cuda::Form)1>(int, f<(int)0>(*)(int))
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Function properties for helper
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""  # noqa: E501


def test_figures_of_a_log() -> None:
    assert list(figures(LOG)) == [
        KernelFigures("kernel<float, (Form)1>", "sm_90", True, 40, 2048, 16, 20),
        KernelFigures("helper", "sm_90", False, None, None, 0, 0),
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[KernelFigures]]:
    pytest.importorskip("pybind11", reason="the module is built with pybind11")
    for tool in ("nvcc", "cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here")
    return cuda_kernels.build(tmp_path_factory.mktemp("cuda"))


def test_no_kernel_spills(built: tuple[Path, list[KernelFigures]]) -> None:
    kernels = [f for f in built[1] if f.entry]
    assert {f.architecture for f in kernels} == set(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        names = " ".join(f.name for f in kernels if f.architecture == architecture)
        for kernel in ("tile", "finish", "sample", "sum", "small", "primal_small", "draw"):
            assert f"{kernel}_kernel" in names
    assert not [f for f in built[1] if f.spill_bytes]
    assert all(f.registers and f.shared_bytes is not None for f in kernels)
    assert max(f.shared_bytes or 0 for f in kernels) <= 48 << 10


def test_module_imports_without_a_driver(built: tuple[Path, list[KernelFigures]]) -> None:
    spec = importlib.util.spec_from_file_location("_cuda", built[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.emulated is False
    if torch.cuda.is_available():
        assert module.device_problem() == ""
    else:
        assert "driver" in module.device_problem()
    text = module.matrix_products()
    if any(map(loads, ("libcublas.so.13", "libcublas.so.12"))):
        assert text.startswith("cuBLAS (libcublas.so.1")
    else:
        assert text.startswith("own tiles; cuBLAS is not found (libcublas.so.13: ")


def loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def test_named_backend_that_cannot_run_says_why() -> None:
    reason = cuda.unavailable()
    spec = hf.MLPSpec((3, 2))
    x, y = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
    if reason is None:
        reason = "it runs on cuda tensors; these are on cpu"
    with pytest.raises(RuntimeError) as raised:
        hf.linearize(spec, torch.ones(spec.num_params), x, y, backend="cuda")
    assert reason in str(raised.value)
    assert hf.linearize(spec, torch.ones(spec.num_params), x, y).backend != "cuda"
