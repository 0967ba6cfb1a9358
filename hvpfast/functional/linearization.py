"""A linearized loss: what runs, at which values, and whether these are still there."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from hvpfast import backends
from hvpfast.backends.contract import ModelsState, State
from hvpfast.mlp.spec import MLPSpec

__all__ = ["Linearization", "versions"]


class Linearization:
    """A loss at one point, ready for curvature products. Made by :func:`hvpfast.linearize`.

    It belongs to the values that ``params``, ``x`` and ``y`` had: when one of them is changed in
    place, later products raise (changes through ``.data`` cannot be seen).

    Attributes:
        spec: the :class:`MLPSpec`.
        order: 2 or 3, as given to ``linearize``.
        num_params: P.
        like: a tensor with the dtype and device of the parameters.
    """

    __slots__ = ("_choice", "_grad", "_inputs", "_state", "_versions", "like", "num_params",
                 "order", "spec")  # fmt: skip

    def __init__(
        self,
        spec: MLPSpec,
        state: State | None,
        choice: backends.Choice,
        order: int,
        like: Tensor,
        inputs: tuple[Tensor, ...],
    ) -> None:
        self.spec, self._state, self.order = spec, state, order
        self.num_params = spec.num_params
        self._choice, self.like, self._inputs = choice, like, inputs
        self._grad: Tensor | None = None
        self._versions = versions(inputs)

    @property
    def state(self) -> State:
        """The backend's state; rows (K, P) inside."""
        if self._state is None:
            raise RuntimeError(
                "a linearization of many models is not one of a single model; take one model: "
                "linearize(spec, params[m], ...)"
            )
        return self._state

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim."""
        return self.state.loss

    @property
    def grad(self) -> Tensor:
        """The gradient of the loss, flat (P,); computed when first asked for."""
        if self._grad is None:
            self.check_current()
            self._grad = self.state.gradient()
        return self._grad

    @property
    def normalizer(self) -> float:
        """What the loss divides its sum by: 1 for "sum", else the samples or weights that count."""
        return self.state.normalizer

    @property
    def backend(self) -> str:
        """Name of the backend that runs."""
        return self._choice.module.NAME

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters and of every result."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters and of every result."""
        return self.like.device

    def check_current(self) -> None:
        """Raise RuntimeError if params, x or y were changed in place since linearize."""
        if versions(self._inputs) != self._versions:
            raise RuntimeError(
                "params, x or y were changed in place after linearize; the linearization belongs "
                "to their old values. Call linearize again"
            )

    def check_third_order(self, name: str) -> None:
        """Raise RuntimeError where third-order residuals were not kept; ``name`` needs them."""
        if self.order < 3:
            raise RuntimeError(
                f"{name} needs third-order residuals, but this linearization has order=2; call "
                "linearize(..., order=3)"
            )

    def explain(self) -> str:
        """What runs where and why, in a few lines."""
        spec = self.spec
        lines = [
            f"MLP {spec.sizes} {spec.activation}, {spec.loss} ({spec.reduction}), "
            f"P = {self.num_params}, {self.dtype} on {self.device}",
            f"backend: {self.backend}",
        ]
        lines += [f"passed over {name}: {reason}" for name, reason in self._choice.passed_over]
        more = getattr(self._any_state, "explain", None)
        return "\n".join(lines if more is None else [*lines, *more()])

    @property
    def _any_state(self) -> State | ModelsState | None:
        """The state, of one model or of many."""
        return self._state

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} of {self.explain().splitlines()[0]}, backend {self.backend}>"
        )


_version = operator.attrgetter("_version")


def versions(tensors: tuple[Tensor, ...]) -> int:
    """Sum of the version counters: each only ever grows, so a change of any changes the sum."""
    try:
        return sum(map(_version, tensors))
    except RuntimeError:  # inference tensors keep no version counter
        return sum(t._version for t in tensors if not t.is_inference())
