"""One run: every cell (case, K, operation) gated, screened, timed in rounds, recorded."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from hvpfast.bench import gpu_peak, memory, peak, record
from hvpfast.bench.cases import Case, build
from hvpfast.bench.counts import minimal, minimal_bytes
from hvpfast.bench.gate import Gate
from hvpfast.bench.marks import judge
from hvpfast.bench.providers import PROVIDERS, Prepared, Provider
from hvpfast.bench.settings import MIN_ROUNDS, Settings
from hvpfast.lab.measure import timing

SCREEN = 1.5  # a form slower than its provider's fastest by more is not timed further
COMPILE_LEFT_OUT = "left out of the quick run, because compiling takes longer than the rest of it"
QUICK_FORMS = 2


class Progress:
    """One line on stderr that says where the run is."""

    def __init__(self, cells: int, stream: Any = None) -> None:
        self.cells, self.cell, self.label = cells, 0, ""
        self.stream = sys.stderr if stream is None else stream
        self.live = bool(getattr(self.stream, "isatty", lambda: False)())

    def start(self, label: str) -> None:
        """The next cell."""
        self.cell, self.label = self.cell + 1, label
        if not self.live:
            print(f"[{self.cell}/{self.cells}] {label}", file=self.stream, flush=True)

    def say(self, what: str) -> None:
        """What happens inside the cell; overwritten on a terminal, silent elsewhere."""
        if self.live:
            line = f"[{self.cell}/{self.cells}] {self.label}: {what}"
            print(f"\r\x1b[K{line[:110]}", end="", file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the line clean."""
        if self.live:
            print("\r\x1b[K", end="", file=self.stream, flush=True)


def run_bench(settings: Settings, stream: Any = None) -> dict[str, Any]:
    """Run the cells and return the record; with ``settings.out`` it is written after every cell.

    Args:
        settings: what to run.
        stream: where the progress line goes; stderr if None.

    Returns:
        {"environment", "settings", "peak", "skipped", "rows", "marks", "interrupted",
        "seconds"}.  An
        interrupt (Ctrl-C) ends the run after which the record holds the cells that were finished.
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
                    case, K, operation, providers, settings, result, progress, started
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
        "environment": record.environment(),
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
        return {**result, "peak": _limits(settings), "rows": []}
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
    before = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    torch.set_num_threads(threads)
    if cores is not None and threads < len(cores):
        os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if cores is not None:
            os.sched_setaffinity(0, cores)


def _limits(settings: Settings) -> dict[str, Any]:
    """The machine's limits, and how much of it others used while they were measured."""
    disturbance = timing.Disturbance()
    if settings.device != "cpu":
        return {**gpu_peak.measure(settings.dtype), "disturbance": disturbance.share()}
    found = peak.measure(settings.threads, settings.dtype, 0.02 if settings.quick else 0.2)
    return {**found, "disturbance": disturbance.share()}


def _usable(settings: Settings) -> tuple[list[Provider], dict[str, str]]:
    """The providers that can run, and why the others cannot."""
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
    result: dict[str, Any],
    progress: Progress,
    started: float,
) -> list[dict[str, Any]]:
    """Rows of one cell, every form of every provider."""
    gate = Gate(build(case, num_tangents, settings.dtype, settings.device), operation)
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Prepared] = {}
    for provider in providers:
        forms = provider.forms(operation, num_tangents)
        for form in forms[:QUICK_FORMS] if settings.quick else forms:
            key = f"{provider.name}: {form}"
            progress.say(f"checking {key}")
            row: dict[str, Any] = {"status": "left out", "reason": settings.left_out(key, started)}
            prepared: Prepared | None = None
            if row["reason"] is None:
                row, prepared = _check(provider, form, operation, gate)
            rows[key] = {
                **_identity(case, num_tangents, operation, provider, form, settings),
                **row,
            }
            if prepared is not None:
                ready[key] = prepared
        _screen([key for key in ready if rows[key]["provider"] == provider.name], rows, ready)
    estimates = {key: float(rows[key]["median_s"]) for key in ready}
    rounds = _rounds(estimates, settings)

    def tick(done: int) -> None:
        progress.say(f"round {done} of {rounds}")

    def broken(key: str, error: Exception) -> None:
        rows[key].update(record.failure(error))

    disturbance = timing.Disturbance()
    times = timing.interleave(
        {key: prepared.call for key, prepared in ready.items()},
        estimates,
        rounds,
        tick,
        {key: _clock(prepared, settings.device) for key, prepared in ready.items()},
        broken,
    )
    share = disturbance.share()
    for key, measured in times.items():
        low, high = measured.quartiles
        rows[key].update(
            status="timed", median_s=measured.median, q1_s=low, q3_s=high,
            min_s=min(measured.seconds), rounds=rounds, inner=measured.inner,
            disturbance=share,
        )  # fmt: skip
    ready.clear()
    for row in rows.values():
        _rate(row, case, settings, result["peak"])
    if settings.memory:
        for row in _remembered(rows.values()):
            progress.say(f"memory of {row['provider']}: {row['form']}")
            row["memory"] = memory.measure(
                case.name, num_tangents, settings.dtype, operation, row["provider"], row["form"],
                settings.threads,
            )  # fmt: skip
    return list(rows.values())


