"""The CUDA kernels built as plain C++: every path of the engine runs on CPU tensors."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
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


@pytest.mark.parametrize(
    "body", ["cuda_conformance", "cuda_behaviour", "cuda_blas", "cuda_formulas"]
)
def test_emulated(emulated: Path, body: str) -> None:
    """What the file says, in a process whose backend "cuda" is the emulated one."""
    path = os.pathsep.join(
        [str(ROOT / "tests" / "support"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, "-m", "pytest", "-p", "cuda_emulated", "-q", "-rs"]
    done = subprocess.run(
        [*command, f"{HERE}/{body}.py"],
        cwd=ROOT, env=os.environ | {"HVPFAST_CUDA_EMULATED": str(emulated), "PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    output = done.stdout[-4000:] + done.stderr[-4000:]
    assert done.returncode == 0, output
    assert "SKIPPED" not in output, output
    assert "passed" in output, output
