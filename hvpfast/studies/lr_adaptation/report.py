"""Report of the learning-rate study's sound protocol: its template and what that is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvpfast.lab.report.records import grid_values
from hvpfast.lab.report.template import render, render_lines
from hvpfast.studies.lr_adaptation.findings import ARMS, CLAIMS, CONTROL, QUESTION, RATIOS, SPEED

TEMPLATES = Path(__file__).parent
CLAIMED = {**dict.fromkeys(RATIOS, "lower"), "test_loss": "higher"}
"""What was published of the wrapper against Adam: faster at first, a slightly higher loss."""
NEAR = 0.1
"""How far from one the factor of the prediction about noise may be."""


def headline(found: Mapping[str, Any]) -> str:
    """Return the answer and, of the sound protocol, that to the registered prediction."""
    return render_lines(TEMPLATES / "headline.jinja", **names(found))


def sound_report(found: Mapping[str, Any]) -> str:
    """Return the report of the sound protocol."""
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
        "question": QUESTION,
        "ARMS": ARMS,
        "CONTROL": CONTROL,
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
        verdict = found["study"][measure]["verdict_holm"]
        if measure in CLAIMED and verdict not in ("lower", "higher"):
            verdicts[measure] = "not shown"
        elif measure in CLAIMED:
            held = verdict == CLAIMED[measure]
            verdicts[measure] = "held" if held else "refuted, the opposite"
    return verdicts


def relative_times(arms: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the time of every arm's step over that of Adam's."""
    seconds = {name: arm["seconds_per_step"] for name, arm in arms.items()}
    base = seconds["adam"]
    return {name: time / base if time and base else None for name, time in seconds.items()}


def nearest_verdict(found: Mapping[str, Any]) -> str:
    """Return whether the predicted relative of the wrapper is the nearest."""
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
