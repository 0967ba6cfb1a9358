"""How far the spectral density by Lanczos quadrature is from the exact spectrum.

A 40-32-32-10 net (2,698 parameters) is trained on MNIST-1D. Its dense Hessian, by products with the
identity in float64, gives the exact spectrum; the distance of a density to it is Wasserstein-1,
relative to the largest |eigenvalue|. It has two parts: few steps resolve too little of what a probe
sees, and few probes see too small a sample of the spectrum. The second part is what is left after
all steps; it is computed from the exact eigenvectors and drawn as a dashed line.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hvpfast as hf
from hvpfast.analysis.density.quadrature import spectral_density
from hvpfast.analysis.density.spectrum import SpectralDensity, wasserstein
from hvpfast.backends.probes.draw import probes
from hvpfast.bench import record, tables
from hvpfast.lab.data.mnist1d import mnist1d
from hvpfast.lab.data.splits import generator
from hvpfast.utils import plotting

DESCRIPTION = "Distance of the spectral density to the exact spectrum, by steps and probes."
SIZES = (40, 32, 32, 10)
SHOWN = (80, 10)  # steps and probes of the density that is drawn, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[5, 10, 20, 40, 80, 160], help="%(default)s")
    add("--probes", type=int, nargs="+", default=[1, 10, 40], help="%(default)s")
    add("--seeds", type=int, default=3, help="runs per cell (default: %(default)s)")
    add("--epochs", type=int, default=30, help="of the training (default: %(default)s)")
    add("--samples", type=int, default=5000, help="of MNIST-1D: 2000, 5000 or 10000")
    add("--quick", action="store_true", help="seconds: does everything work?")
    record.add_out(parser, figure=True)


def run(arguments: argparse.Namespace) -> int:
    """The exit status is 1 when the check against direct products failed, else 0."""
    steps, counts, seeds = arguments.steps, arguments.probes, arguments.seeds
    if arguments.quick:
        steps, counts, seeds, arguments.epochs, arguments.samples = [4, 8, 16], [1, 4], 1, 3, 2000
    model, data = trained(arguments.epochs, arguments.samples)
    exact, vectors = exact_spectrum(model, data)
    scale = float(exact.abs().max())
    H = hf.HessianOperator(model, F.cross_entropy, None, data)
    error = moment_error(H)
    rows = []
    for count in counts:
        left = [floor(exact, vectors, count, seed) / scale for seed in range(seeds)]
        for num_steps in steps:
            rows.append(cell(H, exact, scale, num_steps, count, seeds, left))
            print(
                f"{num_steps} steps, {count} probes: distance {rows[-1]['distance']:.3g} of the "
                f"largest |eigenvalue|, {rows[-1]['floor']:.2g} after all steps",
                flush=True,
            )
    result: dict[str, Any] = {
        **record.head("density"),
        "net": "-".join(map(str, SIZES)),
        "samples": len(data[0]),
        "loss": float(H.loss),
        "spectrum": {
            "min": float(exact[0]),
            "max": float(exact[-1]),
            "trace": float(exact.sum()),
            "frobenius_sq": float(exact.square().sum()),
        },
        "moment_error": error,
        "status": "checked" if error < 1e-4 else "wrong",
        "rows": rows,
    }
    record.publish(result, render(result), arguments.out)
    if arguments.out is not None:
        shown = spectral_density(H, min(SHOWN[0], max(steps)), min(SHOWN[1], max(counts)), seed=0)
        draw(result, shown, exact, arguments.out / "bench.png")
    return int(result["status"] == "wrong")


def trained(epochs: int, samples: int) -> tuple[hf.MLP, tuple[Tensor, Tensor]]:
    """The net after training by Adam, and its train data, in float32."""
    split = mnist1d(samples, 0.2, 0, torch.float32).train
    model = hf.MLP(SIZES, "relu", generator=generator(0, "density", "init"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = generator(0, "density", "batches")
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(split.y), generator=order), 128):
            loss = F.cross_entropy(model(split.x[batch]), split.y[batch])
            (model.flat.grad,) = torch.autograd.grad(loss, model.flat)
            optimizer.step()
    return model, (split.x, split.y)


def exact_spectrum(model: hf.MLP, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues (P,) and eigenvectors (P, P) of the dense Hessian in float64."""
    x, y = data
    H = hf.HessianOperator(model, F.cross_entropy, None, (x.double(), y), dtype=torch.float64)
    dense = H @ torch.eye(H.num_params, dtype=torch.float64)
    values, vectors = torch.linalg.eigh((dense + dense.T) / 2)
    return values, vectors


