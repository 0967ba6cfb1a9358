"""torch.func transforms, run eagerly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvpfast.bench.cases import PENALTY_WEIGHTS, Problem
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers import transforms
from hvpfast.bench.providers.base import Prepared, Provider

T = torch.func


def evaluate(
    params: tuple[Tensor, ...],
    x: Tensor,
    y: Tensor,
    V: Any,
    *,
    operation: str,
    form: str,
    num_tangents: int,
    act: Callable[[Tensor], Tensor],
) -> Any:
    """One operation as a function of tensors only, so that torch.compile sees all of it."""

    def f(p: Any) -> Tensor:
        return common.mlp_loss(p, x, y, act)

    if operation == "gradient":
        gradient, value = T.grad_and_value(f)(params)
        return value, gradient
    if operation == "hvp":
        return transforms.products(T, f, form, params, V)
    if operation == "quadratic":
        return transforms.quadratic(T, f, form, params, V)
    return transforms.penalty(T, f, form, params, V, PENALTY_WEIGHTS, num_tangents)


def arguments_of(problem: Problem, form: str, operation: str) -> tuple[Any, ...]:
    """params, x, y and the tangents in the form's layout."""
    stacked = transforms.split_form(form)[1] == "vmap"
    return (*common.inputs(problem), common.tangents(problem, operation, stacked))


def options_of(problem: Problem, form: str, operation: str) -> dict[str, Any]:
    return {
        "operation": operation,
        "form": form,
        "num_tangents": problem.num_tangents,
        "act": common.ACTIVATIONS[problem.case.activation],
    }


class TorchFunc(Provider):
    name = "torch-func"
    kind = "eager"

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        return () if operation == "train_step" else transforms.forms(operation, num_tangents)

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        arguments = arguments_of(problem, form, operation)
        if operation == "hvp_warm":
            return Prepared(_warm(form, problem, arguments), common.named_outputs(operation))
        run = functools.partial(evaluate, *arguments, **options_of(problem, form, operation))
        return Prepared(run, common.named_outputs(operation))


def _warm(form: str, problem: Problem, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """Products with the residuals of the gradient kept from an earlier call."""
    params, x, y, V = arguments
    act = common.ACTIVATIONS[problem.case.activation]
    gradient = T.grad(lambda p: common.mlp_loss(p, x, y, act))
    mode, mapping = transforms.split_form(form)
    if mode == "linearize":
        apply = T.linearize(gradient, params)[1]
    else:
        pull = T.vjp(gradient, params)[1]

        def apply(v: Any) -> Any:
            return pull(v)[0]

    return (lambda: T.vmap(apply)(V)) if mapping == "vmap" else (lambda: [apply(v) for v in V])
