"""A linearized loss: what runs, at which values, and whether these are still there."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from hvpfast.backends import Choice
from hvpfast.backends.contract import PenaltyState, State
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.functional.penalty_kinds import penalty_of
from hvpfast.mlp.checks import check_tangents, tangent_rows
from hvpfast.mlp.spec import MLPSpec


class Linearization(ABC):
    """A loss at one point, ready for curvature products. Made by :func:`hvpfast.linearize`.

    It belongs to the values that ``params``, ``x`` and ``y`` had: when one of them is changed in
    place, later products raise (changes through ``.data`` cannot be seen). With parameters (M, P)
    it is a :class:`hvpfast.ModelsLinearization` of M losses, which the same functions take.

    Attributes:
        spec: the :class:`MLPSpec`.
        order: 2 or 3, as given to ``linearize``.
        num_params: P.
        like: a tensor with the dtype and device of the parameters.
        state: the backend's state.
    """

    __slots__ = ("_choice", "_grad", "_inputs", "_versions", "like", "num_params", "order", "spec",
                 "state")  # fmt: skip

    def __init__(
        self,
        spec: MLPSpec,
        state: Any,
        choice: Choice,
        order: int,
        like: Tensor,
        inputs: tuple[Tensor, ...],
    ) -> None:
        self.spec, self.state, self.order = spec, state, order
        self.num_params = spec.num_params
        self._choice, self.like, self._inputs = choice, like, inputs
        self._grad: Tensor | None = None
        self._versions = versions(inputs)

    @property
    @abstractmethod
    def loss(self) -> Tensor:
        """The loss."""

    @property
    def grad(self) -> Tensor:
        """The gradient of the loss, flat (P,) or (M, P); computed when first asked for."""
        if self._grad is None:
            self.check_current()
            self._grad = self.state.gradient()
        return self._grad

    @abstractmethod
    def product(self, tangents: Tensor, ggn: bool) -> Tensor:
        """H V, or G V with ``ggn``, shaped as the tangents."""

    @abstractmethod
    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        """v_k' H v_k."""

    @abstractmethod
    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        """d sum_k u_k' H v_k / d params."""

    @abstractmethod
    def penalty(self, probes: Tensor | ProbeSource, kind: str, ggn: bool) -> PenaltyState:
        """The penalty of a kind by K >= 1 probes, with the gradient for weights that come later."""

    @abstractmethod
    def exact_penalty(self, kind: str, ggn: bool) -> PenaltyState:
        """The penalty of a kind without probes."""

    @abstractmethod
    def diagonal(self, ggn: bool) -> Tensor:
        """The diagonal of H without probes, (P,)."""

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
        more = getattr(self.state, "explain", None)
        return "\n".join(lines if more is None else [*lines, *more()])

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} of {self.explain().splitlines()[0]}, backend {self.backend}>"
        )


class ModelLinearization(Linearization):
    """The loss of one model at one point."""

    __slots__ = ()
    state: State

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim."""
        return self.state.loss

    @property
    def normalizer(self) -> float:
        """What the loss divides its sum by: 1 for "sum", else the samples or weights that count."""
        return self.state.normalizer

    def product(self, tangents: Tensor, ggn: bool) -> Tensor:
        """H V or G V for (P,) or columns (P, K), shaped as they are."""
        check_tangents(tangents, self.num_params, self.like)
        self.check_current()
        if tangents.dim() == 1:
            vector = tangents if tangents.is_contiguous() else tangents.contiguous()
            return self.state.hvp(vector, ggn)
        rows = tangents.T
        return self.state.hvp(rows if rows.is_contiguous() else rows.contiguous(), ggn).T

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        """v' H v: 0-dim for (P,), (K,) for (P, K)."""
        rows = tangent_rows(tangents, self.num_params, self.like)
        self.check_current()
        out = self.state.quadratic(rows, ggn)
        return out[0] if tangents.dim() == 1 else out

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        """d sum_k u_k' H v_k / d params, (P,)."""
        rows = tangent_rows(tangents, self.num_params, self.like)
        cotangent_rows = tangent_rows(cotangents, self.num_params, self.like, "cotangents")
        check_pairs(tangents, cotangents)
        self.check_third_order("hvp_vjp")
        self.check_current()
        return self.state.hvp_vjp(rows, cotangent_rows, ggn)

    def penalty(self, probes: Tensor | ProbeSource, kind: str, ggn: bool) -> PenaltyState:
        """The penalty by probes (P,) or (P, K), or by those of a source; K >= 1."""
        self.check_third_order("penalty")
        if not isinstance(probes, ProbeSource):
            probes = tangent_rows(probes, self.num_params, self.like)
        self.check_current()
        return penalty_of(self.state, kind, probes, ggn, self.like, self.num_params)

    def exact_penalty(self, kind: str, ggn: bool) -> PenaltyState:
        """The penalty without probes."""
        self.check_third_order("penalty")
        self.check_current()
        return self.state.exact_penalty(kind, ggn, [True] * len(self.spec.shapes))

    def diagonal(self, ggn: bool) -> Tensor:
        """The diagonal of H without probes, (P,)."""
        self.check_current()
        return self.state.diagonal(ggn)


def check_pairs(tangents: Tensor, cotangents: Tensor) -> None:
    """Raise ValueError unless there is a cotangent for every tangent."""
    if tangents.shape != cotangents.shape:
        raise ValueError(
            "tangents and cotangents must have one shape, pair by pair; got "
            f"{tuple(tangents.shape)} and {tuple(cotangents.shape)}"
        )


_version = operator.attrgetter("_version")


def versions(tensors: tuple[Tensor, ...]) -> int:
    """Sum of the version counters: each only ever grows, so a change of any changes the sum."""
    try:
        return sum(map(_version, tensors))
    except RuntimeError:  # inference tensors keep no version counter
        return sum(t._version for t in tensors if not t.is_inference())
