"""From the records of the spectral study to named numbers, and its answer in a line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from hvpfast.lab.report.records import facts, table
from hvpfast.lab.runs.folder import Row

OUTLIERS = 20
"""Leading eigenvalues among which the largest gap is looked for."""


def findings(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    """Return every number that the report prints."""
    config = facts(records[0])
    main = by_index(table(records, "train", sweep=config["sweep"]))
    eigen = by_index(table(records, "eigen"))
    others = sorted({str(r["sweep"]) for r in table(records, "train")} - {config["sweep"]})
    branches = {name: by_index(table(records, "train", sweep=name)) for name in others}
    return {
        "config": config,
        "data": facts(table(records, "data")[0]),
        "trivial": facts(table(records, "trivial")[0]),
        "points": [point(row, eigen[i]) for i, row in main.items()],
        "collapse": {config["sweep"]: collapse(main)}
        | {name: collapse(rows) for name, rows in branches.items()},
        "hysteresis": {name: hysteresis(main, rows) for name, rows in branches.items()},
        "largest": largest(main, eigen),
        "oracle": oracle(main, eigen),
        "outliers": outliers(main, eigen),
        "overlap": overlaps(main, eigen),
        "residuals": residuals(eigen, config),
        "stationarity": stationarity(main),
        "products": products(eigen),
        "classes": dropped_classes(main),
        "density": [facts(row) for row in table(records, "density")],
        "time": times(timings, config),
    }


def by_index(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return rows by their point of the grid, rising."""
    return {row["index"]: row for row in sorted(rows, key=lambda row: int(row["index"]))}


