"""The flatness study's data sets, and the functions by which a user replaces its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hvpfast.lab.data import datasets, image_files
from hvpfast.lab.data.splits import Data, Split, three_way
from hvpfast.lab.runs.folder import StudyError
from hvpfast.studies.flatness.config import Config

HELD_OUT = 0.2
"""Part of the samples that no training sees."""


@dataclass(frozen=True)
class Custom:
    """The user's own functions; None and empty for the study's."""

    data: Callable[[], Any] | None = None
    model: Callable[[], nn.Module] | None = None
    metrics: Mapping[str, Callable[[nn.Module, Data], float]] = field(default_factory=dict)

    def names(self) -> dict[str, str]:
        """Return the functions' names for env.json, where a resumed run must find the same."""
        told = {"own data": self.data, "own model": self.model}
        names = {what: name_of(own) for what, own in told.items() if own is not None}
        return names | {f"own metric {name}": name_of(own) for name, own in self.metrics.items()}

    def measure(self, model: nn.Module, data: Data) -> dict[str, float]:
        """Return a column ``metric_NAME`` for each of the user's metrics."""
        with torch.no_grad():
            return {f"metric_{name}": float(own(model, data)) for name, own in self.metrics.items()}


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function or class; of an object, that of its class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def load(own: Custom, config: Config) -> Data:
    """Return the data in splits: train, held out (``val``), test.

    With ``test_samples`` 0 the held-out fifth is the test split too, as in the published runs.
    """
    dtype = getattr(torch, config.dtype)
    if own.data is not None:
        data = own_splits(own.data(), dtype)
        check_labels(data)
    else:
        data = named(config, dtype)
    if len(data.train.y) < config.batch_size:
        raise StudyError(
            f"{len(data.train.y)} samples to train are fewer than a batch of {config.batch_size}. "
            "Lower --batch-size or raise --n-samples"
        )
    return data


def named(config: Config, dtype: torch.dtype) -> Data:
    """Return one of the study's own data sets, every input standardised by the train split."""
    num, num_test, held_out = config.n_samples, config.test_samples, HELD_OUT
    if num_test == 0:
        num_test = round(HELD_OUT * num)
        num, held_out = num - num_test, 0.0
    makers = {"rbf": datasets.load_rbf, "cifar-like": datasets.load_cifar_like}
    if config.data in makers:
        arrays = makers[config.data](num, num_test)
    else:
        arrays = image_files.load_cifar100(config.data_dir)
    sizes = {"num_train": num, "num_test": num_test}
    return three_way(arrays, held_out, config.root_seed, dtype, standardise="features", **sizes)


def own_splits(given: Any, dtype: torch.dtype) -> Data:
    """Return the splits of what the user's function gave: a `Data`, or four arrays.

    Of four arrays the last fifth of the train samples is held out; inputs stay as they are.

    Raises:
        StudyError: it is something else, or its parts do not fit each other.
    """
    if isinstance(given, Data):
        train, val, test = (Split(s.x.to(dtype), s.y.long()) for s in given.splits.values())
        return replace(given, train=train, val=test if given.val is given.test else val, test=test)
    if not isinstance(given, tuple) or len(given) != 4:
        raise StudyError(
            "data() must return (x_train, y_train, x_test, y_test) or a Data of three splits; "
            f"got {type(given).__name__}"
        )
    x, y, x_test, y_test = (torch.as_tensor(np.asarray(part)) for part in given)
    if len(x) != len(y) or len(x_test) != len(y_test) or x.shape[1:] != x_test.shape[1:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, y, x_test, y_test))
        raise StudyError(
            f"data() must return x (N, ...), y (N,), and the same to test; got {shapes}"
        )
    if y.is_floating_point() or y_test.is_floating_point():
        raise StudyError("data() must return integer classes; got floating-point labels")
    first = len(y) - max(1, round(HELD_OUT * len(y)))
    digest = hashlib.sha256()
    for part in (x, y, x_test, y_test):
        digest.update(part.contiguous().numpy().tobytes())
    y, y_test = y.long(), y_test.long()
    return Data(
        Split(x[:first].to(dtype), y[:first]),
        Split(x[first:].to(dtype), y[first:]),
        Split(x_test.to(dtype), y_test),
        f"given, SHA-256 {digest.hexdigest()[:16]}...",
        "own data",
        int(torch.cat((y, y_test)).max()) + 1,
    )


def check_labels(data: Data) -> None:
    for name, split in data.splits.items():
        y = split.y
        if len(y) == 0 or int(y.min()) < 0 or int(y.max()) >= data.num_classes:
            raise StudyError(
                f"the {name} split must have samples, of classes 0 to {data.num_classes - 1}; got "
                f"{len(y)} samples" + (f" of classes {y.min()} to {y.max()}" if len(y) else "")
            )
