"""Where tests compute: pytest's option --device, and one thread where tensors are small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from cases import Case, Problem, problem
from torch import Tensor

# The value of --device; conftest.py sets it before test modules are imported.
DEVICE = torch.device("cpu")


def place(t: Tensor) -> Tensor:
    """The tensor on the device of this run, strides included."""
    if t.device == DEVICE:
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t)


def placed(case: Case) -> Problem:
    """The case's tensors on the device of this run."""
    q = problem(case)
    params = place(q.params) if isinstance(q.params, Tensor) else [place(t) for t in q.params]
    return Problem(
        place(q.flat), params, place(q.x), place(q.y), place(q.tangents), place(q.cotangents)
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: on tensors this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