def point(row: Mapping[str, Any], eigen: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the report's table says of one lambda."""
    names = ("index", "lambda", "train_loss", "test_accuracy", "params_norm", "collapsed")
    found = {name: row[name] for name in names}
    found["grad_norm"] = row["grad_norm"]
    ranks = (1, 9, 10, 11)
    return found | {f"value_{i}": eigen.get(f"value_{i}") for i in ranks}


def collapse(rows: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return where a sweep has collapsed, and how it gets there.

    ``first``: the lambda from which on every network has. ``jump``: the change of the logits'
    spread over that one step of the grid; ``jump_before``: its median over the steps between half
    that lambda and it. A jump many times as large tells a transition of first order.
    """
    points = list(rows.values())
    first: float | None = None
    for row in reversed(points):
        if not row["collapsed"]:
            break
        first = row["lambda"]
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
        at = next((change for change, lam in changes if lam == first), None)
        near = [change for change, lam in changes if first / 2 < lam < first]
        found["jump"] = at
        found["jump_before"] = median(near) if near else None
    return found


def hysteresis(
    main: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the lambdas, common to two sweeps, at which exactly one of them has collapsed."""
    both = [i for i in other if i in main]
    only_main = [main[i]["lambda"] for i in both if other[i]["collapsed"] > main[i]["collapsed"]]
    only_other = [main[i]["lambda"] for i in both if other[i]["collapsed"] < main[i]["collapsed"]]
    return {
        "num": len(both),
        "alive_only_main": len(only_main),
        "range_main": [min(only_main), max(only_main)] if only_main else None,
        "alive_only_other": len(only_other),
        "range_other": [min(only_other), max(only_other)] if only_other else None,
    }


def alive_points(
    main: Mapping[int, Mapping[str, Any]], eigen: Mapping[int, Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return the eigenvalues of networks that have not collapsed, by rising lambda."""
    return [eigen[i] for i, row in main.items() if not row["collapsed"]]


def largest(
    main: Mapping[int, Mapping[str, Any]], eigen: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the course of the largest eigenvalue of H: ends, and where it is at its top."""
    points = [(row["lambda"], row["value_1"]) for row in eigen.values()]
    top = max(points, key=lambda p: p[1])
    alive = [row["value_1"] for row in alive_points(main, eigen)]
    collapsed = [eigen[i]["value_1"] for i, row in main.items() if row["collapsed"]]
    return {
        "at_first": points[0][1],
        "first_lambda": points[0][0],
        "top": top[1],
        "top_lambda": top[0],
        "last_alive": alive[-1] if alive else None,
        "collapsed": median(collapsed) if collapsed else None,
        "at_last": points[-1][1],
        "hump": points[0][1] < top[1] > points[-1][1],
    }


def oracle(
    main: Mapping[int, Mapping[str, Any]], eigen: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Compare the eigenvalues of collapsed networks with what analysis gives for them."""
    rows = [eigen[i] for i, row in main.items() if row["collapsed"]]
    if not rows or "value_10" not in rows[0]:
        return None
    worst = 0.0
    beyond = 0.0
    for row in rows:
        found = sorted((row[f"value_{i}"] for i in range(1, 10)), reverse=True)
        for i, value in enumerate(found):
            worst = max(worst, abs(value / row[f"predicted_{i + 1}"] - 1))
        beyond = max(beyond, abs(row["value_10"]))
    last = rows[-1]
    return {
        "num": len(rows),
        "worst": worst,
        "tenth": beyond,
        "last_lambda": last["lambda"],
        "last_values": [last[f"value_{i}"] for i in range(1, 10)],
    }


def outliers(
    main: Mapping[int, Mapping[str, Any]], eigen: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return where the largest ratio of neighbouring leading eigenvalues lies, while it learns."""
    rows = [row for row in alive_points(main, eigen) if "value_11" in row]
    if not rows:
        return None
    counts: dict[int, int] = {}
    for row in rows:
        last = max(i for i in range(1, OUTLIERS + 2) if f"value_{i}" in row)
        ratios = {i: gap(row, i) for i in range(2, last)}
        most = max(ratios, key=lambda i: ratios[i])
        counts[most] = counts.get(most, 0) + 1
    return {
        "num": len(rows),
        "after": dict(sorted(((str(k), v) for k, v in counts.items()), key=lambda kv: -kv[1])),
        "gap_9": median(gap(row, 9) for row in rows),
        "gap_10": median(gap(row, 10) for row in rows),
        "gap_10_most": max(gap(row, 10) for row in rows),
        "negative": sum(row["num_negative"] for row in rows),
    }


def gap(row: Mapping[str, Any], i: int) -> float:
    """Return |lambda_i / lambda_(i+1)|; infinite over a zero."""
    below = abs(row[f"value_{i + 1}"])
    return float(abs(row[f"value_{i}"]) / below) if below > 0 else math.inf


def overlaps(
    main: Mapping[int, Mapping[str, Any]], eigen: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return how much of the leading subspace neighbouring lambdas share."""
    rows = [row for row in alive_points(main, eigen) if row["overlap"] is not None]
    values = [row["overlap"] for row in rows]
    low = min(rows, key=lambda row: row["overlap"]) if rows else None
    return {
        "num": len(values),
        "median": median(values) if values else None,
        "least": low["overlap"] if low else None,
        "least_lambda": low["lambda"] if low else None,
    }


def residuals(eigen: Mapping[int, Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """Count pairs within the tolerance, and what the others are."""
    rows = list(eigen.values())
    total = sum(sum(k.startswith("residual_") and k[9:].isdigit() for k in r) for r in rows)
    within = sum(row["num_within"] for row in rows)
    rounding = sum(row["by_rounding"] for row in rows)
    beyond = [row["largest_beyond"] for row in rows if row["largest_beyond"] is not None]
    worst = [row["worst_within"] for row in rows if row["worst_within"] is not None]
    return {
        "num": total,
        "within": within,
        "rounding": rounding,
        "unexplained": total - within - rounding,
        "worst_within": max(worst) if worst else None,
        "largest_beyond": max(beyond) if beyond else None,
        "tol": config["tol"],
    }


def stationarity(main: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the gradient norms of the objective, and relative to the penalty's own."""
    rows = list(main.values())
    norms = [row["grad_norm"] for row in rows]
    relative = [
        row["grad_norm"] / (row["decay"] * row["params_norm"]) for row in rows if row["decay"] > 0
    ]
    worst = max(rows, key=lambda row: float(row["grad_norm"]))
    return {
        "median": median(norms),
        "worst": max(norms),
        "worst_lambda": worst["lambda"],
        "relative_median": median(relative) if relative else None,
        "relative_worst": max(relative) if relative else None,
        "polished": sum(row["polish_steps"] > 0 for row in rows),
        "patience": sum(row["stopped"] == "patience" for row in rows),
        "epochs": fmean(row["epochs"] for row in rows),
        "num": len(rows),
    }


def products(eigen: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Count products per lambda, and compare warm with cold starts at the same lambdas."""
    rows = list(eigen.values())
    pairs = [(r["cold_matvecs"], r["num_matvecs"]) for r in rows if r["cold_matvecs"] is not None]
    return {
        "mean": fmean(row["num_matvecs"] for row in rows),
        "num_pairs": len(pairs),
        "cold": fmean(c for c, _ in pairs) if pairs else None,
        "warm": fmean(w for _, w in pairs) if pairs else None,
        "fewer": sum(w < c for c, w in pairs),
        "difference": max(
            (r["cold_difference"] for r in rows if r["cold_difference"] is not None), default=None
        ),
    }


def dropped_classes(main: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for every class, the first lambda from which on no test sample of it is right."""
    found = []
    for c in range(10):
        lost: float | None = None
        for row in reversed(list(main.values())):
            if row[f"class_{c}"]:
                break
            lost = row["lambda"]
        found.append({"class": c, "lost": lost})
    return sorted(found, key=lambda f: (f["lost"] is None, f["lost"] or 0.0))


def times(timings: Mapping[str, float], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return seconds per lambda on one core, and what the published grid of 451 would take.

    The spread is between lambdas; the interval of the total is 2 sd sqrt(451), and of the mean of
    few lambdas 2 sd / sqrt(n) more.
    """
    found: dict[str, Any] = {}
    main = f"train-{config['sweep']}-"
    kinds = {"fit": (main, "/fit-"), "pairs": ("eigen-", "/pairs-")}
    for name, (cell, what) in kinds.items():
        seconds = [s for k, s in timings.items() if k.startswith(cell) and what in k]
        found[name] = spread(seconds)
    n = min(found["fit"]["n"], found["pairs"]["n"])
    total = 451 * sum(found[k]["mean"] or 0.0 for k in kinds)
    sd = math.sqrt(sum((found[k]["sd"] or 0.0) ** 2 for k in kinds))
    found["total"] = total
    found["total_half"] = 2 * sd * math.sqrt(451 + 451**2 / n) if n > 1 else None
    found["whole"] = sum(s for k, s in timings.items() if "/" not in k)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation and range."""
    return {
        "n": len(values),
        "mean": fmean(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
        "least": min(values, default=None),
        "most": max(values, default=None),
    }
