"""The line on stderr that says where a run is."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A line that is overwritten on a terminal; elsewhere one line per cell.

    Args:
        cells: how many there are.
        stream: where it is written; stderr if None.
    """

    def __init__(self, cells: int, stream: Any = None) -> None:
        self.cells, self.cell, self.label = cells, 0, ""
        self.stream = sys.stderr if stream is None else stream
        self.live = bool(getattr(self.stream, "isatty", lambda: False)())

    def start(self, label: str) -> None:
        self.cell, self.label = self.cell + 1, label
        if not self.live:
            print(f"[{self.cell}/{self.cells}] {label}", file=self.stream, flush=True)

    def say(self, what: str) -> None:
        """What happens inside the cell; shown on a terminal only."""
        if self.live:
            line = f"[{self.cell}/{self.cells}] {self.label}: {what}"
            print(f"\r\x1b[K{line[:110]}", end="", file=self.stream, flush=True)

    def close(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=self.stream, flush=True)
