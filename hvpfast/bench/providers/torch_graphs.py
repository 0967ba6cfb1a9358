"""torch's own forms, recorded as CUDA graphs: their times without the cost of launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvpfast.bench.cases import Problem
from hvpfast.bench.providers.base import Prepared, Provider
from hvpfast.bench.providers.torch_compile import TorchCompile
from hvpfast.bench.providers.torch_eager import TorchEager
from hvpfast.bench.providers.torch_func import TorchFunc
from hvpfast.utils import cuda_graph

# By the first word of a form.
_RECORDED: dict[str, Provider] = {
    "eager": TorchEager(),
    "func": TorchFunc(),
    "compiled": TorchCompile(),
}


class TorchGraphs(Provider):
    """Every form of torch-eager, torch-func and torch-compile that starts cold, replayed."""

    name = "torch-graphs"
    kind = "graphed"

    def unavailable(self, device: str = "cpu") -> str | None:
        if device == "cpu":
            return "CUDA graphs record work on a GPU"
        return super().unavailable(device)

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        if operation == "hvp_warm":  # autograd goes back on the stream of the primal passes
            return ()
        return tuple(
            f"{name}: {form}"
            for name, provider in _RECORDED.items()
            for form in provider.forms(operation, num_tangents)
        )

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        name, _, inner = form.partition(": ")
        prepared = _RECORDED[name].prepare(inner, operation, problem)
        replay = recorded(problem.device, form, prepared.call)
        if prepared.restore is not None:
            prepared.restore()  # the calls ahead of the recording were training steps
        return Prepared(replay, prepared.outputs, restore=prepared.restore)


def recorded(device: str, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Record a call as a CUDA graph, after a few that are not recorded; returns its replay."""
    where = torch.device(device)
    with cuda_graph.side_stream(where):
        for _ in range(cuda_graph.WARMUPS):
            call()
    recording: cuda_graph.Recording[Any] = cuda_graph.Recording(where, name, call)
    return recording.replay
