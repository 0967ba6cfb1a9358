"""The CUDA engine on M models of one network: arrays in, arrays out, by address.

Each operation allocates its workspace from torch and queues its kernels. The size of the workspace
is asked once per shape: the engine finds it by running the operation without launching anything.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpfast.backends.messages import class_weights, plan_arguments
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.backends.streams import HiddenMemory
from hvpfast.mlp.checks import label_message
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils.memory import available_bytes, bytes_text, out_of_memory

if TYPE_CHECKING:
    from hvpfast.backends import _cuda


@functools.cache
def engine() -> _cuda.Engine | str:
    """The extension module, or why there is none; loaded when first asked for."""
    try:
        return importlib.import_module("hvpfast.backends._cuda")
    except ImportError as error:
        return (
            f"hvpfast was built without CUDA ({error}); install it where nvcc is found, with "
            "HVPFAST_CUDA=on"
        )


@functools.lru_cache(maxsize=1024)
def plan(spec: MLPSpec) -> _cuda.Plan:
    """The engine's description of a network."""
    return _loaded().Plan(*plan_arguments(spec))


def _loaded() -> _cuda.Engine:
    module = engine()
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


@functools.lru_cache(maxsize=256)
def _sizes(
    spec: MLPSpec, dtype: torch.dtype, device: torch.device, M: int, N: int, order: int
) -> dict[tuple[str, int, bool, str | None], tuple[int, int]]:
    """The (workspace, kept) bytes of operations on all points of these shapes.

    Filled as they are asked for, by (operation, K, ggn, distribution of the probes that are drawn).
    """
    return {}


def _array(t: Tensor, of_models: bool) -> tuple[int, int]:
    """The address of an array, and the entries between models where each has its own."""
    return t.data_ptr(), t[0].numel() if of_models else 0


