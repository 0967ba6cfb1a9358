"""What a provider is: a named way to compute the operations, in forms that are timed apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from hvpfast.bench.cases import Array, Problem
from hvpfast.bench.providers import torch_common as common


@dataclass(frozen=True)
class Prepared:
    """One form ready to run, its inputs already in its natural layout.

    Args:
        call: one complete operation. On the CPU it is finished when it returns; on a GPU its work
            is queued on torch's current stream, or ``wait`` waits for it.
        outputs: turns what ``call`` returned into float arrays in flat order, by name: ``loss``
            (), ``gradient`` (P,), ``hvp`` (K, P), ``quadratic`` (K,), ``penalty`` (), ``params``
            (P,) after a training step.
        drawn: the probes are drawn inside ``call`` and are not the problem's, so only statistics
            can be compared.
        restore: puts the parameters of a training step back where they started.
        wait: waits for what ``call`` returned, where torch's stream does not know of it.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Array]]
    drawn: bool = False
    restore: Callable[[], None] | None = None
    wait: Callable[[Any], Any] | None = None


class Provider(Protocol):
    """One library or one way of using it.

    Kinds: ours, eager, compiled; graphed, recorded once as a CUDA graph and replayed; plain, an
    unpenalised training step.
    """

    name: str
    kind: str

    def unavailable(self, device: str = "cpu") -> str | None:
        """None when it can run here on ``device`` ("cpu" or "cuda"), otherwise the reason."""
        return common.no_device(device)

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        """Names of the forms that compute the operation; empty when there is none."""

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        """Inputs in the form's layout, compiled objects made on the first call of the result."""
