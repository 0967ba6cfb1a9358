"""A pytest plugin: backend "cuda" runs on CPU tensors, its kernels emulated on the host.

``HVPFAST_CUDA_EMULATED`` is the path of the module, which CMake builds with the option of this name
(test_cuda_emulated.py does). A library that stands in for cuBLAS lies beside it; with
``HVPFAST_CUDA_EMULATED_BLAS=1`` it computes every product that is a launch of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from hvpfast.backends.cuda import many as cuda_models
from hvpfast.backends.cuda import state as cuda

NAME = "_cuda_emulated"
MODULE = Path(os.environ["HVPFAST_CUDA_EMULATED"])
(STAND_IN,) = MODULE.parent.glob("libcublas_stand_in*")
stand_in = ctypes.CDLL(str(STAND_IN))


def load(path: Path) -> ModuleType:
    """The emulated module at ``path``, in the place of ``hvpfast.backends._cuda``."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cuda.unavailable.cache_clear()
    cuda_models.engine = lambda: module  # type: ignore[assignment]
    shared_bytes = int(os.environ.get("HVPFAST_CUDA_EMULATED_SHARED", 96 << 10))
    module.set_machine(13000, 1, shared_bytes)  # none: no network is small
    return module


def use_blas(names: list[str], least_macs: int = 0, least_side: int = 0) -> None:
    """From now on the library is looked for by these names, with this rule for what it gets."""
    module = cuda_models.engine()
    module.use_blas(names, least_macs, least_side, 4096)  # type: ignore[union-attr]
    cuda_models._sizes.cache_clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"stand-in for cuBLAS: {stand_in.stand_in_products()} calls")


load(MODULE)
if os.environ.get("HVPFAST_CUDA_EMULATED_BLAS") == "1":
    use_blas([str(STAND_IN)])
