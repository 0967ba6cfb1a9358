"""The suite behind ``hvpfast bench``: correctness first, then interleaved timing against peers."""

from hvpfast.bench.command import DESCRIPTION, add_arguments, main, run
from hvpfast.bench.runner import run_bench
from hvpfast.bench.settings import Settings

__all__ = ["DESCRIPTION", "Settings", "add_arguments", "main", "run", "run_bench"]
