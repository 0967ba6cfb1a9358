"""Learning rates from the Hessian's diagonal."""

from hvpfast.studies.lr_adaptation.config import Config
from hvpfast.studies.lr_adaptation.experiment import STUDY

__all__ = ["STUDY", "Config"]
