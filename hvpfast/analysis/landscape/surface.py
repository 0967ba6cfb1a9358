"""A landscape and its file: losses on a grid, with their directions and settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvpfast.utils.files import npz_bytes, write_whole

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Surface:
    """Losses L(p + x d_1 + y d_2) on a grid (plane), or L(p + x d_1) (line).

    Attributes:
        losses: (X, Y), or (X,) for a line; float64. Inf or NaN where the loss overflows, NaN where
            a point is not ``done``.
        done: which points were evaluated, bool, shaped as ``losses``.
        x, y: coordinates (X,), (Y,); ``y`` is None for a line.
        directions: columns d_i (P, 1 or 2), in the dtype of the computation, along ``param_names``.
        center_loss: L(p).
        settings: what the losses depend on, as JSON values; equal settings give equal files.
    """

    losses: Tensor
    done: Tensor
    x: Tensor
    y: Tensor | None
    directions: Tensor
    center_loss: float
    settings: Mapping[str, Any]

    @property
    def complete(self) -> bool:
        """Whether every point was evaluated."""
        return bool(self.done.all())

    @property
    def overflow(self) -> Tensor:
        """Points whose loss is inf or NaN, bool, shaped as ``losses``."""
        return self.done & ~torch.isfinite(self.losses)

    @property
    def unit(self) -> str:
        """Text: what a distance of 1 means."""
        return str(self.settings["unit"])

    @property
    def seed(self) -> int | None:
        """Seed of the random directions; None for given ones."""
        seed: int | None = self.settings["seed"]
        return seed

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the parameters along which the directions are flat."""
        return tuple(self.settings["parameters"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz archive, whole or not at all; :func:`load` reads it."""
        arrays = {
            "losses": self.losses,
            "done": self.done,
            "x": self.x,
            "directions": self.directions,
            "center_loss": torch.tensor(self.center_loss, dtype=torch.float64, device="cpu"),
        }
        if self.y is not None:
            arrays["y"] = self.y
        found = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
        settings = json.dumps({"format": _FORMAT, **self.settings}, sort_keys=True)
        write_whole(Path(path), npz_bytes({**found, "settings": np.array(settings)}))


def load(path: str | os.PathLike[str]) -> Surface:
    """The surface in a file, complete or not.

    Raises:
        ValueError: the file is something else, or damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            settings = json.loads(str(archive["settings"]))
            arrays = {name: archive[name] for name in archive.files if name != "settings"}
        if settings.pop("format") != _FORMAT:
            raise ValueError("it has another format")
        tensors: dict[str, Any] = {name: torch.from_numpy(a) for name, a in arrays.items()}
        center_loss = float(tensors.pop("center_loss"))
        return Surface(center_loss=center_loss, settings=settings, **{"y": None, **tensors})
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is not a landscape of this library, or is damaged ({error}); "
            "delete it or choose another path"
        ) from error
