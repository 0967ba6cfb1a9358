"""MNIST-1D: generated, not downloaded, and compared with what was published.

References:
    Greydanus, Kobak (2024), Scaling Down Deep Learning with MNIST-1D, ICML.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hvpfast.lab.data.splits import Arrays, Data, three_way
from hvpfast.lab.runs.folder import StudyError
from hvpfast.lab.runs.packages import EXTRA, require

NUM_INPUTS, NUM_CLASSES = 40, 10


@dataclass(frozen=True)
class Published:
    """Digests and projections of MNIST-1D of one size."""

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
    """Compare generated data x (N, 40), y (N,) with `PUBLISHED`; return in what way it is equal.

    With another libm a value within 1e-15 of a rounding edge may round to another 1e-6. So where
    only the data's digest differs, the projections decide: they must agree to 1e-9 per value.

    Raises:
        StudyError: the data differ from those published.
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

    The package seeds the global generators of ``random`` and NumPy; both are then restored.
    """
    package = require("mnist1d.data", "the data set mnist1d")
    arguments = package.get_dataset_args()
    arguments.num_samples = num_samples
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made: dict[str, Any] = package.make_dataset(arguments)
        return made
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def mnist1d(num_samples: int, val_fraction: float, root_seed: int, dtype: torch.dtype) -> Data:
    """Return MNIST-1D in three splits; validation samples are drawn from the train part.

    With a `val_fraction` of 0, for protocols that have no such split, validation is the test split.
    """
    if val_fraction:
        split_sizes(num_samples, val_fraction)
    made = make_mnist1d(num_samples)
    check = verify(*(np.concatenate([made[k], made[f"{k}_test"]]) for k in ("x", "y")))
    parts = {name: made[name] for name in ("x", "y", "x_test", "y_test")}
    arrays = Arrays("mnist1d", num_classes=NUM_CLASSES, check=check, **parts)
    return three_way(arrays, val_fraction, root_seed, dtype)
