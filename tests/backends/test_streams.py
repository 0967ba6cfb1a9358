"""Memory that callers do not see is kept for every stream that reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvpfast.backends.streams import HiddenMemory


class Recorded:
    """A tensor on a GPU, as far as its memory is concerned."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self) -> None:
        self.streams: list[object] = []

    def record_stream(self, stream: object) -> None:
        self.streams.append(stream)


def test_other_streams_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(stream="first")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now.stream)
    tensors: Any = [Recorded(), Recorded()]
    hidden = HiddenMemory(tensors)
    hidden.used()
    assert [t.streams for t in tensors] == [[], []], "the stream they were made on"
    now.stream = "second"
    hidden.used()
    assert [t.streams for t in tensors] == [["second"], ["second"]]


def test_nothing_to_tell_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(device: torch.device) -> None:
        raise AssertionError("there are no streams")

    monkeypatch.setattr(torch.cuda, "current_stream", ask)
    HiddenMemory([torch.zeros(3)]).used()
