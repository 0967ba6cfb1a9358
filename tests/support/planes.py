"""A small plane for the tests of landscapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dense import classes, perceptron
from torch import nn

from hvpfast.analysis import landscape


def small_plane(path: Path | None, **options: Any) -> landscape.Surface:
    """6 x 6 points of a small perceptron, five at a time, saved after each five."""
    model, data = perceptron(), classes(8, 4)
    given = {"seed": 5, "num_points": 6, "points_at_once": 5, "save_every": 0.0, **options}
    return landscape.plane(model, nn.CrossEntropyLoss(), None, data, path=path, **given)
