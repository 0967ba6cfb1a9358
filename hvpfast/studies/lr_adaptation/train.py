"""The trainings of the learning-rate study: one optimizer per arm, on the functional fast path."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch.optim import Optimizer

import hvpfast as hf
from hvpfast.lab.data.mnist1d import NUM_CLASSES, NUM_INPUTS
from hvpfast.lab.data.splits import Data, Split, fold, generator
from hvpfast.lab.measure.training import Diverged, linearize, score, shuffled
from hvpfast.optim import AdaHessian, HessianLRAdaptation
from hvpfast.studies.lr_adaptation.config import Config

Stream = tuple[str | int, ...]
"""Name of a random stream."""
ROUNDS, ROUND_STEPS = 7, 20
"""Rounds of the timing, the first of which warms up, and steps of each arm in a round."""
BETA2 = {"adam-0.99": 0.99, "adam-0.9": 0.9}
"""Arms that are Adam with a shorter memory of the squared gradients, by their beta2."""
CURVATURES = ("difference", "secant", "hutchinson", "exact")
"""What is scaled with: the arm of that name wraps Adam, the arm with "-sgd" behind it SGD."""
NEEDS_HESSIAN = ("hutchinson", "exact", "adahessian")


@dataclass
class Trained:
    """A trained network, its curve, and what the four claims are measured by."""

    model: hf.MLP
    epochs: list[dict[str, Any]] = field(default_factory=list)
    """A row per epoch, epoch 0 being before training."""
    num_steps: int = 0
    steps_to_target: int | None = None
    best_epoch: int = 0
    best_flat: torch.Tensor | None = None
    """The parameters at the epoch with the lowest validation loss."""
    diverged: bool = False

    @property
    def steps_counted(self) -> int:
        """The steps to the target, or all where it is not reached."""
        return self.steps_to_target or self.num_steps


def spec(config: Config) -> hf.MLPSpec:
    return hf.MLPSpec((NUM_INPUTS, *config.hidden, NUM_CLASSES), activation=config.activation)


def make_optimizer(arm: str, param: torch.Tensor, rate: float, seed: int) -> Optimizer:
    """Return the optimizer of an arm; `seed` is that of its probes, if it draws any."""
    if arm == "adahessian":
        return AdaHessian([param], rate, seed=seed)
    base: Optimizer
    if arm.endswith("sgd"):
        base = torch.optim.SGD([param], lr=rate, momentum=0.9, fused=True)
    else:
        betas = (0.9, BETA2.get(arm, 0.999))
        base = torch.optim.Adam([param], lr=rate, betas=betas, fused=True)
    curvature = arm.removesuffix("-sgd")
    return HessianLRAdaptation(base, curvature, seed=seed) if curvature in CURVATURES else base


def take_step(
    config: Config, network: hf.MLPSpec, model: hf.MLP, optimizer: Any, arm: str, batch: Split
) -> float:
    """Take one step of an arm on a batch and return the batch's loss before it.

    Raises:
        Diverged: the loss is not finite.
    """

    def evaluate() -> hf.Linearization:
        lin = linearize(network, model, batch, config.backend, order=2)
        model.flat.grad = lin.grad
        return lin

    if arm == "secant":
        return float(optimizer.step(evaluate).loss)
    lin = evaluate()
    if arm in NEEDS_HESSIAN:
        optimizer.step(operator=lin)
    else:
        optimizer.step()
    return float(lin.loss)


def new_model(config: Config, *stream: str | int) -> hf.MLP:
    init = generator(config.root_seed, "init", *stream)
    dtype = getattr(torch, config.dtype)
    return hf.MLP(spec(config).sizes, config.activation, dtype=dtype, generator=init)


def batches(config: Config, train: Split, stream: Stream, epochs: int) -> Iterator[list[Split]]:
    order = generator(config.root_seed, "batches", *stream)
    for _ in range(epochs):
        yield shuffled(train, config.batch_size, order)


def train(
    config: Config,
    data: Data,
    arm: str,
    rate: float,
    init: Stream,
    order: Stream,
    epochs: int,
    *,
    stop_at_target: bool = False,
) -> Trained:
    """Train one network; `init` and `order` name its streams. A diverging training ends early."""
    network, model = spec(config), new_model(config, *init)
    optimizer = make_optimizer(arm, model.flat, rate, fold(config.root_seed, "probes", *order))
    trained = Trained(model)
    lowest, grain = math.inf, config.evaluations
    trained.epochs.append({"epoch": 0, "batch_loss": None, **scores(model, data.val)})
    try:
        for epoch, parts in enumerate(batches(config, data.train, order, epochs), 1):
            marks = {round(len(parts) * k / grain) for k in range(1, grain)}
            losses = []
            for i, batch in enumerate(parts, 1):
                losses.append(take_step(config, network, model, optimizer, arm, batch))
                trained.num_steps += 1
                if i in marks and trained.steps_to_target is None:
                    look(config, trained, score(model, data.val)[0])
                if stop_at_target and trained.steps_to_target is not None:
                    return trained
            row = {"epoch": epoch, "batch_loss": fmean(losses), **scores(model, data.val)}
            if not math.isfinite(row["val_loss"]):
                raise Diverged
            trained.epochs.append(row)
            look(config, trained, row["val_loss"])
            if row["val_loss"] < lowest:
                lowest, trained.best_epoch = row["val_loss"], epoch
                trained.best_flat = model.flat.detach().clone()
            if stop_at_target and trained.steps_to_target is not None:
                return trained
    except Diverged:
        trained.diverged = True
    return trained


def look(config: Config, trained: Trained, val_loss: float) -> None:
    """Note the step of the first evaluation at or below the target."""
    if trained.steps_to_target is None and val_loss <= config.target_loss:
        trained.steps_to_target = trained.num_steps


def scores(model: hf.MLP, split: Split) -> dict[str, float]:
    return dict(zip(("val_loss", "val_accuracy"), score(model, split), strict=True))


def time_steps(config: Config, data: Data, arms: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Time a step of each arm, without evaluations, the arms in turn; medians over the rounds."""
    network, rate = spec(config), config.learning_rates[0]
    trainings = {arm: new_model(config, "cost") for arm in arms}
    optimizers = {arm: make_optimizer(arm, m.flat, rate, 0) for arm, m in trainings.items()}
    parts = itertools.cycle(next(batches(config, data.train, ("cost",), 1)))
    seconds: dict[str, list[float]] = {arm: [] for arm in trainings}
    for _ in range(ROUNDS):
        some = list(itertools.islice(parts, ROUND_STEPS))
        for arm, model in trainings.items():
            start = time.perf_counter()
            for batch in some:
                take_step(config, network, model, optimizers[arm], arm, batch)
            seconds[arm].append((time.perf_counter() - start) / ROUND_STEPS)
    yield {"table": "cost", "rounds": ROUNDS, "steps_per_round": ROUND_STEPS}
    for arm, rounds in seconds.items():
        yield {"table": "timing", "what": arm, "seconds": median(rounds[1:])}
