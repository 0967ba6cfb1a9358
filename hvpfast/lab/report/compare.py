"""From records to named numbers, and to the words that reports print them with."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from hvpfast.lab.report.statistics import MAX_EXACT_PAIRS, holm, paired
from hvpfast.lab.runs.folder import Row

LEVEL = 0.95
"""Coverage of every interval in the reports."""
NONE = "–"
"""What is printed for a number that does not exist."""


def table(records: list[Row], name: str, **equal: Any) -> list[dict[str, Any]]:
    """Return the rows of one table in which every given column has the given value."""
    rows = [row for row in records if row["table"] == name]
    return [row for row in rows if all(row[k] == v for k, v in equal.items())]


def facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the columns that only file it."""
    return {k: v for k, v in row.items() if k not in ("table", "cell")}


def by_seed(
    rows: Sequence[Mapping[str, Any]], measure: str, arms: Sequence[str]
) -> dict[str, list[float]]:
    """Return a measure per arm, seed by seed; seeds that lack it in any arm are left out of all."""
    found = {
        arm: {r["seed"]: float(r[measure]) for r in rows if r["arm"] == arm and known(r, measure)}
        for arm in arms
    }
    complete = [seed for seed in found[arms[0]] if all(seed in found[a] for a in arms)]
    return {arm: [found[arm][seed] for seed in complete] for arm in arms}


def known(row: Mapping[str, Any], measure: str) -> bool:
    """Return whether the row has a number for the measure."""
    return row.get(measure) is not None


def summary(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Return mean, standard deviation and number of the values that are not None."""
    there = [v for v in values if v is not None]
    mean = fmean(there) if there else None
    return {"mean": mean, "sd": stdev(there) if len(there) > 1 else None, "n": len(there)}


def compare(base: Sequence[float], other: Sequence[float], ratio: bool = False) -> dict[str, Any]:
    """Compare pairs: the mean difference other - base, or the geometric mean ratio other / base.

    A ratio is the exponential of a difference of logarithms; where a value is not positive the
    plain difference is taken, and ``kind`` says so.
    """
    ratio = ratio and min([*base, *other], default=0.0) > 0
    pairs = list(zip(base, other, strict=True))
    found = paired([math.log(b / a) if ratio else b - a for a, b in pairs], LEVEL)
    direction = "lower" if found.mean is not None and found.mean < 0 else "higher"
    result = asdict(found)
    for name in ("mean", "low", "high", "boot_low", "boot_high") if ratio else ():
        result[name] = None if result[name] is None else math.exp(result[name])
    return {
        **result,
        "kind": "ratio" if ratio else "difference",
        "evidence": found.evidence,
        "verdict": direction if found.evidence else "no evidence of a difference",
    }


def holm_correct(comparisons: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return `compare` results with ``p_holm`` and ``verdict_holm``, corrected for their number."""
    corrected = holm([found["p"] for found in comparisons.values()])
    result = {}
    for (name, found), p in zip(comparisons.items(), corrected, strict=True):
        lower = found["mean"] is not None and found["mean"] < float(found["kind"] == "ratio")
        told = "lower" if lower else "higher"
        evidence = p is not None and p < 1 - LEVEL
        verdict = told if evidence else "no evidence of a difference"
        result[name] = {**found, "p_holm": p, "verdict_holm": verdict}
    return result


def number(value: float | None, digits: int = 4) -> str:
    """Return a number as the reports print it."""
    if value is None:
        return NONE
    if value and not 1e-5 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text else text  # 1.1e+02 is 110


def percent(value: float | None, decimals: int = 0) -> str:
    """Return a share as a percentage."""
    return NONE if value is None else f"{100 * value:.{decimals}f} %"


def spread(found: Mapping[str, Any]) -> str:
    """Return a `summary` as mean ± standard deviation."""
    return number(found["mean"]) + ("" if found["sd"] is None else f" ± {number(found['sd'], 2)}")


def change(value: float | None, kind: str) -> str:
    """Return a difference with its sign, or a ratio with a cross."""
    if value is None:
        return NONE
    return f"×{value:.3g}" if kind == "ratio" else f"{value:+.4f}"


def interval(found: Mapping[str, Any], prefix: str = "") -> str:
    """Return Student's interval of a `compare` in brackets; with "boot_" the bootstrap's."""
    low, high = (found[prefix + end] for end in ("low", "high"))
    kind = found["kind"]
    return NONE if low is None else f"[{change(low, kind)}, {change(high, kind)}]"


def p_value(found: Mapping[str, Any], name: str = "p") -> str:
    """Return a p value of a `compare`; the smallest that random sign patterns give is a bound."""
    value = found[name]
    drawn = found["n"] > MAX_EXACT_PAIRS and value is not None and value <= found["p_resolution"]
    return "≤ " * drawn + number(value, 2)


def count(quantity: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun: 1 seed, 2 seeds."""
    return f"{quantity} {singular if quantity == 1 else plural or singular + 's'}"


def table_line(*cells: str) -> str:
    """Return one line of a table."""
    return "| " + " | ".join(cells) + " |"


def table_head(names: Sequence[str], words: Sequence[str] = ()) -> str:
    """Return the head of a table: numbers are to the right; the first column and `words` not."""
    dashes = ["---" if i == 0 or n in words else "---:" for i, n in enumerate(names)]
    return f"{table_line(*names)}\n{table_line(*dashes)}"


def wrap(markdown: str, width: int = 100) -> str:
    """Return the Markdown with its paragraphs and list items wrapped; tables and headings pass."""
    lines: list[str] = []
    for line in markdown.splitlines():
        joins = bool(lines and lines[-1] and line) and not line.startswith(("- ", "|", "#", "!"))
        if joins and not lines[-1].startswith(("|", "#", "!")):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return (
        "\n".join(line if line.startswith(("|", "#", "!")) else fill(line, width) for line in lines)
        + "\n"
    )


def fill(text: str, width: int) -> str:
    """Return one paragraph or list item, wrapped."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
