"""Types of the extension module (csrc/cuda/bindings.cpp): arrays are passed by address."""

from collections.abc import Sequence
from typing import Protocol

class Where:
    def __init__(self, device: int, stream: int, workspace: int, bytes: int) -> None: ...

class Probes:
    def __init__(self, distribution: str, seed: int, first: int) -> None: ...

class Point:
    def num_bytes(
        self, operation: str, K: int, ggn: bool, probes: Probes | None = None
    ) -> tuple[int, int]: ...
    def matrix_products(self) -> str: ...
    def linearize(
        self, residuals: int, residual_bytes: int, scalars: int, where: Where, /
    ) -> None: ...
    def gradient(self, out: int, where: Where, /) -> None: ...
    def hvp(self, tangents: int, K: int, ggn: bool, out: int, where: Where, /) -> None: ...
    def quadratic(self, tangents: int, K: int, ggn: bool, out: int, where: Where, /) -> None: ...
    def hvp_vjp(
        self, tangents: int, cotangents: int, K: int, ggn: bool, out: int, where: Where, /
    ) -> None: ...
    def penalty(
        self, tangents: int, probes: Probes | None, K: int, ggn: bool, value: int, kept: int,
        kept_bytes: int, where: Where, /,
    ) -> None: ...  # fmt: skip
    def penalty_gradient(
        self, tangents: int, probes: Probes | None, K: int, ggn: bool, g_loss: float,
        g_penalty: float, out: int, kept: int, kept_bytes: int, where: Where, /,
    ) -> None: ...  # fmt: skip

class Plan:
    def __init__(
        self,
        sizes: Sequence[int],
        activation: str,
        loss: str,
        mean: bool,
        bias: bool,
        class_weights: Sequence[float],
        ignore_index: int,
        label_smoothing: float,
    ) -> None: ...
    def point_float32(
        self, M: int, N: int, params: Sequence[int], flat: bool, params_model: int, x: int,
        x_model: int, y: int, y_model: int, class_weights: int, third_order: bool, device: int, /,
    ) -> Point: ...  # fmt: skip
    def point_float64(
        self, M: int, N: int, params: Sequence[int], flat: bool, params_model: int, x: int,
        x_model: int, y: int, y_model: int, class_weights: int, third_order: bool, device: int, /,
    ) -> Point: ...  # fmt: skip

_Where = Where
_Probes = Probes
_Plan = Plan

class Engine(Protocol):
    """The module itself."""

    emulated: bool
    cuda_version: int
    Where: type[_Where]
    Probes: type[_Probes]
    Plan: type[_Plan]

    def device_problem(self) -> str: ...
    def matrix_products(self) -> str: ...
