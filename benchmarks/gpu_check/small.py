"""Every operation of one backend on small shapes, once: what compute-sanitizer watches.

    python3 small.py BACKEND DEVICE [EVERY]     with EVERY = 3: each third of the cases

Results are compared with torch.func on the CPU. So a tool that changes the timing of blocks shows
whether the numbers depend on it, and it watches few kernels but ours.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import hvpfast as hf

SIZES = ((5, 3), (7, 9, 4), (33, 17, 20, 10))
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-10}


def cases() -> Iterator[tuple[hf.MLPSpec, int, int, torch.dtype]]:
    """(spec, N, K, dtype): each depth, loss and dtype once, activations and reductions in turn."""
    activations = itertools.cycle(("relu", "tanh", "gelu", "sigmoid", "silu", "softplus"))
    axes = itertools.product(SIZES, ("cross_entropy", "mse"), (torch.float32, torch.float64))
    for i, (sizes, loss, dtype) in enumerate(axes):
        spec = hf.MLPSpec(sizes, next(activations), loss, ("mean", "sum")[i % 2], i % 3 != 0)
        yield spec, (1, 17, 40)[i % 3], (1, 3)[i % 2], dtype


def results(lin: hf.Linearization, V: Tensor, U: Tensor) -> list[Tensor]:
    """All that the contract has, the probes drawn by the library included."""
    found = [lin.loss, lin.grad]
    for curvature in ("hessian", "ggn"):
        product = hf.hvp if curvature == "hessian" else hf.ggnvp
        found += [product(lin, V), product(lin, V[:, 0])]
        found += [hf.quadratic_form(lin, V, curvature=curvature)]
        found += [hf.hvp_vjp(lin, V, U, curvature=curvature)]
        found += hf.penalty(lin, V, weights=(0.5, 2.0), curvature=curvature)
        found += hf.penalty(lin, num_probes=2, seed=3, curvature=curvature)
    return found


def main(backend: str, device: str, every: str = "1") -> int:
    """0 when everything ran and agrees."""
    worst = 0.0
    for spec, N, K, dtype in itertools.islice(cases(), None, None, int(every)):
        g = torch.Generator().manual_seed(N)
        P = spec.num_params
        params, x, V, U = (
            torch.randn(*shape, generator=g, dtype=dtype)
            for shape in ((P,), (N, spec.sizes[0]), (K, P), (K, P))
        )
        y = torch.randint(0, spec.sizes[-1], (N,), generator=g)
        if spec.loss == "mse":
            y = torch.randn(N, spec.sizes[-1], generator=g, dtype=dtype)
        mine, theirs = (
            results(
                hf.linearize(spec, *(t.to(where) for t in (params, x, y)), backend=name),
                V.to(where).T,
                U.to(where).T,
            )
            for name, where in ((backend, device), ("reference", "cpu"))
        )
        for a, b in zip(mine, theirs, strict=True):
            error = float((a.cpu() - b).abs().max() / b.abs().max().clamp_min(1e-30))
            worst = max(worst, error / TOLERANCE[dtype])
            if not error <= TOLERANCE[dtype]:  # also when it is NaN
                print(f"{spec} N={N} K={K} {dtype}: relative difference {error:.2e}")
                return 1
    print(f"agrees; largest difference {worst:.2g} of what is allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
