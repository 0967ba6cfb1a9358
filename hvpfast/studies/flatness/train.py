"""Training with the flatness penalty: any module with cross-entropy, perceptrons on fast kernels.

    loss = CE + (lambda / B) mean_k ||H v_k||^2        v_k ~ N(0, I), fresh in every step

H is the Hessian of the mini-batch's mean cross-entropy (or its Gauss-Newton part), so the mean over
probes is Tr(H^2), and lambda / B is the weight of the penalty (B, the batch size, divides what is a
mean already).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hvpfast as hf
from hvpfast.lab.data.splits import Data, Split, fold, generator
from hvpfast.lab.measure.training import Diverged, linearize, score, shuffled
from hvpfast.studies.flatness.config import Config

FLATNESS_BATCHES = 4
"""Fixed train batches on which the flatness of an epoch is estimated."""


@dataclass(frozen=True)
class Network:
    """A module to train; with a `spec` it is a `hf.MLP`, whose steps need no autograd."""

    model: nn.Module
    spec: hf.MLPSpec | None
    backend: str
    penalised: str = "hessian"
    """Matrix whose squared norm the steps penalise: "hessian" or "ggn"."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters)


Make = Callable[[int], Network]
"""An untrained network from a seed."""


@dataclass
class Trained:
    """A trained network and its curve: a row per epoch, epoch 0 being before training."""

    network: Network
    epochs: list[dict[str, Any]] = field(default_factory=list)
    probes: dict[str, float] = field(default_factory=dict)
    """Flatness in the last epoch with the step's own probes, with fresh ones, on unseen data."""
    diverged: bool = False


def perceptron(sizes: tuple[int, ...], activation: str, dtype: torch.dtype, seed: int) -> hf.MLP:
    """Return a perceptron with He-normal weights, variance 2 / fan-in, and zero biases."""
    random = torch.Generator().manual_seed(seed)
    model = hf.MLP(sizes, activation, dtype=dtype, generator=random)
    with torch.no_grad():
        for tensor in model.weights:
            if tensor.dim() == 2:
                tensor.normal_(0, math.sqrt(2 / tensor.shape[1]), generator=random)
            else:
                tensor.zero_()
    return model


def custom(make: Callable[[], nn.Module], dtype: torch.dtype, seed: int) -> nn.Module:
    """Return ``make()``, run with torch's global generator seeded, which is then restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make().to(dtype)


def network(model: nn.Module, backend: str, penalised: str = "hessian") -> Network:
    """Return the module, with its spec if it is a perceptron; others run on "reference"."""
    try:
        spec = hf.spec_of(model, F.cross_entropy)
    except hf.NotAnMLPError:
        return Network(model, None, "reference", penalised)
    return Network(model, spec if isinstance(model, hf.MLP) else None, backend, penalised)


def step_gradient(
    net: Network, batch: Split, weight: float, num_probes: int, seed: int
) -> tuple[float, float]:
    """Leave the gradient of CE + weight * mean_k ||H v_k||^2 in ``.grad``; return both values.

    A weight of zero computes no curvature, and its second value is 0.

    Raises:
        Diverged: a value or the gradient is not finite.
    """
    if net.spec is not None:
        values = fast_gradient(net, net.spec, batch, weight, num_probes, seed)
    else:
        values = module_gradient(net, batch, weight, num_probes, seed)
    grads = [p.grad for p in net.parameters if p.grad is not None]
    if not math.isfinite(sum(values) + sum(float(g.sum()) for g in grads)):
        raise Diverged
    return values


def fast_gradient(
    net: Network, spec: hf.MLPSpec, batch: Split, weight: float, num: int, seed: int
) -> tuple[float, float]:
    """Do `step_gradient` for a `hf.MLP`: one flat parameter, no autograd."""
    model: Any = net.model
    lin = linearize(spec, model, batch, net.backend, order=3 if weight > 0 else 2)
    if weight == 0:
        model.flat.grad = lin.grad
        return float(lin.loss), 0.0
    loss, penalty, model.flat.grad = hf.penalty(
        lin,
        num_probes=num,
        distribution="normal",
        seed=seed,
        weights=(1.0, weight),
        curvature=net.penalised,
    )
    return float(loss), float(penalty)


def module_gradient(
    net: Network, batch: Split, weight: float, num: int, seed: int
) -> tuple[float, float]:
    """Do `step_gradient` for any module, through autograd."""
    net.model.zero_grad()
    if weight == 0:
        loss = F.cross_entropy(net.model(batch.x), batch.y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), 0.0
    loss, penalty = penalty_of(net, batch, num, seed, net.penalised)
    (loss + weight * penalty).backward()  # type: ignore[no-untyped-call]
    return loss.item(), penalty.item()


def penalty_of(
    net: Network, batch: Split, num_probes: int, seed: int, curvature: str = "hessian"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and mean_k ||H v_k||^2 with normal probes, differentiable.

    Raises:
        Diverged: the loss is not finite.
    """
    try:
        return hf.hessian_penalty(
            net.model,
            F.cross_entropy,
            (batch.x, batch.y),
            num_probes=num_probes,
            distribution="normal",
            seed=seed,
            curvature=curvature,
            backend=net.backend,
        )
    except ValueError:
        if math.isfinite(score(net.model, batch)[0]):
            raise
        raise Diverged from None


