"""The CPU engine: hand-derived kernels of the extension module ``backends._cpu``, by address.

One plan per network; a state is a C++ linearization plus the tensors whose memory it reads. The
number of threads is torch's (``torch.set_num_threads``) at the time of each call; results do not
depend on it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, get_num_threads

from hvpfast.backends.contract import State
from hvpfast.backends.cpu.many import CpuModels
from hvpfast.backends.cpu.operations import CpuOperations, CpuPenaltyOperations
from hvpfast.backends.messages import PERCEPTRONS_ONLY, dtype_reason, exact_text, plan_arguments
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils.memory import LARGE_BYTES, check_scratch

try:
    from hvpfast.backends import _cpu
except ImportError as error:
    _missing: str | None = f"the extension module hvpfast.backends._cpu is not importable ({error})"
else:
    _missing = None

NAME = "cpu"


def unavailable() -> str | None:
    """None, or why the extension module cannot be used."""
    return _missing


def unsupported(spec: MLPSpec | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why the engine cannot take this case."""
    if spec is None:
        return PERCEPTRONS_ONLY
    if device.type != "cpu":
        return f"it runs on CPU tensors; these are on {device}"
    return dtype_reason(dtype)


@functools.lru_cache(maxsize=1024)
def plan(spec: MLPSpec, isa: str = "") -> _cpu.Plan:
    """The engine's description of a network; ``isa`` names an instruction set, "" is the best."""
    return _cpu.Plan(*plan_arguments(spec), isa)


def linearize(
    spec: MLPSpec, params: Tensor | Sequence[Tensor], x: Tensor, y: Tensor, order: int
) -> CpuState:
    """The state at flat parameters (P,) or ``[W1, b1, ...]``, used in place."""
    engine_of, D, double = plan(spec), spec.sizes, x.dtype is torch.float64
    # x (N, D[0]) and a squared-error target (N, D[L]) are contiguous
    rest = (x.data_ptr(), D[0], y.data_ptr(), D[-1], len(x), order == 3, get_num_threads())
    if isinstance(params, Tensor):
        flat = engine_of.linearize_flat_float64 if double else engine_of.linearize_flat_float32
        engine = flat(params.data_ptr(), *rest)
    else:
        make = engine_of.linearize_layers_float64 if double else engine_of.linearize_layers_float32
        engine = make([p.data_ptr() for p in params], *rest)
    return CpuState(engine, spec, params, x, y)


def linearize_models(spec: MLPSpec, params: Tensor, x: Tensor, y: Tensor, order: int) -> CpuModels:
    """The states of M models at (M, P), each with its own x and y or all with the same ones."""
    engine_of = plan(spec)
    double = params.dtype is torch.float64
    make = engine_of.linearize_models_float64 if double else engine_of.linearize_models_float32
    engine = make(
        len(params),
        params.data_ptr(),
        x.data_ptr(),
        x.dim() == 2,
        y.data_ptr(),
        y.dim() == (1 if spec.loss == "cross_entropy" else 2),
        x.size(-2),
        order == 3,
        get_num_threads(),
    )
    return CpuModels(engine, params, x, y)


@functools.lru_cache(maxsize=1024)
def _small(spec: MLPSpec) -> bool:
    """Whether the scratch memory of exact curvature is small for any number of samples."""
    # of the blocks of a panel, which has at most 128 bytes per number; chunks have bounded memory
    return 6 * 128 * sum(spec.sizes[1:]) ** 2 < LARGE_BYTES // 16


class CpuPenalty(CpuPenaltyOperations):
    """The C++ penalty of one state, for its gradient."""

    __slots__ = ()

    _engine: _cpu.Penalty

    @property
    def penalty(self) -> Tensor:
        return self._state.like.new_full((), self._engine.value)


class CpuState(CpuOperations):
    """A C++ linearization and the tensors it reads."""

    __slots__ = ("_num_params", "_spec", "loss_value")

    penalty_type = CpuPenalty

    _engine: _cpu.Linearization

    def __init__(
        self,
        engine: _cpu.Linearization,
        spec: MLPSpec,
        params: Tensor | Sequence[Tensor],
        x: Tensor,
        y: Tensor,
    ) -> None:
        self._engine, self._spec, self._inputs = engine, spec, (params, x, y)
        self._num_params, self.dtype, self.like = spec.num_params, x.dtype, x
        self.loss_value: float = engine.loss

    @property
    def loss(self) -> Tensor:
        return self.like.new_full((), self.loss_value)

    def empty_gradient(self) -> Tensor:
        return self.like.new_empty(self._num_params)

    @property
    def normalizer(self) -> float:
        return self._engine.normalizer

    def sample_traces(self, ggn: bool, chosen: Sequence[bool]) -> Tensor:
        self._check_scratch("trace", ggn, chosen, False)
        out = self.like.new_empty(len(self.like))
        flags = self._flags(chosen)
        self._engine.sample_traces(ggn, *flags, out.data_ptr(), get_num_threads())
        return out

    def diagonal(self, ggn: bool) -> Tensor:
        self._check_scratch("trace", ggn, [True] * len(self._spec.shapes), False)
        out = self.empty_gradient()
        self._engine.diagonal(ggn, out.data_ptr(), get_num_threads())
        return out

    def inner_product(self, other: State, ggn: bool, chosen: Sequence[bool]) -> float:
        if not isinstance(other, CpuState):
            raise TypeError(f"the other state must be of backend 'cpu'; got {type(other).__name__}")
        self._check_scratch("fro2", ggn, chosen, False)
        flags = self._flags(chosen)
        return self._engine.inner_product(other._engine, ggn, *flags, get_num_threads())

    def exact_penalty(self, kind: str, ggn: bool, chosen: Sequence[bool]) -> CpuPenalty:
        self._check_scratch(kind, ggn, chosen, True)
        flags = self._flags(chosen)
        engine = self._engine.exact_penalty(kind, ggn, *flags, get_num_threads())
        return CpuPenalty(self, engine, None)

    def _flags(self, chosen: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        """The flags of [W1, b1, ...] as those of the weights and of the biases."""
        if self._spec.bias:
            return list(chosen[::2]), list(chosen[1::2])
        return list(chosen), [False] * len(chosen)

    def _check_scratch(self, kind: str, ggn: bool, chosen: Sequence[bool], gradient: bool) -> None:
        if _small(self._spec):
            return
        flags = self._flags(chosen)
        size = self._engine.exact_bytes(kind, ggn, *flags, gradient, get_num_threads())
        check_scratch(size, exact_text(self._spec, kind, gradient), self.like.device)
