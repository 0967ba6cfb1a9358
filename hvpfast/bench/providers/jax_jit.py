"""JAX: the same forms under ``jit``, inputs already on the device, every call waited for."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from hvpfast.bench.cases import ADAM, PENALTY_WEIGHTS, Problem
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers import transforms
from hvpfast.bench.providers.base import Prepared, Provider


def _jax() -> Any:
    return importlib.import_module("jax")


class JaxJit(Provider):
    """``jax.jit`` of the whole function."""

    name = "jax"
    kind = "compiled"

    def unavailable(self, device: str = "cpu") -> str | None:
        if importlib.util.find_spec("jax") is None:
            return "jax is not installed (pip install 'hvpfast[bench]')"
        try:
            jax = _jax()
            # Handing each call to another thread costs small networks up to a third of their
            # time. Read when the CPU client starts, so it must come first.
            with contextlib.suppress(AttributeError):  # old versions have no such choice
                jax.config.update("jax_cpu_enable_async_dispatch", False)
            # On a GPU the default is TF32, three digits; elsewhere this changes nothing.
            jax.config.update("jax_default_matmul_precision", "highest")
            jax.devices(device)
        except Exception as error:  # jax raises several types of its own
            return f"jax cannot start its {device} device: {error}"
        return None

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        return transforms.forms(operation, num_tangents)

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        jax = _jax()
        if problem.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        device = jax.devices(problem.device)[0]
        V = problem.layout(operation, transforms.split_form(form)[1] == "vmap")
        arguments = jax.device_put((problem.params, problem.x, problem.y, V), device)
        run = functools.partial(
            _run,
            operation=operation,
            form=form,
            num_tangents=problem.num_tangents,
            activation=problem.case.activation,
        )
        outputs = common.named_outputs(operation)
        if operation == "train_step":
            call, outputs = _step(jax, run, arguments), _step_outputs
        elif operation == "hvp_warm":
            call = _warm(jax, form, problem.case.activation, arguments)
        else:
            call = functools.partial(jax.jit(run), *arguments)
        if problem.device == "cpu":  # dispatch is synchronous; a GPU's calls are queued
            return Prepared(lambda: jax.block_until_ready(call()), outputs)
        return Prepared(call, outputs, wait=jax.block_until_ready)


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
    return lambda: compiled(kept, V)


def _step(jax: Any, run: Callable[..., Any], arguments: Any) -> Callable[[], Any]:
    """Adam on the penalised loss, gradient and update in one jitted function, buffers donated."""
    params, x, y, V = arguments
    lr, eps, b1, b2 = ADAM["lr"], ADAM["eps"], 0.9, 0.999

    def step(p: Any, m: Any, v: Any, t: Any, x: Any, y: Any, V: Any) -> Any:
        g = run(p, x, y, V)[2]
        m = tuple(b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True))
        v = tuple(b2 * a + (1 - b2) * b * b for a, b in zip(v, g, strict=True))
        c1, c2 = 1 - b1**t, 1 - b2**t
        p = tuple(
            w - lr * (a / c1) / (jax.numpy.sqrt(b / c2) + eps)
            for w, a, b in zip(p, m, v, strict=True)
        )
        return g, p, m, v, t + 1

    compiled = jax.jit(step, donate_argnums=(0, 1, 2, 3))
    zeros = [jax.tree_util.tree_map(jax.numpy.zeros_like, params) for _ in range(2)]
    start = jax.tree_util.tree_map(jax.numpy.array, params)  # copies: the step's own to donate
    state: list[Any] = [start, *zeros, jax.numpy.ones(())]

    def call() -> Any:
        gradient, *state[:] = compiled(*state, x, y, V)
        return gradient, state[0]

    return call


def _step_outputs(out: Any) -> dict[str, Any]:
    return {"gradient": common.flat(out[0]), "params": common.flat(out[1])}
