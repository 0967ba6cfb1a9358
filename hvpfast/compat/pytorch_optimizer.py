"""The Hessian's diagonal in the form that pytorch_optimizer takes: ``step(hessian=[...])``.

AdaHessian and SophiaH use a given diagonal instead of drawing their own probes through a graph of
gradients: ``loss.backward()`` needs no ``create_graph=True``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn, optim

from hvpfast.analysis.estimators.estimate import diagonal
from hvpfast.mlp.checks import check_curvature
from hvpfast.operators.hessian import GGNOperator, HessianOperator


def hessian_for(
    optimizer: optim.Optimizer,
    model: nn.Module,
    loss_fn: Callable[..., Any],
    data: Any,
    num_matvecs: int = 1,
    *,
    method: str = "hutchinson",
    distribution: str = "rademacher",
    seed: int | None = None,
    curvature: str = "hessian",
    **options: Any,
) -> list[Tensor]:
    """The diagonal of the curvature, one tensor per parameter of an optimizer, in its order.

    Args:
        optimizer: has ``param_groups``; their parameters are parameters of the model.
        model: any module.
        loss_fn: called as ``loss_fn(outputs, y)``.
        data: a batch (x, y), or several; see :class:`hvpfast.HessianOperator`.
        num_matvecs: products to spend.
        method: as for :func:`hvpfast.diagonal`: ``"hutchinson"``, ``"xdiag"``, ``"exact"``, ...
        distribution: of the probes.
        seed: of the probes; None takes fresh entropy.
        curvature: ``"hessian"`` or ``"ggn"``.
        **options: keyword arguments of the operator.

    Returns:
        Tensors shaped like the parameters, in the order of the parameter groups.

    Raises:
        ValueError: a parameter of the optimizer is not the model's.
    """
    kind = GGNOperator if check_curvature(curvature) else HessianOperator
    params = [p for group in optimizer.param_groups for p in group["params"]]
    options = {"check_deterministic": False} | options
    A = kind(model, loss_fn, params, data, **options)
    result = diagonal(A, num_matvecs, method=method, distribution=distribution, seed=seed)
    return A.layout.split(result.estimate.unsqueeze(0), stacked=False)
