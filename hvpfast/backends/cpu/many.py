"""Many models at once on the CPU engine: one C++ object for all, whose models the threads share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpfast.backends.cpu.operations import CpuOperations, CpuPenaltyOperations

if TYPE_CHECKING:
    from hvpfast.backends import _cpu


class CpuModelsPenalty(CpuPenaltyOperations):
    """The C++ penalties of M models, for their gradients."""

    __slots__ = ()

    _engine: _cpu.ModelsPenalty

    @property
    def penalty(self) -> Tensor:
        out = torch.empty_like(self.loss)
        self._engine.values(out.data_ptr())
        return out


class CpuModels(CpuOperations):
    """The C++ linearizations of M models and the tensors they read."""

    __slots__ = ("_shape",)

    penalty_type = CpuModelsPenalty

    _engine: _cpu.Models

    def __init__(self, engine: _cpu.Models, params: Tensor, x: Tensor, y: Tensor) -> None:
        self._engine, self._inputs = engine, (params, x, y)
        self._shape, self.dtype, self.like = tuple(params.shape), x.dtype, x

    def empty_gradient(self) -> Tensor:
        return self.like.new_empty(self._shape)

    @property
    def loss(self) -> Tensor:
        out = self.like.new_empty(self._shape[0])
        self._engine.losses(out.data_ptr())
        return out

    @property
    def normalizers(self) -> Tensor:
        out = self.like.new_empty(self._shape[0], dtype=torch.float64)
        self._engine.normalizers(out.data_ptr())
        return out
