"""Hessian-vector products of many small models at once, each with its own data and tangents.

M models x K tangents of one network, primal passes included. The peers do the same work by vmap and
by batched matrix products, run eagerly, compiled, and recorded as CUDA graphs. Every form is
compared with float64, model by model, before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from hvpfast.bench import peak, record, tables
from hvpfast.bench.cases import CASES, DEVICES, QUICK_CASES, Case
from hvpfast.bench.counts import minimal
from hvpfast.bench.measure import Cell, Form, torch_threads
from hvpfast.bench.report import TIMES, fastest_first, limits_line, machine_line
from hvpfast.bench.suites.models.forms import Models, ModelsForm, forms, truth
from hvpfast.lab.environment import usable_cores

DESCRIPTION = "Many small models at once: products against vmap and batched matrix products."
MIN_ROUNDS = 5
SECONDS_WANTED = 3e-3  # for 451 models x 100 tangents of 40-32-10 on an H100-class GPU
RATIO_WANTED = 100.0  # over torch's vmap and batched products, run eagerly
# What a row says of the measurement, after what it is about.
MEASURED = ("status", "reason", "errors", "median_s", "q1_s", "q3_s", "rounds", "inner")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--case", choices=list(CASES), default="40-32-10", help="default: %(default)s")
    add("--models", type=int, default=451, metavar="M", help="default: %(default)s")
    add("--probes", type=int, default=100, metavar="K", help="default: %(default)s")
    add("--device", choices=DEVICES, default="cpu", help="default: %(default)s")
    add("--rounds", type=int, default=15, help="default: %(default)s")
    add("--threads", type=int, default=usable_cores(), help="default: the usable cores")
    add("--budget", type=float, default=30.0, metavar="SECONDS", help="of timing; rounds are cut")
    add("--deadline", type=float, metavar="SECONDS", help="start no further form after this long")
    add("--quick", action="store_true", help="three tiny models: does everything work?")
    record.add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """The exit status is 1 when a form of ours failed or is wrong, else 0."""
    started = time.perf_counter()
    quick = arguments.quick
    case: Case = QUICK_CASES["quick"] if quick else CASES[arguments.case]
    M, K = (3, 2) if quick else (arguments.models, arguments.probes)
    with torch_threads(arguments.threads):
        limits = peak.limits(arguments.device, arguments.threads, "float32", quick=quick)
        result: dict[str, Any] = {
            **record.head("models"),
            "peak": limits,
            "settings": {
                "case": case.name, "models": M, "probes": K, "device": arguments.device,
                "threads": arguments.threads, "deadline_s": arguments.deadline,
            },
            "rows": [],
        }  # fmt: skip
        problem = Models.build(case, M, K, arguments.device)
        rounds = 2 if quick else arguments.rounds
        result["rows"] = measure(problem, rounds, arguments.budget, arguments.deadline, started)
    macs = M * minimal(case, "hvp", K)[1]
    for row in result["rows"]:
        row.update(macs=macs, **peak.rate(macs, row["median_s"], limits))
    result["marks"] = judge(result)
    result["seconds"] = round(time.perf_counter() - started, 1)
    record.publish(result, render(result), arguments.out)
    return int(record.broken(row for row in result["rows"] if row["kind"] == "ours"))


def measure(
    problem: Models, rounds: int, budget: float, deadline: float | None, started: float
) -> list[dict[str, Any]]:
    exact, allowed = truth(problem)
    cell = Cell()
    for (provider, kind, name), make in forms(problem).items():
        identity = {
            "case": f"{problem.case.name}, {problem.num_models} models",
            "num_tangents": problem.num_tangents, "operation": "hvp",
            "provider": provider, "kind": kind, "form": name,
        }  # fmt: skip
        if deadline is not None and time.perf_counter() - started > deadline:
            cell.leave_out(identity, f"the run's {deadline:g} s were spent")
        else:
            cell.check(identity, provider, functools.partial(_judged, make, exact, allowed))
    del exact
    cell.screen()
    for key, seconds in cell.estimates().items():
        if MIN_ROUNDS * seconds > budget:
            cell.drop(key, f"{MIN_ROUNDS} rounds of it take over {budget:g} s")
    cell.time(cell.rounds_within(budget, rounds, MIN_ROUNDS, calls=2))
    return [{**row, "disturbance": cell.disturbance} for row in cell.rows(MEASURED)]


def _judged(
    make: Callable[[], ModelsForm], exact: torch.Tensor, allowed: float
) -> tuple[Form, dict[str, Any], str]:
    form = make()
    error = worst(form.rows(form.call()), exact)
    right = error <= allowed  # not when it is NaN
    wrong = "" if right else f"error {error:.2e} of its model's, allowed {allowed:.2e}"
    return form, {"errors": {"product": [record.finite(error), allowed]}}, wrong


def worst(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of any model, (M, K, P), relative to the largest entry of its truth."""
    if found.shape != exact.shape:
        return float("inf")
    scale = exact.flatten(1).abs().amax(1)
    error = (found.double() - exact).flatten(1).abs().amax(1)
    return float((error / scale).max())


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the full size must reach on a GPU, for each engine of ours: a time, and a ratio."""
    settings, rows = result["settings"], result["rows"]
    full = (settings["case"], settings["models"], settings["probes"], settings["device"])
    if full != ("40-32-10", 451, 100, "cuda"):
        return []
    timed = record.timed(rows)
    eager = next((r["median_s"] for r in timed if r["kind"] == "eager"), None)
    at_once = {r["provider"]: r["median_s"] for r in timed if r["form"] == "models at once"}
    what, marks = {"case": "40-32-10, 451 models x 100", "operation": "hvp"}, []
    for provider in ("ours-cuda", "ours-triton"):
        seconds = at_once.get(provider)
        ratio = eager / seconds if eager and seconds else None
        marks += [
            {**what, "provider": provider, "against": "seconds", "wanted": SECONDS_WANTED,
             "reached": seconds, "met": None if seconds is None else seconds <= SECONDS_WANTED},
            {**what, "provider": provider, "against": "eager vmap and bmm", "wanted": RATIO_WANTED,
             "reached": ratio, "met": None if ratio is None else ratio >= RATIO_WANTED},
        ]  # fmt: skip
    return marks


def render(result: dict[str, Any]) -> str:
    settings, limits = result["settings"], result["peak"]
    products = settings["models"] * settings["probes"]

    def per_product(row: tables.Row) -> str:
        seconds = row["median_s"]
        return "-" if seconds is None else f"{1e9 * seconds / products:.3g} ns"

    table = tables.fitted((*TIMES, ("per product", per_product)), fastest_first(result["rows"]))
    parts = [
        machine_line(result["environment"], limits),
        limits_line(limits),
        f"\n{settings['case']}, {settings['models']} models x {settings['probes']} tangents on "
        f"{settings['device']}: products H v, primal passes included",
        table,
    ]
    parts += [
        f"  {row['status']}: {row['provider']}: {row['form']}: {row['reason'].splitlines()[0]}"
        for row in result["rows"]
        if row["status"] in (*record.BROKEN, "left out")
    ]
    for mark in result["marks"]:
        met = "not timed" if mark["met"] is None else "met" if mark["met"] else "NOT met"
        reached = tables.number(mark["reached"], ".3g")
        parts.append(
            f"  {mark['provider']}, {mark['against']}: wanted {mark['wanted']:g}, reached {reached}"
            f": {met}"
        )
    return "\n".join(parts)
