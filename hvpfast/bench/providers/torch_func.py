"""torch.func, eager, and the same functions compiled whole by torch.compile."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvpfast.bench.cases import PENALTY_WEIGHTS, Problem
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers import transforms
from hvpfast.bench.providers.base import Prepared

T = torch.func


def _run(
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


def layout(problem: Problem, form: str, operation: str) -> Any:
    """Tangents as the form wants them: a tuple of K trees, or a tree of stacked tensors."""
    tangents = problem.tangents(operation)
    if transforms.split_form(form)[1] == "vmap":
        return common.tensors(problem.stack(tangents))
    return tuple(common.tensors(problem.split(row)) for row in tangents)


def _arguments(problem: Problem, form: str, operation: str) -> tuple[Any, ...]:
    return (*common.inputs(problem), layout(problem, form, operation))


def _options(problem: Problem, form: str, operation: str) -> dict[str, Any]:
    return {
        "operation": operation,
        "form": form,
        "num_tangents": problem.num_tangents,
        "act": common.ACTIVATIONS[problem.case.activation],
    }


class TorchFunc:
    """torch.func transforms run eagerly."""

    name = "torch-func"
    kind = "eager"

    def unavailable(self) -> str | None:
        return None

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        return transforms.forms(operation, num_tangents)

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        arguments = _arguments(problem, form, operation)
        if operation == "hvp_warm":
            return Prepared(_warm(form, problem, arguments), common.named_outputs(operation))
        run = functools.partial(_run, *arguments, **_options(problem, form, operation))
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


class TorchCompile:
    """torch.compile of the whole function, derivatives included."""

    name = "torch-compile"
    kind = "compiled"

    def unavailable(self) -> str | None:
        if os.name == "nt":
            return "torch.compile for CPU tensors needs a C++ compiler set up by hand on Windows"
        return None

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        # Nothing kept between calls of a compiled function: no warm form.
        return () if operation == "hvp_warm" else transforms.forms(operation, num_tangents)

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        arguments = _arguments(problem, form, operation)
        options = _options(problem, form, operation)

        def whole(params: Any, x: Tensor, y: Tensor, V: Any) -> Any:
            return _run(params, x, y, V, **options)

        compiled: Any = torch.compile(own_code(whole), fullgraph=True, dynamic=False)
        return Prepared(lambda: compiled(*arguments), common.named_outputs(operation))


def own_code(function: Any) -> Any:
    """The function with a code object of its own.

    Compiled versions belong to the code object: torch searches them on every call and limits their
        number.
    """
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        None,
        function.__closure__,
    )
