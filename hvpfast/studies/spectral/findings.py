"""The named numbers of the spectral study's report, from its records and timings alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from hvpfast.lab.report.records import facts, first_facts, table
from hvpfast.lab.runs.folder import Row
from hvpfast.studies.spectral.config import GRID
from hvpfast.studies.spectral.data import NUM_CLASSES

OUTLIERS = 20
"""Leading eigenvalues among which the largest gap is sought."""

Facts = Mapping[str, Any]
Rows = Sequence[Facts]
"""Rows of one table, by rising lambda."""
Sweep = Mapping[int, Facts]
"""Rows of one table by their point of the grid, rising."""


def findings(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    config = facts(records[0])
    first, trained = config["sweep"], table(records, "train")
    others = sorted({str(row["sweep"]) for row in trained} - {first})
    sweeps = {n: by_index([row for row in trained if row["sweep"] == n]) for n in (first, *others)}
    main, eigen = sweeps[first], by_index(table(records, "eigen"))
    points, solved = list(main.values()), list(eigen.values())
    alive = [eigen[i] for i, row in main.items() if not row["collapsed"]]
    collapsed = [eigen[i] for i, row in main.items() if row["collapsed"]]
    return {
        "config": config,
        "data": first_facts(records, "data"),
        "trivial": first_facts(records, "trivial"),
        "points": [point(row, eigen[i]) for i, row in main.items()],
        "collapse": {name: collapse(rows) for name, rows in sweeps.items()},
        "hysteresis": {name: hysteresis(main, sweeps[name]) for name in others},
        "largest": largest(solved, alive, collapsed),
        "oracle": oracle(collapsed),
        "outliers": outliers(alive),
        "overlap": overlaps(alive),
        "residuals": residuals(solved, config),
        "stationarity": stationarity(points),
        "products": products(solved),
        "classes": dropped_classes(points),
        "density": [facts(row) for row in table(records, "density")],
        "time": times(timings, config),
    }


def by_index(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return rows by their point of the grid, rising."""
    return {row["index"]: row for row in sorted(rows, key=lambda row: int(row["index"]))}


def column(rows: Rows, name: str) -> list[float]:
    """Return the numbers of a column, without the rows that have none."""
    return [row[name] for row in rows if row[name] is not None]


def onset(rows: Rows, name: str, wanted: bool) -> float | None:
    """Return the lambda from which on a column is true, or false; None if it is not at the end."""
    run = list(itertools.takewhile(lambda row: bool(row[name]) is wanted, reversed(rows)))
    return run[-1]["lambda"] if run else None


def point(row: Facts, eigen: Facts) -> dict[str, Any]:
    """Return what the report's table says of one lambda."""
    names = ("index", "lambda", "train_loss", "test_accuracy", "params_norm", "collapsed",
             "grad_norm")  # fmt: skip
    values = (f"value_{i}" for i in (1, 9, 10, 11))
    return {name: row[name] for name in names} | {name: eigen.get(name) for name in values}


def collapse(sweep: Sweep) -> dict[str, Any]:
    """Return where a sweep has collapsed, and how it gets there.

    ``first``: the lambda from which on every network has. ``jump``: the change of the logits'
    spread over that one step of the grid; ``jump_before``: its median over the steps between half
    that lambda and it. A jump many times as large tells a transition of first order.
    """
    points = list(sweep.values())
    first = onset(points, "collapsed", True)
    alive = [row for row in points if not row["collapsed"]]
    found: dict[str, Any] = {
        "first": first,
        "num_collapsed": len(points) - len(alive),
        "num": len(points),
        "last_alive": alive[-1]["lambda"] if alive else None,
        "last_accuracy": alive[-1]["test_accuracy"] if alive else None,
        "last_norm": alive[-1]["params_norm"] if alive else None,
        "jump": None,
    }
    if first is not None and alive and alive[-1]["lambda"] < first:
        positive = [row for row in points if row["lambda"] > 0]
        changes = [
            (abs(b["spread"] - a["spread"]), b["lambda"]) for a, b in itertools.pairwise(positive)
        ]
        near = [change for change, lam in changes if first / 2 < lam < first]
        found["jump"] = next((change for change, lam in changes if lam == first), None)
        found["jump_before"] = median(near) if near else None
    return found


