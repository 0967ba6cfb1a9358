"""Does penalising the Hessian's Frobenius norm lower the test loss of a small MLP on MNIST-1D?

    baseline    loss = CE
    penalised   loss = CE + rho ||H v||^2     H the mini-batch Hessian of CE, v one probe a step

With Rademacher probes, E ||H v||^2 = Tr(H H) = ||H||_F^2. Yes: over paired seeds, the interval of
the difference in test loss lies below zero. No, or no evidence: it does not. The test split is used
once, after the last step of each final run; the learning rate and rho are chosen on validation data
by the rule that is also reported, the loss after the last epoch.

Random streams are named and derived from one root seed: split; init, batches and probes of each
training; curvature; tuner. Rows, by their ``table``: data, trivial (what a constant prediction
scores), trial (one training of a tuning trial), epoch (a point of a final run's curve), final.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as F

import hvpfast as hf
from hvpfast import backends
from hvpfast.studies.data import (
    NUM_CLASSES,
    Data,
    Split,
    fold,
    generator,
    mnist1d,
    split_sizes,
)
from hvpfast.studies.folder import Row, StudyError
from hvpfast.studies.hessian_norm_report import (
    ARMS,
    QUESTION,
    figures,
    findings,
    headline,
    report,
)
from hvpfast.studies.progress import Cell
from hvpfast.studies.run import Study
from hvpfast.studies.training import Diverged, curvature, linearize, score
from hvpfast.studies.tuning import Point, minimise

NUM_INPUTS = 40


@dataclass(frozen=True)
class Config:
    """What the study does; every field is an option of the command line."""

    num_samples: int = 5000
    """samples of mnist1d, a fifth of them test; 5000 is the official set, 2000 a small one"""
    val_fraction: float = 0.2
    """part of the train samples that is kept for validation"""
    hidden: tuple[int, ...] = (32, 32)
    """widths of the hidden layers"""
    activation: Literal["relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "softplus"] = "relu"
    """activation of the hidden layers"""
    epochs: int = 20
    """epochs of every training, in tuning as in the final runs"""
    batch_size: int = 128
    """samples per step; the smaller last batch of an epoch is used too"""
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """learning rates that both arms try first; later trials search between the ends"""
    rho_min: float = 1e-5
    """lower end of the search for rho"""
    rho_max: float = 1e-1
    """upper end of the search for rho"""
    trials: int = 24
    """tuning trials of each arm, the shared learning rates included"""
    tune_seeds: tuple[int, ...] = (0, 1)
    """training seeds over which every trial is averaged"""
    seeds: tuple[int, ...] = tuple(range(10))
    """training seeds of the final runs, the pairs of the comparison; 0-9 means 0 to 9"""
    curvature_probes: int = 128
    """fresh probes for the curvature of a trained network"""
    root_seed: int = 0
    """every random stream is derived from this number"""
    backend: str = "auto"
    """auto, or a backend that hvpfast info lists"""
    dtype: Literal["float32", "float64"] = "float32"
    """floating-point type of everything"""

    def __post_init__(self) -> None:
        split_sizes(self.num_samples, self.val_fraction)
        for name in ("epochs", "batch_size", "curvature_probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        rates = self.learning_rates
        if not rates or min(rates) <= 0:
            raise ValueError(f"learning_rates must be positive, at least one; got {rates}")
        if not 0 < self.rho_min <= self.rho_max:
            ends = f"{self.rho_min} and {self.rho_max}"
            raise ValueError(f"rho_min and rho_max must be 0 < rho_min <= rho_max; got {ends}")
        if self.trials < len(rates):
            raise ValueError(
                f"trials must cover the {len(rates)} learning_rates; got {self.trials}"
            )
        for name in ("tune_seeds", "seeds"):
            seeds = getattr(self, name)
            if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
                raise ValueError(
                    f"{name} must be different integers >= 0, at least one; got {seeds}"
                )


PRESETS = {
    "default": Config(),
    "smoke": Config(
        num_samples=500,
        epochs=2,
        learning_rates=(3e-3, 3e-2),
        trials=3,
        tune_seeds=(0,),
        seeds=(0, 1),
        curvature_probes=4,
    ),
}


@dataclass
class Trained:
    """A trained network and its curve: a row per epoch, epoch 0 being before training."""

    model: hf.MLP
    epochs: list[dict[str, Any]]
    diverged: bool = False


def spec(config: Config) -> hf.MLPSpec:
    """Return the network and its mean cross-entropy."""
    return hf.MLPSpec((NUM_INPUTS, *config.hidden, NUM_CLASSES), activation=config.activation)


def engine(config: Config) -> dict[str, str]:
    """Return the backend that ``config.backend`` means here, and why others were passed over."""
    dtype, device = getattr(torch, config.dtype), torch.device("cpu")
    try:
        choice = backends.choose(config.backend, spec(config), device, dtype)
    except (RuntimeError, ValueError) as error:
        raise StudyError(str(error)) from error
    passed_over = {f"passed over {name}": reason for name, reason in choice.passed_over}
    return {"backend": choice.module.NAME, "dtype": config.dtype, **passed_over}


def load(config: Config) -> Data:
    """Return the three splits of mnist1d."""
    dtype = getattr(torch, config.dtype)
    return mnist1d(config.num_samples, config.val_fraction, config.root_seed, dtype)


def train(config: Config, data: Data, point: Point, purpose: str, seed: int) -> Trained:
    """Train one network with Adam; rho = 0 is the baseline, whose steps compute no curvature.

    Initial weights, batches and probes are three streams of (`purpose`, `seed`): both arms start
    from the same weights and see the same batches. A training that diverges ends early.
    """
    network, root = spec(config), config.root_seed
    init, batches = (generator(root, name, purpose, seed) for name in ("init", "batches"))
    dtype = getattr(torch, config.dtype)
    model = hf.MLP(network.sizes, config.activation, dtype=dtype, generator=init)
    optimizer = torch.optim.Adam([model.flat], lr=point["learning_rate"], fused=True)
    trained = Trained(model, [epoch_row(0, model, data)])
    rho, num, step = point["rho"], len(data.train.y), itertools.count()
    try:
        for epoch in range(1, config.epochs + 1):
            loss_sum = penalty_sum = 0.0
            order = torch.randperm(num, generator=batches)
            for i in range(0, num, config.batch_size):
                batch = order[i : i + config.batch_size]
                split = Split(data.train.x[batch], data.train.y[batch])
                probe_seed = fold(root, "probes", purpose, seed, next(step))
                loss, penalty, grad = objective(
                    network, model, split, config.backend, rho, probe_seed
                )
                loss_sum += loss * len(batch)
                penalty_sum += penalty * len(batch)
                model.flat.grad = grad
                optimizer.step()
            penalty_mean = penalty_sum / num if rho > 0 else None
            trained.epochs.append(epoch_row(epoch, model, data, loss_sum / num, penalty_mean))
    except Diverged:
        trained.diverged = True
    return trained


def objective(
    network: hf.MLPSpec, model: hf.MLP, batch: Split, backend: str, rho: float, probe_seed: int
) -> tuple[float, float, torch.Tensor]:
    """Return CE, ||H v||^2 (0 for rho = 0) and the gradient (P,) of CE + rho ||H v||^2.

    Raises:
        Diverged: one of them is not finite.
    """
    lin = linearize(network, model, batch, backend, order=3 if rho > 0 else 2)
    if rho > 0:
        loss, penalty, grad = hf.penalty(lin, num_probes=1, weights=(1.0, rho), seed=probe_seed)
        values = float(loss), float(penalty)
    else:
        values, grad = (float(lin.loss), 0.0), lin.grad
    if not math.isfinite(sum(values) + float(grad.sum())):
        raise Diverged
    return *values, grad


def epoch_row(
    epoch: int,
    model: hf.MLP,
    data: Data,
    batch_loss: float | None = None,
    batch_penalty: float | None = None,
) -> dict[str, Any]:
    """Return a point of the curve: means over the epoch's batches, and validation after it."""
    val_loss, val_accuracy = score(model, data.val)
    return {
        "epoch": epoch,
        "batch_loss": batch_loss,
        "batch_penalty": batch_penalty,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
    }


