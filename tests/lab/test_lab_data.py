"""The data sets of the studies: splits, made and packaged sets, files on disk, what goes wrong."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvpfast.lab.data import datasets, image_files
from hvpfast.lab.data.splits import Arrays, Data, three_way
from hvpfast.lab.measure.predictors import linear_prediction
from hvpfast.lab.runs.folder import StudyError

SMALL = Arrays(
    "small",
    np.arange(60, dtype=np.uint8).reshape(20, 3),
    np.arange(20, dtype=np.int64) % 4,
    200 + np.arange(12, dtype=np.uint8).reshape(4, 3),
    np.arange(4, dtype=np.int64),
    4,
    "as it is",
    255.0,
)


# splits


def split(arrays: Arrays = SMALL, fraction: float = 0.25, seed: int = 0, **options: Any) -> Data:
    return three_way(arrays, fraction, seed, torch.float64, **options)


def test_splits_are_disjoint_complete_scaled_and_named_by_the_seed() -> None:
    made = split()
    assert [len(s.y) for s in (made.train, made.val, made.test)] == [15, 5, 4]
    assert (made.name, made.num_classes, made.check) == ("small", 4, "as it is")
    rows = torch.cat([made.train.x, made.val.x]) * 255
    assert torch.equal(rows.sort(0).values, torch.arange(60.0, dtype=torch.float64).reshape(20, 3))
    first = (made.train.x[:, 0] * 255 / 3).round().long()
    assert torch.equal(made.train.y, first % 4)  # labels stay with their rows
    assert torch.equal(split().val.x, made.val.x)
    assert not torch.equal(split(seed=1).val.x, made.val.x)


def test_fewer_samples_are_drawn_and_standardised_by_the_train_split() -> None:
    made = split(num_train=12, num_test=2, standardise="features")
    assert [len(s.y) for s in (made.train, made.val, made.test)] == [9, 3, 2]
    assert made.train.x.mean(0).abs().max() < 1e-12
    assert torch.allclose(made.train.x.std(0, correction=0), torch.ones(3, dtype=torch.float64))
    assert made.test.x.mean() > 2  # by the train split's numbers, not its own
    plain, shifted = split(), split(standardise=(0.5, 0.25))
    assert torch.allclose(shifted.val.x, (plain.val.x - 0.5) / 0.25)
    constant = Arrays(**{**vars(SMALL), "x": np.ones((20, 3), np.uint8)})
    assert torch.equal(split(constant, standardise="features").train.x, torch.zeros(15, 3).double())


def test_without_validation_the_test_split_is_shared_and_standardised_once() -> None:
    made = split(fraction=0.0, standardise=(0.5, 0.25))
    assert made.val is made.test
    assert len(made.train.y) == 20
    kept = torch.arange(200.0, 212.0, dtype=torch.float64).reshape(4, 3) / 255
    assert torch.allclose(made.test.x, (kept - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 21}, "small: train samples: 21 asked for, there are 20"),
        ({"num_test": 5}, "small: test samples: 5 asked for, there are 4"),
        ({"fraction": 0.01}, "cannot be kept for validation"),
        ({"fraction": 0.99}, "cannot be kept for validation"),
        ({"fraction": -0.5}, "cannot be kept for validation"),
    ],
)
def test_samples_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        split(**options)
    with pytest.raises(ValueError, match="standardise must be"):
        split(standardise="rows")


# digits, cifar-like, rbf


def test_digits_are_the_published_ones_at_28x28() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    made = datasets.load_digits()
    assert made.x.shape == (1437, 784)
    assert made.x_test.shape == (360, 784)
    assert made.x.min() >= 0
    assert made.x.max() <= 1
    assert (np.bincount(made.y) > 100).all()
    assert np.linalg.matrix_rank(made.x.astype(np.float64), tol=1e-3) <= 64
    order = np.random.Generator(np.random.Philox(0)).permutation(1797)
    coarse = torch.as_tensor(sklearn.load_digits().images[order[:5], None] / 16)
    fine = torch.nn.functional.interpolate(coarse, 28, mode="bilinear").reshape(5, 784)
    assert np.allclose(made.x[:5], fine, atol=1e-6)
    assert (made.y[:5] == sklearn.load_digits().target[order[:5]]).all()
    assert (datasets.load_digits().x == made.x).all()


def test_digits_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(datasets, "DIGITS", "0" * 64)
    with pytest.raises(StudyError, match="other data than they were published as"):
        datasets.load_digits()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(StudyError, match=r"digits needs .*pip install 'hvpfast\[studies\]'"):
        datasets.load_digits()


def test_resizing_is_bilinear() -> None:
    ramp = np.arange(8.0)[None, None, None] * np.ones((1, 1, 8, 1))
    wide = datasets.resized(ramp, 32).reshape(32, 32)
    assert np.allclose(wide[0, 2:-2], (np.arange(2, 30) + 0.5) / 4 - 0.5, atol=1e-6)
    assert np.allclose(wide[:, 0], 0)
    expected = torch.nn.functional.interpolate(
        torch.as_tensor(SMALL.x[:16, :].reshape(1, 3, 4, 4)).double(), 28, mode="bilinear"
    )
    found = datasets.resized(SMALL.x[:16, :].reshape(1, 3, 4, 4).astype(float), 28)
    assert np.allclose(found, expected.reshape(1, -1), atol=1e-3)


def test_cifar_like_has_the_shape_and_can_be_learned() -> None:
    made = datasets.load_cifar_like(3000, 1000)
    assert (made.x.shape, made.x_test.shape) == ((3000, 3072), (1000, 3072))
    assert made.x.dtype == np.uint8
    assert (np.bincount(np.concatenate([made.y, made.y_test])) == 40).all()
    assert 100 < made.x.mean() < 156
    assert 40 < made.x.std() < 60
    again, other = datasets.load_cifar_like(3000, 1000), datasets.load_cifar_like(3000, 1000, 1)
    assert (again.x == made.x).all()
    assert again.check == made.check != other.check
    x, x_test = made.x.astype(np.float32), made.x_test.astype(np.float32)
    centres = np.stack([x[made.y == c].mean(0) for c in range(100)])
    distances = (centres**2).sum(1) - 2 * x_test @ centres.T
    accuracy = (distances.argmin(1) == made.y_test).mean()
    assert accuracy > 0.1  # ten times chance, by the nearest mean
    assert accuracy < 0.9  # and not solved by it


def test_rbf_has_the_published_shares_and_is_learnable_only_without_drift() -> None:
    made = datasets.load_rbf(2400, 4000)
    assert (made.x.shape, made.num_classes) == ((2400, 10), 5)
    shares = np.bincount(np.concatenate([made.y, made.y_test])) / 6400
    assert np.abs(shares - datasets.RBF_SHARES).max() < 4 * np.sqrt(0.3 * 0.7 / 6400)
    assert sum(datasets.RBF_SHARES) == pytest.approx(1)
    drifting = linear_prediction(split(made, 0.2, standardise="features"))
    still = linear_prediction(split(datasets.load_rbf(2400, 4000, drift=0), 0.2))
    assert drifting["test_accuracy"] < 0.30 + 0.03
    assert still["test_accuracy"] > 0.4
    assert (datasets.load_rbf(2400, 4000).x == made.x).all()


# MNIST on disk


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four small IDX files whose checksums are taken for MNIST's."""
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    random = np.random.default_rng(0)
    images = [random.integers(256, size=(n, 28, 28), dtype=np.uint8) for n in (6, 3)]
    labels = [np.arange(n, dtype=np.uint8) for n in (6, 3)]
    arrays = (images[0], labels[0], images[1], labels[1])
    files = {name: idx(a) for name, a in zip(image_files.MNIST, arrays, strict=True)}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(image_files, "MNIST", sums)
    return files


