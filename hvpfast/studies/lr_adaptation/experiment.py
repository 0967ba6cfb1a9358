"""Does scaling gradients by their running differences, as a stand-in for curvature, help Adam?

    s_t = 0.9 s_{t-1} + 0.1 c_t^2,     the base optimizer steps on  g_t / (sqrt(s_t) + 1e-8)

with c the difference of consecutive gradients (the study's wrapper), the secant on one batch, one
Hutchinson probe of the Hessian's diagonal, or the exact diagonal, of the mini-batch's mean
cross-entropy. A small MLP on MNIST-1D; see `hvpfast.optim`.

Protocols. ``sound``: three splits; every arm tries the same learning rates; the lowest validation
loss after the last epoch wins, by the rule that is reported; then one training per arm and seed,
arms of a seed sharing initial weights and batches. ``published``: as the study was run, with seeds:
the test split is the validation split, each arm is tuned by 20 trials of 10 epochs and trained once
for 20; the whole protocol is repeated once per seed.

Four claims are measured, all on the same runs: steps to a target validation loss, test loss where
the validation loss was lowest, test loss after the last epoch, and their difference, the drift. The
sound protocol measures speed once more, from the same weights and batches, at the learning rate
that tuning found fastest to the target.

Random streams are named and derived from one root seed: split; init, batches and probes of each
training; tuner; scatter. Rows, by their ``table``: data, trivial, trial (one tuning training),
epoch (a point of a final run's curve), final, cost, and those of ``measure.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hvpfast.lab.data.mnist1d import mnist1d
from hvpfast.lab.data.splits import Data, describe_data, fold
from hvpfast.lab.measure.predictors import constant_prediction, linear_prediction
from hvpfast.lab.measure.training import score
from hvpfast.lab.measure.tuning import Point, minimise
from hvpfast.lab.report.records import mean_of
from hvpfast.lab.runs import run as runs
from hvpfast.lab.runs.config import engine_of
from hvpfast.lab.runs.folder import Row, StudyError
from hvpfast.lab.runs.progress import Cell, Task
from hvpfast.studies.lr_adaptation.config import PRESETS, Config
from hvpfast.studies.lr_adaptation.figures import figures
from hvpfast.studies.lr_adaptation.findings import ARMS, QUESTION, STUDIED, findings
from hvpfast.studies.lr_adaptation.measure import proxy_rows
from hvpfast.studies.lr_adaptation.report import headline, report
from hvpfast.studies.lr_adaptation.train import Stream, Trained, spec, time_steps, train

RANDOM_TRIALS = 10
"""Trials that TPE draws at random before it starts, as is Optuna's default."""

mean_loss = partial(mean_of, measure="val_loss")


def engine(config: Config) -> dict[str, str]:
    return engine_of(config, spec(config))


def load(config: Config) -> Data:
    """Return the splits of mnist1d; as published, validation is the test split."""
    fraction = config.val_fraction if config.protocol == "sound" else 0.0
    return mnist1d(config.num_samples, fraction, config.root_seed, getattr(torch, config.dtype))


def trial_row(arm: str, seed: int, trial: int, rate: float, trained: Trained) -> dict[str, Any]:
    row = {"table": "trial", "arm": arm, "seed": seed, "trial": trial, "learning_rate": rate}
    ended = not trained.diverged
    return {
        **row,
        "val_loss": trained.epochs[-1]["val_loss"] if ended else None,
        "steps_to_target": trained.steps_to_target,
        "steps_counted": trained.steps_counted if ended else None,
    }


def trial_rows(config: Config, data: Data, arm: str, trial: int) -> Iterator[dict[str, Any]]:
    rate = config.learning_rates[trial]
    for seed in config.tune_seeds:
        stream = ("tune", seed)
        trained = train(config, data, arm, rate, stream, stream, config.epochs)
        yield trial_row(arm, seed, trial, rate, trained)


def best_rate(arm: str, trials: list[list[Row]]) -> float:
    rows = min(trials, key=mean_loss)
    if mean_loss(rows) == math.inf:
        raise StudyError(f"every tuning trial of the arm {arm} diverged. Lower --learning-rates")
    return float(rows[0]["learning_rate"] or 0)


def fastest_rate(trials: list[list[Row]]) -> float:
    """Return the learning rate with the fewest mean steps to the target; of equals, the best."""
    rows = min(trials, key=lambda rows: (mean_of(rows, "steps_counted"), mean_loss(rows)))
    return float(rows[0]["learning_rate"] or 0)


