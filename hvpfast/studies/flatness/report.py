"""The report of the flatness study: its numbers for the words of the templates beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hvpfast.lab.report.template import render, render_lines
from hvpfast.studies.flatness import findings
from hvpfast.studies.flatness.findings import BASELINE

QUESTION = "Does penalising Tr(H²) make networks generalise better?"
TEMPLATES = Path(__file__).parent
PUBLISHED_MEASURES = ("val_accuracy", "best_accuracy", "late_accuracy", "flatness_same", "last_ce")
PUBLISHED = {
    "0": (0.2633, 0.2800, 0.2600, None, 1.376),
    "0.001": (0.2633, 0.2833, 0.2612, 18.79, 1.378),
    "0.01": (0.2700, 0.2783, 0.2625, 4.88, 1.393),
    "0.1": (0.2667, 0.2967, 0.2580, 1.30, 1.464),
    "1": (0.2583, 0.2983, 0.2797, 0.595, 1.670),
}
"""By lambda, from the published results: final, best and late test accuracy, Tr(H^2)/B of the last
epoch, and its cross-entropy (objective less penalty)."""

Found = Mapping[str, Any]


def report(found: Found) -> str:
    return render(TEMPLATES / "report.md.jinja", **names(found))


def headline(found: Found) -> str:
    """Return the answer, and what the penalty did to the curvature, each in a line."""
    return render_lines(TEMPLATES / "headline.jinja", **names(found))


def names(found: Found) -> dict[str, Any]:
    """Return the names of the templates: the findings, constants, and functions of the findings."""
    functions = (not_beating, seconds, probe_ratios)
    return {
        **found,
        "question": QUESTION,
        "published": published(found),
        "BASELINE": BASELINE,
        "FLATNESS": list(findings.FLATNESS),
        "LATE": findings.LATE,
        "MEASURES": findings.MEASURES,
        "TARGET": findings.TARGET,
        "VARIANCES": findings.VARIANCES,
        "verdicts": findings.verdicts,
        "decidable": findings.decidable,
        "milliseconds": {k: 1e3 * v for k, v in found["cost"]["seconds"].items() if v},
        **{function.__name__: partial(function, found) for function in functions},
    }


def not_beating(found: Found, predictor: Mapping[str, float]) -> list[str]:
    """Return the lambdas whose mean test accuracy is at most that of a simple predictor."""
    means = {arm: found["by_arm"][arm]["test_accuracy"]["mean"] for arm in found["arms"]}
    level = predictor["test_accuracy"]
    return [arm for arm, mean in means.items() if mean is not None and mean <= level]


def seconds(found: Found, arm: str, epochs: float | None) -> float | None:
    """Return the seconds that the steps of so many epochs take."""
    per_step = found["cost"]["seconds"]["plain" if arm == BASELINE else "penalised"]
    if per_step is None or epochs is None:
        return None
    return float(per_step * epochs * found["cost"]["steps_per_epoch"])


def probe_ratios(found: Found) -> dict[str, dict[str, float]]:
    """Return by lambda how many times the Tr(H^2) of fresh probes on the same batches is seen.

    ``same``: by the penalty's own probes; ``unseen``: by fresh probes on held-out batches.
    """
    ratios = {}
    for arm in found["arms"]:
        same, fresh, unseen = (
            found["by_arm"][arm][f"flatness_{name}"]["mean"] for name in ("same", "fresh", "unseen")
        )
        if same and fresh and unseen is not None:
            ratios[arm] = {"same": same / fresh, "unseen": unseen / fresh}
    return ratios


def published(found: Found) -> dict[str, dict[str, float | None]]:
    """Return the published numbers by lambda and measure, where the run follows their protocol."""
    if found["data"]["dataset"] != "rbf" or not found["data"]["held_out_is_test"]:
        return {}
    return {
        arm: dict(zip(PUBLISHED_MEASURES, PUBLISHED[arm], strict=True))
        for arm in found["arms"]
        if arm in PUBLISHED
    }
