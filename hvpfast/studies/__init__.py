"""Curvature studies, run by ``hvpfast study NAME``: a module here that has ``STUDY`` is one."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from hvpfast.lab.runs.run import Study


def studies() -> dict[str, Study[Any, Any]]:
    """Return every study of this package by its name on the command line."""
    names = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(name) for name in names]
    found: list[Study[Any, Any]] = [m.STUDY for m in modules if hasattr(m, "STUDY")]
    return {study.name: study for study in found}
