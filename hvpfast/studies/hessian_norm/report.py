"""Report of the Hessian-norm study's sound protocol: its template and what that is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvpfast.lab.report.compare import grid_values
from hvpfast.lab.report.template import render
from hvpfast.studies.hessian_norm.findings import ARMS, COMPARED, MEASURES, QUESTION, answer


def report(found: Mapping[str, Any]) -> str:
    """Return report.md without its environment section."""
    arms = [(arm.title, found["arms"][name]) for name, arm in ARMS.items()]
    return render(
        Path(__file__).with_name("report.md.jinja"),
        **found,
        question=QUESTION,
        answer=answer(found),
        ARMS=ARMS,
        COMPARED=COMPARED,
        MEASURES=MEASURES,
        grid_values=grid_values,
        gap_in_deviations=gap_in_deviations(found),
        at_edge=[(what, title) for title, arm in arms for what in arm["at_edge"]],
        lost=[(n, title) for title, arm in arms if (n := arm["num_trials_diverged"])],
    )


def gap_in_deviations(found: Mapping[str, Any]) -> float | None:
    """Return the size of the primary difference in standard deviations of the baseline's seeds."""
    mean = found["comparison"]["test_loss"]["mean"]
    sd = found["arms"]["baseline"]["test_loss"]["sd"]
    return abs(mean) / sd if mean is not None and sd else None
