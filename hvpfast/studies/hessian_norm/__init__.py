"""Training with a Hessian-norm penalty."""

from hvpfast.studies.hessian_norm.config import Config
from hvpfast.studies.hessian_norm.experiment import STUDY

__all__ = ["STUDY", "Config"]
