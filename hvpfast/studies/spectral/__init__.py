"""Spectra of networks under a sweep of L2."""

from hvpfast.studies.spectral.config import Config
from hvpfast.studies.spectral.experiment import STUDY

__all__ = ["STUDY", "Config"]
