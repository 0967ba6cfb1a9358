"""Symmetric matrices with prescribed spectra, and the Hessian of a trained net."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import hvpfast as hf

_SIZE = 100


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Q diag(eigenvalues) Q' for a random orthogonal Q, float64."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    G = torch.randn(size, size, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(G)[0]
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


def hessian_like(size: int) -> Tensor:
    """Eigenvalues with a few outliers, a bulk near zero and negative ones."""
    generator = torch.Generator().manual_seed(1)
    bulk = 0.1 * torch.randn(size - 8, generator=generator).double()
    return torch.cat([torch.tensor([9.0, 7, 5, 4, 3.5, -3, 2, -1.5]).double(), bulk])


def expected(values: Tensor, k: int, which: str) -> Tensor:
    """The wanted eigenvalues in the documented order."""
    down = values.sort(descending=True).values
    if which == "LM":
        return values[values.abs().argsort(descending=True)][:k]
    if which == "LA":
        return down[:k]
    if which == "SA":
        return down.flip(0)[:k]
    return torch.cat([down[: k - k // 2], down[len(down) - k // 2 :]])


def _numbers() -> Tensor:
    return torch.arange(1, _SIZE + 1, dtype=torch.float64)


def _outliers() -> Tensor:
    """A few large eigenvalues and a bulk of both signs, as Hessians of trained nets have."""
    bulk = 0.3 * torch.randn(
        _SIZE - 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    return torch.cat([torch.tensor([30.0, 20.0, 10.0, 8.0, 5.0, 4.0, 3.0, -2.0]).double(), bulk])


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "flat": lambda: 1 - _numbers() / (2 * _SIZE),
    "power": lambda: _numbers() ** -1.2,
    "exponential": lambda: 0.8 ** _numbers(),
    "outliers": _outliers,
}


@functools.cache
def trained() -> tuple[hf.HessianOperator, Tensor]:
    """The Hessian of a small trained net, as an operator and dense, float64."""
    generator = torch.Generator().manual_seed(1)
    model = hf.MLP((8, 10, 4), "tanh", dtype=torch.float64, generator=generator)
    x = torch.randn(60, 8, dtype=torch.float64, generator=generator)
    noise = 0.3 * torch.randn(60, 4, dtype=torch.float64, generator=generator)
    y = (x[:, :4] + noise).argmax(1)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    H = hf.HessianOperator(model, nn.CrossEntropyLoss(), None, (x, y))
    dense = H @ torch.eye(H.shape[0], dtype=torch.float64)
    return H, (dense + dense.T) / 2


@functools.cache
def matrix(name: str) -> Tensor:
    """The dense matrix of a spectrum, or ``"net"`` for that of :func:`trained`."""
    return trained()[1] if name == "net" else rotated(SPECTRA[name]())
