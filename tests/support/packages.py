"""Packages that may be missing, and torchvision beside any torch."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch

_schemas: list[Any] = []


def real(name: str) -> Any:
    """The package, or a skipped test with the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _make_torchvision_importable()
            return importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"{name} cannot be imported: {error}")


def _make_torchvision_importable() -> None:
    """Beside a torch of another build torchvision misses the schemas of its own operators."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        _schemas.append(library)  # they live as long as this object
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
