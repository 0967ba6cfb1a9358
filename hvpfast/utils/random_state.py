"""Running code that draws random numbers without disturbing anybody else's."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch


class RandomState:
    """State of the global generators (torch, NumPy, ``random``), of a CUDA device, and of others.

    ``with state:`` runs a block from this state, and then holds the state that the block left. The
    generators themselves are afterwards as they were before the block. A ``copy.copy`` of it draws
    the same numbers again.
    """

    def __init__(
        self, generators: Iterable[torch.Generator] = (), device: torch.device | None = None
    ) -> None:
        self._generators = list(generators)
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._state = self._capture()
        self._outer: tuple[Any, ...] | None = None

    def _capture(self) -> tuple[Any, ...]:
        cuda = None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)
        others = [generator.get_state() for generator in self._generators]
        legacy = np.random.get_state()  # noqa: NPY002 - what datasets draw their augmentations from
        return torch.get_rng_state(), legacy, random.getstate(), cuda, others

    def _restore(self, state: tuple[Any, ...]) -> None:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        random.setstate(state[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state(state[3], self._cuda)
        for generator, other in zip(self._generators, state[4], strict=True):
            generator.set_state(other)

    def __enter__(self) -> None:
        self._outer = self._capture()
        self._restore(self._state)

    def __exit__(self, *_: object) -> None:
        assert self._outer is not None
        self._state = self._capture()
        self._restore(self._outer)


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers draw from, other than torch's global."""
    sampler = getattr(loader, "sampler", None)
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    found = [getattr(owner, "generator", None) for owner in (loader, sampler, inner)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
