"""Linearizations of all batches at one point: kept within a budget, made again beyond it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hvpfast.backends import State
from hvpfast.data import Batches
from hvpfast.layout import Entry
from hvpfast.memory import available_bytes, bytes_text, out_of_memory
from hvpfast.problem import FunctionProblem, MLPProblem, Watch
from hvpfast.random_state import RandomState
from hvpfast.reduction import Batch, BatchWeight, batch_size

__all__ = ["Points"]


class Points:
    """The loss L = sum_b c_b L_b over batches at fixed parameters, batch by batch.

    Coefficients c_b are n_b / sum n_b for a mean, 1 for a sum (see ``reduction.py``).

    Args:
        problem: what is linearized.
        batches: the data.
        weight: the weight n_b of a batch.
        budget: bytes that kept data and states may take; other states are made in every pass.
        free: bytes of memory that are available.
        progressbar: show one for every pass over the batches.

    Attributes:
        loss: L, 0-dim.
        kept, kept_bytes: number of kept states, and what they take.
        skipped: batches of a mean none of whose targets counts.
        only: the kept state of an only batch with coefficient 1 on a backend: nothing to add up.
        largest: bytes of the largest state.
        free: bytes of memory that are left beside what is kept.
        on_backend: whether a backend evaluates the model, rather than the model's own code.
    """

    def __init__(
        self,
        problem: MLPProblem | FunctionProblem,
        batches: Batches,
        weight: BatchWeight,
        budget: int,
        free: int,
        progressbar: bool,
    ) -> None:
        self.problem, self.batches, self.weight = problem, batches, weight
        self.budget, self._free, self._progressbar = budget, free, progressbar
        self.on_backend = isinstance(problem, MLPProblem)
        # a model that draws random numbers draws them from here, not from the caller's generators
        self._random = None if self.on_backend else RandomState(device=problem.device)
        self.update()

    def update(self) -> None:
        """Linearize at the present values of the parameters.

        Raises:
            ValueError: no target counts, or what linearize says of a batch.
            MemoryError: a batch is too large.
        """
        self._states: list[State | None] = []
        self.kept_bytes = self.largest = 0
        self.problem.check_modes()
        self.problem.update()
        self._watch = Watch([*self.problem.watched(), *self.batches.tensors()])
        weights: list[float] = []
        losses: list[float] = []
        with self.running():
            for index, batch in enumerate(self._shown(self.batches, "linearize")):
                weights.append(self.weight(batch))
                losses.append(0.0)
                self._states.append(None)
                if weights[-1] > 0:
                    state = self._linearize(index, batch)
                    losses[-1] = float(state.loss)
                    self._keep(state)
        total = sum(weights) if self.weight.reduction == "mean" else 1.0
        if total == 0:
            raise ValueError(
                "no target counts: in every batch all targets have ignore_index or a class weight "
                "of zero, so the mean is 0/0; give batches with targets that count"
            )
        self._coefficients = [w / total for w in weights]
        self.skipped = sum(w == 0 for w in weights)
        self.kept = sum(state is not None for state in self._states)
        self.total = total
        alone = self.on_backend and self._coefficients == [1.0] and not self._progressbar
        self.only = self._states[0] if alone else None
        value = sum(c * loss for c, loss in zip(self._coefficients, losses, strict=True))
        self.loss = torch.tensor(value, dtype=self.problem.dtype, device=self.problem.device)
        self.free = max(0, self._free - self.kept_bytes - self.batches.nbytes)

    def _keep(self, state: State) -> None:
        size = state.nbytes
        self.largest = max(self.largest, size)
        if self.batches.nbytes + self.kept_bytes + size <= self.budget:
            self._states[-1] = state
            self.kept_bytes += size

    def _linearize(self, index: int, batch: Batch) -> State:
        try:
            return self.problem.linearize(batch)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise MemoryError(
                f"linearizing batch {index} of {batch_size(batch)} samples ran out of memory; "
                f"{bytes_text(available_bytes(self.problem.device))} are available beside "
                f"{bytes_text(self.kept_bytes)} kept: give smaller batches or memory_budget=0"
            ) from error
        except (ValueError, TypeError) as error:
            if len(self.batches) == 1:
                raise
            raise type(error)(f"batch {index} of data: {error}") from error

    def narrowed(self, entries: Sequence[Entry]) -> Points:
        """Points for products with these entries only: the same ones where a backend runs."""
        if isinstance(self.problem, MLPProblem):
            return self
        owners = list({id(entry.owner): entry.owner for entry in entries}.values())
        left = max(0, self.budget - self.kept_bytes)
        problem = self.problem.narrowed(owners)
        return Points(problem, self.batches, self.weight, left, self.free, self._progressbar)

    def states(self, what: str) -> Iterator[tuple[float, State]]:
        """(c_b, state of batch b) for all batches that count, in order."""
        if self.kept + self.skipped == len(self._states):
            shown: Iterable[Any] = self._shown(self._states, what)
        else:
            shown = self._shown(self.batches, what)
        for index, batch in enumerate(shown):
            if self._coefficients[index] > 0:
                state = self._states[index]
                if state is None:
                    state = self._linearize(index, batch)
                yield self._coefficients[index], state

    def gradient(self) -> Tensor:
        """The gradient of L, (F,)."""
        total: Tensor | None = None
        with self.running():
            for coefficient, state in self.states("gradient"):
                part = state.gradient()
                total = part * coefficient if total is None else total.add_(part, alpha=coefficient)
        assert total is not None
        return total

    def check_current(self) -> None:
        """Raise RuntimeError if parameters, buffers or data were changed since the last update.

        Raises:
            RuntimeError: they were; the message says what to do.
            ValueError: a module is in a train mode that has no one Hessian.
        """
        if self._watch.changed():
            raise RuntimeError(
                "parameters, buffers or data were changed in place after the operator was made; "
                "it belongs to their old values. Call H.refresh() to move it to the new ones"
            )
        if not self.on_backend:
            self.problem.check_modes()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around everything that may run the model: keeps the caller's random generators."""
        with self._random or nullcontext():
            yield

    def _shown(self, items: Any, what: str) -> Iterable[Any]:
        if not self._progressbar:
            return items  # type: ignore[no-any-return]
        from tqdm import tqdm

        bar: Iterable[Any] = tqdm(items, total=len(self.batches), desc=what, unit="batch")
        return bar

    def describe(self) -> list[str]:
        """Lines for ``explain()``."""
        count = len(self.batches) - self.skipped
        again = count - self.kept
        lines = [f"data: {self.batches.describe()}"]
        if self.weight.reduction == "mean":
            lines.append(f"mean over batches with weights that sum to {self.total:g}")
        if self.skipped:
            lines.append(f"skipped: {self.skipped} of {len(self.batches)}, no target counts")
        text = f"kept between products: {self.kept} of {count}, {bytes_text(self.kept_bytes)}"
        text += f" of a memory budget of {bytes_text(self.budget)}"
        if self.batches.nbytes:
            text += f", which also holds {bytes_text(self.batches.nbytes)} of data"
        lines.append(text + (f"; {again} linearized again in every product" if again else ""))
        return lines
