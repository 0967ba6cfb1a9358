"""Networks, models and operations on which the CUDA engine's own tests run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case
from device import place, placed
from torch import Tensor

import hvpfast as hf

LAUNCH = 719  # cudaErrorLaunchFailure
WIDE = Case(hf.MLPSpec((300, 70, 5), "tanh"), 20)
SPECS = [
    hf.MLPSpec((6, 8, 3), "tanh", class_weights=(0.5, 2.0, 1.0), label_smoothing=0.1),
    hf.MLPSpec((6, 9, 5, 2), "relu", "mse"),
    hf.MLPSpec((200, 90, 4), "silu"),
]


def operations(case: Case) -> list[tuple[str, Callable[[], Tensor]]]:
    """Every operation from linearize on."""
    q = placed(case)
    V, U = q.tangents, q.cotangents

    def lin() -> hf.Linearization:
        return hf.linearize(case.spec, q.params, q.x, q.y, backend="cuda")

    return [
        ("gradient", lambda: lin().grad),
        ("hvp", lambda: hf.hvp(lin(), V)),
        ("quadratic", lambda: hf.quadratic_form(lin(), V)),
        ("hvp_vjp", lambda: hf.hvp_vjp(lin(), V, U)),
        ("penalty", lambda: hf.penalty(lin(), V)[2]),
        ("drawn penalty", lambda: hf.penalty(lin(), num_probes=2, seed=1)[2]),
    ]


def models(M: int, shared: bool, dtype: torch.dtype, spec: hf.MLPSpec) -> list[list[Tensor]]:
    """[params, x, y, V, U] of M models, K = 3."""
    g = torch.Generator().manual_seed(M)
    N, K, P = 9, 3, spec.num_params
    data = () if shared else (M,)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    if spec.loss == "mse":
        y = randn(*data, N, spec.sizes[-1])
    else:
        y = torch.randint(0, spec.sizes[-1], (*data, N), generator=g)
    tensors = (0.3 * randn(M, P), randn(*data, N, spec.sizes[0]), y, randn(M, K, P), randn(M, K, P))
    return [place(t) for t in tensors]
