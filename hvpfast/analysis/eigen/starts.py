"""Start blocks of Lanczos: random rows, given vectors, gradients of logits averaged by class."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.operators.batch import map_tensors
from hvpfast.operators.hessian import CurvatureOperator
from hvpfast.utils.functional_call import functional_call


def start_rows(
    given: Tensor | None, size: int, block_size: int, seed: int, dtype: torch.dtype, device: Any
) -> Tensor:
    """The first block (b, P): given rows (j, P) mixed into b of them, or random rows.

    For j > b every row of the block is a sum of all given ones with random signs: the Krylov space
    of such a sum has all of their directions after j steps, and improves all of them together.
    """
    if given is None or given.shape[0] < block_size:
        have = 0 if given is None else given.shape[0]
        source = ProbeSource(block_size - have, "normal", seed)
        drawn = probe_rows(source, size, dtype, device) / size**0.5
        return drawn if given is None else torch.cat([given.to(device, dtype), drawn])
    rows = given.to(device, dtype)
    if rows.shape[0] == block_size:
        return rows
    signs = probe_rows(ProbeSource(block_size, "rademacher", seed), rows.shape[0], dtype, device)
    return signs @ rows


def class_gradients(operator: Any) -> Tensor:
    """Gradients of the logits averaged by class: a cheap guess of the outlier eigenvectors.

    Column c C + j is the mean over the samples n of class c of ``d z_j(x_n) / d p``, for the
    C outputs z; classes without samples have no columns. For trained classifiers their span nearly
    has the eigenvectors of the largest eigenvalues; they cost about C gradients.

    Args:
        operator: a HessianOperator or GGNOperator whose targets are class indices (N,).

    Returns:
        Columns (P, j), j <= C^2, each of unit length or zero: for ``V0`` of eigsh.

    Raises:
        TypeError: the operator is another, or its targets are no class indices.

    References:
        Papyan (2020), arXiv:2008.11865.
    """
    if not isinstance(operator, CurvatureOperator):
        raise TypeError(
            "class gradients need a HessianOperator or GGNOperator, whose model and data they are "
            f"of; got {type(operator).__name__}"
        )
    linearized, model = operator.linearized, operator.model
    if linearized.group is not None:
        raise ValueError(
            "class gradients of data spread over processes are not offered: start without them"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    values = {name: p.detach().to(operator.dtype) for name, p in model.named_parameters()}
    chosen = [values[names[id(t)]].requires_grad_() for t in linearized.objective.tensors]
    sums: dict[tuple[int, int], Tensor] = {}
    counts: dict[int, int] = {}
    with linearized.running(), torch.enable_grad():
        for batch in linearized.batches:
            y = batch.y
            if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
                raise TypeError(
                    "class gradients need targets (N,) that are class indices; got "
                    f"{tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}"
                )
            for c in sorted(set(y.tolist())):
                own = y == c
                x = map_tensors(itemgetter(own), batch.x)
                z = functional_call(model, values, (x,))
                if not 0 <= c < z.shape[1]:
                    continue  # ignored targets
                counts[c] = counts.get(c, 0) + len(z)
                for j in range(z.shape[1]):
                    parts = torch.autograd.grad(z[:, j].sum(), chosen, retain_graph=True)
                    flat = torch.cat([part.reshape(-1) for part in parts])
                    row = operator.subset.restrict(flat[None])[0]
                    sums[c, j] = sums[c, j] + row if (c, j) in sums else row
    rows = torch.stack([row / counts[c] for (c, _), row in sums.items()])
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (rows / lengths.clamp(min=torch.finfo(rows.dtype).tiny)).T
