"""The data of an operator: batches (x, y) in a fixed order, read once or for every pass."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hvpfast.operators.batch import Batch, batch_size, bytes_of, map_tensors, tensors_in
from hvpfast.utils.random_state import RandomState, generators_of

_EXPECTED = "data must be a pair (x, y), a list of such pairs, or a DataLoader"


class Batches:
    """The batches of ``data`` in a fixed order, on one device.

    A pair (x, y) is one batch; a list or tuple of pairs is used in place. Anything else that can be
    iterated repeatedly, such as a DataLoader, is read and held in memory if its batches take at
    most ``budget`` bytes, and is read again for every pass otherwise. Every reading starts from the
    same state of the random generators, so a shuffling loader repeats its order, and a checksum of
    every batch verifies it. The generators keep the state that they have outside.

    Args:
        data: the pair, the list, or the loader.
        device: of the batches; tensors elsewhere are copied.
        dtype: floating-point type that floating-point tensors are converted to; None leaves them.
        budget: bytes that copies may take.
        may_be_empty: whether there may be no batch, or only batches without samples.

    Attributes:
        num_samples: samples in all batches.
        held: whether all batches are in memory.
        nbytes: bytes of the copies that are held.

    Raises:
        TypeError: ``data`` can be iterated only once, or its items are not pairs (x, y).
        ValueError: there is no batch, or a batch without samples.
    """

    def __init__(
        self,
        data: Any,
        device: torch.device,
        dtype: torch.dtype | None = None,
        budget: float = float("inf"),
        may_be_empty: bool = False,
    ) -> None:
        self._source, self._in_memory = _source_of(data)
        if may_be_empty and self._in_memory:
            batches = [_as_batch(item, index) for index, item in enumerate(self._source)]
            if not any(map(batch_size, batches)):
                self._source = []
        self._device, self._dtype = device, dtype
        self._random = None if self._in_memory else RandomState(generators_of(data))
        self._batches: list[Batch] = []
        self._checksums: list[int] = []
        self._count = self.num_samples = self.nbytes = 0
        self.held = True
        for index, given in enumerate(self._read()):
            batch = self._converted(given)
            size = batch_size(batch)
            if size == 0:
                raise ValueError(f"batch {index} is empty (0 samples); every batch needs a sample")
            self._count += 1
            self.num_samples += size
            if not self._in_memory:
                self._checksums.append(_checksum(given))
            if self.held:
                self._hold(batch, given, budget)
        if self._count == 0 and not may_be_empty:
            raise ValueError("data is empty: no batch came; give at least one batch (x, y)")

    def _hold(self, batch: Batch, given: Batch, budget: float) -> None:
        theirs = {t.data_ptr() for t in tensors_in(given)} if self._in_memory else set()
        copies = [t for t in tensors_in(batch) if t.data_ptr() not in theirs]
        self.nbytes += sum(t.numel() * t.element_size() for t in copies)
        self._batches.append(batch)
        if self.nbytes > budget:
            self.held, self.nbytes, self._batches = False, 0, []

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        if self.held:
            yield from self._batches
            return
        count = 0
        for count, given in enumerate(self._read(), start=1):
            known = self._checksums[count - 1 : count]
            if not self._in_memory and known != [_checksum(given)]:
                raise _changed(f"batch {count - 1} is not what it was")
            yield self._converted(given)
        if count != self._count:
            raise _changed(f"{count} batches came instead of {self._count}")

    def tensors(self) -> list[Tensor]:
        """The tensors in memory from which batches are read."""
        if self.held:
            return list(tensors_in(self._batches))
        return list(tensors_in(self._source)) if self._in_memory else []

    def repeats(self) -> bool:
        """Whether another reading gives the same batches (always, for data in memory)."""
        if self._in_memory:
            return True
        return [_checksum(given) for given in self._read()] == self._checksums

    def describe(self) -> str:
        """Text: how many batches and samples, and where they are."""
        count = "1 batch" if self._count == 1 else f"{self._count} batches"
        where = "in memory" if self.held else "read again for every product"
        return f"{count}, {self.num_samples} samples, {where}"

    def _converted(self, given: Batch) -> Batch:
        return Batch(map_tensors(self._convert, given.x), map_tensors(self._convert, given.y))

    def _convert(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach() if tensor.requires_grad else tensor
        if self._dtype is not None and tensor.is_floating_point():
            return tensor.to(self._device, self._dtype)
        return tensor.to(self._device)

    def _read(self) -> Iterator[Batch]:
        """Batches as they come from the source, in the random state of the first reading."""
        if self._random is None:
            for index, item in enumerate(self._source):
                yield _as_batch(item, index)
            return
        state, end, index = copy.copy(self._random), object(), 0
        with state:
            iterator = iter(self._source)
        while True:
            with state:
                item = next(iterator, end)
            if item is end:
                return
            yield _as_batch(item, index)
            index += 1


def _source_of(data: Any) -> tuple[Iterable[Any], bool]:
    """An iterable whose items should be pairs, and whether it is in memory already."""
    if isinstance(data, (tuple, list)):
        one_batch = len(data) == 2 and isinstance(data[1], Tensor)
        return ([data] if one_batch else data), True
    if isinstance(data, torch.utils.data.Dataset) and hasattr(data, "__getitem__"):
        raise TypeError(
            f"{_EXPECTED}; got a Dataset, which gives single samples: wrap it in "
            "torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"{_EXPECTED}; got {type(data).__name__}")
    if isinstance(data, Iterator):
        raise TypeError(
            f"{_EXPECTED}; got an iterator (such as a generator), which can be read only once, "
            "while products may read it again: pass list(data), or the DataLoader itself"
        )
    return data, False


def _as_batch(item: Any, index: int) -> Batch:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        length = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise TypeError(
            f"batch {index} of data must be a pair (x, y); got {type(item).__name__}{length}"
        )
    return Batch(item[0], item[1])


def _checksum(batch: Batch) -> int:
    """Checksum of the dtypes, shapes and bytes of all tensors of a batch."""
    value = 0
    for tensor in tensors_in(batch):
        value = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(bytes_of(tensor), value)
    return value


def _changed(what: str) -> RuntimeError:
    return RuntimeError(
        f"the data changed between two readings: {what}. An operator needs the same batches in "
        "every product: pass list(data), use a loader without shuffling and random augmentation, "
        "or raise memory_budget so that the data stay in memory"
    )
