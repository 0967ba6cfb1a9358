"""Further suites of ``hvpfast bench``: every module here is one, by its name.

Each, or its module ``suite`` where it is a folder, gives ``DESCRIPTION``,
``add_arguments(parser)`` and ``run(arguments) -> exit status``.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    module = importlib.import_module(f"{__name__}.{name}")
    is_folder = hasattr(module, "__path__")
    return importlib.import_module(f"{module.__name__}.suite") if is_folder else module
