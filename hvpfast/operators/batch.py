"""A batch (x, y), and the tensors in its nests of tuples, lists and mappings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Inputs ``x`` and targets ``y`` of N samples: tensors (N, ...), or nests of such tensors."""

    x: Any
    y: Any


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        for value in nest.values():
            yield from tensors_in(value)
    elif isinstance(nest, (tuple, list)):
        for value in nest:
            yield from tensors_in(value)


def map_tensors(function: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """The same nest with ``function(tensor)`` in place of every tensor."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, Mapping):
        return {key: map_tensors(function, value) for key, value in nest.items()}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(map_tensors(function, value) for value in nest))
    if isinstance(nest, (tuple, list)):
        return type(nest)(map_tensors(function, value) for value in nest)
    return nest


def batch_size(batch: Batch) -> int:
    """Number of samples N: the leading size of the targets, else of the first input tensor."""
    for tensor in (*tensors_in(batch.y), *tensors_in(batch.x)):
        if tensor.dim() > 0:
            return tensor.shape[0]
    raise ValueError("a batch (x, y) must hold a tensor whose first dimension counts samples")


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, for a checksum."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
