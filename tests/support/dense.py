"""Dense curvature matrices of any module by torch.autograd.functional, and nets to try them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn


def dense(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    x: Any,
    y: Tensor,
    names: Sequence[str] | None = None,
    *,
    ggn: bool = False,
) -> Tensor:
    """H or G (P, P) of one batch for the named parameters (all if None), in their order."""
    everything = {name: p.detach() for name, p in model.named_parameters()}
    names = list(everything) if names is None else list(names)
    shapes = [everything[name].shape for name in names]

    def outputs(flat: Tensor) -> Tensor:
        pieces = flat.split([prod(shape) for shape in shapes])
        own = {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return torch.func.functional_call(model, {**everything, **own}, (x,))

    flat = torch.cat([everything[name].reshape(-1) for name in names])
    if not ggn:
        return torch.autograd.functional.hessian(lambda p: loss_fn(outputs(p), y), flat)
    z = outputs(flat)
    J = torch.autograd.functional.jacobian(outputs, flat).reshape(z.numel(), -1)
    D = torch.autograd.functional.hessian(lambda t: loss_fn(t, y), z)
    return J.T @ D.reshape(z.numel(), z.numel()) @ J


def perceptron(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A 4-5-6-3 tanh net with its own random numbers."""
    model = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)
    ).to(dtype)
    return redraw(model, seed)


def redraw(model: Any, seed: int) -> Any:
    """The model with parameters from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


class ConvNet(nn.Module):
    """A convolution, a BatchNorm and a linear layer on (N, 1, 4, 4): not a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


def convnet(seed: int = 0) -> ConvNet:
    """A :class:`ConvNet` in eval mode, float64."""
    model: ConvNet = redraw(ConvNet().double(), seed)
    return model.eval()


def classes(n: int, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Any:
    """Inputs (n, *shape) and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (n,), generator=generator)


def custom_loss(z: Tensor, y: Tensor) -> Tensor:
    """A mean over samples that no backend knows."""
    return (nn.functional.log_softmax(z, 1) ** 2).sum(1).mean() + z[range(len(y)), y].exp().mean()


def tangents(size: int, count: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal columns (size, count)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, count, generator=generator, dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    """Fail unless the shapes agree and max|difference| <= tolerance * max(1, max|expected|)."""
    assert actual.shape == expected.shape
    error = float((actual - expected).abs().max()) if actual.numel() else 0.0
    assert error <= tolerance * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