def trial_rows(
    config: Config, data: Data, arm: str, number: int, point: Point
) -> Iterator[dict[str, Any]]:
    """Train at one point from every tuning seed; a row each."""
    for seed in config.tune_seeds:
        trained = train(config, data, point, "tune", seed)
        last = {} if trained.diverged else trained.epochs[-1]
        scores = {name: last.get(name) for name in ("val_loss", "val_accuracy")}
        yield {"table": "trial", "arm": arm, "trial": number, "seed": seed, **point, **scores}


def tune(config: Config, data: Data, arm: str, cell: Cell) -> Point:
    """Return the learning rate and rho with the lowest validation loss after the last epoch."""
    rates = config.learning_rates
    space = {"learning_rate": (min(rates), max(rates))}
    if arm == "penalised":
        space["rho"] = (config.rho_min, config.rho_max)

    def evaluate(number: int, point: Point) -> float:
        work = partial(trial_rows, config, data, arm, number, {"rho": 0.0, **point})
        return mean_loss(cell(f"tune-{arm}-{number:03d}", work, describe_trial))

    first = [{"learning_rate": rate} for rate in rates]
    best = minimise(evaluate, space, first, config.trials, fold(config.root_seed, "tuner"))
    if best is None:
        raise StudyError(f"every tuning trial of the {arm} arm diverged. Lower --learning-rates")
    return {"rho": 0.0, **best}