def hysteresis(main: Sweep, other: Sweep) -> dict[str, Any]:
    """Return the lambdas, common to two sweeps, at which exactly one of them has collapsed."""
    both = [i for i in other if i in main]
    found: dict[str, Any] = {"num": len(both)}
    for side, alive, gone in (("main", main, other), ("other", other, main)):
        only = [main[i]["lambda"] for i in both if gone[i]["collapsed"] > alive[i]["collapsed"]]
        found[f"alive_only_{side}"] = len(only)
        found[f"range_{side}"] = [min(only), max(only)] if only else None
    return found


def largest(solved: Rows, alive: Rows, collapsed: Rows) -> dict[str, Any]:
    """Return the course of the largest eigenvalue of H: both ends, and its top.

    `solved` are the eigenvalues of all networks, `alive` of those that have learned, `collapsed` of
    the others.
    """
    top = max(solved, key=lambda row: float(row["value_1"]))
    first, last = solved[0], solved[-1]
    return {
        "at_first": first["value_1"],
        "first_lambda": first["lambda"],
        "top": top["value_1"],
        "top_lambda": top["lambda"],
        "last_alive": alive[-1]["value_1"] if alive else None,
        "collapsed": median(row["value_1"] for row in collapsed) if collapsed else None,
        "at_last": last["value_1"],
        "hump": first["value_1"] < top["value_1"] > last["value_1"],
    }


def oracle(collapsed: Rows) -> dict[str, Any] | None:
    """Compare the eigenvalues of collapsed networks with what analysis gives for them."""
    if not collapsed or "value_10" not in collapsed[0]:
        return None
    last = collapsed[-1]
    return {
        "num": len(collapsed),
        "worst": max(disagreement(row) for row in collapsed),
        "tenth": max(abs(row["value_10"]) for row in collapsed),
        "last_lambda": last["lambda"],
        "last_values": [last[f"value_{i}"] for i in range(1, 10)],
    }


def disagreement(row: Facts) -> float:
    """Return the largest relative error of the nine leading eigenvalues against analysis."""
    values = sorted((row[f"value_{i}"] for i in range(1, 10)), reverse=True)
    predicted = (row[f"predicted_{i}"] for i in range(1, 10))
    return max(abs(float(a / b) - 1) for a, b in zip(values, predicted, strict=True))


def outliers(alive: Rows) -> dict[str, Any] | None:
    """Return where the largest ratio of neighbouring leading eigenvalues lies before a collapse."""
    rows = [row for row in alive if "value_11" in row]
    if not rows:
        return None
    after = Counter(largest_gap(row) for row in rows)
    return {
        "num": len(rows),
        "after": {str(rank): num for rank, num in after.most_common()},
        "gap_9": median(gap(row, 9) for row in rows),
        "gap_10": median(gap(row, 10) for row in rows),
        "gap_10_most": max(gap(row, 10) for row in rows),
        "negative": sum(row["num_negative"] for row in rows),
    }


def largest_gap(row: Facts) -> int:
    """Return the number of the eigenvalue, the first excepted, after which the ratio is largest."""
    last = max(i for i in range(1, OUTLIERS + 2) if f"value_{i}" in row)
    return max(range(2, last), key=lambda i: gap(row, i))


def gap(row: Facts, i: int) -> float:
    """Return |lambda_i / lambda_(i+1)|; infinite over a zero."""
    below = abs(row[f"value_{i + 1}"])
    return float(abs(row[f"value_{i}"]) / below) if below > 0 else math.inf


