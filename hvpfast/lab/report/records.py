"""Rows of a run's records, and columns of them by arm and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from hvpfast.lab.runs.folder import Row


def table(records: list[Row], name: str, **equal: Any) -> list[dict[str, Any]]:
    """Return the rows of one table in which every given column has the given value."""
    rows = [row for row in records if row["table"] == name]
    return [row for row in rows if all(row[k] == v for k, v in equal.items())]


def facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the columns that only file it."""
    return {k: v for k, v in row.items() if k not in ("table", "cell")}


def first_facts(records: list[Row], name: str) -> dict[str, Any]:
    return facts(table(records, name)[0])


def grid_values(column: str | float | int) -> list[float]:
    """Return the numbers of a grid from its column in the configuration's row."""
    return [float(word) for word in str(column).split()]


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


def mean_of(rows: Sequence[Mapping[str, Any]], measure: str) -> float:
    """Return the mean of a measure; infinite where a row has none, as that of a divergence."""
    return fmean(row[measure] if known(row, measure) else math.inf for row in rows)


def known(row: Mapping[str, Any], measure: str) -> bool:
    return row.get(measure) is not None
