"""Small networks, their losses and what backward leaves in them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, problem
from torch import Tensor, nn

import hvpfast as hf

Small = tuple[hf.MLP, nn.Module, tuple[Tensor, Tensor]]


def small() -> Small:
    """A tanh network in float64, its loss and a batch."""
    g = torch.Generator().manual_seed(0)
    model = hf.MLP((5, 4, 3), "tanh", dtype=torch.float64, generator=g)
    x = torch.randn(7, 5, dtype=torch.float64, generator=g)
    return model, nn.CrossEntropyLoss(), (x, torch.randint(3, (7,), generator=g))


def mlp_of(case: Case, flat: Tensor | None = None) -> hf.MLP:
    """The network of a case with the parameters of its problem, or with ``flat``."""
    spec = case.spec
    model = hf.MLP(spec.sizes, spec.activation, spec.bias, dtype=case.dtype)
    with torch.no_grad():
        model.flat.copy_(problem(case).flat if flat is None else flat)
    return model


def loss_module(spec: hf.MLPSpec, dtype: torch.dtype) -> nn.Module:
    """The loss of a specification as torch's own module."""
    if spec.loss == "mse":
        return nn.MSELoss(reduction=spec.reduction)
    weight = spec.class_weights and torch.tensor(spec.class_weights, dtype=dtype)
    return nn.CrossEntropyLoss(
        weight=weight,
        ignore_index=spec.ignore_index,
        reduction=spec.reduction,
        label_smoothing=spec.label_smoothing,
    )


def gradients(model: nn.Module) -> Tensor:
    """The gradients that backward left, flat."""
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


class Penalised(nn.Module):
    """A penalised loss as a module, so that functional_call can replace the parameters."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss, penalty = hf.hessian_penalty(self.model, F.cross_entropy, (x, y), **self.options)
        return loss + 0.3 * penalty
