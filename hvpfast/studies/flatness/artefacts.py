"""The files that the original experiment leaves: its results as a pickle, its report, weights.

FA_regularization_results.pkl holds dictionaries, lists, strings, numbers and NumPy arrays only:

    config          the configuration
    lambda_values   [lambda]
    results         {lambda: {"seeds": (S,), "history": {column: (S, epochs + 1)},
                              "final": {column: (S,)}, "weights": {name: array}}}
    landscapes      [{lambda: {"x": (X,), "y": (X,), "losses": (X, X), "center_loss": number}}]
    findings        the named numbers of the report

Seeds whose training diverged have NaN. Weights are those of the first seed.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import nn

import hvpfast as hf
from hvpfast.lab.report.records import facts, table
from hvpfast.lab.runs.folder import Row, RunFolder, StudyError, write_whole
from hvpfast.studies.flatness.findings import findings, grids
from hvpfast.studies.flatness.report import report
from hvpfast.utils.files import npz_bytes

RESULTS = "FA_regularization_results.pkl"
REPORT = "experiment_report.md"
FILED = ("arm", "lambda", "seed", "test_right")
"""Columns that are not measures: whose row it is, and a bit for every test sample."""


def weights_path(folder: Path, arm: str) -> Path:
    return folder / "weights" / f"lambda-{arm}.npz"


def keep_weights(folder: Path, arm: str, model: nn.Module) -> None:
    if isinstance(model, hf.MLP):
        named = zip(hf.spec_of(model, F.cross_entropy).names, model.weights, strict=True)
    else:
        named = model.named_parameters()  # type: ignore[assignment]
    arrays = {name: tensor.detach().numpy() for name, tensor in named}
    write_whole(weights_path(folder, arm), npz_bytes(arrays))


def artefacts(folder: Path, records: list[Row]) -> None:
    found = findings(records, RunFolder(folder).timings())
    lambdas = {arm: found["by_arm"][arm]["lambda"] for arm in found["arms"]}
    planes = dict.fromkeys(row["plane"] for row in found["landscape"])
    content = {
        "config": found["config"],
        "lambda_values": list(lambdas.values()),
        "results": {lam: arm_results(folder, records, arm) for arm, lam in lambdas.items()},
        "landscapes": [plane_results(records, found, plane) for plane in planes],
        "findings": found,
    }
    write_whole(folder / RESULTS, pickle.dumps(content, protocol=4))
    write_whole(folder / REPORT, report(found))


def arm_results(folder: Path, records: list[Row], arm: str) -> dict[str, Any]:
    rows = table(records, "final", arm=arm)
    return {
        "seeds": np.array([row["seed"] for row in rows]),
        "history": history(records, rows, arm),
        "final": {k: np.array([numeric(row.get(k)) for row in rows]) for k in measured(rows)},
        "weights": {} if rows[0]["diverged"] else read_weights(folder, arm),
    }


def measured(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(k for row in rows for k in facts(row) if k not in FILED))


def history(
    records: list[Row], finals: Sequence[dict[str, Any]], arm: str
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the curves of one lambda by column, (S, epochs + 1)."""
    curves = [table(records, "epoch", arm=arm, seed=row["seed"]) for row in finals]
    names = measured(list(itertools.chain.from_iterable(curves)))
    padded = list(zip(*itertools.zip_longest(*curves, fillvalue={}), strict=True))
    return {k: np.array([[numeric(row.get(k)) for row in rows] for rows in padded]) for k in names}


def numeric(value: Any) -> float:
    """Return a number of a row; NaN for none."""
    return float("nan") if value is None else float(value)


def read_weights(folder: Path, arm: str) -> dict[str, np.ndarray[Any, Any]]:
    path = weights_path(folder, arm)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{path} cannot be read ({error}). Delete the cells/lambda-{arm}-seed-*.jsonl of the "
            "first seed and resume: they are made again with it"
        ) from error


def plane_results(records: list[Row], found: dict[str, Any], plane: int) -> dict[float, Any]:
    centres = {r["arm"]: r["loss"] for r in found["landscape"] if r["plane"] == plane}
    return {
        found["by_arm"][arm]["lambda"]: {
            "x": grid["x"],
            "y": grid["x"],
            "losses": grid["losses"],
            "center_loss": centres[arm],
        }
        for arm, grid in grids(records, plane).items()
    }
