"""Numbers and intervals as words of a report, and its paragraphs wrapped."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from hvpfast.lab.report.statistics import MAX_EXACT_PAIRS

NONE = "–"
"""What is printed for a number that does not exist."""


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with so many significant digits; with a power of ten if tiny or huge."""
    if value is None:
        return NONE
    if value and not 1e-5 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text else text  # 1.1e+02 is 110


def percent(value: float | None, decimals: int = 0) -> str:
    return NONE if value is None else f"{100 * value:.{decimals}f} %"


def spread(found: Mapping[str, Any]) -> str:
    """Return a `summary` as mean ± standard deviation."""
    return number(found["mean"]) + ("" if found["sd"] is None else f" ± {number(found['sd'], 2)}")


def change(value: float | None, kind: str) -> str:
    """Return a difference with its sign, or a ratio with a cross."""
    if value is None:
        return NONE
    return f"×{value:.3g}" if kind == "ratio" else f"{value:+.4f}"


def effect(found: Mapping[str, Any]) -> str:
    """Return the mean of a `compare`."""
    return change(found["mean"], found["kind"])


def interval(found: Mapping[str, Any], prefix: str = "") -> str:
    """Return Student's interval of a `compare` in brackets, or with "boot_" the bootstrap's."""
    low, high = (found[prefix + end] for end in ("low", "high"))
    kind = found["kind"]
    return NONE if low is None else f"[{change(low, kind)}, {change(high, kind)}]"


def p_value(found: Mapping[str, Any], name: str = "p") -> str:
    """Return a p value of a `compare`; a bound if it is the smallest that random signs can give."""
    value = found[name]
    drawn = found["n"] > MAX_EXACT_PAIRS and value is not None and value <= found["p_resolution"]
    return "≤ " * drawn + number(value, 2)


def count(quantity: int, noun: str) -> str:
    """Return a number with its noun: 1 seed, 2 seeds."""
    return f"{quantity} {noun if quantity == 1 else noun + 's'}"


def wrap(markdown: str) -> str:
    """Return the Markdown with paragraphs and list items wrapped, other lines as they are."""
    lines: list[str] = []
    for line in markdown.splitlines():
        joins = bool(lines and lines[-1] and line) and not line.startswith(("- ", "|", "#", "!"))
        if joins and not lines[-1].startswith(("|", "#", "!")):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    wrapper = textwrap.TextWrapper(width=100, break_long_words=False, break_on_hyphens=False)
    for i, line in enumerate(lines):
        if not line.startswith(("|", "#", "!")):
            wrapper.subsequent_indent = "  " if line.startswith("- ") else ""
            lines[i] = wrapper.fill(line)
    return "\n".join(lines) + "\n"
