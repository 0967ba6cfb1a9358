"""The Hessian-norm study's trainings by torch autograd alone: what they cost without the library.

Networks, batches and optimizer are those of ``train.py``. The penalty is a double backward,
differentiated once more, with probes from torch's generator. ||H||_F^2 of a trained network is the
sum of ||H e_i||^2 over all parameters, by vectorised products.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast.lab.data.splits import Data, Split
from hvpfast.lab.measure.torch_baseline import squared_products
from hvpfast.lab.measure.training import score
from hvpfast.studies.hessian_norm.train import Setting, Shape, adam, batches, initial

COLUMNS = 32
"""Products that are vectorised together where the whole Hessian is needed."""


def torch_rows(
    shape: Shape, data: Data, settings: dict[str, Setting], seed: int
) -> Iterator[dict[str, Any]]:
    """Train one seed of each arm and measure one Hessian; yield results, and their timings.

    Of the exact arm one step is taken, and its time counted as often as a training has steps.
    """
    for arm, setting in settings.items():
        one_step = setting.method == "exact"
        start = time.perf_counter()
        model = train_by_torch(shape, data, setting, "final", seed, 1 if one_step else None)
        seconds = time.perf_counter() - start
        if one_step:
            seconds *= shape.epochs * math.ceil(len(data.train.y) / shape.batch_size)
        yield {"table": "timing", "what": f"train-{arm}", "seconds": seconds}
        yield {"table": "torch", "arm": arm, "seed": seed, "val_loss": score(model, data.val)[0]}
    start = time.perf_counter()
    norm = hessian_fro2(model, data.train)
    yield {"table": "timing", "what": "measure", "seconds": time.perf_counter() - start}
    yield {"table": "torch measure", "arm": arm, "seed": seed, "hessian_fro2": norm}


def train_by_torch(
    shape: Shape,
    data: Data,
    setting: Setting,
    purpose: str,
    seed: int,
    max_steps: int | None = None,
) -> nn.Sequential:
    """Return a network trained as `train` does it, for at most `max_steps` steps."""
    model = initial(shape, data, setting.activation, purpose, seed).to_sequential()
    params = list(model.parameters())
    optimizer, steps = adam(params, setting), itertools.count(1)
    for epoch in batches(shape, data, purpose, seed):
        for batch, probe_seed in epoch:
            optimizer.zero_grad()
            if setting.method == "sam":
                sharpness_step(model, params, batch, setting.strength)
            elif setting.method == "exact":
                exact_step(model, params, batch, setting.strength)
            else:
                loss = F.cross_entropy(model(batch.x), batch.y)
                if setting.method == "penalised":
                    loss = loss + setting.strength * penalty(loss, params, probe_seed)
                elif setting.method == "placebo":
                    loss = loss + setting.strength * penalty(loss, params, probe_seed).detach()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if next(steps) == max_steps:
                return model
        score(model, data.val)
    return model


def penalty(loss: Tensor, params: list[nn.Parameter], probe_seed: int) -> Tensor:
    """Return ||H v||^2 with a graph, v a Rademacher probe from torch's generator."""
    random = torch.Generator().manual_seed(probe_seed)
    probe = [torch.randint(2, p.shape, generator=random).to(p.dtype) * 2 - 1 for p in params]
    return squared_products(loss, params, [probe])


def sharpness_step(
    model: nn.Sequential, params: list[nn.Parameter], batch: Split, radius: float
) -> None:
    """Leave in ``.grad`` the gradient at params + radius g / ||g||."""
    grads = torch.autograd.grad(F.cross_entropy(model(batch.x), batch.y), params)
    scale = radius / torch.stack([g.norm() for g in grads]).norm()
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p.add_(scale * g)
    F.cross_entropy(model(batch.x), batch.y).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p, value in zip(params, before, strict=True):
            p.copy_(value)


def exact_step(
    model: nn.Sequential, params: list[nn.Parameter], batch: Split, strength: float
) -> None:
    """Leave in ``.grad`` the gradient of CE + strength ||H||_F^2."""
    loss, flat = loss_of_flat(model, batch)

    def part(point: Tensor, rows: Tensor) -> Tensor:
        return products(loss, point, rows).square().sum()

    total = torch.func.grad(loss)(flat)
    for rows in torch.split(torch.eye(flat.numel(), dtype=flat.dtype), COLUMNS):
        total += strength * torch.func.grad(part)(flat, rows)
    ends = torch.split(total, [p.numel() for p in params])
    for p, grad in zip(params, ends, strict=True):
        p.grad = grad.view_as(p)


def hessian_fro2(model: nn.Sequential, split: Split) -> float:
    """Return ||H||_F^2 = sum_i ||H e_i||^2 of the loss on a split."""
    loss, flat = loss_of_flat(model, split)
    total = 0.0
    for rows in torch.split(torch.eye(flat.numel(), dtype=flat.dtype), COLUMNS):
        total += float(products(loss, flat, rows).double().square().sum())
    return total


def loss_of_flat(model: nn.Sequential, split: Split) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the loss on a split as a function of the flat parameters, and these (P,)."""
    named = dict(model.named_parameters())
    sizes, shapes = [p.numel() for p in named.values()], [p.shape for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = [t.view(s) for t, s in zip(torch.split(flat, sizes), shapes, strict=True)]
        logits = torch.func.functional_call(model, dict(zip(named, parts, strict=True)), (split.x,))
        return F.cross_entropy(logits, split.y)

    return loss, nn.utils.parameters_to_vector(named.values()).detach()


def products(loss: Callable[[Tensor], Tensor], flat: Tensor, rows: Tensor) -> Tensor:
    """Return the rows v' H = (H v)' (K, P)."""
    pullback = torch.func.vjp(torch.func.grad(loss), flat)[1]
    found: Tensor = torch.func.vmap(pullback)(rows)[0]
    return found
