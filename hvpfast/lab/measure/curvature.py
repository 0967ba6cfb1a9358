"""||A||_F^2 and Tr A of the Hessian or Gauss-Newton matrix A of a whole split, exactly.

Where a split has more samples than the network has parameters, A is formed block by block. With the
cores U, M of each sample and a with a one appended (``backends/reference/cores.py``), the block of
layers l <= k is a sum over samples, and so a product of two matrices with N rows:

    H[l, k]_{(i, j), (i', j')} = sum_n U_n[i, i'] a_n[j] a_n[j']
                               + sum_n M_n[i, j'] a_n[j] z_bar_n[i']

(no second sum for l = k, nor at the bias of k). For l = k both factors are symmetric, and half of
each is enough. The work grows with N P^2; that of `Cores`, which sums over pairs of samples, with
N^2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import hvpfast as hf
from hvpfast.backends.reference.cores import cores as cores_of
from hvpfast.lab.data.splits import Split

CHUNK = 1024
"""Samples whose outer products are in memory at once."""

Blocks = dict[tuple[int, int], Tensor]
"""[l, k], l < k, to (D[l], D[k], D[l-1] + 1, D[k-1] + 1): outputs i, i', inputs and bias j, j'.
[k, k] to (pairs i <= i', pairs j <= j')."""


def exact_curvature(
    model: hf.MLP, split: Split, backend: str, curvature: str = "hessian"
) -> dict[str, float]:
    """Return ||A||_F^2 as ``{curvature}_fro2`` and Tr A as ``{curvature}_trace``."""
    if len(split.y) > model.flat.numel():
        norm, trace = norm_and_trace(model, split, curvature == "ggn")
    else:
        operator = {"hessian": hf.HessianOperator, "ggn": hf.GGNOperator}[curvature]
        data = (split.x, split.y)
        cores = operator(model, F.cross_entropy, None, data, backend=backend).cores()
        norm, trace = float(cores.frobenius_sq()), float(cores.trace())
    return {f"{curvature}_fro2": norm, f"{curvature}_trace": trace}


def norm_and_trace(model: hf.MLP, split: Split, ggn: bool) -> tuple[float, float]:
    """Return ||A||_F^2 and Tr A of the mean cross-entropy, A formed block by block."""
    blocks: Blocks = {}
    for part in chunks(model, split, ggn):
        for key, found in part.items():
            blocks[key] = blocks[key].add_(found) if key in blocks else found
    norm = trace = 0.0
    for (l, k), found in blocks.items():
        squares = found.double().square()
        if l < k:
            norm += 2 * float(squares.sum())
            continue
        outputs, inputs = model.sizes[k], model.sizes[k - 1] + 1
        norm += float(weights(outputs, 2.0) @ squares @ weights(inputs, 2.0))
        trace += float(weights(outputs, 0.0) @ found.double() @ weights(inputs, 0.0))
    return norm, trace


def weights(size: int, off_diagonal: float) -> Tensor:
    """Return 1 for the pairs i = i' and another number for i < i', in the order of `half`."""
    i, j = torch.triu_indices(size, size)
    return torch.where(i == j, 1.0, off_diagonal).double()


def chunks(model: hf.MLP, split: Split, ggn: bool) -> Iterator[Blocks]:
    """Yield the blocks summed over `CHUNK` samples, part by part."""
    spec, num = hf.MLPSpec(model.sizes, activation=model.activation), len(split.y)
    tensors = [tensor.detach() for tensor in model.weights]
    for x, y in zip(torch.split(split.x, CHUNK), torch.split(split.y, CHUNK), strict=True):

        def loss(z: Tensor, y: Tensor = y) -> Tensor:
            return F.cross_entropy(z, y, reduction="sum") / num

        cores = cores_of(spec, tensors, x, loss, ggn)
        a = [F.pad(values, (0, 1), value=1.0) for values in cores.a]
        layers = range(1, spec.num_layers + 1)
        found = {(k, k): half(cores.U[k, k]).T @ half(outer(a[k - 1], a[k - 1])) for k in layers}
        for l, k in itertools.combinations(layers, 2):
            found[l, k] = summed(cores.U[l, k], outer(a[l - 1], a[k - 1]))
            if not ggn:
                second = summed(cores.M[l, k], outer(a[l - 1], cores.z_bar[k]))
                found[l, k][..., :-1] += second.permute(0, 3, 2, 1)
        yield found


def half(matrices: Tensor) -> Tensor:
    """Return the entries on and above the diagonal of symmetric matrices (N, D, D)."""
    i, j = torch.triu_indices(*matrices.shape[1:])
    return matrices[:, i, j]


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Return left_n[r] right_n[s], (N, R, S)."""
    return left[:, :, None] * right[:, None, :]


def summed(core: Tensor, pairs: Tensor) -> Tensor:
    """Return sum_n core_n[p, q] pairs_n[r, s], (P, Q, R, S)."""
    return (core.flatten(1).T @ pairs.flatten(1)).view(*core.shape[1:], *pairs.shape[1:])
