"""The providers in one table, in the order they are printed."""

from __future__ import annotations

from hvpfast.bench.providers.base import Prepared, Provider
from hvpfast.bench.providers.jax_jit import JaxJit
from hvpfast.bench.providers.ours import Autograd, Functional
from hvpfast.bench.providers.torch_compile import TorchCompile
from hvpfast.bench.providers.torch_eager import TorchEager
from hvpfast.bench.providers.torch_func import TorchFunc
from hvpfast.bench.providers.torch_graphs import TorchGraphs
from hvpfast.bench.providers.torch_plain import TorchPlain

_ALL: tuple[Provider, ...] = (
    Functional("cpu"),
    Functional("cuda"),
    Functional("triton"),
    Autograd(),
    Functional("reference"),
    TorchEager(),
    TorchFunc(),
    TorchCompile(),
    TorchGraphs(),
    JaxJit(),
    TorchPlain(),
    Functional("triton_tf32x3"),  # last: the deadline of a run takes nothing of full float32
)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _ALL}

__all__ = ["PROVIDERS", "Prepared", "Provider"]
