"""A pytest plugin: backend "cuda" runs on CPU tensors, its kernels emulated on the host.

``HVPFAST_CUDA_EMULATED`` is the path of the module, which CMake builds with the option of this name
(tests/test_cuda_emulated.py does).
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

from hvpfast.backends import cuda, cuda_models

NAME = "_cuda_emulated"


def load(path: str) -> ModuleType:
    """The emulated module at ``path``, in the place of ``hvpfast._cuda``."""
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


load(os.environ["HVPFAST_CUDA_EMULATED"])
