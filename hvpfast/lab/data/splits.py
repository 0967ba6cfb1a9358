"""Splits, random streams, and MNIST-1D, which is generated and not downloaded.

Further data sets are in ``datasets.py``. Data are named, never substituted.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hvpfast.lab.runs.folder import StudyError

NUM_CLASSES = 10
EXTRA = "pip install 'hvpfast[studies]'"


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


@dataclass(frozen=True)
class Data:
    """Train, validation (carved out of the official train part) and test splits."""

    train: Split
    val: Split
    test: Split
    check: str
    """How the data was compared with what was published; see `verify`."""
    name: str = "mnist1d"
    num_classes: int = NUM_CLASSES


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
    val, train = pool[:num_val].sort().values, pool[num_val:].sort().values
    splits = [
        Split(inputs(arrays.x, index, arrays.scale, dtype), labels(arrays.y, index))
        for index in (train, val)
    ]
    test = Split(inputs(arrays.x_test, kept, arrays.scale, dtype), labels(arrays.y_test, kept))
    if standardise != "none":
        mean, std = centre_and_scale(splits[0].x, standardise)
        for split in (*splits, test):
            split.x.sub_(mean).div_(std)
    return Data(
        splits[0],
        splits[1] if num_val else test,
        test,
        arrays.check,
        arrays.name,
        arrays.num_classes,
    )


def drawn(num: int, wanted: int | None, random: torch.Generator, what: str) -> torch.Tensor:
    """Return the indices of `wanted` of `num` samples, in random order."""
    if wanted is not None and not 0 < wanted <= num:
        raise StudyError(f"{what}: {wanted} asked for, there are {num}")
    return torch.randperm(num, generator=random)[:wanted]


def inputs(
    x: npt.NDArray[Any], index: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return the chosen rows of x as floating-point numbers, divided by the scale."""
    return torch.as_tensor(x[index.numpy()]).to(dtype).div_(scale)


def labels(y: npt.NDArray[np.int64], index: torch.Tensor) -> torch.Tensor:
    """Return the chosen labels."""
    return torch.as_tensor(y[index.numpy()])


def centre_and_scale(x: torch.Tensor, how: str | tuple[float, float]) -> tuple[Any, Any]:
    """Return what is subtracted from the inputs, and by what they are then divided."""
    if isinstance(how, tuple):
        return how
    if how != "features":
        raise ValueError(f'standardise must be "none", "features" or (mean, std); got {how!r}')
    std = x.std(0, correction=0)
    return x.mean(0), torch.where(std > 0, std, torch.ones_like(std))


@dataclass(frozen=True)
class Published:
    """What MNIST-1D of one size must be."""

    data: str
    """SHA-256 of round(1e6 * [x; x_test]) as little-endian int64."""
    labels: str
    """SHA-256 of the labels as uint8."""
    projections: tuple[float, ...]
    """sum_i c_i x_i over the flattened data, c_i = (7919 i mod p) - p // 2, for p in `MODULI`."""


MODULI = (97, 101, 103, 107)
PUBLISHED = {
    2000: Published(
        "39c45e5e6184cc0fb7012b012940bd4fcb9c6c25cbee64a6ed0a72427c77366e",
        "7dabae50d46c0e265170931eb6180f81d91534423e8c718799a0137c1db2c381",
        (-2303.5750414404456, -2808.028377834338, 14062.59646724635, -4961.0938765545825),
    ),
    5000: Published(
        "84d961d5accf2cc30aa504b797bbe1ee38911771bd3dd6f6ada4fa8be524ad68",
        "4f5f4160c519e3c47f9d3e196c161336fcd32126a9efffe4153d6e7c8b73f963",
        (3837.713625509945, 7170.756106249067, 2424.8413938897443, 2774.226173333621),
    ),
    10000: Published(
        "503a6fa155aa3793665c3d1164a31b201d7f4848bd620cfe32a26813d168bb5f",
        "22d71096184e4b3252d74b8588a7f893b65f2da7f9df1001dfc387c1a6181915",
        (21637.95011641191, -15186.417787471733, 15148.08859074701, 8445.62049934389),
    ),
}
"""By number of samples, for the package's default arguments; 5000 is the official set."""


