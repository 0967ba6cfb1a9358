"""A run of the benchmark: its cells (case, K, operation) are measured and recorded one by one."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from hvpfast.bench import memory, peak, record
from hvpfast.bench.cases import Case, build
from hvpfast.bench.counts import minimal, minimal_bytes
from hvpfast.bench.gate import Gate
from hvpfast.bench.marks import judge
from hvpfast.bench.measure import Cell, Form, clock, torch_threads
from hvpfast.bench.progress import Progress
from hvpfast.bench.providers import PROVIDERS, Provider
from hvpfast.bench.settings import MIN_ROUNDS, Settings
from hvpfast.lab.environment import timing_conditions
from hvpfast.lab.measure import timing

COMPILE_LEFT_OUT = "left out of the quick run, because compiling takes longer than the rest of it"
QUICK_FORMS = 2
# What a row says of the measurement, after what it is about.
MEASURED = ("status", "reason", "median_s", "q1_s", "q3_s", "min_s", "rounds", "inner",
            "first_call_s", "errors", "memory", "disturbance")  # fmt: skip


def run_bench(settings: Settings, stream: Any = None) -> dict[str, Any]:
    """Run the cells and return the record; with ``settings.out`` it is written after every cell.

    An interrupt (Ctrl-C) ends the run; the record holds the cells finished by then. The progress
    line goes to ``stream``, stderr if None.
    """
    started = time.perf_counter()
    cells = settings.cells()
    progress = Progress(len(cells), stream)
    with _threads(settings.threads):
        providers, skipped = _usable(settings)
        result = _begun(settings, skipped)
        done = {(row["case"], row["num_tangents"], row["operation"]) for row in result["rows"]}
        earlier = result["seconds"]
        try:
            for case, K, operation in cells:
                progress.start(f"{case.name} K={K} {operation}")
                if (case.name, K, operation) in done:
                    continue
                result["rows"] += _cell(
                    case, K, operation, providers, settings, result["peak"], progress, started
                )
                _save(result, settings, earlier + time.perf_counter() - started)
        except KeyboardInterrupt:
            result["interrupted"] = True
        progress.close()
        _save(result, settings, earlier + time.perf_counter() - started)
    return result


def _begun(settings: Settings, skipped: dict[str, str]) -> dict[str, Any]:
    """An empty record, or with ``settings.resume`` the one in the folder.

    Raises:
        ValueError: that record is of other settings, versions or hardware.
    """
    result: dict[str, Any] = {
        "environment": timing_conditions(),
        "command": record.command_line(),
        "settings": {
            "rounds": settings.rounds,
            "threads": settings.threads,
            "dtype": settings.dtype,
            "quick": settings.quick,
            "memory": settings.memory,
            "budget_s": settings.budget,
            "device": settings.device,
            "forms": list(settings.forms),
            "deadline_s": settings.deadline,
        },
        "skipped": skipped,
        "interrupted": False,
        "seconds": 0.0,
    }
    path = settings.out / "bench.json" if settings.resume and settings.out else None
    if path is None or not path.exists():
        others = timing.Disturbance()
        limits = peak.limits(
            settings.device, settings.threads, settings.dtype, quick=settings.quick
        )
        return {**result, "peak": {**limits, "disturbance": others.share()}, "rows": []}
    stored = record.read_json(path)
    record.check_same(path, "settings", stored["settings"], result["settings"])
    record.check_same(path, "skipped providers", stored["skipped"], skipped)
    record.check_same(path, "environment", stored["environment"], result["environment"])
    return {**stored, "interrupted": False}


def _save(result: dict[str, Any], settings: Settings, seconds: float) -> None:
    result["seconds"] = round(seconds, 1)
    result["marks"] = judge(result["rows"])
    if settings.out is not None:
        record.write_json(settings.out / "bench.json", result)


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Threads of torch, and the cores of thread pools made from here on; as before afterwards.

    XLA sizes its pool by the cores it may use when it starts, so a limit holds only where jax was
    not started before.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    with torch_threads(threads):
        if cores is not None and threads < len(cores):
            os.sched_setaffinity(0, sorted(cores)[:threads])
        try:
            yield
        finally:
            if cores is not None:
                os.sched_setaffinity(0, cores)


def _usable(settings: Settings) -> tuple[list[Provider], dict[str, str]]:
    usable, skipped = list[Provider](), dict[str, str]()
    for name in settings.providers or tuple(PROVIDERS):
        reason = PROVIDERS[name].unavailable(settings.device)
        if reason is None and settings.quick and name == "torch-compile" and not settings.providers:
            reason = COMPILE_LEFT_OUT
        if reason is None:
            usable.append(PROVIDERS[name])
        else:
            skipped[name] = reason
    return usable, skipped


def _cell(
    case: Case,
    num_tangents: int,
    operation: str,
    providers: Sequence[Provider],
    settings: Settings,
    limits: dict[str, Any],
    progress: Progress,
    started: float,
) -> list[dict[str, Any]]:
    gate = Gate(build(case, num_tangents, settings.dtype, settings.device), operation)
    cell = Cell()
    for provider in providers:
        forms = provider.forms(operation, num_tangents)
        for form in forms[:QUICK_FORMS] if settings.quick else forms:
            key = f"{provider.name}: {form}"
            progress.say(f"checking {key}")
            identity = {
                "case": case.name,
                "sizes": list(case.sizes),
                "activation": case.activation,
                "num_samples": case.num_samples,
                "num_tangents": num_tangents,
                "operation": operation,
                "provider": provider.name,
                "kind": provider.kind,
                "form": form,
                "dtype": settings.dtype,
                "threads": settings.threads,
                "device": settings.device,
            }
            if reason := settings.left_out(key, started):
                cell.leave_out(identity, reason)
                continue
            gate.truths(provider.kind)
            prepare = functools.partial(_judged, provider, form, gate)
            cell.check(identity, provider.name, prepare)
        cell.screen()
    wanted = min(3, settings.rounds) if settings.quick else settings.rounds
    rounds = cell.rounds_within(settings.budget, wanted, MIN_ROUNDS)
    cell.time(rounds, lambda done: progress.say(f"round {done} of {rounds}"))
    rows = cell.rows(MEASURED)
    for row in rows:
        _rate(row, case, settings, limits)
    if settings.memory:
        fastest = record.fastest_forms(rows)
        for row in record.timed(rows):  # of other peers the fastest form alone
            if row["kind"] == "ours" or row["provider"] == "torch-eager" or row in fastest:
                progress.say(f"memory of {row['provider']}: {row['form']}")
                row["memory"] = memory.measure(
                    case.name, num_tangents, settings.dtype, operation, row["provider"],
                    row["form"], settings.threads,
                )  # fmt: skip
    return rows


def _judged(provider: Provider, form: str, gate: Gate) -> tuple[Form, dict[str, Any], str]:
    start = time.perf_counter()
    prepared = provider.prepare(form, gate.operation, gate.problem)
    verdict = gate.judge(prepared, provider.kind)
    first = time.perf_counter() - start
    errors = {name: [record.finite(v) for v in pair] for name, pair in verdict.errors.items()}
    ready = Form(prepared.call, clock(gate.problem.device, prepared.wait))
    return ready, {"errors": errors, "first_call_s": first}, verdict.reason


def _rate(row: dict[str, Any], case: Case, settings: Settings, limits: dict[str, Any]) -> None:
    """Add minimal operations and bytes, their times at the measured limits, and the rate."""
    operation = "gradient" if row["kind"] == "plain" else row["operation"]
    K = row["num_tangents"]
    row["schedule"], macs = minimal(case, operation, K)
    moved = minimal_bytes(case, operation, K, 4 if settings.dtype == "float32" else 8)
    row.update(macs=macs, bytes=moved, **peak.rate(macs, row["median_s"], limits))
    row["traffic_floor_s"] = moved / limits["copy_gbytes_per_s"] / 1e9
    peak_rate = limits["fma_gflops_all"]
    row["arithmetic_floor_s"] = 2 * macs / peak_rate / 1e9 if peak_rate else None
