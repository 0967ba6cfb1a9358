"""The penalised step against torch's triple backward: first the numbers, then the time.

All methods run on the threads that the trainings have, interleaved: every round times each of them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.lab.data.splits import Data, Split, fold
from hvpfast.lab.measure.timing import estimate, interleave
from hvpfast.lab.measure.torch_baseline import squared_products
from hvpfast.studies.flatness.config import Config
from hvpfast.studies.flatness.train import Make, adam, batch_of, step_gradient

METHODS = ("plain", "penalised", "torch-plain", "torch-penalised")
WEIGHT = 0.01
"""lambda of the steps; the work does not depend on it."""


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of plain torch modules, with the same parameters in the same order."""
    return model.to_sequential() if isinstance(model, hf.MLP) else copy.deepcopy(model)


def torch_gradient(
    model: nn.Module, batch: Split, weight: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do `step_gradient` by torch.autograd; `rows` (K, P) are the probes, None for no penalty."""
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


def steps_rows(config: Config, data: Data, make: Make) -> Iterator[dict[str, Any]]:
    """Compare a step with torch's, then time one by each method: medians over the rounds."""
    yield agreement(config, data, make)
    num = len(data.train.y) // config.batch_size
    batches = itertools.cycle([batch_of(config, data, i) for i in range(num)])
    seeds = itertools.count()
    calls = {method: stepper(config, make, method, batches, seeds) for method in METHODS}
    guesses = {method: estimate(call) for method, call in calls.items()}
    for method, times in interleave(calls, guesses, config.timing_rounds).items():
        yield {"table": "timing", "what": method, "seconds": times.median}


def agreement(config: Config, data: Data, make: Make) -> dict[str, Any]:
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
    return {
        "table": "agreement",
        "loss_error": relative_error(loss.detach(), expected[0]),
        "penalty_error": relative_error(penalty.detach(), expected[1]),
        "gradient_error": relative_error(flat_gradient(net.model), flat_gradient(other)),
    }


def flat_gradient(model: nn.Module) -> Tensor:
    """Return the gradient (P,), zero where a parameter has none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.reshape(-1) for part in parts])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ||found - expected|| / ||expected||."""
    return float((found - expected).double().norm() / expected.double().norm())


def stepper(
    config: Config, make: Make, method: str, batches: Iterator[Split], seeds: Iterator[int]
) -> Callable[[], None]:
    """Return what makes a step on the next batch, with fresh probes, of a network of its own."""
    net = replace(make(config.seeds[0]), penalised="hessian")
    model = twin(net.model) if method.startswith("torch") else net.model
    weight = WEIGHT / config.batch_size if method.endswith("penalised") else 0.0
    optimizer = adam(config, model)
    num = config.num_hutchinson_samples

    def ours() -> None:
        step_gradient(net, next(batches), weight, num, next(seeds))
        optimizer.step()

    def by_torch() -> None:
        batch, seed = next(batches), next(seeds)
        rows = None
        if weight > 0:
            random = torch.Generator().manual_seed(seed)
            rows = torch.randn((num, net.num_params), generator=random, dtype=batch.x.dtype)
        torch_gradient(model, batch, weight, rows)
        optimizer.step()

    return ours if model is net.model else by_torch