def verify(x: npt.NDArray[np.float64], y: npt.NDArray[np.int64]) -> str:
    """Compare generated data x (N, 40), y (N,) with `PUBLISHED`; return how it was found equal.

    Rounding to 1e-6 may flip for a value within 1e-15 of a rounding edge (another libm), so where
    only the data's digest differs, the projections decide: they must agree to 1e-9 per value.

    Raises:
        StudyError: the data are others than published.
    """
    published = PUBLISHED.get(len(y))
    if published is None:
        return "nothing published for this size"
    labels = hashlib.sha256(y.astype(np.uint8).tobytes()).hexdigest() == published.labels
    rounded = np.round(1e6 * x).astype("<i8")
    if labels and hashlib.sha256(rounded.tobytes()).hexdigest() == published.data:
        return "equal by SHA-256"
    flat, index = x.ravel(), np.arange(x.size)
    found = [math.fsum(flat * ((7919 * index) % p - p // 2)) for p in MODULI]
    pairs = zip(found, published.projections, MODULI, strict=True)
    if labels and all(abs(a - b) <= 1e-9 * (p // 2) for a, b, p in pairs):
        return "equal to 1e-9"
    raise StudyError(
        f"the package mnist1d generated other data than the published {len(y)} samples (another "
        f"version of it?). Install the one this was written for: {EXTRA}"
    )


def split_sizes(num_samples: int, val_fraction: float) -> tuple[int, int, int]:
    """Return the sizes of train, validation and test split of `num_samples` of MNIST-1D.

    Raises:
        ValueError: classes would be unequal, or a split empty.
    """
    if num_samples < NUM_CLASSES or num_samples % NUM_CLASSES:
        raise ValueError(
            f"num_samples must be a multiple of {NUM_CLASSES}, for equal classes; got {num_samples}"
        )
    num_pool = int(0.8 * num_samples)  # the package's own rule
    num_val = round(val_fraction * num_pool) if 0 < val_fraction < 1 else 0
    if not 0 < num_val < num_pool:
        raise ValueError(
            f"val_fraction must leave samples to train and to validate; got {val_fraction} of "
            f"{num_pool} samples"
        )
    return num_pool - num_val, num_val, num_samples - num_pool


def make_mnist1d(num_samples: int) -> dict[str, Any]:
    """Generate MNIST-1D: x, x_test (., 40) float64 and y, y_test (.,) int64.

    The package seeds the global generators of ``random`` and NumPy; both are put back as they were.
    """
    package = require("mnist1d.data", "the data set mnist1d")
    arguments = package.get_dataset_args()
    arguments.num_samples = num_samples
    return preserving_global_generators(lambda: package.make_dataset(arguments))


def preserving_global_generators(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call `work`, then restore the global generators of ``random`` and NumPy, error or not."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        return work()
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def mnist1d(num_samples: int, val_fraction: float, root_seed: int, dtype: torch.dtype) -> Data:
    """Return MNIST-1D in three splits; validation samples are drawn from the train part.

    With a `val_fraction` of 0, for protocols that have no such split, validation is the test split.
    """
    num_val = split_sizes(num_samples, val_fraction)[1] if val_fraction else 0
    made = make_mnist1d(num_samples)
    check = verify(*(np.concatenate([made[k], made[f"{k}_test"]]) for k in ("x", "y")))
    x, y, x_test, y_test = (torch.as_tensor(made[k]) for k in ("x", "y", "x_test", "y_test"))
    order = torch.randperm(len(y), generator=generator(root_seed, "split"))
    val, train = order[:num_val].sort().values, order[num_val:].sort().values
    x, x_test = x.to(dtype), x_test.to(dtype)
    test = Split(x_test, y_test)
    return Data(Split(x[train], y[train]), Split(x[val], y[val]) if num_val else test, test, check)
