"""Further suites of ``hvpfast bench``: every module here is one, by its name.

Each gives ``DESCRIPTION``, ``add_arguments(parser)`` and ``run(arguments) -> exit status``.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

__all__ = ["load", "names"]


def names() -> list[str]:
    """The suites, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of one suite."""
    return importlib.import_module(f"{__name__}.{name}")
