"""Ways to tr H^2 and its gradient: exact, from probes, from dense Hessians; and their truth."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import hvpfast as hf
from hvpfast.bench.cases import PENALTY_WEIGHTS, Case, Problem, build
from hvpfast.bench.providers import PROVIDERS, transforms
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers.jax_jit import mlp_loss
from hvpfast.bench.providers.ours import columns, spec_of
from hvpfast.bench.providers.torch_plain import flat_model

MOST_DENSE = 3000  # parameters of the largest Hessian that is formed
SPREAD_PROBES = 256  # probes from which the standard deviation of an estimate is taken

Outputs = Callable[[Any], tuple[Any, ...]]
Prepare = Callable[[], tuple[Callable[[], Any], Outputs]]


def forms(problem: Problem, operation: str) -> dict[tuple[str, str, bool], Prepare]:
    """(provider, form, whether it is exact) -> what prepares its call."""
    K, gradient = problem.num_tangents, operation == "gradient"
    table: dict[tuple[str, str, bool], Prepare] = {
        ("hvpfast", "exact", True): partial(_ours, problem, gradient, "exact"),
        ("hvpfast", f"{K} probes", False): partial(_ours, problem, gradient, "probes"),
    }
    if gradient:
        table["hvpfast", "exact, autograd", True] = partial(_autograd, problem, "exact")
        table["hvpfast", f"{K} probes, autograd", False] = partial(_autograd, problem, "probes")
    products = "penalty" if gradient else "hvp"
    small = problem.case.num_params <= MOST_DENSE
    for form in transforms.forms(products, K):
        table["jax", f"{K} probes, {form}", False] = partial(_jax, problem, gradient, form)
    if small:
        table["jax", "dense hessian", True] = partial(_jax, problem, gradient, "dense")
        table["torch", "dense torch.func.hessian", True] = partial(_dense, problem, gradient)
    for form in PROVIDERS["torch-eager"].forms(products, K):
        table["torch", f"{K} probes, {form}", False] = partial(_eager, problem, gradient, form)
    if not gradient and small:
        table["hvpfast", "identity columns", True] = partial(_columns, problem)
    return table


def _ours(problem: Problem, gradient: bool, what: str) -> tuple[Callable[[], Any], Outputs]:
    model, (_, x, y) = flat_model(problem), common.inputs(problem)
    spec, flat = hf.spec_of(model, F.cross_entropy), model.flat.detach()
    tangents = columns(problem.tangents("hvp"))
    options: dict[str, Any] = {"weights": PENALTY_WEIGHTS}
    options |= {"estimator": "exact"} if what == "exact" else {"tangents": tangents}

    def value() -> Any:
        if what == "probes":
            return hf.hvp(hf.linearize(spec, flat, x, y, order=2), tangents).square().sum(0).mean()
        with torch.no_grad():
            return hf.hessian_penalty(model, F.cross_entropy, (x, y), estimator="exact")[1]

    if gradient:
        return lambda: hf.penalty(hf.linearize(spec, flat, x, y), **options), lambda out: out[1:]
    return value, lambda out: (out,)


def _autograd(problem: Problem, what: str) -> tuple[Callable[[], Any], Outputs]:
    model = flat_model(problem)
    flat = model.flat
    _, x, y = common.inputs(problem)
    options: dict[str, Any] = {"estimator": "exact"}
    if what == "probes":
        options = {"tangents": columns(problem.tangents("hvp"))}

    def penalised() -> Any:
        flat.grad = None
        loss, penalty = hf.hessian_penalty(model, F.cross_entropy, (x, y), **options)
        torch.autograd.backward(PENALTY_WEIGHTS[0] * loss + PENALTY_WEIGHTS[1] * penalty)
        return penalty.detach(), flat.grad

    return penalised, lambda out: out


def _columns(problem: Problem) -> tuple[Callable[[], Any], Outputs]:
    model, (_, x, y) = flat_model(problem), common.inputs(problem)
    spec, flat = hf.spec_of(model, F.cross_entropy), model.flat.detach()
    identity = torch.eye(flat.numel())
    return (
        lambda: hf.hvp(hf.linearize(spec, flat, x, y), identity).square().sum(),
        lambda out: (out,),
    )


def _dense(problem: Problem, gradient: bool) -> tuple[Callable[[], Any], Outputs]:
    params, x, y = common.inputs(problem)
    flat = torch.cat([p.reshape(-1) for p in params])
    shapes, numels = problem.case.shapes, [p.numel() for p in params]
    act = common.ACTIVATIONS[problem.case.activation]

    def loss(p: Tensor) -> Tensor:
        parts = [t.view(s) for t, s in zip(torch.split(p, numels), shapes, strict=True)]
        return common.mlp_loss(parts, x, y, act)

    def square(p: Tensor) -> Tensor:
        H: Tensor = torch.func.hessian(loss)(p)
        return H.square().sum()

    if not gradient:
        return lambda: square(flat), lambda out: (out,)
    return lambda: _weighted(torch.func, loss, square)(flat), lambda out: (out[1], out[0])


def _weighted(T: Any, f: Callable[[Any], Any], square: Callable[[Any], Any]) -> Callable[..., Any]:
    """params -> the gradient of the weighted sum of f and ``square``, and the value of ``square``.

    ``T``: torch.func or jax.
    """

    def total(p: Any) -> tuple[Any, Any]:
        value = square(p)
        return PENALTY_WEIGHTS[0] * f(p) + PENALTY_WEIGHTS[1] * value, value

    transformed: Callable[..., Any] = T.grad(total, has_aux=True)
    return transformed


def _eager(problem: Problem, gradient: bool, form: str) -> tuple[Callable[[], Any], Outputs]:
    operation = "penalty" if gradient else "hvp"
    call = PROVIDERS["torch-eager"].prepare(form, operation, problem).call
    if gradient:
        return call, lambda out: (out[1].detach(), common.flat(out[2]))
    K = problem.num_tangents

    def value() -> Any:
        found = call()
        leaves = found if form.endswith("batched") else [leaf for tree in found for leaf in tree]
        return sum(leaf.square().sum() for leaf in leaves) / K

    return value, lambda out: (out,)


def _jax(problem: Problem, gradient: bool, form: str) -> tuple[Callable[[], Any], Outputs]:
    if reason := PROVIDERS["jax"].unavailable():
        raise RuntimeError(reason)
    jax: Any = importlib.import_module("jax")
    K, stacked = problem.num_tangents, form.endswith("vmap")
    V = problem.layout("hvp", stacked)
    arguments = jax.device_put((problem.params, problem.x, problem.y, V), jax.devices("cpu")[0])

    def run(params: Any, x: Any, y: Any, V: Any) -> Any:
        def f(p: Any) -> Any:
            return mlp_loss(p, x, y, problem.case.activation)

        def square(p: Any) -> Any:
            if form == "dense":
                return sum((leaf**2).sum() for row in jax.hessian(f)(p) for leaf in row)
            found = transforms.products(jax, f, form, p, V)
            rows = [found] if stacked else found
            return sum(transforms.dot(h, h) for h in rows) / K

        if not gradient:
            return square(params)
        if form != "dense":
            found = transforms.penalty(jax, f, form, params, V, PENALTY_WEIGHTS, K)
            return found[1], found[2]

        slope, value = _weighted(jax, f, square)(params)
        return value, slope

    compiled = jax.jit(run)
    outputs: Outputs = lambda out: (out[0], common.flat(out[1])) if gradient else (out,)  # noqa: E731
    return lambda: jax.block_until_ready(compiled(*arguments)), outputs


# ---- truths ----


def _double(problem: Problem) -> tuple[hf.Linearization, Tensor]:
    """The linearization by the reference backend, and the probes (P, K), in float64."""
    double = problem.astype("float64")
    params, x, y = common.inputs(double)
    lin = hf.linearize(spec_of(problem), list(params), x, y, backend="reference")
    return lin, columns(double.tangents("hvp"))


def truth(problem: Problem, operation: str, exact: bool) -> tuple[Any, ...]:
    """The value, and for a gradient that of the weighted sum, in float64."""
    lin, V = _double(problem)
    if not exact:
        _, value, gradient = hf.penalty(lin, V, weights=PENALTY_WEIGHTS)
    else:
        chosen = [True] * len(lin.spec.shapes)
        if operation == "value":
            return (np.float64(lin.state.inner_product(lin.state, False, chosen)),)
        found = lin.state.exact_penalty("fro2", False, chosen)
        value, gradient = found.penalty, found.gradient(*PENALTY_WEIGHTS)
    return (value.numpy(), gradient.numpy()) if operation == "gradient" else (value.numpy(),)


@functools.lru_cache(maxsize=8)
def _squares_spread(case: Case) -> float:
    """Standard deviation of ||H v||^2 over probes, relative to its mean."""
    lin, _ = _double(build(case, 1))
    V = hf.probes(lin.num_params, SPREAD_PROBES, seed=1, dtype=torch.float64)
    squares = torch.cat([hf.hvp(lin, part).square().sum(0) for part in torch.split(V, 16, dim=1)])
    return float(squares.std() / squares.mean())


def spread(problem: Problem) -> float:
    """Relative standard deviation of the mean over the K probes."""
    return float(_squares_spread(problem.case) / problem.num_tangents**0.5)
