"""The report of the spectral study: its numbers for the words of the templates beside this file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvpfast.lab.report.template import render, render_lines
from hvpfast.studies.spectral.config import GRID

QUESTION = "How does the spectrum of an MLP's Hessian change along a sweep of its L2 penalty?"
TEMPLATES = Path(__file__).parent
SHOWN = 24
"""Lambdas in the report's table, at most."""
FIRST_ORDER = 5.0
"""Times the change of the steps before, from which the last step counts as a jump."""

Found = Mapping[str, Any]


def report(found: Found) -> str:
    return render(
        TEMPLATES / "report.md.jinja",
        **found,
        question=QUESTION,
        FIRST_ORDER=FIRST_ORDER,
        GRID=GRID,
        jump_ratio=jump_ratio(found["collapse"][found["config"]["sweep"]]),
        one_sided=one_sided(found),
        shown=shown(found["points"]),
        uniform_value=uniform_value,
    )


def headline(found: Found) -> str:
    return render_lines(TEMPLATES / "headline.jinja", **found)


def jump_ratio(sweep: Mapping[str, Any]) -> float | None:
    """Return how many times the change before a sweep's collapse its last step is, if it is known.

    Changes are of the spread of the logits from one lambda of the grid to the next.
    """
    if sweep["first"] is None or sweep["jump"] is None or sweep["jump_before"] is None:
        return None
    return float(sweep["jump"] / sweep["jump_before"]) if sweep["jump_before"] else math.inf


def one_sided(found: Found) -> list[dict[str, Any]]:
    """Return where one of two sweeps has learned and the other has collapsed, side by side."""
    main, sides = found["config"]["sweep"], []
    for other, common in found["hysteresis"].items():
        for learned, collapsed, side in ((main, other, "main"), (other, main, "other")):
            if num := common[f"alive_only_{side}"]:
                least, most = common[f"range_{side}"]
                sides.append(
                    {"num": num, "common": common["num"], "least": least, "most": most,
                     "learned": learned, "collapsed": collapsed}
                )  # fmt: skip
    return sides


def shown(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return points evenly spread over the grid, the last among them."""
    step = max(1, -(-len(points) // SHOWN))
    return points[::step] + ([points[-1]] if (len(points) - 1) % step else [])


def uniform_value(config: Mapping[str, Any]) -> float:
    """Return (1 + |h|^2) / 10, the eigenvalues of a collapsed network with ten equal classes.

    Without weights every one of the last layer's inputs h is sigmoid(0) = 1/2.
    """
    width = int(str(config["hidden"]).split()[-1])
    return (1 + width / 4) / 10
