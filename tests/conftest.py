"""Settings for all tests: global state stays as it is, and a missing extension is not an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import device
import pytest
import torch
from device import one_thread

import hvpfast as hf


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where conformance runs: cpu or cuda")
    parser.addoption("--outcomes", type=Path, help="file that gets one JSON line per test")


def pytest_configure(config: pytest.Config) -> None:
    device.DEVICE = torch.device(config.getoption("--device"))
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # one writer, also under xdist
        config.pluginmanager.register(Outcomes(path))
    if hf.available()["cpu"] is not None:
        # Where the extension is not built the suite runs on the reference backend.
        ignore = "ignore:hvpfast runs on the slow reference backend:RuntimeWarning"
        config.addinivalue_line("filterwarnings", ignore)


# Files that take half a minute or more, the longest first. A file runs on one process: what
# starts first ends while the short ones still fill the other processes.
LONGEST = (
    "test_triton_compilation.py",
    "test_cuda_emulated.py",
    "test_cuda_build.py",
    "test_triton.py",
    "test_conformance.py",
    "test_compile.py",
    "test_distributed.py",
    "test_estimators_calibration.py",
    "test_spectral.py",
    "test_sharing.py",
    "test_cli.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))  # the rest keeps its order


class Outcomes:
    """Writes what became of each test as it ends, so that a run that is stopped leaves a record."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._collected = 0

    def _write(self, **entry: object) -> None:
        print(json.dumps(entry), file=self._file, flush=True)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # under xdist the workers collect
            self._write(collected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        if not self._collected:
            self._collected = len(ids)
            self._write(collected=len(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
            self._write(test=report.nodeid, outcome=report.outcome, reason=reason)


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
