"""Text tables from rows: columns are data, a head and how a row is shown under it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Show = str | Callable[[Any], str]  # the row's entry of that name, or a function of the row
Columns = Sequence[tuple[str, Show]]
FixedColumns = Sequence[tuple[str, Show, str]]  # with the width as in a format, "28" or ">12"


def _word(show: Show, row: Row) -> str:
    return str(row[show]) if isinstance(show, str) else show(row)


def fitted(columns: Columns, rows: Iterable[Row]) -> str:
    """A table whose columns are as wide as their longest word, with a rule under the heads.

    The first two columns are aligned at the left, the others at the right.
    """
    lines = [[head for head, _ in columns]]
    lines += [[_word(show, row) for _, show in columns] for row in rows]
    widths = [max(map(len, words)) for words in zip(*lines, strict=True)]

    def align(line: list[str]) -> str:
        words = [
            word.ljust(width) if i < 2 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(words).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([align(lines[0]), rule, *map(align, lines[1:])])


def fixed_head(columns: FixedColumns, gap: str = "") -> str:
    """The heads of columns of fixed widths, ``gap`` between them."""
    return gap.join(f"{head:{width}}" for head, _, width in columns)


def fixed_line(columns: FixedColumns, row: Row, gap: str = "") -> str:
    """One row under :func:`fixed_head`."""
    return gap.join(f"{_word(show, row):{width}}" for _, show, width in columns)


def number(value: float | None, form: str) -> str:
    """A number in a format, "-" for None."""
    return "-" if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """Three digits with a unit: ``"138 us"``; "-" for None."""
    if seconds is None:
        return "-"
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"
