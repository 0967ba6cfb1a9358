"""What predictors without hidden layers score: class frequencies, and softmax regression."""

from __future__ import annotations

from typing import Any

import scipy.optimize
import torch
import torch.nn.functional as F

import hvpfast as hf
from hvpfast.lab.data.splits import Data, Split
from hvpfast.lab.measure.training import scores

LINEAR_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Weight decays of softmax regression, from which validation data choose one; the strongest is
first, as each fit starts from the one before.
"""
LINEAR_STEPS = 200
"""Most steps of L-BFGS for each of them."""


def constant_prediction(data: Data) -> dict[str, Any]:
    """Return test loss and accuracy of predicting the train split's class frequencies."""
    counts = torch.bincount(data.train.y, minlength=data.num_classes).double()
    logits = (counts / counts.sum()).log().expand(len(data.test.y), -1)
    return {
        "test_loss": float(F.nll_loss(logits, data.test.y)),
        "test_accuracy": float((data.test.y == counts.argmax()).double().mean()),
    }


def linear_prediction(data: Data) -> dict[str, Any]:
    """Return the scores of softmax regression, its weight decay chosen by the validation loss.

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
        found = {"decay": decay, **scores(model, data)}
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
