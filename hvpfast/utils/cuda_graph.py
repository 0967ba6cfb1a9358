"""Recording GPU work as a CUDA graph: whether it happens now, and one recorded call.

A recorded call launches what its first run launched, on the same memory: the host's part (checks,
launches, allocation) is paid once. So a recorded call must not wait for the device, must keep its
inputs where they are, and gives its results in the same tensors every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

# Calls before a recording, as torch advises: libraries make handles and workspaces in the first,
# kernels are compiled, optimizers make their state.
WARMUPS = 3

Out = TypeVar("Out")


def recording(like: Tensor) -> bool:
    """Whether work on the device of ``like`` is being recorded, so that nothing can be read."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def check_on_gpu(like: Tensor) -> None:
    """Raise RuntimeError unless work on ``like`` can be recorded."""
    if like.is_cuda:
        return
    reason = "move them with .to('cuda')"
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        reason = "torch sees no GPU here" if built else "this torch was built without CUDA"
    raise RuntimeError(
        f"CUDA graphs record work on a GPU, but params are on {like.device}: {reason}"
    )


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream of its own, ordered after what came before and before what comes next.

    The calls ahead of a recording run on one: a recording is made on one too.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class Recording(Generic[Out]):
    """One call recorded as a CUDA graph; ``outputs`` is what it returned.

    Args:
        device: the GPU.
        what: what is recorded, for the message of an error.
        call: launches the work; every tensor that it reads and that changes between replays must
            be kept by the caller.

    Raises:
        RuntimeError: the call cannot be recorded; the message has the reason.
    """

    def __init__(self, device: torch.device, what: str, call: Callable[[], Out]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do (a loader that pins memory) is no part of it
            with (
                torch.cuda.device(device),
                torch.cuda.graph(
                    self._graph,
                    stream=torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
                    capture_error_mode="thread_local",
                ),
            ):
                self.outputs = call()
        except RuntimeError as error:
            raise RuntimeError(f"{what} cannot be recorded as a CUDA graph: {error}") from error

    def replay(self) -> Out:
        """Launch the recorded work on the current stream; ``outputs`` then holds new values."""
        self._graph.replay()
        return self.outputs


class Buffers:
    """Named tensors that recorded work reads, and how new values get into them.

    Args:
        tensors: by name; copies are made, so that the caller's tensors stay the caller's.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = {name: t.detach().clone() for name, t in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def fill(self, name: str, value: Tensor | None) -> None:
        """Copy ``value`` in; None leaves what is there.

        Raises:
            TypeError: not a tensor, or another dtype or device.
            ValueError: another shape than at the recording.
        """
        if value is None:
            return
        held = self._tensors[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
        if (value.dtype, value.device) != (held.dtype, held.device):
            raise TypeError(
                f"{name} must be {held.dtype} on {held.device}, as it was recorded; got "
                f"{value.dtype} on {value.device}"
            )
        if value.shape != held.shape:
            raise ValueError(
                f"{name} must be {tuple(held.shape)}, as it was recorded; got "
                f"{tuple(value.shape)}. Another shape needs another recording"
            )
        held.copy_(value.detach())


class Addresses:
    """The addresses of tensors when work on them was recorded."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._addresses = self._now()

    def _now(self) -> list[int]:
        return [t.data_ptr() for t in self._tensors]

    def check(self) -> None:
        """Raise RuntimeError if a tensor was given other memory: the recording reads the old."""
        if self._now() != self._addresses:
            raise RuntimeError(
                "the parameters were given other memory after the recording, which reads the old; "
                "change them in place (copy_), or record again"
            )
