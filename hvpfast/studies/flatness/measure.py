"""Measures of a trained network: scores, curvature, and the landscape around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.analysis import landscape
from hvpfast.analysis.estimators.estimate import frobenius_sq
from hvpfast.lab.data.splits import Data, Split, fold
from hvpfast.lab.measure import training
from hvpfast.operators.hessian import CurvatureOperator
from hvpfast.studies.flatness.config import Config
from hvpfast.studies.flatness.train import Network


def scores(model: nn.Module, data: Data) -> dict[str, Any]:
    """Return losses and accuracies, and as ``test_right`` a bit per test sample, in hex."""
    found = training.scores(model, data)
    found["gap"] = found["test_loss"] - found["train_loss"]
    with torch.no_grad():
        right = model(data.test.x).argmax(1) == data.test.y
    return found | {"test_right": np.packbits(right.numpy()).tobytes().hex()}


def rights(row: Mapping[str, Any], num_test: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which test samples are classified correctly, (num_test,), from ``test_right``."""
    packed = np.frombuffer(bytes.fromhex(row["test_right"]), np.uint8)
    return np.unpackbits(packed, count=num_test).astype(bool)


EXACT = ("hessian_fro2", "hessian_trace", "filter_curvature", "held_out_fro2", "part_fro2",
         "part_ggn_fro2")  # fmt: skip


def curvature(config: Config, net: Network, data: Data, seed: int) -> dict[str, Any]:
    """Return curvature on the train split (or its first ``curvature_samples``), and norms.

    ``hessian_fro2`` = Tr(H^2), ``hessian_trace`` and ``filter_curvature`` are of these samples.
    Tr(H^2) depends on the number of samples, so to be compared there are ``held_out_fro2`` of the
    held-out split and ``part_fro2`` of as many train samples, ``part_ggn_fro2`` being that of their
    Gauss-Newton matrix. All are exact; None where the network has no per-sample cores (it is not a
    perceptron). ``hessian_fro2_probes`` is estimated by fresh Rademacher probes.
    """
    H = operator(hf.HessianOperator, net, data.train.part(slice(config.curvature_samples or None)))
    squares = [float(p.detach().double().square().sum()) for p in net.parameters]
    probe_seed = fold(config.root_seed, "curvature", seed)
    probed = frobenius_sq(H, num_matvecs=config.curvature_probes, seed=probe_seed)
    found: dict[str, Any] = {
        "hessian_fro2_probes": float(probed),
        "hessian_fro2_probes_stderr": probed.stderr,
        "params_norm": math.sqrt(sum(squares)),
        "first_norm": float(weights_of(net.model)[0].detach().norm()),
    }
    try:
        cores = H.cores()
    except NotImplementedError:
        return found | dict.fromkeys(EXACT)
    diagonal = cores.diagonal()
    held_out = data.val.part(slice(len(data.train.y)))
    part = data.train.part(slice(len(data.val.y)))
    values = (
        float(cores.frobenius_sq()),
        float(diagonal.double().sum()),
        filter_curvature(net.model, diagonal),
        float(operator(hf.HessianOperator, net, held_out).cores().frobenius_sq()),
        float(operator(hf.HessianOperator, net, part).cores().frobenius_sq()),
        float(operator(hf.GGNOperator, net, part).cores().frobenius_sq()),
    )
    return found | dict(zip(EXACT, values, strict=True))


def operator(kind: type[CurvatureOperator], net: Network, split: Split) -> CurvatureOperator:
    """Return the curvature operator of the mean cross-entropy on a split."""
    data = (split.x, split.y)
    return kind(
        net.model, F.cross_entropy, None, data, backend=net.backend, check_deterministic=False
    )


def weights_of(model: nn.Module) -> list[Tensor]:
    """Return the parameters, layer by layer, in the flat order."""
    return list(model.weights if isinstance(model, hf.MLP) else model.parameters())


def filter_curvature(model: nn.Module, diagonal: Tensor) -> float:
    """Return the mean of d'Hd over random filter-normalised directions d, biases at rest.

    Each filter f (row of a weight) of d is uniform on the sphere of radius ||w_f||, so the mean is
    sum_f ||w_f||^2 / n_f sum_{i in f} H_ii, with the diagonal (P,) of H. Rescaling the layers of a
    ReLU network leaves it as it is.
    """
    tensors, total = weights_of(model), 0.0
    parts = torch.split(diagonal, [t.numel() for t in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        if tensor.dim() > 1:
            squares = tensor.detach().double().flatten(1).square().sum(1)
            total += float(squares @ part.double().view(len(tensor), -1).mean(1))
    return total


def landscape_rows(config: Config, net: Network, data: Data, seed: int) -> Iterator[dict[str, Any]]:
    """Evaluate planes through the network; a row per line of each grid, then one of its centre.

    The random numbers of plane i are the same for every network, which normalises them to its own
    filters. ``curvature_x`` is d'Hd along the plane's first direction, ``difference_x`` the second
    difference of the losses along it over the squared spacing, which also sees ReLU's kinks.
    """
    batch = data.train.part(slice(config.landscape_samples))
    H = operator(hf.HessianOperator, net, batch)
    for i in range(config.landscape_planes):
        surface = landscape.plane(
            net.model,
            F.cross_entropy,
            None,
            (batch.x, batch.y),
            num_points=config.landscape_points,
            seed=fold(config.root_seed, "landscape", i),
        )
        for x, losses in zip(surface.x.tolist(), surface.losses.tolist(), strict=True):
            yield {"kind": "line", "plane": i, "x": x, "losses": " ".join(map(repr, losses))}
        middle, step = config.landscape_points // 2, float(surface.x[1] - surface.x[0])
        curvatures = H.quadratic_form(surface.directions.to(H.dtype)).tolist()
        found: dict[str, Any] = {"kind": "centre", "plane": i, "loss": surface.center_loss}
        found["unit"] = surface.unit
        lines = {"x": surface.losses[:, middle], "y": surface.losses[middle]}
        for (axis, values), value in zip(lines.items(), curvatures, strict=True):
            ahead, here, behind = values[middle + 1], values[middle], values[middle - 1]
            found[f"curvature_{axis}"] = value
            found[f"difference_{axis}"] = float(ahead - 2 * here + behind) / step**2
        yield found | {"mean_rise": float(surface.losses.mean()) - surface.center_loss}
