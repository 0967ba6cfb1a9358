"""Exact tr H^2 and its gradient against probes and dense Hessians."""

from hvpfast.bench.suites.exact.suite import DESCRIPTION, add_arguments, run

__all__ = ["DESCRIPTION", "add_arguments", "run"]
