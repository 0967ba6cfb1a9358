"""Many models at once on the CPU engine: one C++ object for all, whose models the threads share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, get_num_threads

from hvpfast.backends.probes.source import ProbeSource

if TYPE_CHECKING:
    from hvpfast.backends import _cpu

__all__ = ["CpuModels", "CpuModelsPenalty"]


class CpuModels:
    """The C++ linearizations of M models and the tensors they read."""

    __slots__ = ("_engine", "_inputs", "_params", "loss")

    def __init__(self, engine: _cpu.Models, params: Tensor, inputs: tuple[Tensor, ...]) -> None:
        self._engine, self._params = engine, params
        self._inputs = inputs  # keeps the memory alive
        self.loss = params.new_empty(len(params))  # (M,)
        engine.losses(self.loss.data_ptr())

    @property
    def normalizers(self) -> Tensor:
        """What each model's sum of losses was divided by, (M,) float64."""
        out = torch.empty(len(self._params), dtype=torch.float64)
        self._engine.normalizers(out.data_ptr())
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of residuals."""
        return self._engine.num_bytes

    def gradient(self) -> Tensor:
        """Gradients, (M, P)."""
        out = self._like_params()
        self._engine.gradient(out.data_ptr(), get_num_threads())
        return out

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        """H_m v_mk, or with ``ggn`` G_m v_mk, for rows (M, K, P): (M, K, P)."""
        out = torch.empty_like(tangents)
        self._engine.hvp(
            tangents.data_ptr(), tangents.size(1), ggn, out.data_ptr(), get_num_threads()
        )
        return out

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        """v_mk' H_m v_mk, (M, K)."""
        out = tangents.new_empty(tangents.shape[:2])
        self._engine.quadratic(
            tangents.data_ptr(), tangents.size(1), ggn, out.data_ptr(), get_num_threads()
        )
        return out

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        """d sum_k <u_mk, H_m v_mk> / d params_m, (M, P)."""
        out = self._like_params()
        self._engine.hvp_vjp(
            tangents.data_ptr(),
            cotangents.data_ptr(),
            tangents.size(1),
            ggn,
            out.data_ptr(),
            get_num_threads(),
        )
        return out

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> CpuModelsPenalty:
        """(1/K) sum_k ||H_m v_mk||^2 for probes given as rows (M, K, P) or as their source."""
        if isinstance(probes, ProbeSource):
            engine = self._engine.penalty_of_probes(
                probes.distribution,
                probes.seed,
                probes.first,
                probes.num_probes,
                ggn,
                get_num_threads(),
            )
            return CpuModelsPenalty(self, engine, None)
        engine = self._engine.penalty(probes.data_ptr(), probes.size(1), ggn, get_num_threads())
        return CpuModelsPenalty(self, engine, probes)

    def _like_params(self) -> Tensor:
        return torch.empty_like(self._params, requires_grad=False)


class CpuModelsPenalty:
    """The C++ penalties of M models, for their gradients."""

    __slots__ = ("_engine", "_probes", "_state", "penalty")

    def __init__(self, state: CpuModels, engine: _cpu.ModelsPenalty, probes: Tensor | None) -> None:
        self._state, self._engine = state, engine
        self._probes = probes  # keeps the memory alive
        self.penalty = torch.empty_like(state.loss)  # (M,)
        engine.values(self.penalty.data_ptr())

    @property
    def loss(self) -> Tensor:
        """The losses, (M,)."""
        return self._state.loss

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        """Gradients d(g_loss * loss_m + g_penalty * penalty_m) / d params_m, (M, P)."""
        out = self._state._like_params()
        self._engine.gradient(g_loss, g_penalty, out.data_ptr(), get_num_threads())
        return out
