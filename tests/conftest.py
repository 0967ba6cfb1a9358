"""Settings for all tests: global state stays as it is, and a missing extension is not an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import one_thread

import hvpfast as hf


def pytest_configure(config: pytest.Config) -> None:
    if hf.available()["cpu"] is not None:
        # Where the extension is not built the suite runs on the reference backend.
        ignore = "ignore:hvpfast runs on the slow reference backend:RuntimeWarning"
        config.addinivalue_line("filterwarnings", ignore)


def pytest_report_header() -> list[str]:
    reasons = [f"{name}: {reason or 'available'}" for name, reason in hf.available().items()]
    return [f"hvpfast backends: {'; '.join(reasons)}"]


@pytest.fixture
def single_threaded(global_state_untouched: None) -> Iterator[None]:
    """One torch thread for a test of small tensors."""
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def global_state_untouched() -> Iterator[None]:
    """Fail a test after which threads, default dtype or grad mode differ."""

    def state() -> tuple[object, ...]:
        return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()

    before = state()
    yield
    assert state() == before, "a test left (threads, default dtype, grad mode) changed"
