"""Whether Triton can run, and how its kernels are started: every launch goes through here."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """None, or why Triton cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install hvpfast[triton]"
    if INTERPRETED:
        return None
    if torch.version.cuda is None:
        return (
            "this build of torch has no CUDA; for tests, Triton's interpreter runs on CPU tensors "
            "when TRITON_INTERPRET=1 is set before Python starts"
        )
    if not torch.cuda.is_available():
        return "no CUDA device can be used: none is visible, or its driver is too old for torch"
    return None


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for, from which the kernel can be compiled ahead of time."""

    kernel: Any
    arguments: tuple[Any, ...]  # tensors, integers and None
    constants: dict[str, Any]  # compile-time arguments and options of the compiler


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them: nothing is written."""
    global _recorded
    _recorded, before = [], _recorded
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run ``programs`` programs of a kernel on the current stream of its first tensor's device.

    Multiply-adds are fused unless ``enable_fp_fusion=False``; Triton's own default differs between
    its versions.
    """
    constants = {"enable_fp_fusion": True, **constants}
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, constants))
    elif programs > 0:
        device = next(a.get_device() for a in arguments if isinstance(a, Tensor))
        if device < 0 or device == torch.cuda.current_device():
            kernel[(programs,)](*arguments, **constants)
        else:
            with torch.cuda.device(device):
                kernel[(programs,)](*arguments, **constants)