def final_rows(
    config: Config,
    data: Data,
    arm: str,
    seed: int,
    rate: float,
    order: Stream,
    speed_rate: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Train a final network: its curve, then the row in which the test split is used.

    With `speed_rate` it is trained once more, at that learning rate and until the target.
    """
    network, init = spec(config), ("final", seed)
    trained = train(config, data, arm, rate, init, order, config.epochs)
    for row in trained.epochs:
        yield {"table": "epoch", "arm": arm, "seed": seed, **row}
    final: dict[str, Any] = {"table": "final", "arm": arm, "seed": seed, "learning_rate": rate}
    final["diverged"] = trained.diverged
    if not trained.diverged and trained.best_flat is not None:
        final["num_steps"], final["steps_to_target"] = trained.num_steps, trained.steps_to_target
        final["steps_counted"] = trained.steps_counted
        final["best_epoch"] = trained.best_epoch
        final["val_loss"] = trained.epochs[-1]["val_loss"]
        final["val_lowest"] = trained.epochs[trained.best_epoch]["val_loss"]
        final["train_loss"] = score(trained.model, data.train)[0]
        final["test_loss"], final["test_accuracy"] = score(trained.model, data.test)
        with torch.no_grad():
            trained.model.flat.copy_(trained.best_flat)
        final["test_lowest"], _ = score(trained.model, data.test)
        final["drift"] = final["test_loss"] - final["test_lowest"]
    if speed_rate is not None:
        fast = train(config, data, arm, speed_rate, init, order, config.epochs, stop_at_target=True)
        whole = config.epochs * math.ceil(len(data.train.y) / config.batch_size)
        final["speed_rate"] = speed_rate
        final["speed_reached"] = fast.steps_to_target is not None
        final["steps_tuned"] = fast.steps_to_target or whole
    final |= {"sizes": "-".join(map(str, network.sizes)), "num_params": network.num_params}
    yield {**final, "backend": config.backend, "dtype": config.dtype}


def repeat_rows(config: Config, data: Data, arm: str, seed: int) -> Iterator[dict[str, Any]]:
    """Run the published protocol once for one arm: the search, then the one final training.

    One initial state serves every trial and the final runs of both arms; batches differ between
    all trainings, as they did where nothing was seeded.
    """
    rows: list[dict[str, Any]] = []

    def evaluate(number: int, point: Point) -> float:
        order, rate = ("published", arm, seed, number), point["learning_rate"]
        trained = train(config, data, arm, rate, ("final", seed), order, config.tune_epochs)
        rows.append(trial_row(arm, seed, number, rate, trained))
        return mean_loss(rows[-1:])

    space = {"learning_rate": (config.learning_rates[0], config.learning_rates[-1])}
    tuner = fold(config.root_seed, "tuner", arm, seed)
    start: list[Point] = [{}] * min(RANDOM_TRIALS, config.trials)
    best = minimise(evaluate, space, start, config.trials, tuner)
    if best is None:
        raise StudyError(f"every tuning trial of the arm {arm} diverged. Lower --learning-rates")
    yield from rows
    order = ("published", arm, seed, "final")
    yield from final_rows(config, data, arm, seed, best["learning_rate"], order)


def data_rows(data: Data) -> Iterator[dict[str, Any]]:
    yield data.row
    yield {"table": "trivial", **constant_prediction(data)}
    yield {"table": "linear", **linear_prediction(data)}


def describe_trial(rows: list[Row]) -> str:
    row = rows[0]
    return f"tune   {row['arm']:<14}  lr {row['learning_rate']:.1e}  val loss {mean_loss(rows):.4f}"


def describe_final(rows: list[Row]) -> str:
    row = rows[-1]
    head = f"final  {row['arm']:<14}  seed {row['seed']:<2}  lr {row['learning_rate']:.1e}"
    if row["diverged"]:
        return f"{head}  diverged"
    target = "never" if row["steps_to_target"] is None else f"{row['steps_to_target']} steps"
    return f"{head}  target {target}  test loss {row['test_loss']:.4f}"


def describe_proxies(rows: list[Row]) -> str:
    return f"proxies along {rows[0]['trajectory']}, seed {rows[0]['seed']}"


def plan(config: Config) -> list[str]:
    if config.protocol == "published":
        return ["data", *(f"repeat-{arm}-{s:03d}" for s in config.seeds for arm in STUDIED)]
    tuning = [f"tune-{arm}-{i:02d}" for arm in ARMS for i in range(len(config.learning_rates))]
    finals = [f"final-{arm}-{seed:03d}" for seed in config.seeds for arm in ARMS]
    proxies = [f"proxies-{arm}-{seed:03d}" for seed in config.proxy_seeds for arm in STUDIED]
    return ["data", "cost", *tuning, *finals, *proxies]


def experiment(config: Config, data: Data, cell: Cell) -> None:
    """Tune every arm, train every arm from every seed, and measure the proxies."""
    config = replace(config, backend=engine(config)["backend"])  # chosen once for the whole run
    cell("data", partial(data_rows, data), describe_data)
    tasks: list[Task] = []
    if config.protocol == "published":
        for seed, arm in itertools.product(config.seeds, STUDIED):
            repeat = partial(repeat_rows, config, data, arm, seed)
            tasks.append((f"repeat-{arm}-{seed:03d}", repeat, describe_final))
        cell.together(tasks)
        return
    cell("cost", partial(time_steps, config, data, ARMS), lambda _: "time of a step of every arm")
    grid = range(len(config.learning_rates))
    tunings: list[Task] = [
        (f"tune-{arm}-{i:02d}", partial(trial_rows, config, data, arm, i), describe_trial)
        for arm, i in itertools.product(ARMS, grid)
    ]
    trials = iter(cell.together(tunings))
    found = {arm: [next(trials) for _ in grid] for arm in ARMS}
    rates = {arm: best_rate(arm, found[arm]) for arm in ARMS}
    speed = {arm: fastest_rate(found[arm]) for arm in ARMS}
    for seed, arm in itertools.product(config.seeds, ARMS):
        stream = ("final", seed)
        work = partial(final_rows, config, data, arm, seed, rates[arm], stream, speed[arm])
        tasks.append((f"final-{arm}-{seed:03d}", work, describe_final))
    for seed, arm in itertools.product(config.proxy_seeds, STUDIED):
        measure = partial(proxy_rows, config, data, arm, rates[arm], seed)
        tasks.append((f"proxies-{arm}-{seed:03d}", measure, describe_proxies))
    cell.together(tasks)


STUDY = runs.Study(
    name="lr-adaptation",
    module="hvpfast.studies.lr_adaptation",
    question=QUESTION,
    presets=PRESETS,
    packages=("optuna", "matplotlib", "mnist1d"),
    engine=engine,
    load=load,
    plan=plan,
    experiment=experiment,
    figures=figures,
    findings=findings,
    report=report,
    headline=headline,
)

run = partial(runs.run, STUDY)
