"""The table of backends: what each must provide, which can run here, and the choice among them.

A backend is a module with the functions of :class:`hvpfast.backends.contract.Backend`. Its
``linearize`` returns the state of one model at one point; ``linearize_models`` returns that of M
models of one network, with M in front of every shape, and model m's results are those of its own
``linearize``.

Backends take arguments that are checked: by ``mlp/checks.py``, as ``functional/`` calls it. Only
the values of labels are theirs to check, while they read them (``checks.label_message``).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

import torch

from hvpfast.backends.contract import Backend
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils.choice import check_choice

# Each backend's name and its module below this package; "auto" takes the first, in this order, that
# can run and supports the case.
BACKENDS = {
    "cpu": "cpu.state",
    "cuda": "cuda.state",
    "triton": "triton.state",
    "triton_tf32x3": "triton.tf32x3",
    "reference": "reference.state",
}


@dataclass(frozen=True)
class Choice:
    """A backend and, for "auto", the (name, reason) of those passed over."""

    module: Backend
    passed_over: tuple[tuple[str, str], ...] = ()


def available() -> dict[str, str | None]:
    """Backend names mapped to None if they can run here, else to the reason why not."""
    modules = {name: _load(name) for name in BACKENDS}
    return {n: m if isinstance(m, str) else m.unavailable() for n, m in modules.items()}


def choose(name: str, spec: MLPSpec | None, device: torch.device, dtype: torch.dtype) -> Choice:
    """The named backend, or for "auto" the first that supports the case.

    Args:
        name: a backend's name or ``"auto"``.
        spec: the network, or None for a model that is not an MLP.
        device: where the parameters live.
        dtype: their floating-point type.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the named backend cannot run here or does not support the case.
    """
    check_choice("backend", name, ("auto", *BACKENDS))
    passed_over: list[tuple[str, str]] = []
    for candidate in BACKENDS if name == "auto" else (name,):
        module = _load(candidate)
        if isinstance(module, str):
            reason: str | None = module
        else:
            reason = module.unavailable() or module.unsupported(spec, device, dtype)
            if reason is None and name == "auto":
                reason = getattr(module, "NAMED_ONLY", None)
            if reason is None:
                return Choice(module, tuple(passed_over))
        passed_over.append((candidate, reason or ""))
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in passed_over)
    raise RuntimeError(f"backend {name!r} cannot run: {reasons}")


def _load(name: str) -> Backend | str:
    """The backend's module, or the reason why it cannot be imported."""
    try:
        return cast(Backend, importlib.import_module(f"hvpfast.backends.{BACKENDS[name]}"))
    except ImportError as error:
        return f"its module cannot be imported ({error})"
