"""torch.compile of the whole function, derivatives included."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from typing import Any

import torch
from torch import Tensor

from hvpfast.bench.cases import Problem
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers import transforms
from hvpfast.bench.providers.base import Prepared, Provider
from hvpfast.bench.providers.torch_eager import train_step
from hvpfast.bench.providers.torch_func import arguments_of, evaluate, options_of

# On the CPU every form is tried in a process of its own first: some of the code that torch 2.13
# generates for nested transforms writes out of bounds and ends the process.
TRIAL_SECONDS = 600
TRIAL_CALLS = 20


class TorchCompile(Provider):
    """``torch.compile(fullgraph=True)``; the first call compiles."""

    name = "torch-compile"
    kind = "compiled"

    def unavailable(self, device: str = "cpu") -> str | None:
        if reason := super().unavailable(device):
            return reason
        if os.name == "nt":
            return "torch.compile for CPU tensors needs a C++ compiler set up by hand on Windows"
        return None

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        # A compiled function keeps nothing between its calls, so there is no warm form.
        if operation == "hvp_warm":
            return ()
        return transforms.forms(operation, num_tangents)

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        if problem.device == "cpu":
            _try(form, operation, problem)
        return compiled(form, operation, problem)


def compiled(form: str, operation: str, problem: Problem) -> Prepared:
    arguments = arguments_of(problem, form, operation)
    options = options_of(problem, form, operation)

    def whole(params: Any, x: Tensor, y: Tensor, V: Any) -> Any:
        return evaluate(params, x, y, V, **options)

    function: Any = torch.compile(own_code(whole), fullgraph=True, dynamic=False)
    if operation == "train_step":
        return train_step(
            arguments[0], lambda: function(*arguments), capturable=problem.device != "cpu"
        )
    return Prepared(lambda: function(*arguments), common.named_outputs(operation))


def own_code(function: Any) -> Any:
    """The function with a code object of its own.

    Compiled versions belong to the code object: torch searches them on every call and limits their
    number.
    """
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        None,
        function.__closure__,
    )


def _try(form: str, operation: str, problem: Problem) -> None:
    """Run the form in a process of its own; raise if that process does not survive it."""
    words = [problem.case.name, str(problem.num_tangents), problem.dtype, operation, form]
    done = subprocess.run(
        [sys.executable, "-m", "hvpfast.bench.providers.torch_compile", *words],
        capture_output=True,
        timeout=TRIAL_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"a trial process ended with status {done.returncode}")


def _trial(words: list[str]) -> None:
    from hvpfast.bench.cases import KNOWN_CASES, build

    case, num_tangents, dtype, operation, form = words
    problem = build(KNOWN_CASES[case], int(num_tangents), dtype)
    prepared = compiled(form, operation, problem)
    for _ in range(TRIAL_CALLS):
        prepared.call()


if __name__ == "__main__":
    _trial(sys.argv[1:])
