"""Train, validation and test splits of a data set, drawn by named random streams."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hvpfast.lab.runs.folder import Row, StudyError


def fold(root: int, *names: str | int) -> int:
    """Derive the seed of a named random stream: 63 bits of SHA-256 of ``root/name/...``."""
    digest = hashlib.sha256("/".join(map(str, (root, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(root: int, *names: str | int) -> torch.Generator:
    """Return a generator of its own for a named stream; global generators are never touched."""
    return torch.Generator().manual_seed(fold(root, *names))


@dataclass(frozen=True)
class Split:
    """Inputs x (N, D[0]) and class labels y (N,) int64."""

    x: torch.Tensor
    y: torch.Tensor

    def part(self, index: slice | torch.Tensor) -> Split:
        return Split(self.x[index], self.y[index])


@dataclass(frozen=True)
class Data:
    """Train, validation (carved out of the official train part) and test splits."""

    train: Split
    val: Split
    test: Split
    check: str
    """How the data was compared with what was published, for the report."""
    name: str = "mnist1d"
    num_classes: int = 10

    @property
    def splits(self) -> dict[str, Split]:
        """Splits by their names in the columns of rows: train, val, test."""
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def sizes(self) -> dict[str, int]:
        """Columns with the number of samples: num_train, num_val, num_test."""
        return {f"num_{name}": len(split.y) for name, split in self.splits.items()}

    @property
    def row(self) -> dict[str, Any]:
        """Row of the table "data"."""
        return {"table": "data", "dataset": self.name, **self.sizes, "check": self.check}


def describe_data(rows: list[Row], held_out: str = "validation") -> str:
    """Return the line of progress of a cell whose first row is or resembles `Data.row`."""
    line = "{dataset}: {num_train} train, {num_val} {held_out}, {num_test} test"
    return line.format(held_out=held_out, **rows[0])


@dataclass(frozen=True)
class Arrays:
    """A data set as it is stored: inputs x (N, D), labels y (N,) int64, and the same to test."""

    name: str
    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64]
    x_test: npt.NDArray[Any]
    y_test: npt.NDArray[np.int64]
    num_classes: int
    check: str
    """How the data was compared with what was published."""
    scale: float = 1.0
    """Inputs are divided by this: 255 for bytes."""


def three_way(
    arrays: Arrays,
    val_fraction: float,
    root_seed: int,
    dtype: torch.dtype,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    standardise: str | tuple[float, float] = "none",
) -> Data:
    """Return train, validation and test splits of a data set.

    Args:
        arrays: the data set.
        val_fraction: part of the train samples that is kept for validation; 0 for protocols that
            have no such split: validation is then the test split.
        root_seed: the samples are drawn by its stream "split".
        dtype: of the inputs.
        num_train: train and validation samples together; None for all.
        num_test: test samples; None for all.
        standardise: ``"none"``; ``"features"``, every input by its mean and standard deviation over
            the train split; or (mean, standard deviation) for all inputs.

    Raises:
        StudyError: more samples are asked for than there are, or a split would be empty.
    """
    random = generator(root_seed, "split")
    pool = drawn(len(arrays.y), num_train, random, f"{arrays.name}: train samples")
    kept = drawn(len(arrays.y_test), num_test, random, f"{arrays.name}: test samples").sort().values
    num_val = round(val_fraction * len(pool))
    if not 0 <= val_fraction < 1 or (val_fraction > 0) != (num_val > 0) or num_val == len(pool):
        raise StudyError(
            f"{val_fraction} of {len(pool)} samples cannot be kept for validation: both splits "
            "need samples. Change the fraction or the number of samples"
        )

    def split(x: npt.NDArray[Any], y: npt.NDArray[np.int64], index: torch.Tensor) -> Split:
        rows = torch.as_tensor(x[index.numpy()]).to(dtype).div_(arrays.scale)
        return Split(rows, torch.as_tensor(y[index.numpy()]))

    train = split(arrays.x, arrays.y, pool[num_val:].sort().values)
    val = split(arrays.x, arrays.y, pool[:num_val].sort().values)
    test = split(arrays.x_test, arrays.y_test, kept)
    if standardise != "none":
        mean, std = centre_and_scale(train.x, standardise)
        for part in (train, val, test):
            part.x.sub_(mean).div_(std)
    held_out = val if num_val else test
    return Data(train, held_out, test, arrays.check, arrays.name, arrays.num_classes)


def drawn(num: int, wanted: int | None, random: torch.Generator, what: str) -> torch.Tensor:
    """Return the indices of `wanted` of `num` samples, in random order."""
    if wanted is not None and not 0 < wanted <= num:
        raise StudyError(f"{what}: {wanted} asked for, there are {num}")
    return torch.randperm(num, generator=random)[:wanted]


def centre_and_scale(x: torch.Tensor, how: str | tuple[float, float]) -> tuple[Any, Any]:
    """Return what is subtracted from the inputs, and by what they are then divided."""
    if isinstance(how, tuple):
        return how
    if how != "features":
        raise ValueError(f'standardise must be "none", "features" or (mean, std); got {how!r}')
    std = x.std(0, correction=0)
    return x.mean(0), torch.where(std > 0, std, torch.ones_like(std))
