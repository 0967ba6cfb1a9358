"""JAX: the same forms under ``jit``, inputs already on the device, every call waited for."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from hvpfast.bench.cases import PENALTY_WEIGHTS, Problem
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers import transforms
from hvpfast.bench.providers.base import Prepared


def _jax() -> Any:
    return importlib.import_module("jax")


class JaxJit:
    """``jax.jit`` of the whole function."""

    name = "jax"
    kind = "compiled"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("jax") is None:
            return "jax is not installed (pip install 'hvpfast[bench]')"
        try:
            jax = _jax()
            # Handing each call to another thread costs small networks up to a third of their
            # time. Read when the CPU client starts, so it must come first.
            with contextlib.suppress(AttributeError):  # old versions have no such choice
                jax.config.update("jax_cpu_enable_async_dispatch", False)
            jax.devices("cpu")
        except Exception as error:  # jax raises several types of its own
            return f"jax cannot start its CPU device: {error}"
        return None

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        return transforms.forms(operation, num_tangents)

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        jax = _jax()
        if problem.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        device = jax.devices("cpu")[0]
        tangents = problem.tangents(operation)
        if transforms.split_form(form)[1] == "vmap":
            V: Any = problem.stack(tangents)
        else:
            V = tuple(problem.split(row) for row in tangents)
        arguments = jax.device_put((problem.params, problem.x, problem.y, V), device)
        if operation == "hvp_warm":
            call = _warm(jax, form, problem.case.activation, arguments)
        else:
            run = functools.partial(
                _run,
                operation=operation,
                form=form,
                num_tangents=problem.num_tangents,
                activation=problem.case.activation,
            )
            compiled = jax.jit(run)

            def call() -> Any:
                return jax.block_until_ready(compiled(*arguments))

        return Prepared(call, common.named_outputs(operation))


def mlp_loss(params: tuple[Any, ...], x: Any, y: Any, activation: str) -> Any:
    """Mean cross-entropy of the network W_1, b_1, ... on x (N, D[0]), y (N,)."""
    jax = _jax()
    act = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}[activation]
    a = x
    for i in range(0, len(params) - 2, 2):
        a = act(a @ params[i].T + params[i + 1])
    z = a @ params[-2].T + params[-1]
    picked = jax.numpy.take_along_axis(z, y[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(z, axis=1) - picked).mean()


def _run(
    params: tuple[Any, ...],
    x: Any,
    y: Any,
    V: Any,
    *,
    operation: str,
    form: str,
    num_tangents: int,
    activation: str,
) -> Any:
    jax = _jax()

    def f(p: Any) -> Any:
        return mlp_loss(p, x, y, activation)

    if operation == "gradient":
        return jax.value_and_grad(f)(params)
    if operation == "hvp":
        return transforms.products(jax, f, form, params, V)
    if operation == "quadratic":
        return transforms.quadratic(jax, f, form, params, V)
    return transforms.penalty(jax, f, form, params, V, PENALTY_WEIGHTS, num_tangents)


def _warm(jax: Any, form: str, activation: str, arguments: Any) -> Callable[[], Any]:
    """Products with the residuals of the gradient computed by an earlier jitted call."""
    params, x, y, V = arguments
    mode, mapping = transforms.split_form(form)

    def residuals(p: Any) -> Any:
        gradient = jax.grad(lambda q: mlp_loss(q, x, y, activation))
        return (jax.linearize if mode == "linearize" else jax.vjp)(gradient, p)[1]

    def apply(kept: Any, tangents: Any) -> Any:
        def one(v: Any) -> Any:
            return kept(v) if mode == "linearize" else kept(v)[0]

        return jax.vmap(one)(tangents) if mapping == "vmap" else [one(v) for v in tangents]

    kept = jax.block_until_ready(jax.jit(residuals)(params))
    compiled = jax.jit(apply)
    return lambda: jax.block_until_ready(compiled(kept, V))
