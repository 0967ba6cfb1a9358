"""Lines of progress of the Hessian-norm study's sound protocol, one per finished cell."""

from __future__ import annotations

import math
from statistics import fmean

from hvpfast.lab.runs.folder import Row


def mean_loss(rows: list[Row]) -> float:
    """Return the mean validation loss of a trial; infinite where a training diverged."""
    losses = [row["val_loss"] for row in rows]
    return fmean(loss if isinstance(loss, float) else math.inf for loss in losses)


def describe_data(rows: list[Row]) -> str:
    """Return the data's line of progress."""
    sizes = "{num_train} train, {num_val} validation, {num_test} test".format(**rows[0])
    return f"{rows[0]['dataset']}: {sizes}"


def describe_trial(rows: list[Row]) -> str:
    """Return a trial's line of progress."""
    row = rows[0]
    strength = f"strength {row['strength']:.0e}" if row["strength"] else ""
    point = f"lr {row['learning_rate']:.1e}  {strength:<14}"
    return f"tune   {row['arm']:<16}  {point}  val loss {mean_loss(rows):.4f}"


def describe_final(rows: list[Row]) -> str:
    """Return a final run's line of progress."""
    row = rows[-1]
    head = f"final  {row['arm']:<16}  seed {row['seed']:<2}"
    if row["diverged"]:
        return f"{head}  diverged"
    losses = f"val loss {row['val_loss']:.4f}  test loss {row['test_loss']:.4f}"
    return f"{head}  {losses}  |H|^2 {row['hessian_fro2']:.3g}"


def describe_torch(rows: list[Row]) -> str:
    """Return the line of progress of the trainings by torch autograd."""
    return f"torch  autograd alone    seed {rows[0]['seed']:<2}  {len(rows) - 1} arms"
