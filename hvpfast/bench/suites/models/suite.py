"""Hessian-vector products of many small models at once, each with its own data and tangents.

M models x K tangents of one network, primal passes included. The peers do the same work by vmap and
by batched matrix products, run eagerly, compiled, and recorded as CUDA graphs. Every form is held
against float64, model by model, before anything is timed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from hvpfast.bench import gpu_peak, peak, record
from hvpfast.bench.cases import CASES, DEVICES, QUICK_CASES, Case
from hvpfast.bench.counts import minimal
from hvpfast.bench.report import duration, limits_line, machine_line, table
from hvpfast.bench.suites.models.forms import Form, Models, forms, truth
from hvpfast.lab.environment import usable_cores
from hvpfast.lab.measure import timing

DESCRIPTION = "Many small models at once: products against vmap and batched matrix products."
SCREEN = 1.5  # a form this many times slower than its provider's best is not timed further
MIN_ROUNDS = 5
SECONDS_WANTED = 3e-3  # for 451 models x 100 tangents of 40-32-10 on an H100-class GPU
RATIO_WANTED = 100.0  # over torch's vmap and batched products, run eagerly


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hvpfast bench models`` to a parser."""
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
    add("--out", type=Path, metavar="DIR", help="folder for bench.json and bench.txt")


def run(arguments: argparse.Namespace) -> int:
    """Run the suite.

    Returns:
        The exit status: 1 when a form of ours failed or is wrong, else 0.
    """
    started = time.perf_counter()
    quick = arguments.quick
    case: Case = QUICK_CASES["quick"] if quick else CASES[arguments.case]
    M, K = (3, 2) if quick else (arguments.models, arguments.probes)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        on_gpu = arguments.device != "cpu"
        limits = gpu_peak.measure("float32") if on_gpu else peak.measure(
            arguments.threads, "float32", 0.02 if quick else 0.2
        )  # fmt: skip
        result: dict[str, Any] = {
            "suite": "models",
            "command": record.command_line(),
            "environment": record.environment(),
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
    finally:
        torch.set_num_threads(before)
    for row in result["rows"]:
        _rate(row, problem, limits)
    result["marks"] = judge(result)
    result["seconds"] = round(time.perf_counter() - started, 1)
    text = render(result)
    print(text)
    if arguments.out is not None:
        record.keep(arguments.out, result, text)
    ours = [row for row in result["rows"] if row["kind"] == "ours"]
    return int(any(row["status"] in ("wrong", "failed") for row in ours))


def measure(
    problem: Models, rounds: int, budget: float, deadline: float | None, started: float
) -> list[dict[str, Any]]:
    """The rows: correctness, then times in interleaved rounds."""
    exact, own = truth(problem)
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Form] = {}
    for (provider, kind, name), make in forms(problem).items():
        key = f"{provider}: {name}"
        rows[key] = {
            "case": f"{problem.case.name}, {problem.num_models} models",
            "num_tangents": problem.num_tangents, "operation": "hvp",
            "provider": provider, "kind": kind, "form": name, "status": "left out",
            "reason": None, "errors": None, "median_s": None, "q1_s": None, "q3_s": None,
            "rounds": None, "inner": None,
        }  # fmt: skip
        if deadline is not None and time.perf_counter() - started > deadline:
            rows[key]["reason"] = f"the run's {deadline:g} s were spent"
            continue
        try:
            form = make()
            error = worst(form.rows(form.call()), exact)
            rows[key].update(errors={"product": [record.finite(error), own]}, status="checked")
            if not error <= own:  # also when it is NaN
                rows[key].update(
                    status="wrong", reason=f"error {error:.2e} of its model's, allowed {own:.2e}"
                )
                continue
            rows[key]["median_s"] = timing.estimate(form.call, form.clock)
        except Exception as error:  # a form that breaks is reported, and the run goes on
            rows[key].update(record.failure(error))
            continue
        ready[key] = form
    del exact
    _screen(rows, ready, budget)
    estimates = {key: float(rows[key]["median_s"]) for key in ready}
    turn = sum(
        timing.SETTLE_SECONDS + max(2 * s, timing.TURN_SECONDS + timing.WARM_SECONDS)
        for s in estimates.values()
    )
    rounds = min(rounds, max(MIN_ROUNDS, int(budget / max(turn, 1e-9))))
    busy = timing.Disturbance()
    times = timing.interleave(
        {key: form.call for key, form in ready.items()},
        estimates,
        rounds,
        clocks={key: form.clock for key, form in ready.items()},
        broken=lambda key, error: rows[key].update(record.failure(error)),
    )
    for key, found in times.items():
        low, high = found.quartiles
        rows[key].update(
            status="timed", median_s=found.median, q1_s=low, q3_s=high, rounds=rounds,
            inner=found.inner,
        )  # fmt: skip
    share = busy.share()
    return [{**row, "disturbance": share} for row in rows.values()]


