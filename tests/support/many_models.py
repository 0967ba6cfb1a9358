"""Models of one network, each with its own parameters, data and tangents, for the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import SEED, Case, problem
from torch import Tensor

import hvpfast as hf


@dataclass(frozen=True)
class Models:
    """M models of a case's network; ``x`` and ``y`` are shared where they lack the axis M."""

    spec: hf.MLPSpec
    params: Tensor  # (M, P)
    x: Tensor
    y: Tensor
    tangents: Tensor  # (M, P, K)
    cotangents: Tensor

    def alone(self, m: int) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters, x and y of one model."""
        own_y = self.y.dim() > (1 if self.spec.loss == "cross_entropy" else 2)
        return (
            self.params[m],
            self.x[m] if self.x.dim() == 3 else self.x,
            self.y[m] if own_y else self.y,
        )


def models(case: Case, M: int = 3, x_shared: bool = False, y_shared: bool = False) -> Models:
    """M variations of a case: parameters, data and tangents of their own."""
    q = problem(case)
    g = torch.Generator().manual_seed(SEED % 2**31)

    def varied(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return torch.stack([t.roll(m) for m in range(M)])
        noise = torch.randn(M, *t.shape, generator=g).to(t.dtype)
        return t + 0.3 * noise * t.abs().mean()

    return Models(
        case.spec,
        varied(q.flat),
        q.x if x_shared else varied(q.x),
        q.y if y_shared else varied(q.y),
        varied(q.tangents),
        varied(q.cotangents),
    )


def linearize(q: Models, backend: str) -> hf.ModelsLinearization:
    lin = hf.linearize(q.spec, q.params, q.x, q.y, backend=backend)
    assert isinstance(lin, hf.ModelsLinearization)
    return lin


def few() -> Models:
    """Three small models with cross-entropy."""
    return models(Case(hf.MLPSpec((5, 4, 3), "tanh"), 6, 2))
