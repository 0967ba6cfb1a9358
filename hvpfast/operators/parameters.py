"""The parameters that make up a flat vector: how they are named, chosen and placed in it."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hvpfast.mlp.module import MLP
from hvpfast.mlp.spec import MLPSpec


class Entry(NamedTuple):
    """A named piece of a parameter: entries ``offset`` onwards of the tensor ``owner``."""

    name: str
    shape: tuple[int, ...]
    owner: Tensor
    offset: int

    @property
    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    def values(self) -> Tensor:
        """Its entries (numel,), detached; a view where the owner is contiguous."""
        return self.owner.detach().reshape(-1)[self.offset : self.offset + self.numel]


class Subset:
    """P coordinates of a longer flat vector (F,): those of some entries, in the entries' order.

    Args:
        entries: the P coordinates.
        tensors: the parameters whose concatenation is (F,).

    Attributes:
        whole: whether the P coordinates are all of (F,), in order.
    """

    def __init__(self, entries: Sequence[Entry], tensors: Sequence[Tensor]) -> None:
        starts: dict[int, int] = {}
        self._full = 0
        for tensor in tensors:
            starts[id(tensor)] = self._full
            self._full += tensor.numel()
        self._runs: list[tuple[int, int]] = []  # [start, stop) in (F,), neighbours joined
        for entry in entries:
            start = starts[id(entry.owner)] + entry.offset
            stop = start + entry.numel
            if self._runs and self._runs[-1][1] == start:
                start = self._runs.pop()[0]
            self._runs.append((start, stop))
        self.whole = self._runs == [(0, self._full)]

    def holds(self, start: int, stop: int) -> bool:
        """Whether all of (F,) from ``start`` to ``stop`` is among them."""
        return any(a <= start and stop <= b for a, b in self._runs)

    def embed(self, rows: Tensor) -> Tensor:
        """Rows (K, F) with zeros elsewhere, from rows (K, P)."""
        if self.whole:
            return rows
        full, done = rows.new_zeros(rows.shape[0], self._full), 0
        for start, stop in self._runs:
            full[:, start:stop] = rows[:, done : done + stop - start]
            done += stop - start
        return full

    def restrict(self, rows: Tensor) -> Tensor:
        """Rows (K, P) of rows (K, F)."""
        if self.whole:
            return rows
        return torch.cat([rows[:, start:stop] for start, stop in self._runs], dim=1)


def owners_of(entries: Iterable[Entry]) -> list[Tensor]:
    """The parameters that the entries are pieces of, each once, in order."""
    return list({id(entry.owner): entry.owner for entry in entries}.values())


def by_layer(model: nn.Module, entries: list[Entry]) -> list[Entry]:
    """The entries; those of the layers where they are the flat tensor of an :class:`MLP`."""
    flat = isinstance(model, MLP) and entries[0].shape == model.flat.shape
    return layers_of(model) if flat else entries


def layers_of(model: nn.Module) -> list[Entry]:
    """One entry per weight and bias, those of an :class:`MLP` being pieces of its flat tensor."""
    if type(model) is not MLP:
        return _parameters_of(model)
    spec = MLPSpec(model.sizes, model.activation, bias=model.bias)
    offsets = itertools.accumulate(spec.numels, initial=0)
    pieces = zip(spec.names, spec.shapes, offsets, strict=False)  # the last offset is P
    return [Entry(name, shape, model.flat, offset) for name, shape, offset in pieces]


def _parameters_of(model: nn.Module) -> list[Entry]:
    return [Entry(name, tuple(p.shape), p, 0) for name, p in model.named_parameters()]


def matching(entries: Iterable[Entry], patterns: str | Iterable[str]) -> list[Entry]:
    """The entries whose names match a glob pattern, in the order of the patterns.

    Raises:
        ValueError: a pattern matches nothing.
    """
    known = list(entries)
    found: dict[str, Entry] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = [e.name for e in known if fnmatch.fnmatchcase(e.name, pattern)]
        if not names:
            raise ValueError(
                f"no parameter matches {pattern!r}; there are {', '.join(e.name for e in known)}"
            )
        found.update((e.name, e) for e in known if e.name in names)
    return list(found.values())


def select(model: nn.Module, params: Any) -> list[Entry]:
    """The entries that ``params`` names: see :class:`hvpfast.HessianOperator`.

    Raises:
        TypeError: ``params`` is of another kind.
        ValueError: no parameter, one that is not the model's own, or one given twice.
    """
    own = _parameters_of(model)
    if params is None:
        chosen = [entry for entry in own if entry.owner.requires_grad]
        if not chosen:
            raise ValueError("no parameter of the model requires gradients; name some in params=")
        return chosen
    if isinstance(params, Tensor) or not isinstance(params, (str, Iterable)):
        raise TypeError(
            "params must be None, a dict name -> parameter, a list of parameters, or name "
            f"patterns such as '0.*'; got {type(params).__name__}"
        )
    items = params.items() if isinstance(params, Mapping) else params
    given = [items] if isinstance(items, str) else list(items)
    if not given:
        raise ValueError("params is empty: name at least one parameter, or pass None for all")
    if all(isinstance(item, str) for item in given):
        layers = layers_of(model)
        whole = [e for e in own if e.name in given and e.name not in {la.name for la in layers}]
        chosen = matching([*layers, *whole], given)  # the flat tensor of an MLP by its name only
        if whole and len(chosen) > len(whole):
            raise ValueError(f"params names parts of {whole[0].name} beside {whole[0].name} itself")
        return chosen
    chosen = [_own_entry(own, item, index) for index, item in enumerate(given)]
    if len({id(entry.owner) for entry in chosen}) < len(chosen):
        names = [entry.name for entry in chosen]
        raise ValueError(f"params names a parameter twice: {', '.join(names)}")
    return chosen


def _own_entry(own: Sequence[Entry], item: Any, index: int) -> Entry:
    name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"entry {index} of params must be a parameter; got {type(tensor).__name__}")
    for entry in own:
        if entry.owner is tensor and name in (None, entry.name):
            return entry
    what = f"entry {index} of params" if name is None else f"params[{name!r}]"
    raise ValueError(
        f"{what}, of shape {tuple(tensor.shape)}, is not a parameter of the model (the very "
        "object, under its own name); pass parameters from model.named_parameters(), or their "
        f"names: {', '.join(entry.name for entry in own)}"
    )