def overlaps(alive: Rows) -> dict[str, Any]:
    """Return how much of the leading subspace neighbouring lambdas share."""
    rows = [row for row in alive if row["overlap"] is not None]
    low = min(rows, key=lambda row: float(row["overlap"])) if rows else None
    return {
        "num": len(rows),
        "median": median(row["overlap"] for row in rows) if rows else None,
        "least": low["overlap"] if low else None,
        "least_lambda": low["lambda"] if low else None,
    }


def residuals(rows: Rows, config: Facts) -> dict[str, Any]:
    """Count pairs within the tolerance, and what the others are."""
    total = sum(sum(k.startswith("residual_") and k[9:].isdigit() for k in r) for r in rows)
    within = sum(row["num_within"] for row in rows)
    rounding = sum(row["by_rounding"] for row in rows)
    return {
        "num": total,
        "within": within,
        "rounding": rounding,
        "unexplained": total - within - rounding,
        "worst_within": max(column(rows, "worst_within"), default=None),
        "largest_beyond": max(column(rows, "largest_beyond"), default=None),
        "tol": config["tol"],
    }


def stationarity(points: Rows) -> dict[str, Any]:
    """Return the gradient norms of the objective, and relative to the penalty's own."""
    relative = [
        row["grad_norm"] / (row["decay"] * row["params_norm"]) for row in points if row["decay"] > 0
    ]
    worst = max(points, key=lambda row: float(row["grad_norm"]))
    return {
        "median": median(row["grad_norm"] for row in points),
        "worst": worst["grad_norm"],
        "worst_lambda": worst["lambda"],
        "relative_median": median(relative) if relative else None,
        "relative_worst": max(relative, default=None),
        "polished": sum(row["polish_steps"] > 0 for row in points),
        "patience": sum(row["stopped"] == "patience" for row in points),
        "epochs": fmean(row["epochs"] for row in points),
        "num": len(points),
    }


def products(rows: Rows) -> dict[str, Any]:
    """Count products per lambda, and compare warm with cold starts at the same lambdas."""
    both = [row for row in rows if row["cold_matvecs"] is not None]
    return {
        "mean": fmean(row["num_matvecs"] for row in rows),
        "num_pairs": len(both),
        "cold": fmean(row["cold_matvecs"] for row in both) if both else None,
        "warm": fmean(row["num_matvecs"] for row in both) if both else None,
        "fewer": sum(row["num_matvecs"] < row["cold_matvecs"] for row in both),
        "difference": max(column(rows, "cold_difference"), default=None),
    }


def dropped_classes(points: Rows) -> list[dict[str, Any]]:
    """Return, for every class, the first lambda from which on no test sample of it is right."""
    found = [{"class": c, "lost": onset(points, f"class_{c}", False)} for c in range(NUM_CLASSES)]
    return sorted(found, key=lambda f: (f["lost"] is None, f["lost"] or 0.0))


def times(timings: Mapping[str, float], config: Facts) -> dict[str, Any]:
    """Return seconds per lambda on one core, and what the whole published grid would take.

    The total is of N = `GRID` lambdas. Twice its standard error, from the spread sd between the n
    timed ones, is 2 sd sqrt(N + N^2 / n): of a sum of N, and of a mean that is known from n.
    """
    found: dict[str, Any] = {}
    main = f"train-{config['sweep']}-"
    kinds = {"fit": (main, "/fit-"), "pairs": ("eigen-", "/pairs-")}
    for name, (cell, what) in kinds.items():
        found[name] = summary([s for k, s in timings.items() if k.startswith(cell) and what in k])
    n = min(found["fit"]["n"], found["pairs"]["n"])
    sd = math.sqrt(sum((found[k]["sd"] or 0.0) ** 2 for k in kinds))
    found["total"] = GRID * sum(found[k]["mean"] or 0.0 for k in kinds)
    found["total_half"] = 2 * sd * math.sqrt(GRID + GRID**2 / n) if n > 1 else None
    found["whole"] = sum(s for k, s in timings.items() if "/" not in k)
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "n": len(values),
        "mean": fmean(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
        "least": min(values, default=None),
        "most": max(values, default=None),
    }