def mean_loss(rows: list[Row]) -> float:
    """Return the mean validation loss of a trial; infinite where a training diverged."""
    losses = [row["val_loss"] for row in rows]
    return fmean(loss if isinstance(loss, float) else math.inf for loss in losses)


def final_rows(
    config: Config, data: Data, arm: str, seed: int, point: Point
) -> Iterator[dict[str, Any]]:
    """Train a final network: its curve, then the row in which the test split is used, once."""
    trained, network = train(config, data, point, "final", seed), spec(config)
    for row in trained.epochs:
        yield {"table": "epoch", "arm": arm, "seed": seed, **row}
    final: dict[str, Any] = {"table": "final", "arm": arm, "seed": seed, **point}
    final["diverged"] = trained.diverged
    if not trained.diverged:
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test)):
            final[f"{name}_loss"], final[f"{name}_accuracy"] = score(trained.model, split)
        final["gap"] = final["test_loss"] - final["train_loss"]
        lin = linearize(network, trained.model, data.train, config.backend, order=2)
        probe_seed = fold(config.root_seed, "curvature", seed)
        final |= curvature(lin, config.curvature_probes, probe_seed)
        final["params_norm"] = float(trained.model.flat.detach().norm())
    final |= {"sizes": "-".join(map(str, network.sizes)), "num_params": network.num_params}
    yield {**final, "backend": config.backend, "dtype": config.dtype}


def data_rows(data: Data) -> Iterator[dict[str, Any]]:
    """Describe the data, and score predicting the train split's class frequencies."""
    sizes = {f"num_{name}": len(getattr(data, name).y) for name in ("train", "val", "test")}
    yield {"table": "data", "dataset": "mnist1d", **sizes, "check": data.check}
    counts = torch.bincount(data.train.y, minlength=NUM_CLASSES).double()
    logits = (counts / counts.sum()).log().expand(len(data.test.y), -1)
    yield {
        "table": "trivial",
        "test_loss": float(F.nll_loss(logits, data.test.y)),
        "test_accuracy": float((data.test.y == counts.argmax()).double().mean()),
    }


def describe_data(rows: list[Row]) -> str:
    """Return the data's line of progress."""
    sizes = "{num_train} train, {num_val} validation, {num_test} test".format(**rows[0])
    return f"{rows[0]['dataset']}: {sizes}"


def describe_trial(rows: list[Row]) -> str:
    """Return a trial's line of progress."""
    row = rows[0]
    rho = f"rho {row['rho']:.1e}" if row["rho"] else ""
    point = f"lr {row['learning_rate']:.1e}  {rho:<11}"
    return f"tune   {row['arm']:<9}  {point}  val loss {mean_loss(rows):.4f}"


def describe_final(rows: list[Row]) -> str:
    """Return a final run's line of progress."""
    row = rows[-1]
    head = f"final  {row['arm']:<9}  seed {row['seed']:<2}"
    if row["diverged"]:
        return f"{head}  diverged"
    losses = f"val loss {row['val_loss']:.4f}  test loss {row['test_loss']:.4f}"
    return f"{head}  {losses}  |H|^2 {row['hessian_fro2']:.3g}"


def plan(config: Config) -> list[str]:
    """Return the key of every cell, in order."""
    tuning = [f"tune-{arm}-{number:03d}" for arm in ARMS for number in range(config.trials)]
    return ["data", *tuning, *(f"final-{arm}-{seed:03d}" for seed in config.seeds for arm in ARMS)]


def experiment(config: Config, data: Data, cell: Cell) -> None:
    """Tune both arms, then train both from every seed."""
    config = replace(config, backend=engine(config)["backend"])  # chosen once for the whole run
    cell("data", partial(data_rows, data), describe_data)
    points = {arm: tune(config, data, arm, cell) for arm in ARMS}
    for seed, arm in itertools.product(config.seeds, ARMS):
        work = partial(final_rows, config, data, arm, seed, points[arm])
        cell(f"final-{arm}-{seed:03d}", work, describe_final)


STUDY = Study(
    name="hessian-norm",
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
