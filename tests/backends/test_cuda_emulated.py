"""The CUDA kernels built as plain C++: the conformance body runs on them, on CPU tensors."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("pybind11", reason="the emulated kernels are built with pybind11")


@functools.cache
def emulated_module(build: Path) -> Path:
    """The emulated module, built in a folder; HVPFAST_CUDA_EMULATED names one that is there."""
    if "HVPFAST_CUDA_EMULATED" in os.environ:
        return Path(os.environ["HVPFAST_CUDA_EMULATED"])
    import pybind11

    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
    configure += ["-DHVPFAST_CUDA=off", "-DHVPFAST_CUDA_EMULATED=ON", "-DHVPFAST_WERROR=ON"]
    configure += [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
    ]
    for command in (configure, ["cmake", "--build", str(build), "--target", "_cuda_emulated"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (module,) = build.glob("_cuda_emulated*.so")
    return module


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_module(tmp_path_factory.mktemp("cuda_emulated"))


def run_emulated(
    module: Path, *arguments: str, shared_bytes: int = 96 << 10, blas: bool = False
) -> str:
    """Output of a pytest run in which backend "cuda" is the emulated one."""
    command = [sys.executable, "-m", "pytest", "-p", "cuda_emulated", "-q", *arguments]
    path = os.pathsep.join(
        [str(ROOT / "tests" / "support"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    )
    env = os.environ | {
        "HVPFAST_CUDA_EMULATED": str(module),
        "HVPFAST_CUDA_EMULATED_SHARED": str(shared_bytes),
        "HVPFAST_CUDA_EMULATED_BLAS": str(int(blas)),
        "PYTHONPATH": path,
    }
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("path", ["small", "general", "cublas"])
def test_conformance(emulated: Path, path: str) -> None:
    """Every case of the matrix, judged against float64 like those of every other backend.

    Without shared memory no network is small: every operation goes pass by pass, its products by
    the engine's tiles or by the library that stands in for cuBLAS.
    """
    output = run_emulated(
        emulated,
        *("tests/backends/test_conformance.py", "-k", "cuda", "-rs"),
        shared_bytes=96 << 10 if path == "small" else 0,
        blas=path == "cublas",
    )
    assert "SKIPPED" not in output, output
    assert "passed" in output, output
    (calls,) = re.findall(r"stand-in for cuBLAS: (\d+) calls", output)
    assert (int(calls) > 10_000) == (path == "cublas")


@pytest.mark.parametrize("body", ["cuda_behaviour", "cuda_blas", "cuda_formulas"])
def test_behaviour(emulated: Path, body: str) -> None:
    """What these files say of models, errors, failures of runtime and cuBLAS, and formulas."""
    shared_bytes = 0 if body == "cuda_blas" else 96 << 10
    output = run_emulated(emulated, f"tests/backends/{body}.py", "-rs", shared_bytes=shared_bytes)
    assert "SKIPPED" not in output, output
    assert "passed" in output, output
