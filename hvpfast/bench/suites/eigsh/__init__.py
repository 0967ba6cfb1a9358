"""Eigenpairs of trained networks against SciPy and the peers."""

from hvpfast.bench.suites.eigsh.suite import DESCRIPTION, add_arguments, run

__all__ = ["DESCRIPTION", "add_arguments", "run"]
