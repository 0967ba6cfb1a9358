"""What every backend provides: its module, its states, its penalties.

States of one model and of M models of one network have the same operations: M stands in front of
every shape. Tensors that a method returns are new and hold no autograd history; so are ``loss`` and
``penalty`` of penalties and ``loss`` of :class:`ModelsState`, each time they are read. Callers
change them, and autograd attaches history to them, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hvpfast.backends.probes.source import ProbeSource
from hvpfast.mlp.spec import MLPSpec


class PenaltyState(Protocol):
    """A curvature penalty of one model or of many at their points, before its gradient."""

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim or (M,); a new tensor each time."""

    @property
    def penalty(self) -> Tensor:
        """The penalty, 0-dim or (M,); a new tensor each time."""

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        """Gradient d(g_loss * loss + g_penalty * penalty) / d params, (P,) or (M, P)."""


class AnyState(Protocol):
    """What states of one model and of many have; K tangents are contiguous rows (K, P), (M, K, P).

    A state may also have ``explain()``: lines on how it runs, for ``Linearization.explain()``.
    """

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim or (M,), of the parameters' dtype and device."""

    @property
    def nbytes(self) -> int:
        """Memory that the state keeps alive beyond its inputs, in bytes."""

    def gradient(self) -> Tensor:
        """Gradient d loss / d params, (P,) or (M, P)."""

    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        """H v_k, or with ``ggn`` G v_k, for K >= 0 rows or one (P,), shaped as they are."""

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        """v_k' H v_k, (K,) or (M, K)."""

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        """Third order, d sum_k <u_k, H v_k> / d params with u_k, v_k held fixed, (P,) or (M, P)."""

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> PenaltyState:
        """(1/K) sum_k ||H v_k||^2 for probes given as rows or as their source, K >= 1.

        Model m of many takes the K = num_probes probes of a source from ``first + m K`` on, which
        are ``source.of_model(m)``; the caller has checked that the last index is below 2**32.
        """


class State(AnyState, Protocol):
    """A linearization of one model at one point."""

    @property
    def loss_value(self) -> float:
        """The loss as a number."""

    @property
    def normalizer(self) -> float:
        """What the sum of losses was divided by."""

    # Exact curvature, without probes: of multilayer perceptrons, and not on every backend; where
    # there is none these raise NotImplementedError. ``chosen`` has one flag per tensor
    # [W1, b1, ...]: H is the block of the tensors with True, one or more.

    def sample_traces(self, ggn: bool, chosen: Sequence[bool]) -> Tensor:
        """The trace of each sample's part of H, (N,)."""

    def diagonal(self, ggn: bool) -> Tensor:
        """The diagonal of H over all tensors, (P,)."""

    def inner_product(self, other: Any, ggn: bool, chosen: Sequence[bool]) -> float:
        """tr H G, with H at this state and G at another state of the same backend and network."""

    def exact_penalty(self, kind: str, ggn: bool, chosen: Sequence[bool]) -> PenaltyState:
        """tr H (kind "trace") or tr H^2 ("fro2") over the chosen tensors."""


class ModelsState(AnyState, Protocol):
    """Linearizations of M models of one network, each at its own parameters; contiguous tensors.

    Labels out of range, and a mean over no targets, are errors like those of one model. Where the
    models have their own targets, y (M, N), the message begins with ``model m:`` for the first such
    model m. A loss that is not finite is no error here: ``functional.linearize`` reads the losses.
    """

    @property
    def normalizers(self) -> Tensor:
        """What each model's sum of losses was divided by, (M,) float64."""


class Backend(Protocol):
    """What the module of a backend provides.

    It may also have ``NAMED_ONLY``: why "auto" passes over it though it can run, or None.
    """

    NAME: str

    def unavailable(self) -> str | None:
        """Why the backend cannot run on this machine, or None if it can."""

    def unsupported(
        self, spec: MLPSpec | None, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """Why the backend cannot take this case (spec None: not an MLP), or None if it can."""

    def linearize(
        self, spec: MLPSpec, params: Tensor | Sequence[Tensor], x: Tensor, y: Tensor, order: int
    ) -> State:
        """The state at ``params``; ``order`` 2 keeps only what hvp and quadratic need."""

    def linearize_models(
        self, spec: MLPSpec, params: Tensor, x: Tensor, y: Tensor, order: int
    ) -> ModelsState:
        """The states of M models at ``params`` (M, P), M >= 1.

        x is (M, N, D[0]), or (N, D[0]) for samples that all models share; y is (M, N) or (N,) for
        cross_entropy, (M, N, D[L]) or (N, D[L]) for mse. x and y are shared independently of each
        other; all tensors are contiguous.
        """
