"""Flatness-aware training by Tr(H^2)."""

from hvpfast.studies.flatness.config import Config
from hvpfast.studies.flatness.experiment import STUDY, run

__all__ = ["STUDY", "Config", "run"]
