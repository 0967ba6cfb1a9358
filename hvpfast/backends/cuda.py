"""The CUDA engine: hand-derived kernels of the extension module ``hvpfast._cuda``, by address.

All memory comes from torch's caching allocator and all work goes to torch's current stream; nothing
waits for the device until a loss is read, so that calls can be captured in a CUDA graph. Models
with parameters of their own are the first axis of every array; one model is M = 1 of them.
Matrix products are in full precision: the engine's own tiles, and where torch has brought cuBLAS,
that for the large ones (csrc/cuda/blas.h has the rule; ``Linearization.explain()`` says it).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from hvpfast.backends import cuda_models, exact_text
from hvpfast.backends.cuda_models import CudaModelsPenalty, CudaModelsState
from hvpfast.probes import ProbeSource
from hvpfast.spec import MLPSpec

NAME = "cuda"
EXACT_BACKENDS = "cpu and reference"


@functools.cache
def unavailable() -> str | None:
    """None, or why the engine cannot be used; asked once, and not before it is needed."""
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
        return "it runs multilayer perceptrons only"
    module = cuda_models.engine()
    wanted = "cpu" if not isinstance(module, str) and module.emulated else "cuda"
    if device.type != wanted:
        return f"it runs on {wanted} tensors; these are on {device}"
    if wanted == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels are compiled for compute capability 8.0 and newer; {device} is older"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64; these are {dtype}"
    return None


def linearize(
    spec: MLPSpec, params: Tensor | Sequence[Tensor], x: Tensor, y: Tensor, order: int
) -> CudaState:
    """The state at flat parameters (P,) or ``[W1, b1, ...]``, used in place."""
    return CudaState(CudaModelsState(spec, params, x, y, order, 1))


def linearize_models(
    spec: MLPSpec, params: Tensor, x: Tensor, y: Tensor, order: int
) -> CudaModelsState:
    """The states of M models at parameters (M, P).

    Args:
        spec: the network of every model.
        params: (M, P), contiguous, used in place.
        x: (M, N, D[0]), or (N, D[0]) for all models.
        y: (M, N) or (M, N, D[L]), or without M for all models.
        order: 3, or 2 to keep only what hvp and quadratic need.
    """
    return CudaModelsState(spec, params, x, y, order, len(params))


class CudaState:
    """One model: the only one of a :class:`CudaModelsState`."""

    def __init__(self, models: CudaModelsState) -> None:
        self._models = models

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim."""
        return self._models.loss[0]

    @property
    def loss_value(self) -> float:
        """The loss as a number: waits for the device when first read."""
        return self._models.values[0][0]

    @property
    def normalizer(self) -> float:
        """What the sum of losses was divided by: waits for the device when first read."""
        return self._models.values[0][1]

    @property
    def nbytes(self) -> int:
        """Bytes of residuals."""
        return self._models.nbytes

    def explain(self) -> list[str]:
        """How it runs, for ``Linearization.explain()``."""
        return self._models.explain()

    def gradient(self) -> Tensor:
        """Gradient d loss / d params, (P,)."""
        return self._models.gradient()[0]

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        """H v_k, or with ``ggn`` G v_k, for rows (K, P) or one (P,), shaped as they are."""
        rows = tangents.reshape(1, -1, tangents.shape[-1])
        return self._models.hvp(rows, ggn).view_as(tangents)

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        """v_k' H v_k, (K,)."""
        return self._models.quadratic(tangents.unsqueeze(0), ggn)[0]

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        """d sum_k <u_k, H v_k> / d params, (P,)."""
        return self._models.hvp_vjp(tangents.unsqueeze(0), cotangents.unsqueeze(0), ggn)[0]

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> CudaPenalty:
        """(1/K) sum_k ||H v_k||^2 for probes given as rows (K, P) or as their source."""
        rows = probes if isinstance(probes, ProbeSource) else probes.unsqueeze(0)
        return CudaPenalty(self._models.penalty(rows, ggn))

    def sample_traces(self, ggn: bool, chosen: Sequence[bool]) -> Tensor:
        """Not on this backend: NotImplementedError."""
        self._no_exact("trace")

    def diagonal(self, ggn: bool) -> Tensor:
        """Not on this backend: NotImplementedError."""
        self._no_exact("trace")

    def inner_product(self, other: object, ggn: bool, chosen: Sequence[bool]) -> float:
        """Not on this backend: NotImplementedError."""
        self._no_exact("fro2")

    def exact_penalty(self, kind: str, ggn: bool, chosen: Sequence[bool]) -> CudaPenalty:
        """Not on this backend: NotImplementedError."""
        self._no_exact(kind)

    def _no_exact(self, kind: str) -> NoReturn:
        raise NotImplementedError(
            f"{exact_text(self._models._spec, kind)} is not computed by backend 'cuda'; the "
            f"backends {EXACT_BACKENDS} compute it, and estimator='hutchinson' estimates it here"
        )


class CudaPenalty:
    """One model's penalty, for its gradient."""

    def __init__(self, models: CudaModelsPenalty) -> None:
        self._models = models

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim."""
        return self._models.loss[0]

    @property
    def penalty(self) -> Tensor:
        """The penalty, 0-dim, a new tensor each time: autograd attaches history to it."""
        return self._models.penalty[0]

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        """Gradient d(g_loss * loss + g_penalty * penalty) / d params, (P,)."""
        return self._models.gradient(g_loss, g_penalty)[0]
