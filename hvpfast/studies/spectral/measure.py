"""What the spectral study measures at a lambda: eigenpairs, overlaps, collapse, density.

H is the Hessian of the train split's cross-entropy; H + d I that of the objective has the same
eigenvectors, and its eigenvalues are larger by d, so that no second solution is needed.

Where all weights but the last biases are 0, the last hidden layer h is the same for every sample,
and so are the class probabilities p. Then only (W_3, b_3) has curvature:

    H = (diag p - p p') (x) (h, 1)(h, 1)'      eigenvalues  (1 + |h|^2) eig(diag p - p p')

With sigmoids 1 + |h|^2 = 1 + width / 4, 33 for 128 units: nine eigenvalues 3.3 for uniform p.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hvpfast as hf
from hvpfast.lab.data.splits import fold
from hvpfast.studies.spectral import artefacts as files
from hvpfast.studies.spectral.config import Config
from hvpfast.studies.spectral.data import BASIS_BYTES, EVALUATION, NUM_CLASSES, Problem, scores
from hvpfast.studies.spectral.train import COLLAPSED_SPREAD, decay_of

TOP = NUM_CLASSES
"""Largest dimension of the subspaces in which neighbouring lambdas are compared."""
NUM_LOWEST = 3
"""Smallest eigenvalues that are computed beside a density."""


def eigenpairs(
    config: Config,
    problem: Problem,
    flat: Tensor,
    index: int,
    k: int,
    which: str = "LM",
    V0: Tensor | None = None,
) -> hf.EigenResult:
    """Return k pairs of H in the row space of the inputs.

    Under a penalty hidden units become alike, and dozens of eigenvalues equal or nearly so. A
    Krylov space from b vectors may miss all but b equal ones without a trace in its residuals,
    hence blocks of k. In a collapsed network the eigenvalues from the tenth on are a thousandth of
    the others, whose rounding in float32 would hide them: it is solved in float64.
    """
    train = problem.data.train
    collapsed = scores(problem.model(flat), train.x, train.y)[2] < COLLAPSED_SPREAD
    H = problem.hessian(flat, dtype=torch.float64 if collapsed else None)
    return hf.eigsh(
        H,
        min(k, H.shape[0]),
        which,
        V0=V0,
        tol=config.tol,
        seed=fold(config.root_seed, "probes", "eigsh", index),
        compress=False,  # done already
        block_size=min(k, H.shape[0]),
        memory_budget=BASIS_BYTES,
    )


def collapsed_eigenvalues(probabilities: Tensor, hidden_sq: float) -> Tensor:
    """Return (1 + |h|^2) eig(diag p - p p'), descending: C values, the last of them 0."""
    p = probabilities.double()
    values: Tensor = torch.linalg.eigvalsh(torch.diag(p) - torch.outer(p, p)).flip(0)
    return (1 + hidden_sq) * values


def collapse_prediction(problem: Problem, flat: Tensor) -> Tensor:
    """Return what a collapsed network's eigenvalues would be, from its mean p and mean h."""
    model = problem.model(flat)
    *hidden, last_weights, last_bias = model.weights
    num, total_p = len(problem.data.train.y), torch.zeros(NUM_CLASSES, dtype=torch.float64)
    total_h = torch.zeros(last_weights.shape[1], dtype=torch.float64)
    with torch.no_grad():
        for h in torch.split(problem.data.train.x, EVALUATION):
            for W, b in zip(hidden[::2], hidden[1::2], strict=True):
                h = torch.sigmoid(h @ W.T + b)
            p = (h @ last_weights.T + last_bias).double().softmax(1)
            total_h += h.double().sum(0) / num
            total_p += p.sum(0) / num
    return collapsed_eigenvalues(total_p, float(total_h.square().sum()))


def overlap(one: Tensor, other: Tensor) -> float:
    """Return ||U'V||_F^2 / k of two subspaces with orthonormal columns (P, k): 1 if they agree."""
    return float((one.double().T @ other.double()).square().sum()) / one.shape[1]


def eigen_rows(
    config: Config, problem: Problem, folder: Path, before: int | None, indices: list[int]
) -> Iterator[dict[str, Any]]:
    """Solve neighbouring lambdas, each from the eigenvectors of the one before; keep their files.

    The first is solved from a random start, the last both ways, which compares them. `before` is
    the lambda before the first, whose leading pairs are solved again for the overlap.
    """
    previous: Tensor | None = None
    top: Tensor | None = None
    if before is not None:
        flat = state(config, problem, folder, before)
        top = eigenpairs(config, problem, flat, before, TOP).eigenvectors
    for position, index in enumerate(indices):
        flat = state(config, problem, folder, index)
        begin = time.perf_counter()
        found = eigenpairs(config, problem, flat, index, config.pairs, V0=previous)
        yield timing(f"pairs-{index}", begin)
        row = described(config, problem, flat, index, found)
        row |= {"start": "cold" if previous is None else "warm", "cold_matvecs": None}
        row["cold_difference"] = None
        if position == len(indices) - 1 and previous is not None:
            cold = eigenpairs(config, problem, flat, index, config.pairs)
            row["cold_matvecs"] = cold.num_matvecs
            both = [r.eigenvalues.abs().sort().values for r in (found, cold)]
            row["cold_difference"] = float(((both[0] - both[1]).abs() / both[1]).max())
        leading = found.eigenvectors[:, :TOP]
        row["overlap"] = None if top is None else overlap(top, leading)
        yield row
        # a third of the block stays random: the old vectors alone would miss a pair that has just
        # become a leading one
        previous, top = found.eigenvectors[:, : 1 + 2 * config.pairs // 3], leading
        keep(config, problem, folder, index, flat, found)


def state(config: Config, problem: Problem, folder: Path, index: int) -> Tensor:
    """Return the main sweep's parameters at a lambda, as they were kept."""
    return files.read_state(files.state_path(config, folder, config.sweep, index), problem.spec)


def timing(what: str, begin: float) -> dict[str, Any]:
    return {"table": "timing", "what": what, "seconds": time.perf_counter() - begin}


def described(
    config: Config, problem: Problem, flat: Tensor, index: int, found: hf.EigenResult
) -> dict[str, Any]:
    """Return the row of eigenvalues, residuals, and the eigenvalues predicted after a collapse."""
    values, residuals = found.eigenvalues, found.residual_norms
    relative = residuals / values.abs().clamp(min=1e-300)
    within = relative <= config.tol
    row: dict[str, Any] = {
        "table": "eigen",
        "index": index,
        "dtype": str(found.eigenvectors.dtype).removeprefix("torch."),
        "lambda": config.step * index,
        "decay": decay_of(config, index),
        "num_matvecs": found.num_matvecs,
        "stop_reason": found.stop_reason,
        "residual_floor": found.residual_floor,
        "num_within": int(within.sum()),
        "worst_within": float(relative[within].max()) if bool(within.any()) else None,
        "by_rounding": int((~within & (residuals <= 100 * found.residual_floor)).sum()),
        "largest_beyond": float(values.abs()[~within].max()) if not bool(within.all()) else None,
        "num_negative": int((values < 0).sum()),
    }
    for i in range(len(values)):
        row[f"value_{i + 1}"], row[f"residual_{i + 1}"] = float(values[i]), float(residuals[i])
    predicted = collapse_prediction(problem, flat)[: NUM_CLASSES - 1].tolist()
    return row | {f"predicted_{i}": value for i, value in enumerate(predicted, 1)}


def keep(
    config: Config, problem: Problem, folder: Path, index: int, flat: Tensor, found: hf.EigenResult
) -> None:
    """Write the files of one lambda: eigenvalues, and at kept points eigenvectors and gradient."""
    order = found.eigenvalues.argsort()
    values, decay = found.eigenvalues[order], decay_of(config, index)
    for what, shift in (("Hessian-eigenvalues", 0.0), ("Hessian-effective-eigenvalues", decay)):
        path = files.path_of(config, folder, what, index)
        files.keep_values(path, (values + shift).tolist())
    if index in config.kept:
        rows = problem.lift(found.eigenvectors.T[order])
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        rows = (rows * largest.sign()).to(problem.x.dtype)
        files.keep_vectors(config, folder, index, rows)
        path = files.path_of(config, folder, "gradients", index)
        files.keep_gradient(path, problem.spec, problem.gradient(flat))


def density_rows(
    config: Config, problem: Problem, folder: Path, index: int
) -> Iterator[dict[str, Any]]:
    """Measure the density of all P eigenvalues, and the smallest ones, at one lambda."""
    flat = state(config, problem, folder, index)
    H = problem.hessian(flat, reduced=False)
    begin = time.perf_counter()
    seed = fold(config.root_seed, "probes", "density", index)
    density = hf.spectral_density(H, config.density_steps, config.density_probes, seed=seed)
    yield timing("density", begin)
    lowest = eigenpairs(config, problem, flat, index, NUM_LOWEST, "SA")
    trace = density.trace()
    yield {
        "table": "density",
        "index": index,
        "lambda": config.step * index,
        "decay": decay_of(config, index),
        "trace": float(trace.estimate),
        "trace_stderr": float(trace.stderr),
        "lowest": float(lowest.eigenvalues[0]),
        "lowest_residual": float(lowest.residual_norms[0]),
        "num_matvecs": density.num_matvecs,
    }
    curve = density.curve(axis="log", num_points=401)
    columns = (curve.grid, curve.coordinate, curve.density, curve.lower, curve.upper)
    for values in zip(*(c.tolist() for c in columns), strict=True):
        names = ("t", "u", "density", "low", "high")
        yield {"table": "curve", "index": index, **dict(zip(names, values, strict=True))}
