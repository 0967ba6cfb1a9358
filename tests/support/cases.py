"""Networks, batches and tangents for the tests: every option at least once, sizes around tiles."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpfast.backends.probes.draw import probes
from hvpfast.mlp.spec import (
    ACTIVATIONS,
    LOSSES,
    REDUCTIONS,
    MLPSpec,
)

SEED = 0x0123456789ABCDEF
DTYPES = (torch.float32, torch.float64)
TILE_N = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300)
TANGENTS_K = (0, 1, 2, 7, 64)
# One list of widths per number of hidden layers: odd, prime, one, and around SIMD widths.
SIZES = {
    0: ((5, 3), (1, 1), (7, 1), (33, 10)),
    1: ((6, 8, 3), (1, 5, 2), (9, 1, 4), (17, 16, 5), (4, 33, 1)),
    2: ((5, 7, 6, 3), (8, 16, 9, 10), (3, 1, 4, 2), (12, 17, 5, 4)),
    3: ((4, 6, 5, 7, 3), (9, 8, 17, 4, 2), (2, 3, 1, 5, 6)),
}


@dataclass(frozen=True)
class Case:
    """One network with one batch: numbers follow from the fields alone.

    ``layout``: "flat" (P,), "layers" [W1, b1, ...]. ``strided``: x, y and tangents are slices of
    larger tensors, so that no stride is the natural one. ``drawn``: the tangents are the
    Rademacher probes of ``SEED``, else they are normal.
    """

    spec: MLPSpec
    N: int
    K: int = 2
    dtype: torch.dtype = torch.float64
    layout: str = "flat"
    strided: bool = False
    drawn: bool = False

    def __str__(self) -> str:
        s = self.spec
        parts = [
            "-".join(str(d) for d in s.sizes),
            s.activation,
            "ce" if s.loss == "cross_entropy" else "mse",
            s.reduction,
            "bias" if s.bias else "nobias",
            "weights" if s.class_weights else "",
            f"ignore{s.ignore_index}" if s.ignore_index != -100 else "",
            f"smooth{s.label_smoothing}" if s.label_smoothing else "",
            f"N{self.N}",
            f"K{self.K}",
            "f32" if self.dtype == torch.float32 else "f64",
            self.layout if self.layout != "flat" else "",
            "strided" if self.strided else "",
            "drawn" if self.drawn else "",
        ]
        return ".".join(p for p in parts if p)


@dataclass(frozen=True)
class Problem:
    """The tensors of a case; ``params`` as the case's layout wants them, ``flat`` the same (P,)."""

    flat: Tensor
    params: Tensor | list[Tensor]
    x: Tensor
    y: Tensor
    tangents: Tensor  # (P, K) columns
    cotangents: Tensor  # (P, K) columns


def problem(case: Case) -> Problem:
    """Draw the tensors of a case: float32 numbers also in float64 cases of the same name."""
    spec, N, K = case.spec, case.N, case.K
    g = torch.Generator().manual_seed(zlib.crc32(spec.key.encode()) + 31 * N)
    P, d_in, d_out = spec.num_params, spec.sizes[0], spec.sizes[-1]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(case.dtype)

    flat = torch.cat([_initial(randn(*shape)).reshape(-1) for shape in spec.shapes])
    x = randn(2 * N, d_in + 1)[::2, 1:] if case.strided else randn(N, d_in)
    if spec.loss == "mse":
        y = randn(N, 2 * d_out)[:, ::2] if case.strided else randn(N, d_out)
    else:
        y = torch.randint(0, d_out, (2 * N,), generator=g)[::2]
        if spec.ignore_index != -100 and N > 1:
            y = torch.where(torch.arange(N) % 3 == 1, spec.ignore_index, y)
        y = y.repeat_interleave(2)[::2] if case.strided else y.contiguous()
    if case.drawn:
        tangents, cotangents = probes(P, K, seed=SEED, dtype=case.dtype), randn(K, P).T
    elif case.strided:  # columns of a row-major matrix: the transpose must be copied
        tangents, cotangents = randn(P, 2 * K)[:, ::2], randn(P, 3 * K)[:, 2::3]
    else:
        tangents, cotangents = randn(K, P).T, randn(K, P).T
    params = flat if case.layout == "flat" else [t.clone() for t in spec.unflatten(flat)]
    return Problem(flat, params, x, y, tangents, cotangents)


def _initial(t: Tensor) -> Tensor:
    # weights that keep activations of order one, biases of order one half
    return t * t.shape[1] ** -0.5 if t.dim() == 2 else 0.5 * t


