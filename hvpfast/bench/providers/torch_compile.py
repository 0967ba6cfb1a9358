"""torch.compile of the whole function, derivatives included."""

from __future__ import annotations

import os
import types
from typing import Any

import torch
from torch import Tensor

from hvpfast.bench.cases import Problem
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers import transforms
from hvpfast.bench.providers.base import Prepared
from hvpfast.bench.providers.torch_func import arguments_of, evaluate, options_of

# Not run: what torch 2.13 generates for nested forward mode writes out of bounds, so that the process
# ends then or later. Where it survives, the form is slower than reverse over forward.
UNSAFE = "jvp(jvp"


class TorchCompile:
    """``torch.compile(fullgraph=True)``; the first call compiles."""

    name = "torch-compile"
    kind = "compiled"

    def unavailable(self) -> str | None:
        if os.name == "nt":
            return "torch.compile for CPU tensors needs a C++ compiler set up by hand on Windows"
        return None

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        # Nothing kept between calls of a compiled function: no warm form.
        return () if operation == "hvp_warm" else transforms.forms(operation, num_tangents)

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        if UNSAFE in form:
            raise RuntimeError("not run: the code compiled for it writes out of bounds")
        return compiled(form, operation, problem)


def compiled(form: str, operation: str, problem: Problem) -> Prepared:
    """The form compiled as a function of all its inputs."""
    arguments = arguments_of(problem, form, operation)
    options = options_of(problem, form, operation)

    def whole(params: Any, x: Tensor, y: Tensor, V: Any) -> Any:
        return evaluate(params, x, y, V, **options)

    function: Any = torch.compile(own_code(whole), fullgraph=True, dynamic=False)
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
