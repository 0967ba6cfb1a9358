"""Does penalising the Hessian's Frobenius norm lower the test loss of a small MLP on MNIST-1D?

    baseline    loss = CE
    penalised   loss = CE + rho ||H v||^2     H the mini-batch Hessian of CE, v one probe a step

With Rademacher probes, E ||H v||^2 = Tr(H H) = ||H||_F^2. Yes: over paired seeds, the interval of
the difference in test loss lies below zero. No, or no evidence: it does not.

Two protocols. "sound": the learning rate is chosen on one grid and shared, then rho on a grid at
that rate; the test split is used once, after the last step of each final run; everything is chosen
on validation data by the rule that is also reported, the loss after the last epoch; further arms
say what an effect is due to (see `ARMS`). "published": as the claim was made, many times over; see
``published.py``.

Random streams are named and derived from one root seed: split; init, batches and probes of each
training; tuner. Rows, by their ``table``: data, trivial (what predictors without a network score),
trial (one training of a tuning trial), epoch (a point of a final run's curve), final, torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

import hvpfast as hf
from hvpfast.lab.data.mnist1d import NUM_CLASSES, NUM_INPUTS, mnist1d
from hvpfast.lab.data.splits import Data, describe_data
from hvpfast.lab.measure.curvature import exact_curvature
from hvpfast.lab.measure.predictors import constant_prediction, linear_prediction
from hvpfast.lab.measure.training import scores
from hvpfast.lab.report.records import mean_of
from hvpfast.lab.runs import run as runs
from hvpfast.lab.runs.config import engine_of
from hvpfast.lab.runs.folder import Row, StudyError
from hvpfast.lab.runs.progress import Cell, Task
from hvpfast.studies.hessian_norm import published
from hvpfast.studies.hessian_norm.config import PRESETS, Config
from hvpfast.studies.hessian_norm.figures import figures
from hvpfast.studies.hessian_norm.findings import ARMS, QUESTION, findings
from hvpfast.studies.hessian_norm.report import headline, report
from hvpfast.studies.hessian_norm.torch_baseline import torch_rows
from hvpfast.studies.hessian_norm.train import Setting, Shape, train

mean_loss = partial(mean_of, measure="val_loss")


def shape_of(config: Config) -> Shape:
    sizes = (NUM_INPUTS, *config.hidden, NUM_CLASSES)
    return Shape(sizes, config.epochs, config.batch_size, config.backend, config.root_seed)


def engine(config: Config) -> dict[str, str]:
    return engine_of(config, hf.MLPSpec(shape_of(config).sizes, activation=config.activation))


def load(config: Config) -> Data:
    """Return the splits of mnist1d; as published, validation is the test split."""
    fraction = config.val_fraction if config.protocol == "sound" else 0.0
    return mnist1d(config.num_samples, fraction, config.root_seed, getattr(torch, config.dtype))


# tuning


def trial_rows(
    config: Config, data: Data, stage: str, arm: str, number: int, setting: Setting
) -> Iterator[dict[str, Any]]:
    for seed in config.tune_seeds:
        trained = train(shape_of(config), data, setting, "tune", seed)
        last = {} if trained.diverged else trained.epochs[-1]
        reached = {name: last.get(name) for name in ("val_loss", "val_accuracy")}
        head = {"table": "trial", "stage": stage, "arm": arm, "trial": number, "seed": seed}
        yield {**head, **setting.columns, **reached}


def describe_trial(rows: list[Row]) -> str:
    row = rows[0]
    strength = f"strength {row['strength']:.0e}" if row["strength"] else ""
    point = f"lr {row['learning_rate']:.1e}  {strength:<14}"
    return f"tune   {row['arm']:<16}  {point}  val loss {mean_loss(rows):.4f}"


def best_of(
    config: Config, data: Data, stage: str, grids: Mapping[str, Sequence[Setting]], cell: Cell
) -> dict[str, Setting]:
    """Return each arm's setting with the lowest mean validation loss, the first of equals."""
    numbered = [(arm, i, setting) for arm, grid in grids.items() for i, setting in enumerate(grid)]
    tasks: list[Task] = []
    for arm, i, setting in numbered:
        work = partial(trial_rows, config, data, stage, arm, i, setting)
        tasks.append((f"{stage}-{arm}-{i:03d}", work, describe_trial))
    losses: dict[str, list[float]] = {arm: [] for arm in grids}
    for (arm, _, _), rows in zip(numbered, cell.together(tasks), strict=True):
        losses[arm].append(mean_loss(rows))
    for arm, values in losses.items():
        if min(values) == math.inf:
            raise StudyError(
                f"every tuning trial of the {arm} arm diverged. Lower --learning-rates or its grid"
            )
    return {arm: grids[arm][values.index(min(values))] for arm, values in losses.items()}


def tune(config: Config, data: Data, cell: Cell) -> dict[str, Setting]:
    """Return the setting of every arm.

    First the learning rates of the baselines are chosen, then the strengths, then the rate of the
    arm "own-rate". The placebo and the exact arm take the penalised arm's setting, from which they
    differ in one thing.
    """

    def rates(name: str, strength: float = 0.0) -> list[Setting]:
        arm = ARMS[name]
        activation = config.smooth_activation if arm.smooth else config.activation
        return [Setting(arm.method, activation, rate, strength) for rate in config.learning_rates]

    bases = {arm: rates(arm) for arm in ARMS if ARMS[arm].base == arm}
    chosen = best_of(config, data, "rate", bases, cell)
    grids = {
        name: [
            replace(chosen[arm.base], method=arm.method, strength=strength)
            for strength in getattr(config, arm.grid)
        ]
        for name, arm in ARMS.items()
        if arm.grid
    }
    chosen |= best_of(config, data, "strength", grids, cell)
    for name in ("placebo", "exact"):
        chosen[name] = replace(chosen["penalised"], method=ARMS[name].method)
    again = {"own-rate": rates("own-rate", chosen["penalised"].strength)}
    return chosen | best_of(config, data, "rate", again, cell)


