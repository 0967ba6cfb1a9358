"""Exact tr H^2 and its gradient against estimates with K probes and against dense Hessians.

Every call starts from the parameters: the primal passes are in the clock. Exact forms are checked
against tr H^2 in float64, forms with probes against the same probes in float64, before anything is
timed. The record holds the standard deviation of the estimates too: the exact value has none.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.bench import record
from hvpfast.bench.cases import CASES, PENALTY_WEIGHTS, QUICK_CASES, Case, Problem, build
from hvpfast.bench.providers import PROVIDERS, transforms
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers.jax_jit import mlp_loss
from hvpfast.lab.environment import usable_cores
from hvpfast.lab.measure import timing

DESCRIPTION = "Exact tr H^2 and its gradient against K probes and dense Hessians."
CASE_NAMES = ("40-32-10", "784-128-128-10-n512", "3072-256-100")
TOLERANCE = 1e-3  # relative, of float32 results
MOST_DENSE = 3000  # parameters of the largest Hessian that is formed
SCREEN = 1.5  # a form this many times slower than its provider's best is not timed further
SPREAD_PROBES = 256  # probes from which the standard deviation of an estimate is taken


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hvpfast bench exact`` to a parser."""
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASE_NAMES, default=list(CASE_NAMES), metavar="CASE",
        help=f"default: all of {', '.join(CASE_NAMES)}")  # fmt: skip
    add("--probes", type=int, default=8, metavar="K", help="default: %(default)s")
    add("--rounds", type=int, default=25, help="default: %(default)s")
    add("--threads", type=int, default=usable_cores(), help="default: the usable cores")
    add("--quick", action="store_true", help="a tiny case in seconds: does everything work?")
    add("--out", type=Path, metavar="DIR", help="folder for bench.json and bench.txt")


def run(arguments: argparse.Namespace) -> int:
    """Run the suite.

    Returns:
        The exit status: 1 when a form of ours is wrong, else 0.
    """
    cases = [QUICK_CASES["quick"]] if arguments.quick else [CASES[n] for n in arguments.cases]
    rounds = 2 if arguments.quick else arguments.rounds
    result: dict[str, Any] = {
        "suite": "exact",
        "command": record.command_line(),
        "environment": record.environment(),
        "probes": arguments.probes,
        "threads": arguments.threads,
        "rounds": rounds,
        "tolerance": TOLERANCE,
        "rows": [],
    }
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        for case in cases:
            problem = build(case, arguments.probes)
            for operation in ("value", "gradient"):
                result["rows"] += measure(problem, operation, rounds)
    finally:
        torch.set_num_threads(before)
    text = render(result)
    print(text)
    if arguments.out is not None:
        record.keep(arguments.out, result, text)
    ours = [row for row in result["rows"] if row["provider"] == "hvpfast"]
    return int(any(row["status"] in ("wrong", "failed") for row in ours))


