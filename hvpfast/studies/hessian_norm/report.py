"""Report of the Hessian-norm study, and the answer of both protocols: templates and their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvpfast.lab.report.records import grid_values
from hvpfast.lab.report.template import render, render_lines
from hvpfast.studies.hessian_norm.findings import ARMS, COMPARED, MEASURES, QUESTION

TEMPLATES = Path(__file__).parent


def headline(found: Mapping[str, Any]) -> str:
    """Return the answer and a line of explanation, for the findings of either protocol."""
    return render_lines(TEMPLATES / "headline.jinja", **found)


def report(found: Mapping[str, Any]) -> str:
    arms = [(arm.title, found["arms"][name]) for name, arm in ARMS.items()]
    gap, sd = found["comparison"]["test_loss"]["mean"], found["arms"]["baseline"]["test_loss"]["sd"]
    return render(
        TEMPLATES / "report.md.jinja",
        **found,
        question=QUESTION,
        ARMS=ARMS,
        COMPARED=COMPARED,
        MEASURES=MEASURES,
        grid_values=grid_values,
        gap_in_deviations=abs(gap) / sd if gap is not None and sd else None,
        at_edge=[(what, title) for title, arm in arms for what in arm["at_edge"]],
        diverged_trials=[(n, title) for title, arm in arms if (n := arm["num_trials_diverged"])],
    )