def _remembered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose memory is measured: all of ours and of torch-eager, else a provider's fastest."""
    timed = sorted(
        (row for row in rows if row["status"] == "timed"), key=lambda row: float(row["median_s"])
    )
    first = {row["provider"]: row["form"] for row in reversed(timed)}
    return [
        row
        for row in timed
        if row["kind"] == "ours"
        or row["provider"] == "torch-eager"
        or first[row["provider"]] == row["form"]
    ]


def _identity(
    case: Case, K: int, operation: str, provider: Provider, form: str, settings: Settings
) -> dict[str, Any]:
    return {
        "case": case.name,
        "sizes": list(case.sizes),
        "activation": case.activation,
        "num_samples": case.num_samples,
        "num_tangents": K,
        "operation": operation,
        "provider": provider.name,
        "kind": provider.kind,
        "form": form,
        "dtype": settings.dtype,
        "threads": settings.threads,
        "device": settings.device,
        **dict.fromkeys(("status", "reason", "median_s", "q1_s", "q3_s", "min_s", "rounds", "inner",
                         "first_call_s", "errors", "memory", "disturbance")),
    }  # fmt: skip


def _clock(prepared: Prepared, device: str) -> timing.Clock:
    """What times a form: the host, the GPU's events, or the host once a result is there."""
    if prepared.wait is not None:
        return timing.waiting(prepared.wait)
    return timing.host_seconds if device == "cpu" else timing.event_seconds


def _check(
    provider: Provider, form: str, operation: str, gate: Gate
) -> tuple[dict[str, Any], Prepared | None]:
    """Prepare and judge one form; only what passes the gate comes back to be timed."""
    gate.truths(provider.kind)
    start = time.perf_counter()
    try:
        prepared = provider.prepare(form, operation, gate.problem)
        verdict = gate.judge(prepared, provider.kind)
        first = time.perf_counter() - start
        clock = _clock(prepared, gate.problem.device)
        seconds = timing.estimate(prepared.call, clock) if verdict.ok else None
    except Exception as error:  # a provider that breaks is reported, and the run goes on
        return record.failure(error), None
    errors = {name: [record.finite(v) for v in pair] for name, pair in verdict.errors.items()}
    row = {"errors": errors, "first_call_s": first, "median_s": seconds}
    if not verdict.ok:
        return {**row, "status": "wrong", "reason": verdict.reason}, None
    return {**row, "status": "checked"}, prepared


def _screen(keys: list[str], rows: dict[str, dict[str, Any]], ready: dict[str, Prepared]) -> None:
    """Drop a provider's forms that are far slower than its best; they keep their quick estimate."""
    best = min((rows[key]["median_s"] for key in keys), default=0.0)
    for key in keys:
        if rows[key]["median_s"] > SCREEN * best:
            rows[key].update(
                status="screened", reason=f"over {SCREEN} times its provider's best form"
            )
            del ready[key]


def _rounds(estimates: dict[str, float], settings: Settings) -> int:
    turn = sum(
        timing.SETTLE_SECONDS + max(seconds, timing.TURN_SECONDS + timing.WARM_SECONDS)
        for seconds in estimates.values()
    )
    wanted = min(3, settings.rounds) if settings.quick else settings.rounds
    return min(wanted, max(MIN_ROUNDS, int(settings.budget / max(turn, 1e-9))))


def _rate(row: dict[str, Any], case: Case, settings: Settings, limits: dict[str, Any]) -> None:
    """Minimal operations and bytes, the time these take at the measured limits, and the rate."""
    operation = "gradient" if row["kind"] == "plain" else row["operation"]
    K = row["num_tangents"]
    schedule, macs = minimal(case, operation, K)
    moved = minimal_bytes(case, operation, K, 4 if settings.dtype == "float32" else 8)
    row.update(schedule=schedule, macs=macs, bytes=moved, gflops=None, peak_fraction=None)
    row["traffic_floor_s"] = moved / limits["copy_gbytes_per_s"] / 1e9
    peak_rate = limits["fma_gflops_all"]
    row["arithmetic_floor_s"] = 2 * macs / peak_rate / 1e9 if peak_rate else None
    if row["median_s"] is not None:
        row["gflops"] = 2 * macs / row["median_s"] / 1e9
        row["peak_fraction"] = row["gflops"] / peak_rate if peak_rate else None
