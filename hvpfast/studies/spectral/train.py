"""Training of the spectral study: Adam in mini-batches, early stopping, a full-batch polish.

The objective is CE + (d / 2) ||theta||^2 over all tensors, biases too, with a decay d:

    explicit    d = 2 lambda    the penalty lambda ||theta||^2 in the loss
    coupled     d = lambda      Adam's weight_decay = lambda

Adam sees grad CE + d theta in both cases, which is what its coupled decay adds, so that the two
differ by this factor and by nothing else; stationary points have grad CE = -d theta, H + d I.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hvpfast as hf
from hvpfast.lab.data.splits import generator
from hvpfast.lab.measure.training import Diverged, shuffled
from hvpfast.lab.runs.folder import StudyError
from hvpfast.studies.spectral.config import Config
from hvpfast.studies.spectral.data import NUM_CLASSES, Problem, scores

HISTORY = 20
"""Steps that L-BFGS remembers."""
COLLAPSED_SPREAD = 1e-2
"""A network whose logits vary less than this over the samples has collapsed."""


def decay_of(config: Config, index: int) -> float:
    """Return d, the factor in (d / 2) ||theta||^2, at a point of the grid."""
    factor = 2.0 if config.penalty == "explicit" else 1.0
    return factor * config.step * index


def start(config: Config, problem: Problem) -> Tensor:
    """Return the initial parameters (P,): PyTorch's default, the same for every lambda."""
    random = generator(config.root_seed, "init")
    model = hf.MLP(problem.spec.sizes, "sigmoid", dtype=problem.x.dtype, generator=random)
    return model.flat.detach().clone()


@dataclass(frozen=True)
class Fit:
    """Parameters (P,) after one lambda, and how they were found."""

    flat: Tensor
    epochs: int
    best_epoch: int
    stopped: str
    polish_steps: int


def fit(config: Config, problem: Problem, flat: Tensor, index: int, sweep: str) -> Fit:
    """Train from `flat` at one lambda, with a fresh Adam, and polish.

    The stopping rule "effective" evaluates the objective of the whole train split after each epoch
    and returns to the best state. "running-ce", as published, takes the mean of the epoch's batch
    losses, during which the weights change, and keeps the last state.

    Raises:
        Diverged: a loss is not finite.
    """
    train, decay = problem.data.train, decay_of(config, index)
    model = problem.model(flat)
    adam = torch.optim.Adam([model.flat], lr=config.learning_rate, weight_decay=decay, fused=True)
    batches = generator(config.root_seed, "batches", sweep, index)
    best, best_epoch, best_state, stopped = math.inf, 0, flat, "epochs"
    for epoch in range(1, config.epochs + 1):
        running = 0.0
        for batch in shuffled(train, config.batch_size, batches):
            lin = linearize(problem.spec, model.flat, batch.x, batch.y, problem)
            model.flat.grad = lin.grad
            running += float(lin.loss) * len(batch.y) / len(train.y)
            adam.step()
        if config.stopping == "effective":
            running = scores(model, train.x, train.y)[0] + decay / 2 * square(model.flat)
        if not math.isfinite(running):
            raise Diverged
        if running < best:
            best, best_epoch, best_state = running, epoch, model.flat.detach().clone()
        elif epoch - best_epoch >= config.patience:
            stopped = "patience"
            break
    last = model.flat.detach().clone() if config.stopping == "running-ce" else best_state
    steps = 0
    if config.polish and decay > 0:  # without a penalty there is no minimum at finite distance
        last, steps = polish(config, problem, last, decay)
    return Fit(last, epoch, best_epoch, stopped, steps)


def linearize(
    spec: hf.MLPSpec, flat: Tensor, x: Tensor, y: Tensor, problem: Problem
) -> hf.Linearization:
    """Linearize the loss of a batch; raise `Diverged` where it is not finite."""
    try:
        return hf.linearize(spec, flat, x, y, backend=problem.backend, order=2)
    except ValueError:
        if bool(torch.isfinite(flat).all()):
            raise
        raise Diverged from None


def square(flat: Tensor) -> float:
    """Return ||theta||^2, summed in float64."""
    return float(flat.detach().double().square().sum())


def polish(config: Config, problem: Problem, flat: Tensor, decay: float) -> tuple[Tensor, int]:
    """Minimise the objective of the whole train split by L-BFGS; return parameters and steps.

    It runs in the row space of the inputs: outside, only the penalty is left, whose minimum is 0.
    """
    z = torch.nn.Parameter(problem.narrow(flat))
    y, dtype = problem.data.train.y, problem.x.dtype
    optimizer = torch.optim.LBFGS(
        [z],
        max_iter=config.polish,
        max_eval=2 * config.polish,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=config.polish_tol,
        tolerance_change=0.0,
    )

    def objective() -> Tensor:
        lin = linearize(problem.reduced, z.detach().to(dtype), problem.x, y, problem)
        z.grad = lin.grad.double() + decay * z.detach()
        return lin.loss.double() + decay / 2 * z.detach().square().sum()

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    steps = int(optimizer.state[z]["n_iter"])
    return problem.lift(z.detach()[None])[0].to(dtype), steps


def chain(
    config: Config, problem: Problem, flat: Tensor, indices: list[int], sweep: str
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Train along lambdas, each from where the one before ended ("fresh": each from `flat`).

    Yields the row of each lambda, and its parameters (P,).

    Raises:
        StudyError: a training diverged.
    """
    begin = flat
    for index in indices:
        try:
            found = fit(config, problem, begin, index, sweep)
            row = described(config, problem, found, index, sweep)
        except Diverged:
            raise StudyError(
                f"the {sweep} sweep diverged at lambda {config.step * index:g}: the loss is not "
                "finite. Lower --learning-rate"
            ) from None
        yield row, found.flat
        if sweep != "fresh":
            begin = found.flat


def described(
    config: Config, problem: Problem, found: Fit, index: int, sweep: str
) -> dict[str, Any]:
    data, decay, flat = problem.data, decay_of(config, index), found.flat
    model = problem.model(flat)
    train_loss, train_hits, spread = scores(model, data.train.x, data.train.y)
    test_loss, test_hits, _ = scores(model, data.test.x, data.test.y)
    gradient = problem.gradient(flat)
    effective = gradient + decay * flat.double()
    norm_sq = square(flat)
    row: dict[str, Any] = {
        "table": "train",
        "sweep": sweep,
        "index": index,
        "lambda": config.step * index,
        "decay": decay,
        **{name: value for name, value in vars(found).items() if name != "flat"},
        "train_loss": train_loss,
        "train_objective": train_loss + decay / 2 * norm_sq,
        "test_loss": test_loss,
        "train_accuracy": mean(train_hits),
        "test_accuracy": mean(test_hits),
        "params_norm": math.sqrt(norm_sq),
        "spread": spread,
        "collapsed": spread < COLLAPSED_SPREAD,
        "grad_norm_ce": float(gradient.norm()),
        "grad_norm": float(effective.norm()),
    }
    for c in range(NUM_CLASSES):
        row[f"class_{c}"] = mean(test_hits[data.test.y == c])
        row[f"train_class_{c}"] = mean(train_hits[data.train.y == c])
    return row


def mean(hits: Tensor) -> float | None:
    """Return the share of hits; None where there are no samples."""
    return float(hits.double().mean()) if hits.numel() else None
