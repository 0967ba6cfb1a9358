"""Data linearized at one point: states of batches are kept within a budget, or made when needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hvpfast.backends.contract import State
from hvpfast.operators.batch import Batch, batch_size
from hvpfast.operators.data import Batches
from hvpfast.operators.distributed import Group, checksum
from hvpfast.operators.objective import FunctionObjective, MLPObjective, Watch, links_of
from hvpfast.operators.parameters import Entry, owners_of
from hvpfast.operators.reduction import BatchWeight
from hvpfast.utils.memory import available_bytes, bytes_text, out_of_memory
from hvpfast.utils.random_state import RandomState


class LinearizedData:
    """The loss L = sum_b c_b L_b over batches at fixed parameters, batch by batch.

    Coefficients c_b are n_b / sum n_b for a mean, 1 for a sum (see ``reduction.py``).

    Args:
        objective: the model with its loss.
        batches: the data.
        weight: the weight n_b of a batch.
        budget: bytes that kept data and states may take; further states are made in every pass.
        free: bytes of memory that are available.
        progressbar: show one for every pass over the batches.
        group: processes with shards of the data; L and its coefficients are over all data.

    Attributes:
        loss: L, 0-dim.
        coefficients: c_b of this process's batches.
        kept, kept_bytes: number of kept states, and the bytes they take.
        skipped: number of batches in a mean none of whose targets counts.
        only: the kept state, if there is a single batch with coefficient 1 on a backend and so
            nothing to add up; else None.
        largest: bytes of the largest state.
        width: number of entries F of all parameters of the objective.
        free: bytes of memory that are left besides what is kept.
        on_backend: whether a backend evaluates the model, rather than the model's own code.
    """

    def __init__(
        self,
        objective: MLPObjective | FunctionObjective,
        batches: Batches,
        weight: BatchWeight,
        budget: int,
        free: int,
        progressbar: bool,
        group: Group | None = None,
    ) -> None:
        self.objective, self.batches, self.weight, self.group = objective, batches, weight, group
        self.budget, self._free, self._progressbar = budget, free, progressbar
        self.on_backend = isinstance(objective, MLPObjective)
        self.width = sum(t.numel() for t in objective.tensors)
        # a model that draws random numbers draws them from here, not from the caller's generators
        self._random = None if self.on_backend else RandomState(device=objective.device)
        self.update()

    def update(self) -> None:
        """Linearize at the present values of the parameters.

        Raises:
            ValueError: no target counts, or a batch cannot be linearized.
            MemoryError: a batch is too large.
            DistributedError: another process of the group failed, or has other parameters.
        """
        self._failed = True  # until the end of this method
        if self.group is None:
            weights, losses = self._linearize_all()
            total = sum(weights)
        else:
            weights, (total, total_loss) = self._linearize_shards(self.group)
        total = total if self.weight.reduction == "mean" else 1.0
        if total == 0:
            raise ValueError(
                "no target counts: in every batch all targets have ignore_index or a class weight "
                "of zero, so the mean is 0/0; give batches with targets that count"
            )
        self.coefficients = [w / total for w in weights]
        self.skipped = sum(w == 0 for w in weights)
        self.kept = sum(state is not None for state in self._states)
        self.total = total
        alone = self.on_backend and self.coefficients == [1.0] and not self._progressbar
        self.only = self._states[0] if alone else None
        if self.group is None:
            value = sum(c * loss for c, loss in zip(self.coefficients, losses, strict=True))
        else:
            value = total_loss / total
        self.loss = torch.tensor(value, dtype=self.objective.dtype, device=self.objective.device)
        self.free = max(0, self._free - self.kept_bytes - self.batches.nbytes)
        self._failed = False

    def _linearize_all(self) -> tuple[list[float], list[float]]:
        """The weights n_b and losses L_b of this process's batches; keeps their states."""
        self._states: list[State | None] = []
        self.kept_bytes = self.largest = 0
        self.objective.check_modes()
        self.objective.update()
        watched = [*self.objective.watched(), *self.batches.tensors()]
        self._watch = Watch(watched, links_of(self.objective.model))
        weights: list[float] = []
        losses: list[float] = []
        with self.running():
            for index, batch in enumerate(self._shown(self.batches, "linearize")):
                weights.append(self.weight(batch))
                losses.append(0.0)
                self._states.append(None)
                if weights[-1] > 0:
                    state = self._linearize(index, batch)
                    losses[-1], size = float(state.loss), state.nbytes
                    self.largest = max(self.largest, size)
                    if self.batches.nbytes + self.kept_bytes + size <= self.budget:
                        self._states[-1] = state
                        self.kept_bytes += size
        return weights, losses

    def _linearize_shards(self, group: Group) -> tuple[list[float], list[float]]:
        """This process's weights n_b; sum n_b and sum n_b L_b over all processes."""
        weights: list[float] = []

        def part() -> Tensor:
            own, losses = self._linearize_all()
            weights.extend(own)
            weighted = sum(w * loss for w, loss in zip(own, losses, strict=True))
            return torch.tensor([sum(own), weighted], dtype=torch.float64, device="cpu")

        watched = self.objective.watched()
        sums, marks = group.total("linearization", part, (2,), mark=lambda: checksum(watched))
        if len(set(marks)) > 1:
            sums_by_tensor = {
                f"the values of parameter or buffer {i}, of shape {tuple(t.shape)} (checksum)":
                f"{checksum([t]):08x}" for i, t in enumerate(watched)
            }  # fmt: skip
            group.same("values: load one checkpoint everywhere, or broadcast them", sums_by_tensor)
        return weights, sums.tolist()

    def _linearize(self, index: int, batch: Batch) -> State:
        try:
            return self.objective.linearize(batch)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise MemoryError(
                f"linearizing batch {index} of {batch_size(batch)} samples ran out of memory; "
                f"{bytes_text(available_bytes(self.objective.device))} are available beside "
                f"{bytes_text(self.kept_bytes)} kept: give smaller batches or memory_budget=0"
            ) from error
        except (ValueError, TypeError) as error:
            if len(self.batches) == 1:
                raise
            raise type(error)(f"batch {index} of data: {error}") from error

    def narrowed(self, entries: Sequence[Entry]) -> LinearizedData:
        """The same for products with these entries only: itself where a backend runs."""
        if isinstance(self.objective, MLPObjective):
            return self
        left = max(0, self.budget - self.kept_bytes)
        objective = self.objective.narrowed(owners_of(entries))
        rest = left, self.free, self._progressbar, self.group
        return LinearizedData(objective, self.batches, self.weight, *rest)

    def states(self, what: str) -> Iterator[tuple[float, State]]:
        """(c_b, state of batch b) for all batches that count, in order."""
        all_kept = self.kept + self.skipped == len(self._states)
        items: Iterable[Any] = self._states if all_kept else self.batches
        for index, batch in enumerate(self._shown(items, what)):
            if self.coefficients[index] > 0:
                state = self._states[index]
                if state is None:
                    state = self._linearize(index, batch)
                yield self.coefficients[index], state

    def gradient(self) -> Tensor:
        """The gradient of L, (F,)."""
        if self.group is None:
            return self._own_gradient()
        like = self.objective.dtype, self.objective.device
        return self.group.total("gradient", self._own_gradient, (self.width,), *like)[0]

    def _own_gradient(self) -> Tensor:
        """The gradient of sum_b c_b L_b over this process's batches, (F,)."""
        self.check_current()
        total: Tensor | None = None
        with self.running():
            for coefficient, state in self.states("gradient"):
                part = state.gradient()
                total = part * coefficient if total is None else total.add_(part, alpha=coefficient)
        if total is None:  # a shard without targets that count
            objective = self.objective
            total = torch.zeros(self.width, dtype=objective.dtype, device=objective.device)
        return total

    def check_current(self) -> None:
        """Raise RuntimeError if parameters, buffers or data were changed since the last update.

        Raises:
            RuntimeError: they were, or the last update failed; the message says what to do.
            ValueError: a module is in a train mode in which the loss is random.
        """
        if self._failed:
            raise RuntimeError("the last refresh() of the operator failed; call it again first")
        if self._watch.changed():
            raise RuntimeError(
                "parameters, buffers or data were changed in place or replaced after the operator "
                "was made; it belongs to their old values. Call H.refresh() to move it to the new "
                "ones"
            )
        if not self.on_backend:
            self.objective.check_modes()

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context for everything that may run the model: it keeps the caller's generators."""
        with self._random or nullcontext():
            yield

    def _shown(self, items: Any, what: str) -> Iterable[Any]:
        size, hidden = len(self.batches), not self._progressbar
        bar: Iterable[Any] = tqdm(items, total=size, desc=what, unit="batch", disable=hidden)
        return bar

    def describe(self) -> list[str]:
        """Lines for ``explain()``."""
        count = len(self.batches) - self.skipped
        again = count - self.kept
        lines = [f"data: {self.batches.describe()}"]
        if self.group is not None:
            lines.append(self.group.describe() + "; the data are this process's own")
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