class CudaModelsState:
    """M models of one network, each at its own parameters; K tangents each, as rows (M, K, P).

    Attributes:
        scalars: (M, 4) float64 on the device: loss, normalizer, the index of the first label out
            of range or -1, and 1 / normalizer.
    """

    def __init__(
        self, spec: MLPSpec, params: Tensor | Sequence[Tensor], x: Tensor, y: Tensor, order: int
    ) -> None:
        M = len(params) if isinstance(params, Tensor) and params.dim() == 2 else 1
        self.spec, self._M = spec, M
        self._weights = class_weights(spec, torch.float64, x.device)
        self._inputs = (params, x, y)  # keeps the memory alive
        self._dtype, self._device = x.dtype, x.device
        tensors = [params] if isinstance(params, Tensor) else list(params)
        N = x.shape[-2]
        self._sizes = _sizes(spec, x.dtype, x.device, M, N, order)
        make = plan(spec).point_float64 if x.dtype is torch.float64 else plan(spec).point_float32
        stride = spec.num_params if M > 1 else 0
        own = [t.data_ptr() for t in tensors], isinstance(params, Tensor), stride
        own_x = _array(x, x.dim() == 3)
        own_y = _array(y, y.dim() == (3 if spec.loss == "mse" else 2))
        weights = 0 if self._weights is None else self._weights.data_ptr()
        index = self._device.index or 0
        self._point = make(M, N, *own, *own_x, *own_y, weights, order == 3, index)
        self.scalars = torch.empty(M, 4, dtype=torch.float64, device=self._device)
        where, _workspace, self._residuals = self._memory("linearize")
        self._point.linearize(
            self._residuals.data_ptr(), self._residuals.nbytes, self.scalars.data_ptr(), where
        )
        self._hidden = HiddenMemory([self._residuals, self.scalars, *tensors, x, y])

    @property
    def loss(self) -> Tensor:
        return self.scalars[:, 0].to(self._dtype, copy=True)

    @property
    def normalizers(self) -> Tensor:
        return self.scalars[:, 1]

    @property
    def nbytes(self) -> int:
        return self._residuals.nbytes

    @functools.cached_property
    def values(self) -> list[tuple[float, float]]:
        """(loss, normalizer) of each model as numbers: waits for the device.

        Raises:
            ValueError: a label is out of range.
        """
        spec, y = self.spec, self._inputs[2]
        rows = self.scalars.tolist()
        for m, (_, _, wrong, _) in enumerate(rows):
            if wrong >= 0:
                n = int(wrong)
                label = int(y[m, n] if y.dim() == 2 else y[n])
                of_model = f"model {m}: " if self._M > 1 else ""
                raise ValueError(
                    of_model + label_message(label, n, spec.sizes[-1], spec.ignore_index)
                )
        return [(loss, normalizer) for loss, normalizer, _, _ in rows]

    def explain(self) -> list[str]:
        return [f"matrix products: {self._point.matrix_products()}"]

    def gradient(self) -> Tensor:
        out = self._empty(self.spec.num_params)
        where, _workspace, _ = self._memory("gradient")
        self._point.gradient(out.data_ptr(), where)
        return out

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        out = torch.empty_like(tangents)
        K = tangents.shape[1]
        where, _workspace, _ = self._memory("hvp", K, ggn)
        self._point.hvp(tangents.data_ptr(), K, ggn, out.data_ptr(), where)
        return out

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        K = tangents.shape[1]
        out = self._empty(K)
        where, _workspace, _ = self._memory("quadratic", K, ggn)
        self._point.quadratic(tangents.data_ptr(), K, ggn, out.data_ptr(), where)
        return out

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        K = tangents.shape[1]
        out = self._empty(self.spec.num_params)
        if K == 0:
            return out.zero_()
        where, _workspace, _ = self._memory("hvp_vjp", K, ggn)
        self._point.hvp_vjp(
            tangents.data_ptr(), cotangents.data_ptr(), K, ggn, out.data_ptr(), where
        )
        return out

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> CudaModelsPenalty:
        return CudaModelsPenalty(self, probes, ggn)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(self._M, *shape, dtype=self._dtype, device=self._device)

    def _memory(
        self,
        operation: str,
        K: int = 1,
        ggn: bool = False,
        source: ProbeSource | None = None,
        keep: bool = True,
    ) -> tuple[_cuda.Where, Tensor, Tensor]:
        """Where an operation runs, its workspace, and the memory that its result keeps.

        ``source`` is that of the probes that a penalty draws; without ``keep`` nothing is kept.

        The caller holds the workspace until the work is queued: the caching allocator gives its
        memory to later work of the same stream only.
        """
        if operation != "linearize":
            self._hidden.used()
        drawn = _probes(source)

        def num_bytes(K: int) -> tuple[int, int]:
            return self._point.num_bytes(operation, K, ggn, drawn)

        key = operation, K, ggn, None if source is None else source.distribution
        if key not in self._sizes:
            self._sizes[key] = num_bytes(K)
        workspace_bytes, kept_bytes = self._sizes[key]
        sizes = workspace_bytes, kept_bytes if keep else 0
        try:
            workspace, kept = (
                torch.empty(max(size, 1), dtype=torch.uint8, device=self._device) for size in sizes
            )
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise self._too_large(operation, K, sum(sizes), num_bytes) from error
        return self._where(workspace), workspace, kept

    def _where(self, workspace: Tensor) -> _cuda.Where:
        stream = 0
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
        return _loaded().Where(
            self._device.index or 0, stream, workspace.data_ptr(), workspace.nbytes
        )

    def _too_large(
        self, operation: str, K: int, size: int, num_bytes: Callable[[int], tuple[int, int]]
    ) -> MemoryError:
        """The error that says what the operation takes and what would fit."""
        free = available_bytes(self._device)
        text = f"{operation} takes {bytes_text(size)} of {self._device} memory"
        if operation != "linearize" and K > 1:
            one, two = (sum(num_bytes(k)) for k in (1, 2))
            fits = max(0, 1 + (free - one) // max(1, two - one)) if free >= one else 0
            text += f" for K = {K} tangents of {self._M} model(s); {bytes_text(free)} are free"
            text += f", enough for K = {fits}: take fewer at once"
        else:
            text += f" for N = {self._inputs[1].shape[-2]} samples of {self._M} model(s); "
            text += f"{bytes_text(free)} are free: take fewer samples at once"
        return MemoryError(text)


def _probes(source: ProbeSource | None) -> _cuda.Probes | None:
    if source is None:
        return None
    return _loaded().Probes(source.distribution, source.seed, source.first)


class CudaModelsPenalty:
    """The penalties of M models, for their gradients.

    Probes of a source are drawn by the engine: signs by the blocks that run a small network, all
    others by a kernel of their own.
    """

    def __init__(self, state: CudaModelsState, tangents: Tensor | ProbeSource, ggn: bool) -> None:
        self._state, self._ggn = state, ggn
        self._source = tangents if isinstance(tangents, ProbeSource) else None
        rows = [] if isinstance(tangents, ProbeSource) else [tangents]
        self._K = rows[0].shape[1] if self._source is None else self._source.num_probes
        # the address of the tangents, or their source
        self._given = rows[0].data_ptr() if rows else 0, _probes(self._source), self._K, ggn
        where, _workspace, kept = state._memory("penalty", self._K, ggn, self._source)
        self._kept = kept.data_ptr(), kept.nbytes
        self.values = torch.empty(state._M, dtype=torch.float64, device=state._device)
        state._point.penalty(*self._given, self.values.data_ptr(), *self._kept, where)
        self._hidden = HiddenMemory([kept, self.values, *rows])

    @property
    def loss(self) -> Tensor:
        return self._state.loss

    @property
    def penalty(self) -> Tensor:
        self._hidden.used()
        return self.values.to(self._state._dtype, copy=True)

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        state = self._state
        self._hidden.used()
        out = state._empty(state.spec.num_params)
        where, _workspace, _ = state._memory(
            "penalty_gradient", self._K, self._ggn, self._source, keep=False
        )
        weights = g_loss, g_penalty
        state._point.penalty_gradient(*self._given, *weights, out.data_ptr(), *self._kept, where)
        return out
