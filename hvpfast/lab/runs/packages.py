"""Packages that only some studies need."""

from __future__ import annotations

import importlib
from types import ModuleType

from hvpfast.lab.runs.folder import StudyError

EXTRA = "pip install 'hvpfast[studies]'"
"""What installs all of them."""


def require(package: str, purpose: str) -> ModuleType:
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise StudyError(
            f"{purpose} needs {missing}, which cannot be imported ({error}). "
            f"Install it with: {EXTRA}"
        ) from error
