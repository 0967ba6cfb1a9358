"""The formats of tangents, and the rows (K, P) that operators compute with.

K tangents are given as columns (P, K), or as tensors shaped like the parameters; operators take
them as rows, so that each tangent is one contiguous vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors that make up a flat vector (P,), in order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numels(self) -> tuple[int, ...]:
        """Number of entries of each tensor; P is their sum."""
        return tuple(prod(shape) for shape in self.shapes)

    def ordered(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The values of a dict by name, in order.

        Raises:
            ValueError: a name is missing, or there is another.
        """
        if set(tensors) != set(self.names):
            raise ValueError(
                f"tangents must have the entries {', '.join(self.names)}; missing: "
                f"{sorted(set(self.names) - set(tensors))}, unknown: "
                f"{sorted(set(tensors) - set(self.names))}"
            )
        return [tensors[name] for name in self.names]

    def rows_of(self, tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """Rows (K, P) of tensors shaped like the parameters, and whether they have a trailing K.

        Raises:
            TypeError: an entry is not a tensor, or differs in dtype or device from the first.
            ValueError: the number of tensors or a shape does not fit.
        """
        if len(tensors) != len(self.names):
            raise ValueError(
                f"expected {len(self.names)} tensors, for {', '.join(self.names)}; "
                f"got {len(tensors)}"
            )
        for name, tensor in zip(self.names, tensors, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"the entry for {name} must be a tensor; got {type(tensor)}")
            if (tensor.dtype, tensor.device) != (tensors[0].dtype, tensors[0].device):
                raise TypeError(
                    f"all entries must have one dtype and device; {self.names[0]} has "
                    f"{tensors[0].dtype} on {tensors[0].device}, {name} has {tensor.dtype} on "
                    f"{tensor.device}"
                )
        stacked = tensors[0].dim() == len(self.shapes[0]) + 1
        count = tensors[0].shape[-1] if stacked else 1
        rows = []
        for name, shape, tensor in zip(self.names, self.shapes, tensors, strict=True):
            wanted = (*shape, count) if stacked else shape
            if tuple(tensor.shape) != wanted:
                raise ValueError(
                    f"the entry for {name} must have the shape {wanted}; got "
                    f"{tuple(tensor.shape)}. Entries are shaped like their parameters, or all "
                    "have one more dimension at the end, for K tangents"
                )
            rows.append(tensor.detach().reshape(prod(shape), count).T)
        return torch.cat(rows, dim=1), stacked

    def split(self, rows: Tensor, stacked: bool) -> list[Tensor]:
        """Tensors shaped like the parameters, with a trailing K if ``stacked``, of rows (K, P)."""
        pieces = torch.split(rows, list(self.numels), dim=1)
        if stacked:
            count = rows.shape[0]
            return [p.T.reshape(*s, count) for s, p in zip(self.shapes, pieces, strict=True)]
        return [piece[0].reshape(s) for s, piece in zip(self.shapes, pieces, strict=True)]


def matrix_rows(
    given: Tensor, axis: int, size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Contiguous, detached rows (K, P) of (P,), or of a matrix with P along ``axis``.

    Raises:
        ValueError: another shape.
        TypeError: another dtype or device.
    """
    dim = given.dim()
    if dim not in (1, 2) or given.shape[axis if dim == 2 else 0] != size:
        wanted = f"({size},) or " + (f"rows (K, {size})" if axis else f"columns ({size}, K)")
        hint = ""
        if dim == 2 and given.shape[1 - axis] == size:
            kind = "rows of v @ A" if axis else "columns of A @ V"
            hint = f". Did you mean .T? Tangents are the {kind}"
        raise ValueError(
            f"tangents must be {wanted} to match the parameters; got {tuple(given.shape)}{hint}"
        )
    if given.dtype != dtype or given.device != device:
        raise TypeError(
            f"tangents must be {dtype} on {device}; got {given.dtype} on "
            f"{given.device}: use v.to(A.device, A.dtype), or build the operator with dtype="
        )
    rows = given.unsqueeze(0) if dim == 1 else given.T if axis == 0 else given
    return (rows.detach() if rows.requires_grad else rows).contiguous()


def given_rows(name: str, given: Any, size: int, shapes: Mapping[int, str]) -> Tensor:
    """Detached rows (K, P), K >= 1, of what an algorithm is given as ``name``.

    Args:
        name: of the argument, for messages.
        given: (P,), or columns (P, K).
        size: P.
        shapes: what is allowed: the text for messages by number of dimensions.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(given).__name__}")
    if given.dim() not in shapes or given.shape[0] != size or given.numel() == 0:
        wanted = " or ".join(shapes.values())
        raise ValueError(f"{name} must be {wanted}; got {tuple(given.shape)}")
    return given.detach().reshape(size, -1).T
