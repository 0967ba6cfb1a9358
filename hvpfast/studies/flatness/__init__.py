"""Flatness-aware training by Tr(H^2)."""

from hvpfast.studies.flatness.experiment import STUDY

__all__ = ["STUDY"]
