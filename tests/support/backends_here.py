"""Which backends a run of the tests has, and one skip for each that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import device
import pytest
import torch
from cases import Case

import hvpfast as hf
from hvpfast.backends import choose

# Those that can run here, as parameters of tests; test_conformance.py says why the others cannot.
BACKENDS = [name for name, reason in hf.available().items() if reason is None]


def refusal(name: str, case: Case) -> str | None:
    """Why a backend cannot run a case on the device of this run, or None."""
    if (reason := hf.available()[name]) is not None:
        return reason
    try:
        choose(name, case.spec, device.DEVICE, case.dtype)
    except RuntimeError as error:
        return str(error)
    return None


def skip_without(name: str, case: Case | None = None) -> None:
    """Skip the calling test or module where the backend cannot run, or not this case.

    Every skip comes from this line, so that pytest's summary has one line for each reason.
    """
    reason = hf.available()[name] if case is None else refusal(name, case)
    if reason is not None:
        pytest.skip(f"{name}: {reason}", allow_module_level=True)


T = TypeVar("T")


def on_gpu(values: Sequence[T]) -> Sequence[T]:
    """Parameters of a test that needs a GPU: where there is none, one stands for all."""
    return values if torch.cuda.is_available() else values[:1]


def skip_without_gpu() -> None:
    """Skip the calling test where torch sees no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
