"""Tensors that the library makes name their device: torch's default device is the caller's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvpfast

PACKAGE = Path(hvpfast.__file__).parent
FACTORIES = {
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}
PROGRAMS = {"bench", "lab", "studies"}  # their processes are their own


def unplaced(code: str) -> Iterator[tuple[int, str]]:
    """(line, call) of every call of a factory of torch without ``device=``."""
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "torch"
            and node.func.attr in FACTORIES
            and not any(word.arg in ("device", None) for word in node.keywords)
        ):
            yield node.lineno, ast.unparse(node)


def test_factories_name_their_device() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if f.relative_to(PACKAGE).parts[0] not in PROGRAMS]
    assert len(files) > 100
    found = [f"{f}:{line}: {call}" for f in files for line, call in unplaced(f.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("call", ["torch.zeros(3)", "x + torch.arange(2, dtype=d)"])
def test_a_call_without_is_seen(call: str) -> None:
    assert [line for line, _ in unplaced(f"import torch\n{call}")] == [2]
    assert not list(unplaced(f"{call[:-1]}, device=x.device)"))
