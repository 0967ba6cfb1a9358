"""Exact tr H^2 and its gradient against estimates with K probes and against dense Hessians.

Every call starts from the parameters, so primal passes are timed too. Exact forms are checked
against tr H^2 in float64, forms with probes against the same probes in float64, before anything is
timed. The record holds the standard deviation of the estimates too: the exact value has none.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import numpy as np

from hvpfast.bench import record
from hvpfast.bench.cases import CASES, QUICK_CASES, Problem, build
from hvpfast.bench.measure import Cell, Form, clock, torch_threads
from hvpfast.bench.suites.exact.forms import Prepare, forms, spread, truth
from hvpfast.lab.environment import usable_cores

DESCRIPTION = "Exact tr H^2 and its gradient against K probes and dense Hessians."
CASE_NAMES = ("40-32-10", "784-128-128-10-n512", "3072-256-100")
TOLERANCE = 1e-3  # relative, of float32 results
# What a row says of the measurement, after what it is about.
MEASURED = ("errors", "status", "reason", "median_s", "q1_s", "q3_s", "inner")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASE_NAMES, default=list(CASE_NAMES), metavar="CASE",
        help=f"default: all of {', '.join(CASE_NAMES)}")  # fmt: skip
    add("--probes", type=int, default=8, metavar="K", help="default: %(default)s")
    add("--rounds", type=int, default=25, help="default: %(default)s")
    add("--threads", type=int, default=usable_cores(), help="default: the usable cores")
    add("--quick", action="store_true", help="a tiny case in seconds: does everything work?")
    record.add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """The exit status is 1 when a form of ours is wrong, else 0."""
    cases = [QUICK_CASES["quick"]] if arguments.quick else [CASES[n] for n in arguments.cases]
    rounds = 2 if arguments.quick else arguments.rounds
    result: dict[str, Any] = {
        **record.head("exact"),
        "probes": arguments.probes,
        "threads": arguments.threads,
        "rounds": rounds,
        "tolerance": TOLERANCE,
        "rows": [],
    }
    with torch_threads(arguments.threads):
        for case in cases:
            problem = build(case, arguments.probes)
            for operation in ("value", "gradient"):
                result["rows"] += measure(problem, operation, rounds)
    record.publish(result, render(result), arguments.out)
    return int(record.broken(row for row in result["rows"] if row["provider"] == "hvpfast"))


def measure(problem: Problem, operation: str, rounds: int) -> list[dict[str, Any]]:
    truths = {exact: truth(problem, operation, exact) for exact in (True, False)}
    cell = Cell()
    for (provider, form, exact), make in forms(problem, operation).items():
        identity = {
            "case": problem.case.name, "operation": operation, "provider": provider, "form": form,
            "exact": exact, "relative_std": None if exact else spread(problem),
        }  # fmt: skip
        cell.check(identity, (provider, exact), functools.partial(_judged, make, truths[exact]))
    cell.screen()
    cell.time(rounds)
    return [{**_said(row), "disturbance": cell.disturbance} for row in cell.rows(MEASURED)]


def _judged(make: Prepare, truths: tuple[Any, ...]) -> tuple[Form, dict[str, Any], str]:
    call, outputs = make()
    errors = [
        float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
        for a, b in zip(outputs(call()), truths, strict=True)
    ]
    wrong = "" if max(errors) < TOLERANCE else f"relative errors {errors}"
    return Form(call, clock("cpu")), {"errors": errors}, wrong


def _said(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the columns that say nothing of it; of a screened form the time alone."""
    silent = {name for name in MEASURED if row[name] is None}
    if row["status"] == "screened":
        silent.add("reason")
    return {name: value for name, value in row.items() if name not in silent}


def render(result: dict[str, Any]) -> str:
    lines = [
        f"tr H^2 with and without its gradient, from the parameters; float32, "
        f"{result['threads']} threads, medians of {result['rounds']} interleaved rounds",
    ]
    for row in result["rows"]:
        head = f"{row['case']}: {row['operation']}"
        if head not in lines:
            lines += ["", head]
        name = f"  {row['provider']:8} {row['form']:44}"
        if row["status"] in record.BROKEN:
            lines.append(f"{name} {row['status']}: {row['reason']}")
            continue
        std = "exact" if row["exact"] else f"std {100 * row['relative_std']:.2g} %"
        note = "" if row["status"] == "timed" else "  (one estimate, not timed further)"
        lines.append(f"{name} {1e6 * row['median_s']:12.1f} us  {std}{note}")
    return "\n".join(lines)
