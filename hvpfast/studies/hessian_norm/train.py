"""Training of the Hessian-norm study's networks: one step function per method, one loop.

    plain      CE                                 with weight decay where a strength is given
    penalised  CE + rho ||H v||^2                 v one Rademacher probe a step
    placebo    CE; ||H v||^2 is computed, and its gradient stopped
    exact      CE + rho ||H||_F^2                 no probe: the sum over all of them
    sam        the gradient of CE at params + radius g / ||g||, g the gradient of CE

H is the mini-batch Hessian of CE. Initial weights, batches and probes are three streams named by
purpose and seed: all methods start from the same weights and see the same batches and probes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hvpfast as hf
from hvpfast.lab.data.splits import Data, Split, fold, generator
from hvpfast.lab.measure.training import Diverged, linearize, score, shuffled

Step = Callable[[Split, int], tuple[float, float | None, Tensor]]
"""(batch, seed of the probe) to loss, penalty (None without one) and gradient (P,)."""


@dataclass(frozen=True)
class Setting:
    """What trainings of a run differ in."""

    method: str
    """plain, penalised, placebo, exact or sam."""
    activation: str
    learning_rate: float
    strength: float = 0.0
    """rho; for sam its radius; for plain the (decoupled) weight decay."""

    @property
    def columns(self) -> dict[str, float]:
        return {"learning_rate": self.learning_rate, "strength": self.strength}


@dataclass(frozen=True)
class Shape:
    """What all trainings of a run share: the network but for its activation, and the loop."""

    sizes: tuple[int, ...]
    epochs: int
    batch_size: int
    backend: str
    root_seed: int


@dataclass
class Trained:
    """A trained network and its curve: a row per epoch, epoch 0 being before training."""

    model: hf.MLP
    epochs: list[dict[str, Any]]
    diverged: bool = False


def train(
    shape: Shape, data: Data, setting: Setting, purpose: str, seed: int, order: str = ""
) -> Trained:
    """Train one network with Adam; a training that diverges ends early.

    An `order` names streams of batches and probes of its own; the initial weights stay the same.
    """
    model = initial(shape, data, setting.activation, purpose, seed)
    step, optimizer = step_of(shape, model, setting), adam([model.flat], setting)
    trained = Trained(model, [epoch_row(0, model, data)])
    num, schedule = len(data.train.y), batches(shape, data, purpose + order, seed)
    try:
        for epoch in range(1, shape.epochs + 1):
            loss_sum = penalty_sum = 0.0
            known = True
            for batch, probe_seed in next(schedule):
                loss, penalty, grad = step(batch, probe_seed)
                if not math.isfinite(loss + (penalty or 0.0) + float(grad.sum())):
                    raise Diverged
                loss_sum += loss * len(batch.y)
                known = penalty is not None
                penalty_sum += (penalty or 0.0) * len(batch.y)
                model.flat.grad = grad
                optimizer.step()
            mean = penalty_sum / num if known else None
            trained.epochs.append(epoch_row(epoch, model, data, loss_sum / num, mean))
    except Diverged:
        trained.diverged = True
    return trained


def adam(params: Iterable[Tensor], setting: Setting) -> torch.optim.Optimizer:
    decay = setting.strength if setting.method == "plain" else 0.0
    return torch.optim.AdamW(params, lr=setting.learning_rate, weight_decay=decay, fused=True)


def initial(shape: Shape, data: Data, activation: str, purpose: str, seed: int) -> hf.MLP:
    """Return the untrained network of a seed: the same weights for all methods."""
    random = generator(shape.root_seed, "init", purpose, seed)
    return hf.MLP(shape.sizes, activation, dtype=data.train.x.dtype, generator=random)


def batches(
    shape: Shape, data: Data, purpose: str, seed: int
) -> Iterator[Iterator[tuple[Split, int]]]:
    """Yield the steps of each epoch: batches, each with the seed of its probe."""
    random = generator(shape.root_seed, "batches", purpose, seed)
    steps = itertools.count()
    for _ in range(shape.epochs):
        yield (
            (batch, fold(shape.root_seed, "probes", purpose, seed, next(steps)))
            for batch in shuffled(data.train, shape.batch_size, random)
        )


def step_of(shape: Shape, model: hf.MLP, setting: Setting) -> Step:
    """Return what makes a step's gradient by the setting's method; see the head of this file."""
    spec = hf.MLPSpec(shape.sizes, activation=setting.activation)
    strength = setting.strength

    def plain(batch: Split, probe_seed: int) -> tuple[float, None, Tensor]:
        lin = linearize(spec, model, batch, shape.backend, order=2)
        return float(lin.loss), None, lin.grad

    def penalised(batch: Split, probe_seed: int) -> tuple[float, float, Tensor]:
        lin = linearize(spec, model, batch, shape.backend, order=3)
        loss, penalty, grad = hf.penalty(
            lin, num_probes=1, weights=(1.0, strength), seed=probe_seed
        )
        return float(loss), float(penalty), grad

    def placebo(batch: Split, probe_seed: int) -> tuple[float, float, Tensor]:
        lin = linearize(spec, model, batch, shape.backend, order=2)
        probe = hf.probes(spec.num_params, seed=probe_seed, dtype=lin.dtype)
        return float(lin.loss), float(hf.hvp(lin, probe).square().sum()), lin.grad

    def exact(batch: Split, probe_seed: int) -> tuple[float, float, Tensor]:
        try:
            loss, penalty = hf.hessian_penalty(
                model, F.cross_entropy, (batch.x, batch.y), estimator="exact", backend=shape.backend
            )
        except ValueError:
            if math.isfinite(score(model, batch)[0]):
                raise
            raise Diverged from None
        (grad,) = torch.autograd.grad(loss + strength * penalty, model.flat)
        return float(loss.detach()), float(penalty.detach()), grad

    def sam(batch: Split, probe_seed: int) -> tuple[float, None, Tensor]:
        lin = linearize(spec, model, batch, shape.backend, order=2)
        loss, there = float(lin.loss), model.flat.detach().clone()
        norm = float(lin.grad.norm())
        if not 0 < norm < math.inf:
            raise Diverged
        with torch.no_grad():
            model.flat.add_(lin.grad, alpha=strength / norm)
        grad = linearize(spec, model, batch, shape.backend, order=2).grad
        with torch.no_grad():
            model.flat.copy_(there)
        return loss, None, grad

    steps: tuple[Step, ...] = (plain, penalised, placebo, exact, sam)
    return {step.__name__: step for step in steps}[setting.method]


def epoch_row(
    epoch: int, model: hf.MLP, data: Data, loss: float | None = None, penalty: float | None = None
) -> dict[str, Any]:
    """Return a point of the curve: means over the epoch's batches, and validation after it."""
    row = {"epoch": epoch, "batch_loss": loss, "batch_penalty": penalty}
    row["val_loss"], row["val_accuracy"] = score(model, data.val)
    return row
