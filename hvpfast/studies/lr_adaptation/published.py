"""Report of the learning-rate study's published protocol, repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvpfast.lab.report.template import render
from hvpfast.studies.lr_adaptation.findings import CLAIMS, DESCRIPTIVE
from hvpfast.studies.lr_adaptation.report import TEMPLATES, names

ORIGINAL = {
    "adam": {"learning_rate": 0.00524, "test_lowest": 1.092, "test_loss": 1.211},
    "difference": {"learning_rate": 0.00271, "test_lowest": 1.088, "test_loss": 1.120},
}
"""What the study published: the learning rates in words, the losses read off its figure (± 0.005).
Its words say that the wrapper converges faster at first and Adam ends slightly lower; its figure
shows the opposite on both counts."""


def published_report(found: Mapping[str, Any]) -> str:
    """Return the report of the published protocol, repeated."""
    return render(
        TEMPLATES / "published.md.jinja",
        **names(found),
        CLAIMS=CLAIMS,
        DESCRIPTIVE=DESCRIPTIVE,
        ORIGINAL=ORIGINAL,
    )