def _matrix() -> list[Case]:
    """Every activation x loss x reduction x dtype x bias x number of hidden layers."""
    cases = []
    axes = itertools.product(SIZES, ACTIVATIONS, LOSSES, REDUCTIONS, (True, False), DTYPES)
    for i, (hidden, activation, loss, reduction, bias, dtype) in enumerate(axes):
        if hidden == 0 and activation not in ("relu", "identity"):
            continue  # a linear model does not use its activation
        j = i // 2  # the same network in both dtypes
        sizes = SIZES[hidden][j % len(SIZES[hidden])]
        spec = MLPSpec(sizes, activation, loss, reduction, bias)
        N, K = (1, 3, 16, 19)[(j // 3) % 4], (1, 2, 3)[j % 3]
        layout = ("flat", "layers")[(j // 2) % 2]
        cases.append(Case(spec, N, K, dtype, layout, strided=j % 5 == 0, drawn=j % 3 > 0))
    return cases


def _cross_entropy_options() -> list[Case]:
    cases = []
    axes = itertools.product((False, True), (-100, 2), (0.0, 0.1), REDUCTIONS, DTYPES)
    for weights, ignore, smoothing, reduction, dtype in axes:
        spec = MLPSpec(
            (7, 6, 4),
            "tanh",
            reduction=reduction,
            class_weights=(0.5, 2.0, 1.5, 0.25) if weights else None,
            ignore_index=ignore,
            label_smoothing=smoothing,
        )
        cases.append(Case(spec, 13, 2, dtype, drawn=weights))
    zero_weight = MLPSpec((3, 4), class_weights=(1.0, 0.0, 2.0, 1.0), label_smoothing=0.3)
    ignored_row = MLPSpec((3, 5, 3), "silu", ignore_index=-1, reduction="sum", bias=False)
    return [*cases, Case(zero_weight, 11), Case(ignored_row, 4, layout="layers")]


def _shapes() -> list[Case]:
    """N around every tile, K from none to many, widths around tiles, wide inputs."""
    cases = []
    for i, N in enumerate(TILE_N):
        relu = MLPSpec((12, 17, 5), "relu")
        deep = MLPSpec((6, 9, 33, 4), "softplus", "mse", bias=False)
        layout = ("flat", "layers")[i % 2]
        cases += [Case(relu, N, 3, torch.float32, layout, drawn=True), Case(relu, N, 1)]
        cases += [Case(deep, N, 2, torch.float32), Case(deep, N, 3, layout=layout, strided=True)]
    for K, dtype in itertools.product(TANGENTS_K, DTYPES):
        spec = MLPSpec((10, 12, 8, 4), "tanh")
        cases += [Case(spec, 9, K, dtype, drawn=K > 0), Case(spec, 40, K, dtype, "layers", True)]
    for sizes in (
        (1, 1, 1),
        (1, 64, 65, 1),
        (65, 64, 63),
        (31, 129, 16),
        (15, 128, 32, 17),
        (257, 7, 3),
        (300, 40, 11),
    ):
        for dtype, N in itertools.product(DTYPES, (5, 70)):
            cases.append(Case(MLPSpec(sizes, "sigmoid"), N, 3, dtype, drawn=N > 5))
    long_sums = MLPSpec((40, 16, 5), "silu")
    cases += [Case(long_sums, 2000, 4, dtype, drawn=True) for dtype in DTYPES]
    wide = MLPSpec((200, 24, 6), "relu")  # N < 2 D[0] and beyond it
    cases += [Case(wide, N, K, torch.float32, drawn=True) for N in (2, 64, 450) for K in (1, 8)]
    return cases


def _unique(cases: list[Case]) -> list[Case]:
    return list({str(case): case for case in cases}.values())


CASES = _unique([*_matrix(), *_cross_entropy_options(), *_shapes()])
# A handful for expensive checks: each activation once, both losses, all depths.
FEW = [
    Case(MLPSpec(SIZES[i % 4][0], activation, LOSSES[i % 2], REDUCTIONS[i // 2 % 2]), 6)
    for i, activation in enumerate(ACTIVATIONS)
] + [
    Case(MLPSpec((4, 5, 3), "tanh", class_weights=(1.0, 2.0, 0.5), label_smoothing=0.2), 6),
    Case(MLPSpec((4, 5, 6, 2), "gelu", "mse", "sum", bias=False), 6),
]


def with_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case in another dtype."""
    return dataclasses.replace(case, dtype=dtype)
