"""Run by test_cuda_emulated.py: the kernels' formulas, one by one, against definitions.

They are those of the CPU engine (activations.h and losses.h in csrc/common) with one number per
thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from cases import DTYPES
from cuda_emulated import MODULE
from torch import Tensor

from hvpfast.mlp.spec import ACTIVATIONS

(PATH,) = MODULE.parent.glob("libcuda_formulas*")
LIBRARY = ctypes.CDLL(str(PATH))
C_TYPES = {torch.float32: ("float", ctypes.c_float), torch.float64: ("double", ctypes.c_double)}
# The order of csrc/common/activations.h.
NAMES = ("identity", "relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "softplus")
POINTS = (1e-30, 1e-6, 0.1, 0.3, 0.624, 0.626, 1.0, 1.5, 2.0, 3.1, 5.0, 8.0, 12.0, 19.9, 20.1)
FAR = (25.0, 200.0)

exp, tanh = mpmath.exp, mpmath.tanh
DEFINITIONS: dict[str, Callable[[Any], Any]] = {
    "identity": lambda z: z,
    "relu": lambda z: z if z > 0 else 0 * z,
    "sigmoid": lambda z: 1 / (1 + exp(-z)),
    "tanh": tanh,
    "gelu": lambda z: z * mpmath.erfc(-z / mpmath.sqrt(2)) / 2,
    "gelu_tanh": lambda z: (
        z * (1 + tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3))) / 2
    ),
    "silu": lambda z: z / (1 + exp(-z)),
    "softplus": lambda z: mpmath.log1p(exp(z)) if z <= 20 else z,
}


def of(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The library's function for numbers of a dtype."""
    function: Callable[..., Any] = getattr(LIBRARY, f"{name}_{C_TYPES[dtype][0]}")
    function.restype = ctypes.c_double  # type: ignore[attr-defined]
    return function


def address(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def test_every_activation_is_here() -> None:
    assert set(NAMES) == set(ACTIVATIONS) == set(DEFINITIONS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(name: str, dtype: torch.dtype) -> None:
    """act and three derivatives, to roundings of their value and of their argument.

    The gate (1 + tanh g) / 2 of gelu_tanh also has the rounding of its 1, as in torch.
    """
    points = [*POINTS, *(-p for p in POINTS), *FAR, *(-p for p in FAR)]
    z = torch.tensor(points, dtype=dtype)
    out = torch.empty(len(z), 4, dtype=dtype)
    of("jets", dtype)(NAMES.index(name), len(z), address(z), address(out))
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for at, row in zip(z.tolist(), out.tolist(), strict=True):
        with mpmath.workdps(min(400, 50 + int(at * at / 4))):  # tails are differences from 1
            truth = list(mpmath.diffs(DEFINITIONS[name], mpmath.mpf(at), 4))
            for n in range(4):
                scale = abs(truth[n]) + max(1, abs(at)) * abs(truth[n + 1])
                if name == "gelu_tanh":
                    scale += max(1, abs(at)) ** (1 - n)
                error = abs(mpmath.mpf(row[n]) - truth[n])
                assert error <= 8 * eps * scale + tiny, f"derivative {n} at {at}: {row[n]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 2, 7, 8, 9, 10, 33])
@pytest.mark.parametrize("spread", [0.1, 3.0, 100.0])
def test_cross_entropy(C: int, spread: float, dtype: torch.dtype) -> None:
    """softmax, logsumexp, D2[u] in place of u, and D3[u, v] added to what is there."""
    g = torch.Generator().manual_seed(C)
    z, u, v, before = (torch.randn(C, generator=g).to(dtype) for _ in range(4))
    z, w = spread * z, 0.3
    d2, d3, p = u.clone(), before.clone(), torch.empty_like(z)
    number = C_TYPES[dtype][1]
    log_sum = of("cross_entropy", dtype)(
        C, address(z), number(w), *(address(t) for t in (d2, u, v, p, d3))
    )

    def along(f: Tensor, direction: Tensor) -> Tensor:  # derivatives of logsumexp are symmetric
        return torch.autograd.grad(f @ direction.double(), wide, create_graph=True)[0]

    wide = z.double().clone().requires_grad_()
    softmax = torch.softmax(wide, 0)
    eps = torch.finfo(dtype).eps
    largest = 1 + float(z.abs().max())  # exponents are rounded to eps of this
    size = float(u.abs().max() * v.abs().max())
    for mine, truth, scale in (
        (torch.tensor(log_sum, dtype=torch.float64), torch.logsumexp(wide, 0), 1.0),
        (p, softmax, 1.0),
        (d2, w * along(softmax, u), float(u.abs().max())),
        (d3 - before, w * along(along(softmax, u), v), 4 * size + 1 / largest),
    ):
        assert (mine.double() - truth).abs().max() <= 4 * eps * largest * scale
