"""What trainings of the studies share: batches, the loss linearized on one, scores on a split."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import hvpfast as hf
from hvpfast.lab.data.splits import Data, Split


class Diverged(ArithmeticError):
    """A training whose loss, penalty or gradient is no longer finite: a result, not a fault."""


def score(model: torch.nn.Module, split: Split) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy on one split."""
    with torch.no_grad():
        logits = model(split.x)
        loss = F.cross_entropy(logits, split.y)
        accuracy = (logits.argmax(1) == split.y).double().mean()
    return float(loss), float(accuracy)


def scores(model: torch.nn.Module, data: Data) -> dict[str, float]:
    """Return the columns train_loss, train_accuracy and the same of val and test."""
    found = {}
    for name, split in data.splits.items():
        found[f"{name}_loss"], found[f"{name}_accuracy"] = score(model, split)
    return found


def shuffled(split: Split, batch_size: int, random: torch.Generator) -> list[Split]:
    """Return the split's samples in random order, in batches; the last one may be smaller."""
    order = torch.randperm(len(split.y), generator=random)
    parts = (torch.split(values[order], batch_size) for values in (split.x, split.y))
    return [Split(x, y) for x, y in zip(*parts, strict=True)]


def linearize(
    spec: hf.MLPSpec, model: hf.MLP, split: Split, backend: str, order: int
) -> hf.Linearization:
    """Linearize the loss on one split; raise `Diverged` where the loss is not finite."""
    try:
        return hf.linearize(spec, model.flat, split.x, split.y, backend=backend, order=order)
    except ValueError:
        if math.isfinite(score(model, split)[0]):
            raise
        raise Diverged from None
