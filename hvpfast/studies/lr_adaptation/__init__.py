"""Learning rates from the Hessian's diagonal."""

from hvpfast.studies.lr_adaptation.experiment import STUDY

__all__ = ["STUDY"]
