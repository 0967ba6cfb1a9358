"""Registers, shared memory and spills of the GPU kernels."""

from hvpfast.bench.suites.kernels.suite import DESCRIPTION, add_arguments, run

__all__ = ["DESCRIPTION", "add_arguments", "run"]
