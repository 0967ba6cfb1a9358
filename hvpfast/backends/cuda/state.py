"""The CUDA engine: hand-derived kernels of the extension module ``backends._cuda``, by address.

All memory comes from torch's caching allocator and all work goes to torch's current stream; nothing
waits for the device until a loss is read, so that calls can be captured in a CUDA graph. Models
with parameters of their own are the first axis of every array; one model is M = 1 of them.
Matrix products are in full precision: the engine's own tiles, and where torch has brought cuBLAS,
that for the large ones (csrc/cuda/blas.h has the rule; ``Linearization.explain()`` says it).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast.backends.cuda import many as cuda_models
from hvpfast.backends.cuda.many import CudaModelsState
from hvpfast.backends.messages import PERCEPTRONS_ONLY, dtype_reason, exact_text
from hvpfast.backends.one_of_many import OneModel
from hvpfast.mlp.spec import MLPSpec

NAME = "cuda"


@functools.cache
def unavailable() -> str | None:
    """None, or why the engine cannot be used; found once, when first asked for."""
    module = cuda_models.engine()
    if isinstance(module, str):
        return module
    if module.emulated:
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    return module.device_problem() or (
        None if torch.cuda.is_available() else "torch sees no CUDA device it can use"
    )


def unsupported(spec: MLPSpec | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why the engine cannot take this case."""
    if spec is None:
        return PERCEPTRONS_ONLY
    module = cuda_models.engine()
    wanted = "cpu" if not isinstance(module, str) and module.emulated else "cuda"
    if device.type != wanted:
        return f"it runs on {wanted} tensors; these are on {device}"
    if wanted == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels are compiled for compute capability 8.0 and newer; {device} is older"
    if (reason := dtype_reason(dtype)) is not None:
        return reason
    if spec.num_params >= 2**31:
        return f"it takes fewer than 2**31 parameters; these are {spec.num_params}"
    return None


def linearize(
    spec: MLPSpec, params: Tensor | Sequence[Tensor], x: Tensor, y: Tensor, order: int
) -> CudaState:
    """The state at flat parameters (P,) or ``[W1, b1, ...]``, used in place."""
    return CudaState(CudaModelsState(spec, params, x, y, order))


def linearize_models(
    spec: MLPSpec, params: Tensor, x: Tensor, y: Tensor, order: int
) -> CudaModelsState:
    """The states of M models at (M, P), each with its own x and y or all with the same ones."""
    return CudaModelsState(spec, params, x, y, order)


class CudaState(OneModel[CudaModelsState]):
    """One model: the only one of a :class:`CudaModelsState`."""

    __slots__ = ()

    @property
    def loss_value(self) -> float:
        """Read from the device when first asked for, which waits for it."""
        return self._models.values[0][0]

    @property
    def normalizer(self) -> float:
        return self._models.values[0][1]

    def explain(self) -> list[str]:
        return self._models.explain()

    def _no_exact(self, kind: str) -> NotImplementedError:
        return NotImplementedError(
            f"{exact_text(self._models.spec, kind)} is not computed by backend 'cuda'; the "
            "backends cpu and reference compute it, and estimator='hutchinson' estimates it here"
        )
