"""What trainings of the studies share: linearizing, scoring and measuring curvature."""

from __future__ import annotations

import math
from typing import Any

import scipy.optimize
import torch
import torch.nn.functional as F

import hvpfast as hf
from hvpfast.lab.data.splits import Data, Split
from hvpfast.lab.measure.dense_hessian import norm_and_trace

LINEAR_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Weight decays among which the linear predictor's is chosen, on validation data, strongest first:
each fit starts from the last one.
"""
LINEAR_STEPS = 200
"""Steps of L-BFGS for each of them, at most."""
CHUNK = 16
"""Probes per product: bounds the memory of products on a whole train split."""


class Diverged(ArithmeticError):
    """A training whose loss, penalty or gradient is no longer finite: a result, not a fault."""


def score(model: torch.nn.Module, split: Split) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy on one split."""
    with torch.no_grad():
        logits = model(split.x)
        loss = F.cross_entropy(logits, split.y)
        accuracy = (logits.argmax(1) == split.y).double().mean()
    return float(loss), float(accuracy)


def linearize(
    spec: hf.MLPSpec, model: hf.MLP, split: Split, backend: str, order: int
) -> hf.Linearization:
    """Linearize the loss on one split; raise `Diverged` where the loss is not finite."""
    try:
        return hf.linearize(spec, model.flat, split.x, split.y, backend=backend, order=order)
    except ValueError:
        if math.isfinite(score(model, split)[0]):
            raise
        raise Diverged from None


def curvature(lin: hf.Linearization, num_probes: int, seed: int) -> dict[str, float | None]:
    """Estimate ||H||_F^2 = E ||H v||^2 and Tr H = E v'Hv with Rademacher probes.

    Returns:
        ``hessian_fro2`` and ``hessian_trace``, each with its ``_stderr`` (None for one probe).
    """
    squares, traces = [], []
    for first in range(0, num_probes, CHUNK):
        num = min(CHUNK, num_probes - first)
        probes = hf.probes(lin.num_params, num, seed=seed, dtype=lin.dtype, first=first)
        products = hf.hvp(lin, probes).double()  # (P, K)
        squares.append(products.square().sum(0))
        traces.append((probes.double() * products).sum(0))
    found: dict[str, float | None] = {}
    for name, parts in (("hessian_fro2", squares), ("hessian_trace", traces)):
        samples = torch.cat(parts)
        stderr = float(samples.std() / math.sqrt(num_probes)) if num_probes > 1 else None
        found |= {name: float(samples.mean()), f"{name}_stderr": stderr}
    return found


def exact_curvature(
    model: hf.MLP, split: Split, backend: str, curvature: str = "hessian"
) -> dict[str, float]:
    """Return ||A||_F^2 and Tr A of the Hessian or Gauss-Newton matrix A of a split, exactly.

    Where there are more samples than parameters, A is formed; otherwise it is not.

    Returns:
        ``{curvature}_fro2`` and ``{curvature}_trace``.
    """
    if len(split.y) > model.flat.numel():
        norm, trace = norm_and_trace(model, split, curvature == "ggn")
    else:
        operator = {"hessian": hf.HessianOperator, "ggn": hf.GGNOperator}[curvature]
        data = (split.x, split.y)
        cores = operator(model, F.cross_entropy, None, data, backend=backend).cores()
        norm, trace = float(cores.frobenius_sq()), float(cores.trace())
    return {f"{curvature}_fro2": norm, f"{curvature}_trace": trace}


def constant_prediction(data: Data) -> dict[str, Any]:
    """Return what predicting the train split's class frequencies scores on the test split."""
    counts = torch.bincount(data.train.y, minlength=data.num_classes).double()
    logits = (counts / counts.sum()).log().expand(len(data.test.y), -1)
    return {
        "test_loss": float(F.nll_loss(logits, data.test.y)),
        "test_accuracy": float((data.test.y == counts.argmax()).double().mean()),
    }


def linear_prediction(data: Data) -> dict[str, Any]:
    """Return what the best linear predictor scores: softmax regression, weight decay by validation.

    Returns:
        ``decay`` (the penalty is decay / 2 times the squared parameters), ``train_loss``,
        ``val_loss``, ``test_loss`` and the accuracies.
    """
    best: dict[str, Any] = {}
    model = hf.MLP((data.train.x.shape[1], data.num_classes), dtype=data.train.x.dtype)
    with torch.no_grad():
        model.flat.zero_()
    for decay in LINEAR_DECAYS:
        fit_linear(model, data.train, decay)
        found: dict[str, Any] = {"decay": decay}
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test)):
            found[f"{name}_loss"], found[f"{name}_accuracy"] = score(model, split)
        if not best or found["val_loss"] < best["val_loss"]:
            best = found
    return best


def fit_linear(model: hf.MLP, split: Split, decay: float) -> None:
    """Fit a network without hidden layers to a split by L-BFGS, from where it is."""
    spec = hf.MLPSpec(model.sizes)

    def put(flat: Any) -> None:
        with torch.no_grad():
            model.flat.copy_(torch.as_tensor(flat))

    def loss(flat: Any) -> tuple[float, Any]:
        put(flat)
        lin = hf.linearize(spec, model.flat, split.x, split.y, order=2)
        value = float(lin.loss) + decay / 2 * float(flat @ flat)
        return value, lin.grad.double().numpy() + decay * flat

    start = model.flat.detach().double().numpy()
    options = {"maxiter": LINEAR_STEPS, "ftol": 1e-6}
    put(scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)
