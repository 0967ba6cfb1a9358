"""Reports of the learning-rate study: the templates and what they are given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvpfast.lab.report.records import grid_values
from hvpfast.lab.report.template import render, render_lines
from hvpfast.studies.lr_adaptation import findings
from hvpfast.studies.lr_adaptation.findings import CLAIMS, RATIOS, SPEED

TEMPLATES = Path(__file__).parent
ORIGINAL = {
    "adam": {"learning_rate": 0.00524, "test_lowest": 1.092, "test_loss": 1.211},
    "difference": {"learning_rate": 0.00271, "test_lowest": 1.088, "test_loss": 1.120},
}
"""What the study published: the learning rates in words, the losses read off its figure (± 0.005).
Its words say that the wrapper converges faster at first and Adam ends slightly lower; its figure
shows the opposite on both counts."""
CLAIMED = {**dict.fromkeys(RATIOS, "lower"), "test_loss": "higher"}
"""What was published of the wrapper against Adam: faster at first, a slightly higher loss."""
NEAR = 0.1
"""How far from one the factor of the prediction about noise may be."""


def headline(found: Mapping[str, Any]) -> str:
    """Return the answer and, of the sound protocol, that to the registered prediction."""
    return render_lines(TEMPLATES / "headline.jinja", **names(found))


def report(found: Mapping[str, Any]) -> str:
    if found["protocol"] == "published":
        return render(TEMPLATES / "published.md.jinja", **names(found), ORIGINAL=ORIGINAL)
    config = found["config"]
    return render(
        TEMPLATES / "report.md.jinja",
        **names(found),
        NEAR=NEAR,
        relative_times=relative_times(found["arms"]),
        num_steps=config["epochs"] * math.ceil(found["data"]["num_train"] / config["batch_size"]),
        nearest_verdict=nearest_verdict(found),
        noise=noise_prediction(found),
        proxy_epoch=max(found["proxies"]["adam"], key=int),
    )


def names(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every template of the study is given: the findings and what follows from them."""
    verdicts = {claim: result["verdict_holm"] for claim, result in found["study"].items()}
    labels = {**SPEED, **CLAIMS}
    return {
        **found,
        "question": findings.QUESTION,
        "ARMS": findings.ARMS,
        "CLAIMS": CLAIMS,
        "CONTROL": findings.CONTROL,
        "DESCRIPTIVE": findings.DESCRIPTIVE,
        "RATIOS": RATIOS,
        "grid_values": grid_values,
        "better": [labels[claim] for claim in verdicts if verdicts[claim] == "lower"],
        "worse": [labels[claim] for claim in verdicts if verdicts[claim] == "higher"],
        "rest": [labels[c] for c in verdicts if verdicts[c] not in ("lower", "higher")],
        "claim_verdicts": claim_verdicts(found),
    }


def claim_verdicts(found: Mapping[str, Any]) -> dict[str, str]:
    """Return by measure whether what was claimed of it holds here."""
    verdicts = {}
    for measure in found["claims"]:
        if measure in CLAIMED:
            verdict = found["study"][measure]["verdict_holm"]
            not_held = "refuted, the opposite" if verdict in ("lower", "higher") else "not shown"
            verdicts[measure] = "held" if verdict == CLAIMED[measure] else not_held
    return verdicts


def relative_times(arms: Mapping[str, Any]) -> dict[str, float | None]:
    seconds = {name: arm["seconds_per_step"] for name, arm in arms.items()}
    base = seconds["adam"]
    return {name: time / base if time and base else None for name, time in seconds.items()}


def nearest_verdict(found: Mapping[str, Any]) -> str:
    verdicts = {result["verdict_holm"] for result in found["nearest"].values()}
    if verdicts == {"higher"}:
        return "held"
    return "refuted" if "lower" in verdicts else "undecided"


def noise_prediction(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return whether the running differences measure noise, and what was measured of them.

    ``factor``: their root mean square over that of the difference of two mini-batch gradients,
    sqrt(2) times the noise. None where they were not measured along the wrapper's own trainings.
    """
    along, ranks = found["proxies"].get("difference"), found["ranks"]
    if not along:
        return None
    epoch = max(along, key=int)
    measured = along[epoch]["difference"]
    factor = measured["noise_ratio"]["mean"] / math.sqrt(2)
    verdict = "undecided"
    if ranks["evidence"]:
        held = ranks["verdict"] == "higher" and abs(factor - 1) < NEAR
        verdict = "held" if held else "refuted"
    return {**measured, "epoch": epoch, "factor": factor, "verdict": verdict}