@torch.no_grad()
def flatness(net: Network, batch: Split, num_probes: int, seed: int) -> float:
    """Return the estimate of Tr(H^2) / B on a batch of B samples, without a graph."""
    return float(penalty_of(net, batch, num_probes, seed)[1]) / len(batch.y)


def train(config: Config, data: Data, net: Network, lam: float, seed: int) -> Trained:
    """Train a network with Adam for one lambda; training that diverges ends early.

    Batches and probes are streams of the seed alone: every lambda of a seed sees the same.
    """
    batches = generator(config.root_seed, "batches", seed)
    optimizer = adam(config, net.model)
    trained = Trained(net)
    weight, num_probes = lam / config.batch_size, config.num_hutchinson_samples
    steps, per_epoch = itertools.count(), len(data.train.y) // config.batch_size
    probed: list[dict[str, float]] = []
    try:
        before = {"train_ce": score(net.model, data.train)[0]}
        trained.epochs.append(epoch_row(config, data, net, seed, 0) | before)
        for epoch in range(1, config.num_epochs + 1):
            losses = penalties = 0.0
            whole = shuffled(data.train, config.batch_size, batches)[:per_epoch]
            for i, batch in enumerate(whole):
                probe_seed = fold(config.root_seed, "probes", seed, next(steps))
                loss, penalty = step_gradient(net, batch, weight, num_probes, probe_seed)
                optimizer.step()
                losses += loss / per_epoch
                penalties += penalty / config.batch_size / per_epoch
                if epoch == config.num_epochs:
                    probed.append(probe_thrice(config, data, net, batch, probe_seed, i))
            row = epoch_row(config, data, net, seed, epoch)
            row |= {"train_ce": losses, "train_objective": losses + lam * penalties}
            trained.epochs.append(row | {"train_penalty": penalties if lam > 0 else None})
        for name in probed[0]:
            trained.probes[name] = math.fsum(row[name] for row in probed) / len(probed)
    except Diverged:
        trained.diverged = True
    return trained


def adam(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)


def probe_thrice(
    config: Config, data: Data, net: Network, batch: Split, probe_seed: int, i: int
) -> dict[str, float]:
    """Return Tr(H^2) / B after a step: by its own probes; by fresh ones; by these, held out."""
    num, size = config.num_hutchinson_samples, config.batch_size
    fresh = fold(probe_seed, "fresh")
    start = i * size % max(1, len(data.val.y) - size + 1)
    unseen = data.val.part(slice(start, start + size))
    return {
        "flatness_same": flatness(net, batch, num, probe_seed),
        "flatness_fresh": flatness(net, batch, num, fresh),
        "flatness_unseen": flatness(net, unseen, num, fresh),
    }


def batch_of(config: Config, data: Data, i: int) -> Split:
    """Return batch i of the train split, which is not shuffled."""
    return data.train.part(slice(i * config.batch_size, (i + 1) * config.batch_size))


def epoch_row(config: Config, data: Data, net: Network, seed: int, epoch: int) -> dict[str, Any]:
    """Return a point of the curve: held-out loss and accuracy, and Tr(H^2) / B by fresh probes."""
    loss, accuracy = score(net.model, data.val)
    if not math.isfinite(loss):
        raise Diverged
    values = []
    for i in range(min(FLATNESS_BATCHES, len(data.train.y) // config.batch_size)):
        batch = batch_of(config, data, i)
        probe_seed = fold(config.root_seed, "flatness", seed, epoch, i)
        values.append(flatness(net, batch, config.num_hutchinson_samples, probe_seed))
    mean = math.fsum(values) / len(values)
    return {"epoch": epoch, "loss": loss, "accuracy": accuracy, "flatness": mean}
