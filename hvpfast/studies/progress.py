"""Progress of a run: a bar with the time left, and a line for every finished cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any, Protocol

from tqdm import tqdm

from hvpfast.studies.folder import Row, RunFolder

Work = Callable[[], Iterable[Mapping[str, Any]]]
Describe = Callable[[list[Row]], str]


class Cell(Protocol):
    """What an experiment calls for each unit of work."""

    def __call__(self, key: str, work: Work, describe: Describe) -> list[Row]:
        """Return the rows of the cell `key`: stored ones, or those that `work` makes now."""


class Progress:
    """Runs the cells of a plan: finds finished ones, keeps new ones, and says so."""

    def __init__(self, folder: RunFolder, plan: list[str], quiet: bool) -> None:
        self.folder, self.plan, self.quiet = folder, plan, quiet
        self.pending = [key for key in plan if not folder.cell_path(key).exists()]
        self.seconds: dict[str, list[float]] = {}
        self.bar = tqdm(
            total=len(plan),
            initial=len(plan) - len(self.pending),
            disable=True if quiet else None,  # None: no bar where stderr is not a terminal
            leave=False,
            bar_format="{percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt}{postfix}",
        )

    def __call__(self, key: str, work: Work, describe: Describe) -> list[Row]:
        """Return the rows of the cell `key`, working only where it is not finished."""
        if key not in self.plan:
            raise ValueError(f"cell {key!r} is not in the study's plan; add it to plan(config)")
        stored = self.folder.cell(key)
        if stored is not None:
            return stored
        start = time.perf_counter()
        made = list(work())
        seconds = time.perf_counter() - start
        rows = self.folder.keep_cell(key, made, seconds)
        self.pending.remove(key)
        self.seconds.setdefault(kind(key), []).append(seconds)
        self.show(f"{describe(rows)}  ({seconds:.1f} s)")
        return rows

    def show(self, line: str) -> None:
        """Print the line of a finished cell and move the bar."""
        if self.quiet:
            return
        width, done = len(str(len(self.plan))), len(self.plan) - len(self.pending)
        left = f"about {clock(self.seconds_left())} left" if self.pending else "done"
        self.bar.set_postfix_str(left, refresh=False)
        self.bar.n = done
        self.bar.write(f"{done:>{width}}/{len(self.plan)}  {line}  {left}", file=sys.stderr)

    def seconds_left(self) -> float:
        """Return the time left: a pending cell takes as long as those of its kind did."""
        seen = {name: fmean(times) for name, times in self.seconds.items()}
        return sum(seen.get(kind(key), fmean(seen.values())) for key in self.pending)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


def kind(key: str) -> str:
    """Return the key without its number: cells of one kind cost the same."""
    return key.rstrip("0123456789")


def clock(seconds: float) -> str:
    """Return a duration as people read it: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
