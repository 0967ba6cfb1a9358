"""Hyper-parameter search by Optuna's tree-structured Parzen estimator (TPE), seeded and quiet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvpfast.lab.runs.packages import require

Point = dict[str, float]


def minimise(
    evaluate: Callable[[int, Point], float],
    space: Mapping[str, tuple[float, float]],
    first: Sequence[Mapping[str, float]],
    num_trials: int,
    seed: int,
) -> Point | None:
    """Return the point with the lowest value, the earliest of equals; None if none is finite.

    The points ``first`` come first; coordinates that they leave open are drawn at random. TPE
    chooses the others. All points follow from the seed and the values, so a search whose values
    are on record is resumed by running it again.

    Args:
        evaluate: (number of the trial, point) to a value; infinite for a failure.
        space: name to (low, high), searched on a logarithmic scale.
        first: points to try before TPE chooses.
        num_trials: number of points in all, `first` included.
        seed: of the sampler.
    """
    optuna: Any = require("optuna", "the search for hyper-parameters")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=len(first))
        search = optuna.create_study(sampler=sampler)
        for point in first:
            search.enqueue_trial(dict(point))
        best, lowest = None, math.inf
        for number in range(num_trials):
            trial = search.ask()
            point = {k: float(trial.suggest_float(k, *ends, log=True)) for k, ends in space.items()}
            value = evaluate(number, point)
            search.tell(trial, value)
            if value < lowest:
                best, lowest = point, value
    finally:
        optuna.logging.set_verbosity(verbosity)
    return best
