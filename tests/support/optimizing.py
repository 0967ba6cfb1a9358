"""Small trainings for the tests of optimizers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpfast as hf


def batches(num: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches for the 4-5-6-3 net of dense.perceptron."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(num)
    ]


def adam(params: Any, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


def run(model: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]]) -> None:
    """Train as a user would, giving the optimizer what its curvature needs."""
    for x, y in data:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if optimizer.curvature in ("hutchinson", "exact"):
            closure()
            operator = hf.HessianOperator(model, F.cross_entropy, None, (x, y))
            optimizer.step(operator=operator)
        else:
            optimizer.step(closure)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