@pytest.mark.parametrize("where", ["", "MNIST/raw", "mnist"])
@pytest.mark.parametrize("form", ["plain", "gz", "dots"])
def test_mnist_is_read_from_wherever_it_lies(
    where: str, form: str, mnist: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in mnist.items():
        name = name.replace("-idx", ".idx") if form == "dots" else name
        name, content = (name + ".gz", gzip.compress(content)) if form == "gz" else (name, content)
        (folder / name).write_bytes(content)
    made = image_files.load_mnist(tmp_path)
    assert (made.x.shape, made.x_test.shape, made.num_classes) == ((6, 784), (3, 784), 10)
    assert made.y.tolist() == [0, 1, 2, 3, 4, 5]
    assert made.x[1, 0] == mnist["train-images-idx3-ubyte"][16 + 784]
    assert split(made, 0.5).train.x.max() <= 1


def test_damaged_mnist_is_named(mnist: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in mnist.items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x09")
    with pytest.raises(StudyError, match="t10k-labels-idx1-ubyte is damaged or another file"):
        image_files.load_mnist(tmp_path)
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    with pytest.raises(StudyError, match=r"t10k-labels-idx1-ubyte.gz is damaged"):
        image_files.load_mnist(tmp_path)


def test_absent_mnist_says_what_to_do(mnist: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        image_files.load_mnist(tmp_path)
    message = str(caught.value)
    assert "torchvision cannot be imported" in message
    assert "train-images-idx3-ubyte" in message
    assert "--data-dir" in message
    assert "--data digits" in message
    assert not list(tmp_path.iterdir())


def torchvision(name: str, kind: Any) -> Any:
    module: Any = types.ModuleType("torchvision.datasets")
    setattr(module, name, kind)
    return module


def test_torchvision_fetches_where_it_can(
    mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetching(root: str, download: bool) -> None:
        assert download
        raw = Path(root) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name, content in mnist.items():
            (raw / name).write_bytes(content)

    monkeypatch.setitem(sys.modules, "torchvision.datasets", torchvision("MNIST", fetching))
    assert image_files.load_mnist(tmp_path).check == "equal by MD5"

    def failing(root: str, download: bool) -> None:
        raise RuntimeError("no network")

    monkeypatch.setitem(sys.modules, "torchvision.datasets", torchvision("MNIST", failing))
    with pytest.raises(StudyError, match=r"cannot be fetched \(torchvision: no network\)"):
        image_files.load_mnist(tmp_path / "other")


# CIFAR-100 on disk


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def pickled(num: int, extra: Any = None) -> bytes:
    random = np.random.default_rng(num)
    stored = {
        b"data": random.integers(256, size=(num, 3072), dtype=np.uint8),
        b"fine_labels": [i % 100 for i in range(num)],
        b"coarse_labels": [0] * num,
        b"extra": extra,
    }
    return pickle.dumps(stored, protocol=2)


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Two small parts whose checksums are taken for CIFAR-100's."""
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    parts = {"train": pickled(7), "test": pickled(4)}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in parts.items()}
    monkeypatch.setattr(image_files, "CIFAR", sums)
    return parts


@pytest.mark.parametrize("form", ["folder", "inside", "archive"])
def test_cifar100_is_read_from_folder_or_archive(
    form: str, cifar: dict[str, bytes], tmp_path: Path
) -> None:
    if form == "archive":
        with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as files:
            for name, content in cifar.items():
                info = tarfile.TarInfo(f"cifar-100-python/{name}")
                info.size = len(content)
                files.addfile(info, io.BytesIO(content))
    else:
        folder = tmp_path / ("cifar-100-python" if form == "folder" else "")
        folder.mkdir(exist_ok=True)
        for name, content in cifar.items():
            (folder / name).write_bytes(content)
    made = image_files.load_cifar100(tmp_path)
    assert (made.x.shape, made.x_test.shape, made.num_classes) == ((7, 3072), (4, 3072), 100)
    assert made.y_test.tolist() == [0, 1, 2, 3]
    assert (made.x == np.random.default_rng(7).integers(256, size=(7, 3072), dtype=np.uint8)).all()


def test_damaged_or_absent_cifar100_is_named(cifar: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="ask for the offline data set: --data cifar-like"):
        image_files.load_cifar100(tmp_path)
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(StudyError, match=r"cifar-100-python.tar.gz is damaged"):
        image_files.load_cifar100(tmp_path)
    for name, content in cifar.items():
        (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(StudyError, match="train is damaged or another file"):
        image_files.load_cifar100(tmp_path)


def test_pickles_make_arrays_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(pickle.UnpicklingError, match="has no place in a data set"):
        image_files.batch(pickled(2, Harmful()))
    assert capsys.readouterr().out == ""