def moment_error(H: hf.HessianOperator) -> float:
    """Relative error of Tr H^2 by quadrature against ||H v||^2 of the same probes."""
    found = spectral_density(H, 3, 4, seed=0)
    direct = (H @ probes(H.num_params, 4, seed=0, dtype=H.dtype)).double().square().sum(0).mean()
    return abs(float(found.trace(torch.square)) / float(direct) - 1)


def floor(exact: Tensor, vectors: Tensor, count: int, seed: int) -> float:
    """The distance left after all steps: that of the probes' own masses, (u_i'v)^2."""
    v = probes(len(exact), count, seed=seed, dtype=torch.float64)
    masses = (vectors.T @ v).square().mean(1) / len(exact)
    return wasserstein(exact, masses, exact, None)


def cell(
    H: hf.HessianOperator,
    exact: Tensor,
    scale: float,
    num_steps: int,
    num_probes: int,
    seeds: int,
    left: list[float],
) -> dict[str, Any]:
    distances, seconds = [], []
    for seed in range(seeds):
        start = time.perf_counter()
        found = spectral_density(H, num_steps, num_probes, seed=seed)
        seconds.append(time.perf_counter() - start)
        distances.append(found.distance(exact) / scale)
    return {
        "num_steps": num_steps,
        "num_probes": num_probes,
        "num_matvecs": found.num_matvecs,
        "distance": statistics.median(distances),
        "distances": distances,
        "floor": statistics.median(left),
        "seconds": statistics.median(seconds),
        "trace": float(found.trace()),
        "trace_stderr": found.trace().stderr if num_probes > 1 else None,
    }


def render(result: dict[str, Any]) -> str:
    spectrum = result["spectrum"]
    head = (
        f"{result['net']} on MNIST-1D, {result['samples']} samples, loss {result['loss']:.4g}: "
        f"eigenvalues from {spectrum['min']:.4g} to {spectrum['max']:.4g}, trace "
        f"{spectrum['trace']:.4g}\nsecond moment against direct products: relative error "
        f"{result['moment_error']:.1e}, {result['status']}\n"
        "distance: Wasserstein-1 to the exact spectrum over the largest |eigenvalue|, median "
        "over seeds\n"
    )
    return head + tables.fitted(COLUMNS, result["rows"])


def _trace(row: tables.Row) -> str:
    spread = "" if row["trace_stderr"] is None else f" ± {row['trace_stderr']:.2g}"
    return f"{row['trace']:.4g}{spread}"


COLUMNS: tables.Columns = (
    ("steps", "num_steps"),
    ("probes", "num_probes"),
    ("products", "num_matvecs"),
    ("distance", lambda row: f"{row['distance']:.3g}"),
    ("after all steps", lambda row: f"{row['floor']:.2g}"),
    ("trace", _trace),
    ("time", lambda row: tables.duration(row["seconds"])),
)


def draw(result: dict[str, Any], shown: SpectralDensity, exact: Tensor, path: Path) -> None:
    """The figure: distances by steps, and one density beside the exact spectrum."""
    figure = plotting.new_figure(11.0, 4.4)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    plotting.frame(left)
    rows = result["rows"]
    for count, color in zip(
        sorted({row["num_probes"] for row in rows}), plotting.COLORS, strict=False
    ):
        own = [row for row in rows if row["num_probes"] == count]
        x = [row["num_steps"] for row in own]
        middle = [row["distance"] for row in own]
        low, high = ([f(row["distances"]) for row in own] for f in (min, max))
        name = f"{count} probe" + "s" * (count > 1)
        left.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        left.plot(x, middle, color=color, marker="o", markersize=4, label=name)
        left.axhline(own[0]["floor"], color=color, ls="--", lw=1)
    left.set(xscale="log", yscale="log")
    every = sorted({row["num_steps"] for row in rows})
    left.set_xticks(every, [str(step) for step in every])
    left.set_xticks([], minor=True)
    plotting.label(
        left,
        "Distance to the exact spectrum (dashed: after all steps)",
        "Lanczos steps",
        "Wasserstein-1 / largest |eigenvalue|",
    )
    left.legend(frameon=False, fontsize=9, labelcolor=plotting.INK)
    shown.plot(ax=right, exact=exact, title=f"Hessian of {result['net']} on MNIST-1D")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