def measure(problem: Problem, operation: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one case and operation: correctness, then times in interleaved rounds."""
    truths = {exact: truth(problem, operation, exact) for exact in (True, False)}
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Callable[[], Any]] = {}
    for (provider, form, exact), make in forms(problem, operation).items():
        row: dict[str, Any] = {
            "case": problem.case.name, "operation": operation, "provider": provider, "form": form,
            "exact": exact, "relative_std": None if exact else spread(problem),
        }  # fmt: skip
        key = f"{provider}: {form}"
        rows[key] = row
        try:
            call, outputs = make()
            errors = [
                float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
                for a, b in zip(outputs(call()), truths[exact], strict=True)
            ]
        except Exception as error:  # a peer that breaks is reported, and the run goes on
            row.update(status="failed", reason=f"{type(error).__name__}: {error}"[:300])
            continue
        row["errors"] = errors
        if not max(errors) < TOLERANCE:
            row.update(status="wrong", reason=f"relative errors {errors}")
            continue
        row.update(status="checked", median_s=timing.estimate(call))
        ready[key] = call
    for key in list(ready):
        group = [r["median_s"] for k, r in rows.items()
                 if k in ready and (r["provider"], r["exact"]) ==
                 (rows[key]["provider"], rows[key]["exact"])]  # fmt: skip
        if rows[key]["median_s"] > SCREEN * min(group):
            rows[key].update(status="screened")
    ready = {key: call for key, call in ready.items() if rows[key]["status"] == "checked"}
    busy = timing.Disturbance()
    estimates = {key: float(rows[key]["median_s"]) for key in ready}
    for key, times in timing.interleave(ready, estimates, rounds).items():
        low, high = times.quartiles
        rows[key].update(
            status="timed", median_s=times.median, q1_s=low, q3_s=high, inner=times.inner
        )
    share = busy.share()
    return [{**row, "disturbance": share} for row in rows.values()]


# ---- what is compared ----

_Outputs = Callable[[Any], tuple[Any, ...]]
_Form = Callable[[], tuple[Callable[[], Any], _Outputs]]


def forms(problem: Problem, operation: str) -> dict[tuple[str, str, bool], _Form]:
    """(provider, form, whether it is exact) -> what prepares its call."""
    K, gradient = problem.num_tangents, operation == "gradient"
    table: dict[tuple[str, str, bool], _Form] = {
        ("hvpfast", "exact", True): functools.partial(_ours, problem, gradient, "exact"),
        ("hvpfast", f"{K} probes", False): functools.partial(_ours, problem, gradient, "probes"),
    }
    if gradient:
        for what in ("exact", "probes"):
            name = "exact, autograd" if what == "exact" else f"{K} probes, autograd"
            table["hvpfast", name, what == "exact"] = functools.partial(_autograd, problem, what)
    small = problem.case.num_params <= MOST_DENSE
    for form in transforms.forms("penalty" if gradient else "hvp", K):
        table["jax", f"{K} probes, {form}", False] = functools.partial(
            _jax, problem, gradient, form
        )
    if small:
        table["jax", "dense hessian", True] = functools.partial(_jax, problem, gradient, "dense")
        table["torch", "dense torch.func.hessian", True] = functools.partial(
            _dense, problem, gradient
        )
    eager = PROVIDERS["torch-eager"]
    for form in eager.forms("penalty" if gradient else "hvp", K):
        table["torch", f"{K} probes, {form}", False] = functools.partial(
            _eager, problem, gradient, form
        )
    if not gradient and small:
        table["hvpfast", "identity columns", True] = functools.partial(_columns, problem)
    return table


def _model(problem: Problem) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    params, x, y = common.inputs(problem)
    model = hf.MLP(problem.case.sizes, problem.case.activation)
    with torch.no_grad():
        model.flat.copy_(torch.cat([p.reshape(-1) for p in params]))
    return model, (x, y)


def _ours(problem: Problem, gradient: bool, what: str) -> tuple[Callable[[], Any], _Outputs]:
    model, (x, y) = _model(problem)
    spec, flat = hf.spec_of(model, F.cross_entropy), model.get_parameter("flat").detach()
    tangents = torch.tensor(problem.tangents("hvp")).T
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


def _autograd(problem: Problem, what: str) -> tuple[Callable[[], Any], _Outputs]:
    model, data = _model(problem)
    flat = model.get_parameter("flat")
    options: dict[str, Any] = {"estimator": "exact"}
    if what == "probes":
        options = {"tangents": torch.tensor(problem.tangents("hvp")).T}

    def penalised() -> Any:
        flat.grad = None
        loss, penalty = hf.hessian_penalty(model, F.cross_entropy, data, **options)
        torch.autograd.backward(PENALTY_WEIGHTS[0] * loss + PENALTY_WEIGHTS[1] * penalty)
        return penalty.detach(), flat.grad

    return penalised, lambda out: out


def _columns(problem: Problem) -> tuple[Callable[[], Any], _Outputs]:
    model, (x, y) = _model(problem)
    spec, flat = hf.spec_of(model, F.cross_entropy), model.get_parameter("flat").detach()
    columns = torch.eye(flat.numel())
    return (
        lambda: hf.hvp(hf.linearize(spec, flat, x, y), columns).square().sum(),
        lambda out: (out,),
    )


def _dense(problem: Problem, gradient: bool) -> tuple[Callable[[], Any], _Outputs]:
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

    def total(p: Tensor) -> tuple[Tensor, Tensor]:
        value = square(p)
        return PENALTY_WEIGHTS[0] * loss(p) + PENALTY_WEIGHTS[1] * value, value

    if not gradient:
        return lambda: square(flat), lambda out: (out,)
    return lambda: torch.func.grad(total, has_aux=True)(flat), lambda out: (out[1], out[0])


def _eager(problem: Problem, gradient: bool, form: str) -> tuple[Callable[[], Any], _Outputs]:
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


def _jax(problem: Problem, gradient: bool, form: str) -> tuple[Callable[[], Any], _Outputs]:
    reason = PROVIDERS["jax"].unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    jax: Any = importlib.import_module("jax")
    tangents, K = problem.tangents("hvp"), problem.num_tangents
    stacked = form.endswith("vmap")
    V: Any = problem.stack(tangents) if stacked else tuple(map(problem.split, tangents))
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

        def total(p: Any) -> Any:
            value = square(p)
            return PENALTY_WEIGHTS[0] * f(p) + PENALTY_WEIGHTS[1] * value, value

        slope, value = jax.grad(total, has_aux=True)(params)
        return value, slope

    compiled = jax.jit(run)
    outputs: _Outputs = lambda out: (out[0], common.flat(out[1])) if gradient else (out,)  # noqa: E731
    return lambda: jax.block_until_ready(compiled(*arguments)), outputs


# ---- truths and words ----


def _double(problem: Problem) -> tuple[hf.Linearization, Tensor]:
    """The linearization by the reference backend, and the probes (P, K), in float64."""
    double = problem.astype("float64")
    params, x, y = common.inputs(double)
    spec = hf.MLPSpec(problem.case.sizes, problem.case.activation)
    lin = hf.linearize(spec, list(params), x, y, backend="reference")
    return lin, torch.tensor(double.tangents("hvp")).T


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


def render(result: dict[str, Any]) -> str:
    """The record as a table."""
    lines = [
        f"tr H^2 with and without its gradient, from the parameters; float32, "
        f"{result['threads']} threads, medians of {result['rounds']} interleaved rounds",
    ]
    for row in result["rows"]:
        head = (row["case"], row["operation"])
        if f"{head[0]}: {head[1]}" not in lines:
            lines += ["", f"{head[0]}: {head[1]}"]
        name = f"  {row['provider']:8} {row['form']:44}"
        if row["status"] in ("failed", "wrong"):
            lines.append(f"{name} {row['status']}: {row['reason']}")
            continue
        std = "exact" if row["exact"] else f"std {100 * row['relative_std']:.2g} %"
        note = "" if row["status"] == "timed" else "  (one estimate, not timed further)"
        lines.append(f"{name} {1e6 * row['median_s']:12.1f} us  {std}{note}")
    return "\n".join(lines)
