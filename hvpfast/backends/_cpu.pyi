"""Types of the extension module (csrc/cpu/bindings.cpp): arrays are passed by address."""

from collections.abc import Sequence

class Penalty:
    @property
    def value(self) -> float: ...
    def gradient(self, g_loss: float, g_penalty: float, out: int, threads: int, /) -> None: ...

class Linearization:
    @property
    def loss(self) -> float: ...
    @property
    def normalizer(self) -> float: ...
    @property
    def num_bytes(self) -> int: ...
    def gradient(self, out: int, threads: int, /) -> None: ...
    def hvp(self, tangents: int, K: int, ggn: bool, out: int, threads: int, /) -> None: ...
    def quadratic(self, tangents: int, K: int, ggn: bool, out: int, threads: int, /) -> None: ...
    def hvp_vjp(
        self, tangents: int, cotangents: int, K: int, ggn: bool, out: int, threads: int, /
    ) -> None: ...
    def penalty(self, tangents: int, K: int, ggn: bool, threads: int, /) -> Penalty: ...
    def penalty_of_probes(
        self, distribution: str, seed: int, first: int, K: int, ggn: bool, threads: int, /
    ) -> Penalty: ...
    def sample_traces(
        self, ggn: bool, weights: Sequence[bool], biases: Sequence[bool], out: int, threads: int, /
    ) -> None: ...
    def diagonal(self, ggn: bool, out: int, threads: int, /) -> None: ...
    def inner_product(
        self, other: Linearization, ggn: bool, weights: Sequence[bool], biases: Sequence[bool],
        threads: int, /,
    ) -> float: ...  # fmt: skip
    def exact_penalty(
        self, kind: str, ggn: bool, weights: Sequence[bool], biases: Sequence[bool], threads: int, /
    ) -> Penalty: ...
    def exact_bytes(
        self, kind: str, ggn: bool, weights: Sequence[bool], biases: Sequence[bool],
        gradient: bool, threads: int, /,
    ) -> int: ...  # fmt: skip

class ModelsPenalty:
    def values(self, out: int, /) -> None: ...
    def gradient(self, g_loss: float, g_penalty: float, out: int, threads: int, /) -> None: ...

class Models:
    @property
    def num_bytes(self) -> int: ...
    def losses(self, out: int, /) -> None: ...
    def normalizers(self, out: int, /) -> None: ...
    def gradient(self, out: int, threads: int, /) -> None: ...
    def hvp(self, tangents: int, K: int, ggn: bool, out: int, threads: int, /) -> None: ...
    def quadratic(self, tangents: int, K: int, ggn: bool, out: int, threads: int, /) -> None: ...
    def hvp_vjp(
        self, tangents: int, cotangents: int, K: int, ggn: bool, out: int, threads: int, /
    ) -> None: ...
    def penalty(self, tangents: int, K: int, ggn: bool, threads: int, /) -> ModelsPenalty: ...
    def penalty_of_probes(
        self, distribution: str, seed: int, first: int, K: int, ggn: bool, threads: int, /
    ) -> ModelsPenalty: ...

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
        isa: str,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def linearize_flat_float32(
        self, params: int, x: int, x_stride: int, y: int, y_stride: int, N: int, third_order: bool,
        threads: int, /,
    ) -> Linearization: ...  # fmt: skip
    def linearize_flat_float64(
        self, params: int, x: int, x_stride: int, y: int, y_stride: int, N: int, third_order: bool,
        threads: int, /,
    ) -> Linearization: ...  # fmt: skip
    def linearize_layers_float32(
        self, params: Sequence[int], x: int, x_stride: int, y: int, y_stride: int, N: int,
        third_order: bool, threads: int, /,
    ) -> Linearization: ...  # fmt: skip
    def linearize_layers_float64(
        self, params: Sequence[int], x: int, x_stride: int, y: int, y_stride: int, N: int,
        third_order: bool, threads: int, /,
    ) -> Linearization: ...  # fmt: skip
    def linearize_models_float32(
        self, M: int, params: int, x: int, x_shared: bool, y: int, y_shared: bool, N: int,
        third_order: bool, threads: int, /,
    ) -> Models: ...  # fmt: skip
    def linearize_models_float64(
        self, M: int, params: int, x: int, x_shared: bool, y: int, y_shared: bool, N: int,
        third_order: bool, threads: int, /,
    ) -> Models: ...  # fmt: skip

def draw(
    distribution: str, seed: int, probe: int, stride: int, groups: int, count: int, begin: int,
    end: int, out: int, double_precision: bool, threads: int,
) -> None: ...  # fmt: skip
def fma_peak(seconds: float, threads: int, dtype: str) -> float: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def build_info() -> dict[str, str]: ...
