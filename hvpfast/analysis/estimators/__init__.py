"""Trace, Frobenius norm, diagonal and row norms: estimates with standard errors, exact values."""

from hvpfast.analysis.estimators.estimate import (
    diagonal,
    estimate_all,
    frobenius_norm,
    frobenius_sq,
    row_norms_sq,
    trace,
)
from hvpfast.analysis.estimators.many_models import ModelsEstimate
from hvpfast.analysis.estimators.result import Estimate, Estimates

__all__ = [
    "Estimate",
    "Estimates",
    "ModelsEstimate",
    "diagonal",
    "estimate_all",
    "frobenius_norm",
    "frobenius_sq",
    "row_norms_sq",
    "trace",
]
