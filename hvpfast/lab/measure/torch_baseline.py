"""Penalties on the Hessian by torch.autograd alone: what they cost without the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_products(
    loss: Tensor, params: Sequence[Tensor], probes: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Return mean_k ||H v_k||^2 by double backward, with a graph to differentiate it once more.

    Args:
        loss: a scalar with its graph; H is its Hessian.
        params: the tensors that it is differentiated by.
        probes: directions v_k, each a tensor per parameter, of its shape.
    """
    grads = torch.autograd.grad(loss, params, create_graph=True)
    mean = loss.new_zeros(())
    for probe in probes:
        products = torch.autograd.grad(grads, params, probe, create_graph=True)
        mean = mean + torch.stack([p.square().sum() for p in products]).sum() / len(probes)
    return mean
