"""What trainings of the studies share: linearizing, scoring and measuring curvature."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import hvpfast as hf
from hvpfast.studies.data import Split

CHUNK = 16
"""Probes per product: bounds the memory of products on a whole train split."""


class Diverged(ArithmeticError):
    """A training whose loss, penalty or gradient is no longer finite: a result, not a fault."""


def score(model: hf.MLP, split: Split) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy on one split."""
    with torch.no_grad():
        logits = model(split.x)
        loss = F.cross_entropy(logits, split.y)
        accuracy = (logits.argmax(1) == split.y).double().mean()
    return float(loss), float(accuracy)


def linearize(
    spec: hf.MLPSpec, model: hf.MLP, split: Split, backend: str, order: int
) -> hf.Linearization:
    """Linearize the loss on one split; raise `Diverged` where the loss is not finite."""
    try:
        return hf.linearize(spec, model.flat, split.x, split.y, backend=backend, order=order)
    except ValueError:
        if math.isfinite(score(model, split)[0]):
            raise
        raise Diverged from None


def curvature(lin: hf.Linearization, num_probes: int, seed: int) -> dict[str, float | None]:
    """Estimate ||H||_F^2 = E ||H v||^2 and Tr H = E v'Hv with Rademacher probes.

    Returns:
        ``hessian_fro2`` and ``hessian_trace``, each with its ``_stderr`` (None for one probe).
    """
    squares, traces = [], []
    for first in range(0, num_probes, CHUNK):
        num = min(CHUNK, num_probes - first)
        probes = hf.probes(lin.num_params, num, seed=seed, dtype=lin.dtype, first=first)
        products = hf.hvp(lin, probes).double()  # (P, K)
        squares.append(products.square().sum(0))
        traces.append((probes.double() * products).sum(0))
    found: dict[str, float | None] = {}
    for name, parts in (("hessian_fro2", squares), ("hessian_trace", traces)):
        samples = torch.cat(parts)
        stderr = float(samples.std() / math.sqrt(num_probes)) if num_probes > 1 else None
        found |= {name: float(samples.mean()), f"{name}_stderr": stderr}
    return found
