"""Triton kernels on CUDA devices: the layers of csrc/cpu fused with their epilogues.

Triton is imported when a state is first made, not before. Where TRITON_INTERPRET=1 is set before
this module is imported, Triton's interpreter runs the same kernels on CPU tensors, for tests:
slowly, and only where this backend is named (``NAMED_ONLY``).

One engine serves one model and M models at once: everything inside has the models in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpfast.backends.messages import PERCEPTRONS_ONLY, dtype_reason
from hvpfast.backends.one_of_many import OneModel
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.backends.streams import HiddenMemory
from hvpfast.backends.triton.memory import explained
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils import cuda_graph, triton_launch

if TYPE_CHECKING:
    from hvpfast.backends.triton.penalty import Penalty

NAME = "triton"
NAMED_ONLY = (
    "Triton's interpreter is slow, for tests; name it to mean it"
    if triton_launch.INTERPRETED
    else None
)
unavailable = triton_launch.unavailable
# All classes of a sample lie in the registers of one program.
MOST_CLASSES = {torch.float32: 8192, torch.float64: 4096}


def unsupported(spec: MLPSpec | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why the kernels cannot take this case."""
    if spec is None:
        return PERCEPTRONS_ONLY
    if device.type != ("cpu" if triton_launch.INTERPRETED else "cuda"):
        where = "CPU tensors (TRITON_INTERPRET=1)" if triton_launch.INTERPRETED else "CUDA tensors"
        return f"it runs on {where}; these are on {device}"
    if (reason := dtype_reason(dtype)) is not None:
        return reason
    if spec.sizes[-1] > (most := MOST_CLASSES[dtype]):
        return f"it takes at most {most} outputs in {dtype}; these are {spec.sizes[-1]}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or newer; {device} has less"
    return None


def linearize(
    spec: MLPSpec,
    params: Tensor | Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    order: int,
    precision: str = "ieee",
) -> TritonState:
    """The state at flat parameters (P,) or ``[W1, b1, ...]``, used in place.

    ``precision`` of the products in float32: ``"ieee"`` or ``"tf32x3"``.
    """
    rows = params.unsqueeze(0) if isinstance(params, Tensor) else params
    return TritonState(TritonModelsState(spec, rows, x, y, order, precision))


def linearize_models(
    spec: MLPSpec, params: Tensor, x: Tensor, y: Tensor, order: int, precision: str = "ieee"
) -> TritonModelsState:
    """M states in one: params (M, P), x (M, N, D[0]) or (N, D[0]), y likewise."""
    return TritonModelsState(spec, params, x, y, order, precision)


class TritonModelsState:
    """M models of one network, each at its own point; K tangents are (M, K, P).

    Every operation raises MemoryError where memory runs out; the message says what fits.
    """

    __slots__ = ("_hidden", "_labels_checked", "_lin", "_y")

    def __init__(
        self,
        spec: MLPSpec,
        params: Tensor | Sequence[Tensor],
        x: Tensor,
        y: Tensor,
        order: int,
        precision: str,
    ) -> None:
        from hvpfast.backends.triton.linearization import Linearization

        M = len(params) if isinstance(params, Tensor) else 1
        with explained(spec, M, x, "linearize"):
            self._lin = Linearization(spec, params, x, y, order, precision)
        inputs = [params] if isinstance(params, Tensor) else list(params)
        self._hidden = HiddenMemory([*self._lin.kept, *inputs, x, y])
        self._y = y
        self._labels_checked = False

    def _running(self, operation: str, K: int) -> AbstractContextManager[None]:
        self._hidden.used()
        return explained(self._lin.spec, self._lin.M, self._lin.like, operation, K)

    @property
    def loss(self) -> Tensor:
        """The first read waits for the device and checks the labels, unless a graph is recorded."""
        if not self._labels_checked and not cuda_graph.recording(self._y):
            self._labels_checked = bool(self.loss_values)
        return self._lin.loss

    @property
    def loss_values(self) -> list[float]:
        return self._lin.loss_values(self._y)

    @property
    def normalizers(self) -> Tensor:
        return self._lin.normalizers

    @property
    def nbytes(self) -> int:
        return self._lin.nbytes

    def gradient(self) -> Tensor:
        self._hidden.used()
        return self._lin.gradient()

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        from hvpfast.backends.triton.tangents import hvp

        with self._running("hvp", tangents.shape[1]):
            return hvp(self._lin, tangents, ggn)

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        from hvpfast.backends.triton.tangents import quadratic

        with self._running("quadratic", tangents.shape[1]):
            return quadratic(self._lin, tangents, ggn)

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        from hvpfast.backends.triton.third_order import hvp_vjp

        with self._running("hvp_vjp", tangents.shape[1]):
            return hvp_vjp(self._lin, tangents, cotangents, ggn)

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> TritonModelsPenalty:
        from hvpfast.backends.probes.triton import draw_by_triton
        from hvpfast.backends.triton.penalty import Penalty

        K = probes.num_probes if isinstance(probes, ProbeSource) else probes.shape[1]
        with self._running("penalty", K):
            if isinstance(probes, ProbeSource):
                source, probes = probes, self._lin.empty(self._lin.M, K, self._lin.P)
                draw_by_triton(probes, source.distribution, source.seed, source.first)
            penalty = Penalty(self._lin, probes, ggn)
        return TritonModelsPenalty(self, penalty)


class TritonModelsPenalty:
    """The penalties of M models, for their gradients."""

    __slots__ = ("_hidden", "_penalty", "_state")

    def __init__(self, state: TritonModelsState, penalty: Penalty) -> None:
        self._state, self._penalty = state, penalty
        self._hidden = HiddenMemory(penalty.kept)

    @property
    def loss(self) -> Tensor:
        return self._state._lin.loss

    @property
    def penalty(self) -> Tensor:
        self._hidden.used()
        return self._penalty.value.to(self._state._lin.like.dtype, copy=True)

    def gradient(self, g_loss: float | Tensor, g_penalty: float | Tensor) -> Tensor:
        self._hidden.used()
        with self._state._running("penalty gradient", self._penalty.K):
            return self._penalty.gradient(g_loss, g_penalty)


class TritonState(OneModel[TritonModelsState]):
    """One model at its point: M = 1 of many."""

    __slots__ = ()

    @property
    def loss_value(self) -> float:
        """Read from the device, which waits for it and checks the labels."""
        return self._models.loss_values[0]

    @property
    def normalizer(self) -> float:
        """Read from the device, which waits for it."""
        return float(self._models.normalizers[0])

    def _no_exact(self, kind: str) -> NotImplementedError:
        return NotImplementedError(
            "the triton backend has no exact curvature; the backends 'cpu' and 'reference' have it"
        )
