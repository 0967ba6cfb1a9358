"""Memory that callers do not see, and the CUDA streams that read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HiddenMemory:
    """Tensors of a state, made on one stream and read on others too.

    When the state is freed, torch's allocator gives their memory to later work of the stream they
    were made on. Callers do not see the tensors, and so cannot tell the allocator that another
    stream still reads them: :meth:`used` tells it.

    Args:
        tensors: on one device, one or more.
    """

    __slots__ = ("_stream", "_tensors")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._stream = _current(tensors[0])

    def used(self) -> None:
        """Tell the allocator that the current stream is about to read them."""
        current = _current(self._tensors[0])
        if current is None or current == self._stream:
            return
        for tensor in self._tensors:
            tensor.record_stream(current)


def _current(like: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(like.device) if like.is_cuda else None
