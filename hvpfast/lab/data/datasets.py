"""Data sets that need no download: digits, cifar-like, rbf."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from hvpfast.lab.data.splits import Arrays
from hvpfast.lab.runs.folder import StudyError
from hvpfast.lab.runs.packages import require

DIGITS = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
"""SHA-256 of scikit-learn's digits: 1797 images 8x8 and then the labels, all as bytes."""
NUM_DIGITS_TEST = 360


def load_digits() -> Arrays:
    """Return scikit-learn's 1797 handwritten digits, 8x8 interpolated to 28x28, values in [0, 1].

    The last 360 of a fixed permutation are the test samples. Between the pixels' centres the
    interpolation is bilinear, so that the inputs have rank 64.

    Raises:
        StudyError: scikit-learn is missing, or its digits are others than published.
    """
    images, y = require("sklearn.datasets", "the data set digits").load_digits(return_X_y=True)
    digest = hashlib.sha256(images.astype(np.uint8).tobytes() + y.astype(np.uint8).tobytes())
    if digest.hexdigest() != DIGITS:
        raise StudyError("scikit-learn's digits are other data than they were published as")
    x = resized(images.reshape(-1, 1, 8, 8) / 16, 28)
    order = np.random.Generator(np.random.Philox(0)).permutation(len(y))
    x, y = x[order], y[order].astype(np.int64)
    train, test = slice(None, -NUM_DIGITS_TEST), slice(-NUM_DIGITS_TEST, None)
    return Arrays("digits", x[train], y[train], x[test], y[test], 10, "equal by SHA-256")


def resized(images: npt.NDArray[Any], size: int) -> npt.NDArray[np.float32]:
    """Return square images (N, C, S, S) as rows (N, C * size * size), bilinearly interpolated."""
    given = images.shape[-1]
    centres = np.clip((np.arange(size) + 0.5) * given / size - 0.5, 0, given - 1)
    weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(given)))  # (size, S)
    made = np.einsum("is,ncst,jt->ncij", weights, images, weights, optimize=True)
    return np.asarray(made.reshape(len(images), -1), np.float32)


CIFAR_LIKE = {"classes": 100, "modes": 2, "coarse": 8, "variation": 2.5, "noise": 0.5}
"""Classes, prototypes of each, side of their coarse grid, standard deviations of what is added."""


def load_cifar_like(num_train: int = 3000, num_test: int = 10_000, seed: int = 0) -> Arrays:
    """Make images of CIFAR-100's shape: 3x32x32 bytes, 100 classes that can be learned.

    A class has two smooth prototypes, random colours on an 8x8 grid interpolated to 32x32. A sample
    is one of them, plus a smooth field of its own, plus noise in every pixel; see `CIFAR_LIKE`.
    """
    random = np.random.Generator(np.random.Philox(seed))
    classes, modes, coarse = (int(CIFAR_LIKE[k]) for k in ("classes", "modes", "coarse"))
    num = num_train + num_test
    prototypes = random.standard_normal((classes, modes, 3, coarse, coarse))
    y = random.permutation(np.arange(num) % classes)
    smooth = prototypes[y, random.integers(modes, size=num)]
    smooth += CIFAR_LIKE["variation"] * random.standard_normal(smooth.shape)
    x = resized(smooth, 32)
    x += np.float32(CIFAR_LIKE["noise"]) * random.standard_normal(x.shape, np.float32)
    spread = float(np.sqrt(1 + CIFAR_LIKE["variation"] ** 2 + CIFAR_LIKE["noise"] ** 2))
    pixels = np.clip(np.rint(128 + 80 / spread * x), 0, 255).astype(np.uint8)
    return made("cifar-like", pixels, y.astype(np.int64), num_train, classes, 255.0)


RBF_SHARES = (0.3001, 0.2424, 0.2024, 0.1624, 0.0927)
"""Of the classes: the largest and the smallest as published, the others in between."""
NUM_CENTRES, NUM_ROWS = 50, 1_000_000


def load_rbf(
    num_train: int = 3000, num_test: int = 10_000, seed: int = 0, drift: float = 1e-3
) -> Arrays:
    """Make a stream of radial basis functions like RandomRBF_50_1E-3: 10 features, 5 classes.

    Fifty centres in [0, 1]^10, each with a class, a weight and a width, move by `drift` from row to
    row and turn back at the walls. A row is a centre plus a random direction times a normal number
    times the width. As in the published set, samples are rows of a stream of a million: with the
    drift, centres have then been everywhere, and little can be learned; with ``drift=0``, much.

    References:
        Bifet, Holmes, Kirkby, Pfahringer (2010), MOA, JMLR 11, 1601-1604.
    """
    random = np.random.Generator(np.random.Philox(seed))
    num, features, classes = num_train + num_test, 10, len(RBF_SHARES)
    centres = random.random((NUM_CENTRES, features))
    directions = unit(random.standard_normal((NUM_CENTRES, features)))
    widths, weights = random.random(NUM_CENTRES), random.random(NUM_CENTRES)
    classes_of = np.arange(NUM_CENTRES) % classes
    for c, share in enumerate(RBF_SHARES):
        weights[classes_of == c] *= share / weights[classes_of == c].sum()
    rows = random.choice(NUM_ROWS, num, replace=False)
    chosen = random.choice(NUM_CENTRES, num, p=weights / weights.sum())
    moved = centres[chosen] + drift * rows[:, None] * directions[chosen]
    moved = 1 - np.abs(1 - moved % 2)  # there and back between the walls
    steps = unit(random.uniform(-1, 1, (num, features)))
    x = moved + steps * (random.standard_normal(num) * widths[chosen])[:, None]
    y = classes_of[chosen].astype(np.int64)
    return made("rbf", x.astype(np.float32), y, num_train, classes, 1.0)


def unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def made(
    name: str,
    x: npt.NDArray[Any],
    y: npt.NDArray[np.int64],
    num_train: int,
    num_classes: int,
    scale: float,
) -> Arrays:
    """Return the first `num_train` samples to train on and the others to test on.

    The check is the beginning of a digest, to compare with other machines.
    """
    digest = hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()[:16]
    train, test = slice(None, num_train), slice(num_train, None)
    check = f"made here, SHA-256 {digest}..."
    return Arrays(name, x[train], y[train], x[test], y[test], num_classes, check, scale)
