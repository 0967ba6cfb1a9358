"""A stand-in for CUDA graphs on the CPU: operations are taped, and a replay runs the tape again.

Like the real one it leaves no result of the recording behind (what existed before is as before,
what was made holds NaN), keeps every tensor where it is, bakes Python numbers in, and refuses what
waits for the device or copies from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvpfast.utils import cuda_graph

aten = torch.ops.aten
# What reads a value back, or has a size that depends on values, or comes from the host.
REFUSED = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.index.Tensor,
    aten.lift_fresh.default,
)


class Tape(TorchDispatchMode):
    """The operations of one recording."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REFUSED:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        for t in _tensors((args, kwargs)):
            if _address(t) not in self._before and _address(t) not in self._made:
                whole = _whole(t)
                self._before[_address(t)] = whole, whole.clone()
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            if _address(t) not in self._before:
                self._made[_address(t)] = _whole(t)
        self.ops.append((func, args, kwargs or {}, out))
        return out

    def forget(self) -> None:
        """Undo what the recording computed."""
        for whole, value in self._before.values():
            whole.copy_(value)
        for whole in self._made.values():
            whole.fill_(float("nan") if whole.is_floating_point() else 77)

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.ops:
                for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                    if _address(old) != _address(new):
                        old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _whole(t: Tensor) -> Tensor:
    """All of the storage, as numbers."""
    with torch._C._AutoDispatchBelowAutograd():
        count = t.untyped_storage().nbytes() // t.element_size()
        return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage(), 0, (count,), (1,))


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.tape, self.replays = Tape(), 0

    def replay(self) -> None:
        self.replays += 1
        self.tape.replay()


class Stand:
    """What tests look at: the graphs made, and whether one is being recorded."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.active = False

    @contextmanager
    def record(self, graph: Graph, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.graphs.append(graph)
        self.active = True
        try:
            with graph.tape:
                yield
        finally:
            self.active = False
        graph.tape.forget()


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """torch.cuda's graphs and streams replaced, and CPU tensors taken for the GPU's."""
    stand = Stand()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    nothing: Callable[..., Any] = lambda *_: nullcontext()  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", stand.record)
        patch.setattr(torch.cuda, "Stream", lambda device: stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: stream)
        patch.setattr(torch.cuda, "stream", nothing)
        patch.setattr(torch.cuda, "device", nothing)
        patch.setattr(cuda_graph, "check_on_gpu", lambda like: None)
        patch.setattr(cuda_graph, "recording", lambda like: stand.active)
        yield stand
