"""The files of the spectral study, in ``test_data/`` and by the names that were published.

    Model-{ID}.csv                          a line per lambda: losses and accuracy
    Model-{ID}_split_accuracy.csv           the same with the accuracy of every class
    gradients-{ID}-{L2}.csv                 a line per tensor, ``dL/d<name>: v, v, ...``, of CE
    Hessian-eigenvalues-{ID}-{L2}.csv       a column, ascending; of the cross-entropy's Hessian
    Hessian-eigenvectors-{ID}-{L2}.csv      a row of P numbers per eigenvalue, or .npy (pairs, P)
    model_weights-{ID}-{L2}.pth             state dict

{L2} is lambda with five decimals. Numbers are written with nine significant digits, which keep
float32 exactly; nine decimals, as published, would lose small gradients. Not among the published:
``Hessian-effective-eigenvalues-{ID}-{L2}.csv``, the same pairs of H + d I.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hvpfast as hf
from hvpfast.lab.report.records import table
from hvpfast.lab.runs.folder import Row, StudyError, write_whole
from hvpfast.studies.spectral.config import Config
from hvpfast.studies.spectral.data import NUM_CLASSES, NUM_INPUTS
from hvpfast.studies.spectral.findings import by_index
from hvpfast.utils.files import SCRATCH

FOLDER = "test_data"
CSV_BYTES = 12.5
"""Average bytes of a number with nine significant digits and its separator."""


def name_of(config: Config, what: str, index: int, suffix: str = "csv") -> str:
    return f"{what}-{config.id}-{config.step * index:.5f}.{suffix}"


def path_of(config: Config, folder: Path, what: str, index: int, suffix: str = "csv") -> Path:
    return folder / FOLDER / name_of(config, what, index, suffix)


def state_path(config: Config, folder: Path, sweep: str, index: int) -> Path:
    """Return where the parameters of a lambda lie.

    The main sweep's have the published place and name, the other sweeps' the folder ``branches``.
    """
    if sweep == config.sweep:
        return path_of(config, folder, "model_weights", index, "pth")
    return folder / "branches" / name_of(config, sweep, index, "pth")


def keep_state(path: Path, spec: hf.MLPSpec, flat: Tensor) -> None:
    buffer = io.BytesIO()
    named = zip(spec.names, spec.unflatten(flat.detach()), strict=True)
    torch.save({name: tensor.clone() for name, tensor in named}, buffer)
    write_whole(path, buffer.getvalue())


def read_state(path: Path, spec: hf.MLPSpec) -> Tensor:
    """Return the parameters (P,) of a state dict.

    Raises:
        StudyError: the file is missing or damaged.
    """
    try:
        state = torch.load(path, weights_only=True)
        return spec.flatten([state[name] for name in spec.names])
    except Exception as error:  # torch.load raises anything for a damaged file
        raise StudyError(
            f"{path} cannot be read ({error}). Delete the cells/train-*.jsonl of its sweep and "
            "resume: the weights are made again"
        ) from error


def keep_values(path: Path, values: Sequence[float]) -> None:
    write_whole(path, "".join(f"{v:.9g}\n" for v in sorted(values)))


def keep_vectors(config: Config, folder: Path, index: int, rows: Tensor) -> None:
    """Write eigenvectors as rows (pairs, P), in the order of the eigenvalues' file."""
    path = path_of(config, folder, "Hessian-eigenvectors", index, config.keep_format)
    if config.keep_format == "npy":
        buffer = io.BytesIO()
        np.save(buffer, rows.numpy(), allow_pickle=False)
        write_whole(path, buffer.getvalue())
    else:
        write_whole(path, "".join(line(row) + "\n" for row in rows))


def keep_gradient(path: Path, spec: hf.MLPSpec, gradient: Tensor) -> None:
    parts = zip(spec.names, spec.unflatten(gradient), strict=True)
    write_whole(path, "".join(f"dL/d{name}: {line(part)}\n" for name, part in parts))


def line(numbers: Tensor) -> str:
    values = numbers.reshape(-1).tolist()
    return ", ".join(["%.9g"] * len(values)) % tuple(values)


METRICS = {
    "L2_strength": "lambda",
    "Train_Loss": "train_loss",
    "Train_Reg_Loss": "train_objective",
    "Test_Loss": "test_loss",
    "Test_Accuracy(%)": "test_accuracy",
}
"""Columns of Model-{ID}.csv, and of our rows."""


def artefacts(folder: Path, records: list[Row]) -> None:
    """Write the two tables of scores; delete files that killed processes left half written."""
    for part in folder.glob(f"*/{SCRATCH}*"):
        part.unlink(missing_ok=True)
    config = records[0]
    classes = {f"Class_{c}_Accuracy": f"class_{c}" for c in range(NUM_CLASSES)}
    rows = by_index(table(records, "train", sweep=config["sweep"])).values()
    for ending, columns in (("", METRICS), ("_split_accuracy", METRICS | classes)):
        lines = [",".join(columns)]
        lines += [",".join(metric(row, *column) for column in columns.items()) for row in rows]
        path = folder / FOLDER / f"Model-{config['id']}{ending}.csv"
        write_whole(path, "\n".join(lines) + "\n")


def metric(row: Mapping[str, Any], name: str, column: str) -> str:
    """Return one number of the tables of scores, accuracies in percent; empty where unknown."""
    value = row[column]
    if value is None:
        return ""
    if name == "L2_strength":
        return f"{value:.5f}"
    return f"{100 * value if 'Accuracy' in name else value:.9g}"


def size_text(config: Config) -> str:
    """Return, for a run that is about to start, what it will write and how large that is."""
    sizes = (NUM_INPUTS, *config.hidden, NUM_CLASSES)
    num = hf.MLPSpec(sizes).num_params
    width = 4 if config.dtype == "float32" else 8
    points, kept = len(config.chosen), len(config.kept)
    number = width if config.keep_format == "npy" else CSV_BYTES
    vectors = kept * config.pairs * num * number
    gradients, weights = kept * num * CSV_BYTES, points * num * width
    return (
        f"{megabytes(vectors + gradients + weights)} in {FOLDER}/: eigenvectors of {kept} lambdas "
        f"as {config.keep_format} {megabytes(vectors)}, their gradients {megabytes(gradients)}, "
        f"weights of {points} lambdas {megabytes(weights)}"
    )


def megabytes(size: float) -> str:
    """Return a number of bytes in megabytes, or gigabytes from one on."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
