"""What is timed: networks, batch sizes and the numbers every provider gets, the same for all.

Sizes: N samples, D[0..L] widths, P parameters, K tangents.  Everything is drawn in NumPy from one
seed per case, in float64, and rounded once to the dtype of the run, so that providers and the
float64 truth see the same numbers.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from hvpfast.backends.probes.draw import probes

Array = NDArray[Any]

CURVATURE_OPERATIONS = ("gradient", "hvp", "hvp_warm", "quadratic", "penalty", "penalty_normal")
OPERATIONS = (*CURVATURE_OPERATIONS, "train_step")
DTYPES = ("float32", "float64")
DEVICES = ("cpu", "cuda")
PENALTY_WEIGHTS = (1.0, 0.01)  # gradient of weights[0] * loss + weights[1] * mean_k ||H v_k||^2
# eps far above its usual 1e-8 makes one step a well-conditioned function of the gradient, so that
# the float64 truth can judge it; the arithmetic of a step does not depend on its value.
ADAM: dict[str, Any] = {"lr": 1e-3, "eps": 1e-4}
KINK_MARGIN = 1e-5  # smallest |z| allowed in a relu network, well above float32 rounding of z
PROBE_SEED = 2011


@dataclass(frozen=True)
class Case:
    """One network and batch: ``sizes`` D[0..L], N samples, the K to run, the operations to time."""

    name: str
    sizes: tuple[int, ...]
    activation: str
    num_samples: int
    num_tangents: tuple[int, ...]
    operations: tuple[str, ...] = CURVATURE_OPERATIONS

    @property
    def num_params(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of W_1, b_1, W_2, b_2, ... in flat order."""
        pairs = itertools.pairwise(self.sizes)
        return tuple(shape for d_in, d in pairs for shape in ((d, d_in), (d,)))


# Implicit normal probes need N < 2 D[0] to pay, so penalty_normal is left out of the large batches.
_LARGE_BATCH = ("gradient", "hvp", "hvp_warm", "quadratic", "penalty")
_ALL = (
    Case("40-32-10", (40, 32, 10), "relu", 64, (1, 8)),
    Case("3072-256-100", (3072, 256, 100), "relu", 64, (1, 3)),
    Case("784-128-128-10-n512", (784, 128, 128, 10), "sigmoid", 512, (1, 8)),
    Case("784-128-128-10", (784, 128, 128, 10), "sigmoid", 16384, (8,), _LARGE_BATCH),
    Case("784-1024-512-256-128-64-10", (784, 1024, 512, 256, 128, 64, 10), "relu", 512, (1,)),
    Case("train-40-32-32-10", (40, 32, 32, 10), "relu", 128, (1,), ("train_step",)),
    Case("train-3072-256-100", (3072, 256, 100), "relu", 64, (3,), ("train_step",)),
)
CASES: dict[str, Case] = {case.name: case for case in _ALL}
# Too long for a default run on a CPU: the full data set of a small image task.
DEVICE_CASES: dict[str, Case] = {
    "784-128-128-10-n60000": Case(
        "784-128-128-10-n60000", (784, 128, 128, 10), "sigmoid", 60000, (1,),
        ("gradient", "hvp", "hvp_warm"),
    ),
}  # fmt: skip
QUICK_CASES: dict[str, Case] = {
    "quick": Case("quick", (6, 5, 4), "relu", 8, (2,)),
    "train-quick": Case("train-quick", (6, 5, 4), "relu", 8, (1,), ("train_step",)),
}
KNOWN_CASES: dict[str, Case] = {**CASES, **DEVICE_CASES, **QUICK_CASES}


