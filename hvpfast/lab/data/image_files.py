"""MNIST and CIFAR-100 from files on disk, checked, and fetched through torchvision if possible.

MNIST is four IDX files (plain or ``.gz``): big-endian magic 2051 for images and 2049 for labels, a
32-bit size per dimension, bytes. CIFAR-100 is its "python version": pickles of bytes (N, 3072) and
labels, read only after their checksum, and by a reader that makes arrays and nothing else.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import itertools
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hvpfast.lab.data.splits import Arrays
from hvpfast.lab.runs.folder import StudyError

MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""MD5 of the files, unpacked."""
CIFAR_ARCHIVE = "cifar-100-python.tar.gz"
CIFAR = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
"""MD5 of the members of the folder ``cifar-100-python``."""


def load_mnist(data_dir: str | Path) -> Arrays:
    """Return MNIST, bytes (60000, 784) and (10000, 784), from files under `data_dir`.

    Raises:
        StudyError: files are missing and cannot be fetched, or are not MNIST.
    """
    paths = present("MNIST", Path(data_dir), idx_files, "digits")
    x, y, x_test, y_test = (
        idx(content(path, name, MNIST[name]), name) for name, path in paths.items()
    )
    x, x_test = (images.reshape(len(images), -1) for images in (x, x_test))
    labels, labels_test = y.astype(np.int64), y_test.astype(np.int64)
    return Arrays("mnist", x, labels, x_test, labels_test, 10, "equal by MD5", 255.0)


def load_cifar100(data_dir: str | Path) -> Arrays:
    """Return CIFAR-100 with its fine labels, bytes (50000, 3072) and (10000, 3072).

    Raises:
        StudyError: files are missing and cannot be fetched, or are not CIFAR-100.
    """
    paths = present("CIFAR100", Path(data_dir), cifar_files, "cifar-like")
    (x, y), (x_test, y_test) = (
        batch(content(path, name, CIFAR[name])) for name, path in paths.items()
    )
    return Arrays("cifar-100", x, y, x_test, y_test, 100, "equal by MD5", 255.0)


def present(
    name: str, folder: Path, find: Callable[[Path], dict[str, Path] | None], offline: str
) -> dict[str, Path]:
    """Return what `find` finds; fetch the data set first where it finds nothing."""
    found = find(folder)
    if found is None:
        reason = fetch(name, folder)
        found = find(folder)
        if found is None:
            wanted = ", ".join(MNIST) + " (or .gz)" if name == "MNIST" else CIFAR_ARCHIVE
            raise StudyError(
                f"{name} is not in {folder} and cannot be fetched ({reason}). Put {wanted} there, "
                f"name its folder by --data-dir, or ask for the offline data set: --data {offline}"
            )
    return found


def fetch(name: str, folder: Path) -> str:
    """Try to fetch a data set through torchvision; return why that failed, if it did."""
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError) as error:  # built for another torch, it raises RuntimeError
        return f"torchvision cannot be imported: {error}"
    try:
        getattr(datasets, name)(root=str(folder), download=True)
    except Exception as error:  # no network, no room, a moved address: it raises anything
        return f"torchvision: {error}"
    return "torchvision put it elsewhere"


def idx_files(folder: Path) -> dict[str, Path] | None:
    """Return the paths of MNIST's four files, or None where one is missing."""
    places = (folder, folder / "MNIST" / "raw", folder / "mnist")
    found: dict[str, Path] = {}
    for name in MNIST:
        spellings = (name, name.replace("-idx", ".idx"))
        for place, word, ending in itertools.product(places, spellings, ("", ".gz")):
            path = place / f"{word}{ending}"
            if path.is_file():
                found.setdefault(name, path)
    return found if len(found) == len(MNIST) else None


def cifar_files(folder: Path) -> dict[str, Path] | None:
    """Return the paths of CIFAR-100's two parts, or twice the archive's; None without either."""
    for place in (folder / "cifar-100-python", folder):
        paths = {name: place / name for name in CIFAR}
        if all(path.is_file() for path in paths.values()):
            return paths
    archive = folder / CIFAR_ARCHIVE
    return dict.fromkeys(CIFAR, archive) if archive.is_file() else None


def content(path: Path, name: str, md5: str) -> bytes:
    """Return the bytes of a file, unpacked; raise where they do not have the checksum."""
    found = unpacked(path, name) if path.suffix == ".gz" else path.read_bytes()
    if hashlib.md5(found, usedforsecurity=False).hexdigest() != md5:
        raise StudyError(
            f"{path} is damaged or another file: its MD5 is not {md5}. Delete it and fetch it again"
        )
    return found


def unpacked(path: Path, name: str) -> bytes:
    """Return what a gzip file holds, or one part out of CIFAR-100's archive."""
    try:
        if path.name != CIFAR_ARCHIVE:
            return gzip.decompress(path.read_bytes())
        with tarfile.open(path) as files:
            file = files.extractfile(f"cifar-100-python/{name}")
            return file.read() if file else b""
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise StudyError(f"{path} is damaged ({error}). Delete it and fetch it again") from error


def idx(content: bytes, name: str) -> npt.NDArray[np.uint8]:
    dims = content[3]
    sizes = np.frombuffer(content, ">u4", dims, 4).astype(int)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if content[:3] != b"\0\0\x08" or values.size != sizes.prod():
        raise StudyError(f"{name} is not an IDX file of bytes")
    return values.reshape(sizes)


class ArraysOnly(pickle.Unpickler):
    """Reads pickles of arrays, and refuses all others."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function named by a pickle, if it belongs to arrays."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a data set")
        module = module.replace("numpy.core", "numpy._core") if hasattr(np, "_core") else module
        return super().find_class(module, name)


def batch(content: bytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return pixels (N, 3072) and fine labels (N,) of one part of CIFAR-100."""
    stored = ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    return np.asarray(stored[b"data"], np.uint8), np.asarray(stored[b"fine_labels"], np.int64)
