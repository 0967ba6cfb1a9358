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

from hvpfast.backends.contract import State, exact_text
from hvpfast.backends.cpu.many import CpuModels
from hvpfast.backends.probes.source import ProbeSource
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
        return "it runs multilayer perceptrons only"
    if device.type != "cpu":
        return f"it runs on CPU tensors; these are on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64; these are {dtype}"
    return None


@functools.lru_cache(maxsize=1024)
def plan(spec: MLPSpec, isa: str = "") -> _cpu.Plan:
    """The engine's description of a network; ``isa`` names an instruction set, "" is the best."""
    return _cpu.Plan(
        list(spec.sizes),
        spec.activation,
        spec.loss,
        spec.reduction == "mean",
        spec.bias,
        list(spec.class_weights or ()),
        spec.ignore_index,
        spec.label_smoothing,
        isa,
    )


def linearize(
    spec: MLPSpec, params: Tensor | Sequence[Tensor], x: Tensor, y: Tensor, order: int
) -> CpuState:
    """The state at flat parameters (P,) or ``[W1, b1, ...]``, used in place."""
    engine_of, widths = plan(spec), spec.sizes
    double = x.dtype is torch.float64
    # x (N, D[0]) and a squared-error target (N, D[L]) are contiguous
    rest = (
        x.data_ptr(),
        widths[0],
        y.data_ptr(),
        widths[-1],
        len(x),
        order == 3,
        get_num_threads(),
    )
    if isinstance(params, Tensor):
        flat = engine_of.linearize_flat_float64 if double else engine_of.linearize_flat_float32
        engine = flat(params.data_ptr(), *rest)
    else:
        layers = (
            engine_of.linearize_layers_float64 if double else engine_of.linearize_layers_float32
        )
        engine = layers([p.data_ptr() for p in params], *rest)
    return CpuState(engine, spec, x.dtype, (params, x, y))


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
    return CpuModels(engine, params, (params, x, y))


@functools.lru_cache(maxsize=1024)
def _small(spec: MLPSpec) -> bool:
    """Whether the scratch memory of exact curvature is small for any number of samples."""
    # of the blocks of a panel, which has at most 128 bytes per number; chunks have bounded memory
    return 6 * 128 * sum(spec.sizes[1:]) ** 2 < LARGE_BYTES // 16