# final runs


def final_rows(
    config: Config, data: Data, arm: str, seed: int, setting: Setting
) -> Iterator[dict[str, Any]]:
    """Train a final network: its curve, then the row in which the test split is used, once."""
    shape = shape_of(config)
    start = time.perf_counter()
    trained = train(shape, data, setting, "final", seed)
    yield {"table": "timing", "what": "train", "seconds": time.perf_counter() - start}
    for row in trained.epochs:
        yield {"table": "epoch", "arm": arm, "seed": seed, **row}
    final: dict[str, Any] = {"table": "final", "arm": arm, "seed": seed, **setting.columns}
    final |= {"activation": setting.activation, "diverged": trained.diverged}
    if not trained.diverged:
        model = trained.model
        final |= scores(model, data)
        final["gap"] = final["test_loss"] - final["train_loss"]
        start = time.perf_counter()
        final |= exact_curvature(model, data.train, config.backend)
        yield {"table": "timing", "what": "measure", "seconds": time.perf_counter() - start}
        if arm in ("baseline", "penalised"):
            final |= exact_curvature(model, data.train, config.backend, "ggn")
        with torch.no_grad():
            final["logit_size"] = float(model(data.train.x).square().mean().sqrt())
            final["params_norm"] = float(model.flat.norm())
    yield final


def describe_final(rows: list[Row]) -> str:
    row = rows[-1]
    head = f"final  {row['arm']:<16}  seed {row['seed']:<2}"
    if row["diverged"]:
        return f"{head}  diverged"
    losses = f"val loss {row['val_loss']:.4f}  test loss {row['test_loss']:.4f}"
    return f"{head}  {losses}  |H|^2 {row['hessian_fro2']:.3g}"


def describe_torch(rows: list[Row]) -> str:
    return f"torch  autograd alone    seed {rows[0]['seed']:<2}  {len(rows) - 1} arms"


def data_rows(config: Config, data: Data) -> Iterator[dict[str, Any]]:
    spec = hf.MLPSpec(shape_of(config).sizes)
    network = {"sizes": "-".join(map(str, spec.sizes)), "num_params": spec.num_params}
    yield {**data.row, **network, "backend": config.backend}
    yield {"table": "trivial", "predictor": "class frequencies", **constant_prediction(data)}
    if config.protocol == "sound":
        yield {"table": "trivial", "predictor": "linear", **linear_prediction(data)}


# the two protocols


def plan(config: Config) -> list[str]:
    if config.protocol == "published":
        return ["data", *published.plan(config.repetitions)]
    rates, keys = range(len(config.learning_rates)), ["data"]
    bases = [arm for arm in ARMS if ARMS[arm].base == arm]
    keys += [f"rate-{arm}-{i:03d}" for arm in bases for i in rates]
    for name, arm in ARMS.items():
        numbers = range(len(getattr(config, arm.grid)) if arm.grid else 0)
        keys += [f"strength-{name}-{i:03d}" for i in numbers]
    keys += [f"rate-own-rate-{i:03d}" for i in rates]
    keys += [f"torch-{seed:03d}" for seed in config.torch_seeds]
    return keys + [f"final-{arm}-{seed:03d}" for seed in config.seeds for arm in ARMS]


def experiment(config: Config, data: Data, cell: Cell) -> None:
    """Tune every arm and train it from every seed; or repeat the published protocol."""
    config = replace(config, backend=engine(config)["backend"])  # chosen once for the whole run
    cell("data", partial(data_rows, config, data), describe_data)
    if config.protocol == "published":
        published.experiment(config, shape_of(config), data, cell)
        return
    settings = tune(config, data, cell)
    tasks: list[Task] = []
    for seed in config.torch_seeds:
        training = partial(torch_rows, shape_of(config), data, settings, seed)
        tasks.append((f"torch-{seed:03d}", training, describe_torch))
    for seed in config.seeds:
        for arm, setting in settings.items():
            work = partial(final_rows, config, data, arm, seed, setting)
            tasks.append((f"final-{arm}-{seed:03d}", work, describe_final))
    cell.together(tasks)


PROTOCOLS: dict[Any, Any] = {
    "sound": SimpleNamespace(figures=figures, findings=findings, report=report),
    "published": published,
}
"""What makes figures, findings and report of each."""

STUDY: runs.Study[Config, Data] = runs.Study(
    name="hessian-norm",
    module="hvpfast.studies.hessian_norm",
    question=QUESTION,
    presets=PRESETS,
    packages=("matplotlib", "mnist1d"),
    engine=engine,
    load=load,
    plan=plan,
    experiment=experiment,
    figures=lambda records: PROTOCOLS[records[0]["protocol"]].figures(records),
    findings=lambda records, timings: PROTOCOLS[records[0]["protocol"]].findings(records, timings),
    report=lambda found: PROTOCOLS[found["protocol"]].report(found),
    headline=headline,
)

run = partial(runs.run, STUDY)
