"""Hessian-vector products of many models at once."""

from hvpfast.bench.suites.models.suite import DESCRIPTION, add_arguments, run

__all__ = ["DESCRIPTION", "add_arguments", "run"]