@dataclass(frozen=True)
class Problem:
    """A case with its numbers: params W_1, b_1, ...; x (N, D[0]); y (N,) int64; probes (K, P).

    ``rademacher`` are the probes that the library draws for ``PROBE_SEED``; ``normal`` are
    ordinary normal numbers. ``device`` is where torch providers put them.
    """

    case: Case
    num_tangents: int
    dtype: str
    params: tuple[Array, ...]
    x: Array
    y: Array
    rademacher: Array
    normal: Array
    device: str = "cpu"

    def tangents(self, operation: str) -> Array:
        """Rows (K, P): normal numbers for ``penalty_normal``, Rademacher otherwise."""
        return self.normal if operation == "penalty_normal" else self.rademacher

    def flat(self, parts: Sequence[Array] | None = None) -> Array:
        """The parameters, or ``parts`` shaped like them, as one vector (P,)."""
        return np.concatenate([np.asarray(p).ravel() for p in (parts or self.params)])

    def split(self, row: Array) -> tuple[Array, ...]:
        """One row (P,) as contiguous arrays shaped like the parameters."""
        ends = np.cumsum([math.prod(shape) for shape in self.case.shapes])
        pieces = np.split(row, ends[:-1])
        return tuple(
            np.ascontiguousarray(p.reshape(s))
            for p, s in zip(pieces, self.case.shapes, strict=True)
        )

    def stack(self, rows: Array) -> tuple[Array, ...]:
        """Rows (K, P) as one contiguous array (K, *shape) per parameter."""
        per_row = [self.split(row) for row in rows]
        return tuple(np.stack(column) for column in zip(*per_row, strict=True))

    def layout(self, operation: str, stacked: bool) -> tuple[Any, ...]:
        """Tangents as K trees shaped like the parameters, or as one of stacked arrays."""
        rows = self.tangents(operation)
        return self.stack(rows) if stacked else tuple(self.split(row) for row in rows)

    def astype(self, dtype: str) -> Problem:
        """The same numbers in another dtype (exact towards float64)."""
        numbers: dict[str, Any] = {
            name: getattr(self, name).astype(dtype) for name in ("x", "rademacher", "normal")
        }
        params = tuple(p.astype(dtype) for p in self.params)
        return replace(self, dtype=dtype, params=params, **numbers)


def build(case: Case, num_tangents: int, dtype: str = "float32", device: str = "cpu") -> Problem:
    """Draw a case: nn.Linear's initial distribution, standard normal inputs, uniform labels.

    The same on every machine and in every process.
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    params = []
    for d_in, d in itertools.pairwise(case.sizes):
        bound = d_in**-0.5
        params += [rng.uniform(-bound, bound, (d, d_in)), rng.uniform(-bound, bound, d)]
    params = [p.astype(dtype) for p in params]
    x = _away_from_kinks(case, params, rng).astype(dtype)
    y = rng.integers(0, case.sizes[-1], case.num_samples)
    signs = probes(case.num_params, num_tangents, distribution="rademacher", seed=PROBE_SEED)
    return Problem(
        case=case,
        num_tangents=num_tangents,
        dtype=dtype,
        params=tuple(params),
        x=x,
        y=y,
        rademacher=np.ascontiguousarray(signs.T.numpy()).astype(dtype),
        normal=rng.standard_normal((num_tangents, case.num_params)).astype(dtype),
        device=device,
    )


def _away_from_kinks(case: Case, params: Sequence[Array], rng: np.random.Generator) -> Array:
    """Inputs (N, D[0]); for relu, samples with some |z| below the margin are redrawn.

    At a kink the Hessian jumps, and rounding would decide on which side a provider stands.
    """
    kept: list[Array] = []
    missing = case.num_samples
    while missing:
        x = rng.standard_normal((missing, case.sizes[0])).astype(params[0].dtype)
        if case.activation == "relu":
            x = x[smallest_z(case, params, x) > KINK_MARGIN]
        kept.append(x)
        missing -= len(x)
    return np.concatenate(kept)


def smallest_z(case: Case, params: Sequence[Array], x: Array) -> Array:
    """Smallest |z| over the hidden units of each sample, (N,), in float64."""
    a, smallest = x.astype(np.float64), np.full(len(x), np.inf)
    for weight, bias in zip(params[0:-2:2], params[1:-2:2], strict=True):
        z = a @ weight.T.astype(np.float64) + bias
        smallest = np.minimum(smallest, np.abs(z).min(axis=1))
        a = special.expit(z) if case.activation == "sigmoid" else np.maximum(z, 0.0)
    return smallest