def worst(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of any model, (M, K, P), relative to the largest entry of its truth."""
    if found.shape != exact.shape:
        return float("inf")
    scale = exact.flatten(1).abs().amax(1)
    error = (found.double() - exact).flatten(1).abs().amax(1)
    return float((error / scale).max())


def _screen(rows: dict[str, dict[str, Any]], ready: dict[str, Form], budget: float) -> None:
    """Drop forms whose rounds would take too long; they keep their quick estimate."""
    best: dict[str, float] = {}
    for key in ready:
        provider = rows[key]["provider"]
        best[provider] = min(best.get(provider, float("inf")), rows[key]["median_s"])
    for key in list(ready):
        if rows[key]["median_s"] > SCREEN * best[rows[key]["provider"]]:
            rows[key].update(
                status="screened", reason=f"over {SCREEN} times its provider's best form"
            )
            del ready[key]
        elif MIN_ROUNDS * rows[key]["median_s"] > budget:
            rows[key].update(
                status="screened", reason=f"{MIN_ROUNDS} rounds of it take over {budget:g} s"
            )
            del ready[key]


def _rate(row: dict[str, Any], problem: Models, limits: dict[str, Any]) -> None:
    macs = problem.num_models * minimal(problem.case, "hvp", problem.num_tangents)[1]
    row.update(macs=macs, gflops=None, peak_fraction=None)
    if row["median_s"]:
        row["gflops"] = 2 * macs / row["median_s"] / 1e9
        rate = limits["fma_gflops_all"]
        row["peak_fraction"] = row["gflops"] / rate if rate else None


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of the full size on a GPU, for each engine of ours: a time, and a ratio."""
    settings, rows = result["settings"], result["rows"]
    full = (settings["case"], settings["models"], settings["probes"], settings["device"])
    if full != ("40-32-10", 451, 100, "cuda"):
        return []
    timed = [row for row in rows if row["status"] == "timed"]
    eager = min((r["median_s"] for r in timed if r["kind"] == "eager"), default=None)
    what, marks = {"case": "40-32-10, 451 models x 100", "operation": "hvp"}, []
    for provider in ("ours-cuda", "ours-triton"):
        mine = [
            r["median_s"]
            for r in timed
            if r["provider"] == provider and r["form"] == "models at once"
        ]
        seconds = mine[0] if mine else None
        ratio = eager / seconds if eager and seconds else None
        marks += [
            {**what, "provider": provider, "against": "seconds", "wanted": SECONDS_WANTED,
             "reached": seconds, "met": None if seconds is None else seconds <= SECONDS_WANTED},
            {**what, "provider": provider, "against": "eager vmap and bmm", "wanted": RATIO_WANTED,
             "reached": ratio, "met": None if ratio is None else ratio >= RATIO_WANTED},
        ]  # fmt: skip
    return marks


def render(result: dict[str, Any]) -> str:
    """The record as text."""
    settings, limits = result["settings"], result["peak"]
    lines = [("provider", "form", "median", "q1", "q3", "GFLOP/s", "peak", "per product")]
    products = settings["models"] * settings["probes"]
    for row in sorted(result["rows"], key=lambda r: r["median_s"] or float("inf")):
        seconds, share = row["median_s"], row["peak_fraction"]
        lines.append(
            (
                row["provider"],
                row["form"] + ("" if row["status"] == "timed" else f" ({row['status']})"),
                duration(seconds),
                duration(row["q1_s"]),
                duration(row["q3_s"]),
                "-" if row["gflops"] is None else f"{row['gflops']:.3g}",
                "-" if share is None else f"{share:.0%}",
                "-" if seconds is None else f"{1e9 * seconds / products:.3g} ns",
            )
        )
    parts = [
        machine_line(result["environment"], limits),
        limits_line(limits),
        f"\n{settings['case']}, {settings['models']} models x {settings['probes']} tangents on "
        f"{settings['device']}: products H v, primal passes included",
        table(lines),
    ]
    parts += [
        f"  {row['status']}: {row['provider']}: {row['form']}: {row['reason'].splitlines()[0]}"
        for row in result["rows"]
        if row["status"] in ("wrong", "failed", "left out")
    ]
    for mark in result["marks"]:
        met = "not timed" if mark["met"] is None else "met" if mark["met"] else "NOT met"
        reached = "-" if mark["reached"] is None else f"{mark['reached']:.3g}"
        parts.append(
            f"  {mark['provider']}, {mark['against']}: wanted {mark['wanted']:g}, reached {reached}"
            f": {met}"
        )
    return "\n".join(parts)
