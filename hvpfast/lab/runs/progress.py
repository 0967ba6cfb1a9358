"""Progress of a run: a bar with the time left, and a line for every finished cell."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from tqdm import tqdm

from hvpfast.lab.runs.folder import Row, RunFolder
from hvpfast.lab.runs.sharing import Claims, Helpers

Work = Callable[[], Iterable[Mapping[str, Any]]]
Describe = Callable[[list[Row]], str]
Task = tuple[str, Work, Describe]

POLL_SECONDS = 0.05
"""Seconds between two checks of cells that other processes work on."""
WORTH_HELP = 20.0
"""Seconds of work left from which starting further processes pays."""


class Orphaned(Exception):
    """The process whose run this one helps with has ended."""


class Cell(Protocol):
    """What an experiment calls for its units of work."""

    @property
    def path(self) -> Path:
        """The run folder. A cell writes its artefacts there before it yields its last row."""

    def __call__(self, key: str, work: Work, describe: Describe) -> list[Row]:
        """Return the rows of the cell `key`: stored ones, or those that `work` makes now."""

    def together(self, tasks: Sequence[Task]) -> list[list[Row]]:
        """Return the rows of cells that do not need each other, in order; processes share them."""


class Progress:
    """Runs the cells of a plan: reads finished ones, stores new ones, and shows each.

    Args:
        folder: of the run.
        plan: the key of every cell.
        quiet: no bar and no lines.
        claims: how processes agree who works on a cell.
        helpers: processes to start where the time left is worth it.
        workers: processes that share the cells, for the time left.
        parent: process with whose end this one stops.
    """

    def __init__(
        self,
        folder: RunFolder,
        plan: list[str],
        quiet: bool,
        claims: Claims,
        *,
        helpers: Helpers | None = None,
        workers: int = 1,
        parent: int | None = None,
    ) -> None:
        self.folder, self.plan, self.quiet, self.claims = folder, plan, quiet, claims
        self.helpers, self.workers, self.parent = helpers, workers, parent
        self.bytes = {key: i + 1 for i, key in enumerate(plan)}
        self.pending = [key for key in plan if not folder.cell_path(key).exists()]
        self.seconds: dict[str, list[float]] = {}
        self.bar = tqdm(
            total=len(plan),
            initial=len(plan) - len(self.pending),
            disable=True if quiet else None,  # None: no bar where stderr is not a terminal
            leave=False,
            bar_format="{percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt}{postfix}",
        )

    @property
    def path(self) -> Path:
        return self.folder.path

    def __call__(self, key: str, work: Work, describe: Describe) -> list[Row]:
        return self.together([(key, work, describe)])[0]

    def together(self, tasks: Sequence[Task]) -> list[list[Row]]:
        for key, _, _ in tasks:
            if key not in self.bytes:
                raise ValueError(f"cell {key!r} is not in the study's plan; add it to plan(config)")
        rows: dict[str, list[Row]] = {}
        while missing := [task for task in tasks if task[0] not in rows]:
            before = len(rows)
            for key, work, describe in missing:
                found = self.attempt(key, work, describe)
                if found is not None:
                    rows[key] = found
            if len(rows) == before:
                time.sleep(POLL_SECONDS)
        return [rows[key] for key, _, _ in tasks]

    def attempt(self, key: str, work: Work, describe: Describe) -> list[Row] | None:
        """Return a cell's rows, stored or made now; None where another process works on it."""
        if self.parent not in (None, os.getppid()):
            raise Orphaned
        stored, seconds = self.folder.cell(key), None
        if stored is None:
            with self.claims.hold(self.bytes[key]) as mine:
                if not mine:
                    return None
                stored = self.folder.cell(key)  # finished by its holder just now?
                if stored is None:
                    start = time.perf_counter()
                    made = list(work())
                    seconds = time.perf_counter() - start
                    stored = self.folder.keep_cell(key, made, seconds)
                    self.seconds.setdefault(kind(key), []).append(seconds)
        if key in self.pending:
            self.pending.remove(key)
            timed = "" if seconds is None else f"  ({seconds:.1f} s)"
            self.show(f"{describe(stored)}{timed}")
            if self.helpers and self.seconds and self.seconds_left() > WORTH_HELP:
                self.helpers.start()
        return stored

    def show(self, line: str) -> None:
        """Print the line of a finished cell and move the bar."""
        if self.quiet:
            return
        width, done = len(str(len(self.plan))), len(self.plan) - len(self.pending)
        left = "done"
        if self.pending:
            left = f"about {clock(self.seconds_left() / self.workers)} left" if self.seconds else ""
        self.bar.set_postfix_str(left, refresh=False)
        self.bar.n = done
        self.bar.write(f"{done:>{width}}/{len(self.plan)}  {line}  {left}", file=sys.stderr)

    def seconds_left(self) -> float:
        """Return the work left, if a pending cell takes as long as finished ones of its kind."""
        seen = {name: fmean(times) for name, times in self.seconds.items()}
        other = fmean(seen.values())
        return sum(seen.get(kind(key), other) for key in self.pending)


def kind(key: str) -> str:
    """Return the key without the number at its end: cells of one kind cost the same."""
    return key.rstrip("0123456789")


def clock(seconds: float) -> str:
    """Return a duration in words: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
