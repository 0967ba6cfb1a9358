"""The penalised step against torch's triple backward: first the numbers, then the time.

All methods run on the threads that the trainings have, interleaved: every round times each of them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.lab.data.splits import Data, Split, fold
from hvpfast.lab.measure.timing import estimate, interleave
from hvpfast.lab.measure.torch_baseline import squared_products
from hvpfast.studies.flatness.config import Config
from hvpfast.studies.flatness.train import Network, batch_of, step_gradient, steps_per_epoch

METHODS = ("plain", "penalised", "torch-plain", "torch-penalised")
WEIGHT = 0.01
"""lambda of the steps; the work does not depend on it."""

Step = Callable[[Split, int], None]
"""(batch, seed of the probes) to one training step."""


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of plain torch modules, with the same parameters in the same order."""
    return model.to_sequential() if isinstance(model, hf.MLP) else copy.deepcopy(model)


def torch_gradient(
    model: nn.Module, batch: Split, weight: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Leave the gradient of CE + weight * mean_k ||H v_k||^2 in ``.grad``, by torch.autograd.

    Args:
        model: any module.
        batch: the mini-batch.
        weight: of the penalty.
        rows: probes v_k (K, P); None for no penalty.

    Returns:
        CE and penalty, 0-dim.
    """
    params = list(model.parameters())
    model.zero_grad()
    loss = F.cross_entropy(model(batch.x), batch.y)
    if rows is None:
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), loss.new_zeros(())
    parts = [row.split([p.numel() for p in params]) for row in rows]
    probes = [[v.view_as(p) for v, p in zip(part, params, strict=True)] for part in parts]
    penalty = squared_products(loss, params, probes)
    (loss + weight * penalty).backward()  # type: ignore[no-untyped-call]
    return loss.detach(), penalty.detach()


def agreement_rows(
    config: Config, data: Data, make: Callable[[int], Network]
) -> Iterator[dict[str, Any]]:
    """Compare loss, penalty and gradient with torch's, for the same probes on one batch."""
    net, batch = make(config.seeds[0]), batch_of(config, data, 0)
    other = twin(net.model)
    tangents = hf.probes(
        net.num_params,
        config.num_hutchinson_samples,
        distribution="normal",
        seed=fold(config.root_seed, "agreement"),
        dtype=batch.x.dtype,
    )
    weight = WEIGHT / config.batch_size
    loss, penalty = hf.hessian_penalty(
        net.model, F.cross_entropy, (batch.x, batch.y), tangents=tangents, backend=net.backend
    )
    (loss + weight * penalty).backward()  # type: ignore[no-untyped-call]
    expected = torch_gradient(other, batch, weight, tangents.T)
    ours, theirs = flat_gradient(net.model), flat_gradient(other)
    yield {
        "table": "agreement",
        "loss_error": relative_error(loss.detach(), expected[0]),
        "penalty_error": relative_error(penalty.detach(), expected[1]),
        "gradient_error": relative_error(ours, theirs),
    }


def flat_gradient(model: nn.Module) -> Tensor:
    """Return the gradient (P,), zero where a parameter has none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.reshape(-1) for part in parts])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ||found - expected|| / ||expected||."""
    return float((found - expected).double().norm() / expected.double().norm())


def timing_rows(
    config: Config, data: Data, make: Callable[[int], Network]
) -> Iterator[dict[str, Any]]:
    """Time a step by each method; the seconds are medians over the rounds."""
    num = steps_per_epoch(config, len(data.train.y))
    batches = itertools.cycle([batch_of(config, data, i) for i in range(num)])
    seeds = itertools.count()
    calls = {
        method: partial(one_step, stepper(config, make, method), batches, seeds)
        for method in METHODS
    }
    guesses = {method: estimate(call) for method, call in calls.items()}
    for method, times in interleave(calls, guesses, config.timing_rounds).items():
        yield {"table": "timing", "what": method, "seconds": times.median}


def one_step(step: Step, batches: Iterator[Split], seeds: Iterator[int]) -> None:
    """Make one step on the next batch, with fresh probes."""
    step(next(batches), next(seeds))


def stepper(config: Config, make: Callable[[int], Network], method: str) -> Step:
    """Return the step of a method, for a network of its own."""
    net = replace(make(config.seeds[0]), penalised="hessian")
    weight = WEIGHT / config.batch_size if method.endswith("penalised") else 0.0
    if method.startswith("torch"):
        return torch_step(config, twin(net.model), weight)
    optimizer = adam(config, net.model)

    def step(batch: Split, seed: int) -> None:
        step_gradient(net, batch, weight, config.num_hutchinson_samples, seed)
        optimizer.step()

    return step


def torch_step(config: Config, model: nn.Module, weight: float) -> Step:
    """Return torch's own step of training, its probes drawn by torch."""
    optimizer = adam(config, model)
    size = sum(p.numel() for p in model.parameters())

    def step(batch: Split, seed: int) -> None:
        rows = None
        if weight > 0:
            random = torch.Generator().manual_seed(seed)
            shape = (config.num_hutchinson_samples, size)
            rows = torch.randn(shape, generator=random, dtype=batch.x.dtype)
        torch_gradient(model, batch, weight, rows)
        optimizer.step()

    return step


def adam(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam as the trainings have it."""
    return torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
