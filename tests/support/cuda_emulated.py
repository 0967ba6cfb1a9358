"""A pytest plugin: backend "cuda" runs on CPU tensors, its kernels emulated on the host.

``HVPFAST_CUDA_EMULATED`` is the path of the module, which CMake builds with the option of this name
(test_cuda_emulated.py does). A library that stands in for cuBLAS lies beside it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path
from types import ModuleType

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
    return module


def set_shared_bytes(count: int) -> None:
    """From now on a block has so much shared memory; with none no network is small."""
    cuda_models.engine().set_machine(13000, 1, count)  # type: ignore[union-attr]
    cuda_models._sizes.cache_clear()


def use_blas(names: list[str], least_macs: int = 0, least_side: int = 0) -> None:
    """From now on the library is looked for by these names, with this rule for what it gets."""
    module = cuda_models.engine()
    module.use_blas(names, least_macs, least_side, 4096)  # type: ignore[union-attr]
    cuda_models._sizes.cache_clear()


load(MODULE)
set_shared_bytes(96 << 10)
