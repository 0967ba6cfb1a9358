"""Diagonals of a Hessian for optimizers: from an operator, split into their parameters.

The operator is a :class:`hvpfast.Linearization`, or anything with ``.shape`` and ``@`` whose flat
vector (P,) is the optimizer's parameters one after the other, in the order of its groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvpfast.analysis.estimators.estimate import diagonal
from hvpfast.backends.probes.draw import probes
from hvpfast.functional.linearization import Linearization
from hvpfast.functional.products import hvp
from hvpfast.operators.hessian import GGNOperator, HessianOperator
from hvpfast.operators.parameters import owners_of


def check_operator(operator: Any, params: Sequence[Tensor], caller: str) -> None:
    """Raise if the operator is missing or has other parameters.

    Raises:
        TypeError: there is no operator.
        ValueError: it has another size, or its parameters come in another order.
    """
    if operator is None:
        raise TypeError(
            f"{caller} needs the curvature of the batch: call step(operator=H) with a "
            "Linearization or, say, HessianOperator(model, loss_fn, None, (x, y))"
        )
    num_params = sum(p.numel() for p in params)
    size = operator.num_params if isinstance(operator, Linearization) else operator.shape[0]
    if size != num_params:
        raise ValueError(
            f"the operator has P = {size}, and the parameters with a gradient have {num_params} "
            "entries; they must be the same parameters"
        )
    if not isinstance(operator, (GGNOperator, HessianOperator)):
        return
    if list(map(id, owners_of(operator.entries))) != list(map(id, params)):
        raise ValueError(
            "the operator's parameters are not the optimizer's, one by one in the order of its "
            "groups; make it with params=[p for g in optimizer.param_groups for p in g['params']]"
        )


def hutchinson(operator: Any, params: Sequence[Tensor], seed: int, index: int) -> list[Tensor]:
    """``v * (H v)``, shaped as the parameters, for Rademacher probe number ``index`` of the seed.

    Its mean over probes is diag(H); the mean of its square is ``|H e_i|^2``, which is at least
    ``H_ii^2``.
    """
    num_params = sum(p.numel() for p in params)
    like = params[0]
    v = probes(num_params, seed=seed, dtype=like.dtype, device=like.device, first=index)[:, 0]
    product = hvp(operator, v) if isinstance(operator, Linearization) else operator @ v
    return cut(v * product, params)


def exact(operator: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """diag(H), shaped as the parameters."""
    return cut(exact_diagonal(operator).to(params[0].dtype), params)


def exact_diagonal(operator: Any) -> Tensor:
    """diag(H), (P,): by per-sample cores where the operator has them, else by columns of H."""
    if isinstance(operator, Linearization):
        return operator.diagonal(False)
    return diagonal(operator, method="exact").estimate


def cut(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat vector (P,), shaped as the parameters."""
    pieces = torch.split(flat, [p.numel() for p in params])
    return [piece.view(p.shape) for piece, p in zip(pieces, params, strict=True)]