class CpuState:
    """A C++ linearization and the tensors it reads."""

    __slots__ = ("_dtype", "_engine", "_inputs", "_num_params", "_spec", "loss_value")

    def __init__(
        self,
        engine: _cpu.Linearization,
        spec: MLPSpec,
        dtype: torch.dtype,
        inputs: tuple[Tensor | Sequence[Tensor], Tensor, Tensor],
    ) -> None:
        self._engine, self._spec, self._dtype = engine, spec, dtype
        self._num_params = spec.num_params
        self._inputs = inputs  # keeps the memory alive
        self.loss_value: float = engine.loss

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim."""
        return torch.scalar_tensor(self.loss_value, dtype=self._dtype)

    @property
    def normalizer(self) -> float:
        """What the sum of losses was divided by."""
        return self._engine.normalizer

    @property
    def nbytes(self) -> int:
        """Bytes of residuals."""
        return self._engine.num_bytes

    def gradient(self) -> Tensor:
        """Gradient d loss / d params, (P,)."""
        out = torch.empty(self._num_params, dtype=self._dtype)
        self._engine.gradient(out.data_ptr(), get_num_threads())
        return out

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        """H v_k, or with ``ggn`` G v_k, for rows (K, P) or one (P,), shaped as they are."""
        out = torch.empty_like(tangents)
        K = 1 if tangents.dim() == 1 else len(tangents)
        self._engine.hvp(tangents.data_ptr(), K, ggn, out.data_ptr(), get_num_threads())
        return out

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        """v_k' H v_k, (K,)."""
        K = len(tangents)
        out = torch.empty(K, dtype=self._dtype)
        self._engine.quadratic(tangents.data_ptr(), K, ggn, out.data_ptr(), get_num_threads())
        return out

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        """d sum_k <u_k, H v_k> / d params, (P,)."""
        out = torch.empty(self._num_params, dtype=self._dtype)
        self._engine.hvp_vjp(
            tangents.data_ptr(),
            cotangents.data_ptr(),
            tangents.size(0),
            ggn,
            out.data_ptr(),
            get_num_threads(),
        )
        return out

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> CpuPenalty:
        """(1/K) sum_k ||H v_k||^2 for probes given as rows (K, P) or as their source."""
        if isinstance(probes, ProbeSource):
            engine = self._engine.penalty_of_probes(
                probes.distribution,
                probes.seed,
                probes.first,
                probes.num_probes,
                ggn,
                get_num_threads(),
            )
            return CpuPenalty(self, engine, None)
        engine = self._engine.penalty(probes.data_ptr(), probes.size(0), ggn, get_num_threads())
        return CpuPenalty(self, engine, probes)

    def sample_traces(self, ggn: bool, chosen: Sequence[bool]) -> Tensor:
        """tr H_n of each sample over the chosen tensors, (N,)."""
        self._check_scratch("trace", ggn, chosen, False)
        out = torch.empty(len(self._inputs[1]), dtype=self._dtype)
        flags = self._flags(chosen)
        self._engine.sample_traces(ggn, *flags, out.data_ptr(), get_num_threads())
        return out

    def diagonal(self, ggn: bool) -> Tensor:
        """The diagonal of H, (P,)."""
        self._check_scratch("trace", ggn, [True] * len(self._spec.shapes), False)
        out = torch.empty(self._num_params, dtype=self._dtype)
        self._engine.diagonal(ggn, out.data_ptr(), get_num_threads())
        return out

    def inner_product(self, other: State, ggn: bool, chosen: Sequence[bool]) -> float:
        """tr H_a H_b over the chosen tensors, of this state and one of the same network."""
        if not isinstance(other, CpuState):
            raise TypeError(f"the other state must be of backend 'cpu'; got {type(other).__name__}")
        self._check_scratch("fro2", ggn, chosen, False)
        return self._engine.inner_product(
            other._engine, ggn, *self._flags(chosen), get_num_threads()
        )

    def exact_penalty(self, kind: str, ggn: bool, chosen: Sequence[bool]) -> CpuPenalty:
        """tr H ("trace") or tr H^2 ("fro2") over the chosen tensors, with its gradient."""
        self._check_scratch(kind, ggn, chosen, True)
        flags = self._flags(chosen)
        return CpuPenalty(
            self, self._engine.exact_penalty(kind, ggn, *flags, get_num_threads()), None
        )

    def _flags(self, chosen: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        """The flags of [W1, b1, ...] as those of the weights and of the biases."""
        if self._spec.bias:
            return list(chosen[::2]), list(chosen[1::2])
        return list(chosen), [False] * len(chosen)

    def _check_scratch(self, kind: str, ggn: bool, chosen: Sequence[bool], gradient: bool) -> None:
        if _small(self._spec):
            return
        size = self._engine.exact_bytes(
            kind, ggn, *self._flags(chosen), gradient, get_num_threads()
        )
        check_scratch(size, exact_text(self._spec, kind, gradient), self._inputs[1].device)


class CpuPenalty:
    """The C++ penalty of one state, for its gradient."""

    __slots__ = ("_engine", "_probes", "_state", "value")

    def __init__(self, state: CpuState, engine: _cpu.Penalty, probes: Tensor | None) -> None:
        self._state, self._engine = state, engine
        self._probes = probes  # keeps the memory alive
        self.value: float = engine.value

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim."""
        return self._state.loss

    @property
    def penalty(self) -> Tensor:
        """The penalty, 0-dim."""
        return torch.scalar_tensor(self.value, dtype=self._state._dtype)

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        """Gradient d(g_loss * loss + g_penalty * penalty) / d params, (P,)."""
        out = torch.empty(self._state._num_params, dtype=self._state._dtype)
        self._engine.gradient(g_loss, g_penalty, out.data_ptr(), get_num_threads())
        return out
