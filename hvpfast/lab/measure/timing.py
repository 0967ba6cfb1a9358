"""Interleaved timing: every round runs each competitor once, starting with another one each time.

A competitor's turn is: a pause, in which worker threads that spin after the previous turn go to
sleep; untimed calls that bring its data back into the caches; then ``inner`` calls under the
clock, enough for the clock not to matter.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

TURN_SECONDS = 2e-3  # clocked time aimed at in one turn
WARM_SECONDS = 1e-3  # untimed calls ahead of it, at least one for calls shorter than COLD_SECONDS
COLD_SECONDS = 2e-2  # a call this long refills the caches many times over: no call ahead
SETTLE_SECONDS = 5e-3  # OpenMP and XLA workers spin for a few milliseconds after their last task


@dataclass(frozen=True)
class Times:
    """Seconds per call, one value per round."""

    seconds: tuple[float, ...]
    inner: int

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile over the rounds."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(low), float(high)


Clock = Callable[[Callable[[], Any], int], float]


def host_seconds(call: Callable[[], Any], calls: int) -> float:
    """Seconds of ``calls`` calls by the host's clock; each is complete when it returns."""
    repeats = range(calls)
    start = time.perf_counter()
    for _ in repeats:
        call()
    return time.perf_counter() - start


def event_seconds(call: Callable[[], Any], calls: int) -> float:
    """Seconds between two CUDA events of torch's current stream around ``calls`` calls."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    for _ in range(calls):
        call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def waiting(wait: Callable[[Any], Any]) -> Clock:
    """The host's clock for queued calls: it stops once ``wait`` returns for the last of them."""

    def seconds(call: Callable[[], Any], calls: int) -> float:
        out = None
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        return time.perf_counter() - start

    return seconds


def estimate(call: Callable[[], Any], clock: Clock = host_seconds) -> float:
    """A quick guess of the seconds per call: the smallest of two calls, of more if they are short.

    One call is enough if it takes over a second.
    """
    best, spent, done = float("inf"), 0.0, 0
    while done < 2 or (spent < 0.1 and done < 5) or (spent < 0.02 and done < 20):
        took = clock(call, 1)
        best, spent, done = min(best, took), spent + took, done + 1
        if took > 1.0:
            break
    return best


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    estimates: Mapping[str, float],
    rounds: int,
    tick: Callable[[int], None] = lambda done: None,
    clocks: Mapping[str, Clock] | None = None,
    broken: Callable[[str, Exception], None] | None = None,
) -> dict[str, Times]:
    """Time every call in ``rounds`` rounds.

    Args:
        calls: by name.
        estimates: seconds per call, to choose how many calls make a turn.
        rounds: rounds, each with one turn per call.
        tick: called after every round with the number of rounds done.
        clocks: by name, what takes the time of a turn; the host's where there is none.
        broken: called with the name and the error of a call that raises, which is then left out;
            None lets the error through.

    Returns:
        Times by name, of the calls that did not break.
    """
    names = list(calls)
    if not names:
        return {}

    def calls_in(aim: float) -> dict[str, int]:
        return {n: max(1, min(1000, round(aim / max(estimates[n], 1e-7)))) for n in names}

    inner, warm = calls_in(TURN_SECONDS), calls_in(WARM_SECONDS)
    warm.update({n: 0 for n in names if estimates[n] >= COLD_SECONDS})
    seconds: dict[str, list[float]] = {n: [] for n in names}
    with no_collection():
        for done in range(rounds):
            first = done % len(names)
            for name in names[first:] + names[:first]:
                if name not in seconds:
                    continue
                clock = (clocks or {}).get(name, host_seconds)
                try:
                    seconds[name].append(_turn(calls[name], warm[name], inner[name], clock))
                except Exception as error:
                    if broken is None:
                        raise
                    del seconds[name]
                    broken(name, error)
                    continue
                if estimates[name] > COLD_SECONDS:  # its cycles may hold much memory
                    gc.collect()
            gc.collect()
            tick(done + 1)
    return {n: Times(tuple(taken), inner[n]) for n, taken in seconds.items()}


def _turn(call: Callable[[], Any], warm: int, inner: int, clock: Clock) -> float:
    time.sleep(SETTLE_SECONDS)
    if warm:
        clock(call, warm)  # the same clock: it ends with nothing queued
    return clock(call, inner) / inner


class Disturbance:
    """How much of the machine other processes used since the object was made."""

    def __init__(self) -> None:
        self.start = _processor_seconds()

    def share(self) -> float | None:
        """Cores used by other processes on average; None where Linux's /proc is absent."""
        now = _processor_seconds()
        if self.start is None or now is None:
            return None
        elapsed, everyone, own = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, (everyone - own) / elapsed) if elapsed > 0 else 0.0


def _processor_seconds() -> tuple[float, float, float] | None:
    """Wall seconds; busy seconds of all cores, stolen ones included; those of this process."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(f) for f in fields[:8])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return time.perf_counter(), busy, own.user + own.system


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
