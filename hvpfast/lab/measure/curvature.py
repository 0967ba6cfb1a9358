"""||A||_F^2 and Tr A of the Hessian or Gauss-Newton matrix A of a whole split."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import hvpfast as hf
from hvpfast.lab.data.splits import Split
from hvpfast.lab.measure.dense_hessian import norm_and_trace

CHUNK = 16
"""Probes per product: bounds the memory of products on a whole train split."""


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


def exact_curvature(
    model: hf.MLP, split: Split, backend: str, curvature: str = "hessian"
) -> dict[str, float]:
    """Return ||A||_F^2 and Tr A of the Hessian or Gauss-Newton matrix A of a split, exactly.

    A is formed only where there are more samples than parameters; see ``dense_hessian.py``.

    Returns:
        ``{curvature}_fro2`` and ``{curvature}_trace``.
    """
    if len(split.y) > model.flat.numel():
        norm, trace = norm_and_trace(model, split, curvature == "ggn")
    else:
        operator = {"hessian": hf.HessianOperator, "ggn": hf.GGNOperator}[curvature]
        data = (split.x, split.y)
        cores = operator(model, F.cross_entropy, None, data, backend=backend).cores()
        norm, trace = float(cores.frobenius_sq()), float(cores.trace())
    return {f"{curvature}_fro2": norm, f"{curvature}_trace": trace}
