"""What one model and M models share on the CPU engine: each operation is one call of a C++ object.

The bindings of both (``_cpu.Linearization``, ``_cpu.Models``) take the same arguments. They read
and write tensors by address; the tangents of M models are theirs one model after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, get_num_threads

from hvpfast.backends.probes.source import ProbeSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hvpfast.backends import _cpu


class CpuOperations:
    """Operations on K tangents: rows (K, P) of one model, (M, K, P) of M models.

    Attributes:
        dtype: of all tensors.
        like: a tensor of this dtype, on the CPU.
        penalty_type: the class of the penalties.
    """

    __slots__ = ("_engine", "_inputs", "dtype", "like")

    _engine: _cpu.Linearization | _cpu.Models
    _inputs: tuple[Tensor | Sequence[Tensor], Tensor, Tensor]  # kept alive: the engine reads them
    dtype: torch.dtype
    like: Tensor
    penalty_type: ClassVar[type[CpuPenaltyOperations]]

    @property
    def loss(self) -> Tensor:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return self._engine.num_bytes

    def empty_gradient(self) -> Tensor:
        """A new tensor (P,) or (M, P) for a gradient."""
        raise NotImplementedError

    def gradient(self) -> Tensor:
        out = self.empty_gradient()
        self._engine.gradient(out.data_ptr(), get_num_threads())
        return out

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        out = torch.empty_like(tangents)
        K = 1 if tangents.dim() == 1 else tangents.size(-2)
        self._engine.hvp(tangents.data_ptr(), K, ggn, out.data_ptr(), get_num_threads())
        return out

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        out, K = tangents.new_empty(tangents.shape[:-1]), tangents.size(-2)
        self._engine.quadratic(tangents.data_ptr(), K, ggn, out.data_ptr(), get_num_threads())
        return out

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        out = self.empty_gradient()
        v, u, K = tangents.data_ptr(), cotangents.data_ptr(), tangents.size(-2)
        self._engine.hvp_vjp(v, u, K, ggn, out.data_ptr(), get_num_threads())
        return out

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> CpuPenaltyOperations:
        if isinstance(probes, ProbeSource):
            seed, first, K = probes.seed, probes.first, probes.num_probes
            engine = self._engine.penalty_of_probes(
                probes.distribution, seed, first, K, ggn, get_num_threads()
            )
            return self.penalty_type(self, engine, None)
        K = probes.size(-2)
        engine = self._engine.penalty(probes.data_ptr(), K, ggn, get_num_threads())
        return self.penalty_type(self, engine, probes)


class CpuPenaltyOperations:
    """The C++ penalty of one model or of M models, for its gradient."""

    __slots__ = ("_engine", "_probes", "_state")

    _engine: _cpu.Penalty | _cpu.ModelsPenalty

    def __init__(
        self,
        state: CpuOperations,
        engine: _cpu.Penalty | _cpu.ModelsPenalty,
        probes: Tensor | None,
    ) -> None:
        self._state, self._engine = state, engine
        self._probes = probes  # kept alive: the engine reads them

    @property
    def loss(self) -> Tensor:
        return self._state.loss

    @property
    def penalty(self) -> Tensor:
        raise NotImplementedError

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        out = self._state.empty_gradient()
        self._engine.gradient(g_loss, g_penalty, out.data_ptr(), get_num_threads())
        return out
