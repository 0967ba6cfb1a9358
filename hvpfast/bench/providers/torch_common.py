"""The network in plain torch, and the layouts torch providers start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hvpfast.bench.cases import Array, Problem

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "sigmoid": torch.sigmoid}


def mlp_loss(
    params: Sequence[Tensor], x: Tensor, y: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean cross-entropy of the network W_1, b_1, ... on x (N, D[0]), y (N,)."""
    a = x
    for i in range(0, len(params) - 2, 2):
        a = act(F.linear(a, params[i], params[i + 1]))
    return F.cross_entropy(F.linear(a, params[-2], params[-1]), y)


def tensors(arrays: Sequence[Array], device: str = "cpu") -> tuple[Tensor, ...]:
    """Copies as tensors, so that no two providers share memory."""
    return tuple(torch.tensor(a, device=device) for a in arrays)


def inputs(problem: Problem) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    x, y = tensors((problem.x, problem.y), problem.device)
    return tensors(problem.params, problem.device), x, y


def tangents(problem: Problem, operation: str, stacked: bool) -> Any:
    """Tangents as a tuple of K trees, or as one tree of stacked tensors (K, *shape)."""
    found = problem.layout(operation, stacked)
    if stacked:
        return tensors(found, problem.device)
    return tuple(tensors(tree, problem.device) for tree in found)


def restorer(params: tuple[Tensor, ...]) -> Callable[[], None]:
    """A function that puts the present values back into the parameters."""
    start = [p.detach().clone() for p in params]

    @torch.no_grad()
    def restore() -> None:
        for p, value in zip(params, start, strict=True):
            p.copy_(value)

    return restore


def no_device(device: str) -> str | None:
    """Why torch cannot use the device, or None."""
    if device == "cpu" or torch.cuda.is_available():
        return None
    return f"torch sees no device {device!r}"


def array(value: Any) -> Array:
    """A tensor on any device, or what NumPy can read, as an array."""
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def flat(parts: Any) -> Array:
    """Arrays shaped like the parameters, or a flat tensor, as one vector (P,)."""
    if isinstance(parts, Tensor):
        return array(parts)
    return np.concatenate([array(p).ravel() for p in parts])


def rows(found: Any) -> Array:
    """A list of K trees, a tree of stacked arrays, or a tensor (P, K), as (K, P)."""
    if isinstance(found, Tensor):
        return np.ascontiguousarray(array(found).T)
    if isinstance(found, list):
        return np.stack([flat(tree) for tree in found])
    return np.concatenate([array(leaf).reshape(len(leaf), -1) for leaf in found], axis=1)


def scalar(value: Any) -> Array:
    return np.asarray(float(value.detach() if isinstance(value, Tensor) else value))


def scalars(found: Any) -> Array:
    """A list of K scalars, or an array (K,), as (K,)."""
    return np.array([float(scalar(q)) for q in found])


def named_outputs(operation: str) -> Callable[[Any], dict[str, Array]]:
    """The converter of a tree-valued result of ``operation`` for ``Prepared.outputs``."""
    if operation == "gradient":
        return lambda out: {"loss": scalar(out[0]), "gradient": flat(out[1])}
    if operation in ("hvp", "hvp_warm"):
        return lambda out: {"hvp": rows(out)}
    if operation == "quadratic":
        return lambda out: {"quadratic": scalars(out)}
    return lambda out: {
        "loss": scalar(out[0]),
        "penalty": scalar(out[1]),
        "gradient": flat(out[2]),
    }
