"""Two arms compared by what their paired seeds differ in, with a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from hvpfast.lab.report.records import by_seed
from hvpfast.lab.report.statistics import holm, paired

LEVEL = 0.95
"""Coverage of every interval in the reports."""


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


def compare_arms(
    rows: Sequence[Mapping[str, Any]], measure: str, base: str, other: str, ratio: bool = False
) -> dict[str, Any]:
    values = by_seed(rows, measure, (base, other))
    return compare(values[base], values[other], ratio)


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
