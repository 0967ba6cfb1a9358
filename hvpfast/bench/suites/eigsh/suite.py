"""Eigenpairs of trained networks' Hessians: time and products against SciPy's eigsh.

Every solver starts from the network and its data and ends with k eigenpairs: building operators,
graphs and linearizations is part of the time. Before anything is timed, eigenvalues are compared
with those of the peers, and residuals are measured with products in float64.

Peers: ``scipy.sparse.linalg.eigsh`` (ARPACK, its default number of Lanczos vectors, the same tol)
on Hessian-vector products of torch's double backward with a retained graph, and on curvlinops.
Products are also counted against unrestarted Lanczos with full orthogonalisation in float64, which
checks its residuals after every product: no Krylov method takes fewer from the same start.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hvpfast as hf
from hvpfast.analysis.eigen.solver import eigsh
from hvpfast.bench import record, tables
from hvpfast.bench.measure import torch_threads
from hvpfast.bench.suites.eigsh import trained
from hvpfast.bench.suites.eigsh.solvers import LOSS, SEED, TOL, Found, least_products, ours, solvers
from hvpfast.bench.suites.eigsh.trained import Trained, train
from hvpfast.lab.environment import timing_conditions, usable_cores
from hvpfast.lab.measure import timing

DESCRIPTION = "Time eigenpairs of trained networks against SciPy's eigsh on other products."
EIGENVALUE_RTOL = 1e-5
SWEEP = tuple(2e-4 * i for i in range(6))


@dataclass(frozen=True)
class Case:
    """A trained network, k, and the ratios of times that are asked for, by peer."""

    k: int
    make: Callable[[], Trained]
    text: str
    bars: dict[str, float]


DIGITS = (784, 128, 128, 10)
SMALL = (40, 32, 32, 10)
WIDE = (3072, 256, 100)

CASES = {
    "digits": Case(
        30,
        lambda: train(DIGITS, "sigmoid", trained.digits(), steps=1400),
        "784-128-128-10 sigmoid trained on digits at 28x28, N = 1797",
        {"scipy, torch": 4.0},
    ),
    "digits-shifted": Case(
        30,
        lambda: train(DIGITS, "sigmoid", trained.shifted_digits(10000), steps=1200, batch=128),
        "784-128-128-10 sigmoid trained on shifted digits, N = 10000",
        {"scipy, torch": 1.8, "scipy, curvlinops": 2.5},
    ),
    "mnist1d": Case(
        30,
        lambda: train(SMALL, "relu", trained.mnist1d(5000), steps=3000),
        "40-32-32-10 relu trained on MNIST-1D, N = 4000",
        {"scipy, torch": 5.0},
    ),
    "minibatch": Case(
        10,
        lambda: _first(train(WIDE, "relu", trained.synthetic(640, 3072, 100), steps=5), 64),
        "3072-256-100 relu after 5 steps, mini-batch of N = 64",
        {"scipy, torch": 8.0},
    ),
}
QUICK_CASES = {
    "quick": Case(
        3,
        lambda: train((12, 8, 4), "sigmoid", trained.synthetic(40, 12, 4), steps=30),
        "12-8-4 sigmoid, N = 40",
        {"scipy, torch": 0.0},
    ),
    "quick-minibatch": Case(
        3,
        lambda: _first(train((40, 8, 4), "relu", trained.synthetic(40, 40, 4), steps=10), 8),
        "40-8-4 relu, mini-batch of N = 8",
        {"scipy, torch": 0.0},
    ),
}


def _first(net: Trained, count: int) -> Trained:
    return replace(net, x=net.x[:count], y=net.y[:count])


# ---- measurements ----


def _relative_residual(net: Trained, found: Found) -> float:
    """max ||H y - theta y|| / |theta| with products in float64."""
    H = hf.HessianOperator(net.model, LOSS, None, (net.x, net.y), dtype=torch.float64)
    worst = 0.0
    for value, column in zip(found.values, found.vectors.T, strict=True):
        y = column.double()
        y = y / y.norm()
        worst = max(worst, float((H @ y - value * y).norm()) / abs(value))
    return worst


def measure(name: str, case: Case, rounds: int) -> dict[str, Any]:
    """One case: checked, then timed in rounds that take the solvers in turn."""
    start = time.perf_counter()
    net = case.make()
    row: dict[str, Any] = {
        "case": name, "text": case.text, "k": case.k, "tol": TOL, "num_samples": len(net.y),
        "num_params": sum(p.numel() for p in net.model.parameters()),
        "loss": net.loss, "accuracy": net.accuracy,
        "training_s": round(time.perf_counter() - start, 1), "bars": case.bars,
    }  # fmt: skip
    first = ours(net, case.k)
    calls, row["skipped"] = solvers(net, case.k, "not compressed" not in first.note)
    found, estimates = dict[str, Found](), dict[str, float]()
    for key, call in calls.items():
        began = time.perf_counter()
        found[key] = call()
        estimates[key] = time.perf_counter() - began
    truth = found["scipy, torch"].values
    row["least_products"] = least_products(net, case.k)
    disturbance = timing.Disturbance()
    cpu: dict[str, list[float]] = {key: [] for key in calls}

    def clocked(key: str) -> Callable[[], None]:
        def call() -> None:
            began = time.process_time()
            calls[key]()
            cpu[key].append(time.process_time() - began)

        return call

    times = timing.interleave({key: clocked(key) for key in calls}, estimates, rounds)
    row["disturbance"] = disturbance.share()
    reference = np.array(times["hvpfast"].seconds)
    row["solvers"] = {}
    for key, result in found.items():
        seconds, ratios = times[key], np.array(times[key].seconds) / reference
        low, high = np.percentile(ratios, (25, 75))
        row["solvers"][key] = {
            "num_matvecs": result.num_matvecs,
            "eigenvalue_difference": float(np.max(np.abs(result.values / truth - 1))),
            "relative_residual": _relative_residual(net, result),
            "note": result.note,
            "median_s": seconds.median, "q1_s": seconds.quartiles[0], "q3_s": seconds.quartiles[1],
            "cpu_median_s": float(np.median(cpu[key])),
            "ratio": float(np.median(ratios)), "ratio_q1": float(low), "ratio_q3": float(high),
        }  # fmt: skip
    row["eigenvalues"] = [float(value) for value in found["hvpfast"].values]
    row["wrong"] = _wrong(row)
    return row


def _wrong(row: dict[str, Any]) -> list[str]:
    """What of ours is not as promised."""
    wrong = []
    for key, solver in row["solvers"].items():
        if key.startswith("hvpfast"):
            if solver["eigenvalue_difference"] > EIGENVALUE_RTOL:
                wrong.append(f"{key}: eigenvalues differ from SciPy's")
            if solver["relative_residual"] > TOL:
                wrong.append(f"{key}: a residual is above tol")
    return wrong


def sweep(k: int, quick: bool) -> dict[str, Any]:
    """Products over a sweep of weight decays, each net trained on from its neighbour's weights.

    Cold: from a random start; warm: from the eigenvectors at the neighbouring weight decay.
    """
    sizes, activation = ((12, 8, 4), "sigmoid") if quick else (SMALL, "relu")
    data = trained.synthetic(40, 12, 4) if quick else trained.mnist1d(5000)
    steps = (30, 10) if quick else (2000, 500)
    model = train(sizes, activation, data, steps=steps[0]).model
    rows, last = [], None
    for index, decay in enumerate(SWEEP[:3] if quick else SWEEP):
        net = train(
            sizes, activation, data, steps=steps[1], weight_decay=decay, model=model, seed=index
        )
        model = net.model
        H = hf.HessianOperator(model, LOSS, None, data)
        cold = eigsh(H, k, tol=TOL, seed=SEED)
        row: dict[str, Any] = {"weight_decay": decay, "loss": net.loss, "cold": cold.num_matvecs}
        row |= dict.fromkeys(("warm", "eigenvalue_difference"))
        if last is not None:
            warm = eigsh(H, k, tol=TOL, seed=SEED, V0=last)
            difference = float((warm.eigenvalues / cold.eigenvalues - 1).abs().max())
            row |= {"warm": warm.num_matvecs, "eigenvalue_difference": difference}
        last = cold.eigenvectors
        rows.append(row)
    return {"k": k, "rows": rows}


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, known = parser.add_argument, ", ".join(CASES)
    add("--cases", nargs="+", choices=CASES, default=[], metavar="CASE", help=f"of {known}")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--threads", type=int, default=usable_cores())
    add("--quick", action="store_true", help="tiny nets, one round")
    add("--no-sweep", action="store_true", help="leave out the warm starts")
    add("--out", type=Path, metavar="DIR", help="folder for the record")


def run(arguments: argparse.Namespace) -> int:
    """Measure; the exit status is 1 where a result of ours was wrong, else 0."""
    quick = arguments.quick
    cases = QUICK_CASES if quick else {n: CASES[n] for n in arguments.cases or CASES}
    rounds = 1 if quick else arguments.rounds
    with torch_threads(arguments.threads):
        result: dict[str, Any] = {
            "environment": timing_conditions(),
            "command": record.command_line(),
            "settings": {"rounds": rounds, "threads": arguments.threads, "quick": quick},
            "rows": [],
            "sweeps": [],
        }
        for name, case in cases.items():
            result["rows"].append(measure(name, case, rounds))
            print(render_row(result["rows"][-1]), flush=True)
        for k in () if arguments.no_sweep else (3,) if quick else (10, 30):
            result["sweeps"].append(sweep(k, quick))
            print(render_sweep(result["sweeps"][-1]), flush=True)
    if arguments.out is not None:
        record.keep(arguments.out, result, render(result))
    return int(any(row["wrong"] for row in result["rows"]))


def render(result: dict[str, Any]) -> str:
    return "\n".join([*map(render_row, result["rows"]), *map(render_sweep, result["sweeps"])])


SOLVERS: tables.FixedColumns = (
    ("solver", "solver", "26"),
    ("products", "num_matvecs", ">9"),
    ("median s", lambda s: f"{s['median_s']:.3f}", ">10"),
    ("quartiles", lambda s: f"{s['q1_s']:9.3f}{s['q3_s']:9.3f}", ">18"),
    ("ratio", lambda s: f"{s['ratio']:.2f}", ">8"),
    ("quartiles", lambda s: f"{s['ratio_q1']:7.2f}{s['ratio_q3']:7.2f}", ">14"),
    ("residual", lambda s: f"{s['relative_residual']:.1e}", ">10"),
    ("values", lambda s: f"{s['eigenvalue_difference']:.1e}", ">9"),
)
STARTS: tables.FixedColumns = (
    ("weight decay", lambda row: f"{row['weight_decay']:.1e}", ">13"),
    ("cold", "cold", ">6"),
    ("warm", lambda row: tables.number(row["warm"], "d"), ">6"),
)


def render_row(row: dict[str, Any]) -> str:
    lines = [
        f"{row['text']}: P = {row['num_params']:,}, k = {row['k']}, loss {row['loss']:.3g}; "
        f"unrestarted Lanczos takes {row['least_products']} products",
        f"  {tables.fixed_head(SOLVERS)}",
    ]
    for name, solver in row["solvers"].items():
        lines.append(f"  {tables.fixed_line(SOLVERS, {'solver': name, **solver})}")
    lines += [f"  {key}: {reason}" for key, reason in row["skipped"].items()]
    lines.append(f"  hvpfast: {row['solvers']['hvpfast']['note']}")
    lines += [f"  WRONG: {text}" for text in row["wrong"]]
    for peer, bar in row["bars"].items():
        if peer in row["solvers"] and bar:
            lines.append(f"  aim: {bar:g} times {peer}; {row['solvers'][peer]['ratio']:.2f} here")
    return "\n".join(lines) + "\n"


def render_sweep(found: dict[str, Any]) -> str:
    lines = [
        f"sweep of weight decays, k = {found['k']}: products",
        f"  {tables.fixed_head(STARTS)}",
        *(f"  {tables.fixed_line(STARTS, row)}" for row in found["rows"]),
    ]
    pairs = [(row["cold"], row["warm"]) for row in found["rows"] if row["warm"] is not None]
    share = sum(warm for _, warm in pairs) / sum(cold for cold, _ in pairs)
    lines.append(f"  warm starts take {share:.0%} of the products of cold ones")
    return "\n".join(lines) + "\n"
