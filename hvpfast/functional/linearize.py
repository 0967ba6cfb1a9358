"""Linearize a loss at one point: the backend is chosen, and the primal passes run once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast import backends
from hvpfast.functional.linearization import Linearization, ModelLinearization
from hvpfast.functional.many_models import ModelsLinearization
from hvpfast.mlp.checks import (
    check_batch,
    check_losses,
    check_models,
    check_params,
    nonfinite_reason,
)
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils import cuda_graph

_warned: set[str] = set()


@functools.lru_cache(maxsize=1024)
def _plan(
    spec: MLPSpec, backend: str, dtype: torch.dtype, device: torch.device
) -> tuple[backends.Choice, float]:
    """The backend for one case, chosen once, and the largest number of its dtype."""
    choice = backends.choose(backend, spec, device, dtype)
    compiled = device.type == "cpu" and dtype in (torch.float32, torch.float64)
    reason = backends.available()["cpu"]
    if backend == "auto" and compiled and reason is not None and "cpu" not in _warned:
        _warned.add("cpu")
        warnings.warn(
            f"hvpfast runs on the slow {choice.module.NAME} backend, because the cpu backend "
            f"cannot run: {reason}. This is said once; pass backend='reference' to mean it",
            RuntimeWarning,
            stacklevel=4,
        )
    return choice, torch.finfo(dtype).max


def linearize(
    spec: MLPSpec,
    params: Tensor | Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    backend: str = "auto",
    order: int = 3,
) -> Linearization:
    """Evaluate the loss at one point and keep what products with its curvature need.

    It can be called while a CUDA graph is recorded, once a first call outside has set up what does
    not change.

    Args:
        spec: the network and its loss.
        params: flat (P,), or the list ``[W1, b1, W2, ...]``; contiguous, used without a copy. Or
            (M, P) for M models at once, one flat row each: the result is then a
            :class:`hvpfast.ModelsLinearization`.
        x: inputs (N, D[0]), or (N, ...) with D[0] entries per sample; dtype of ``params``. For M
            models (M, N, D[0]), or (N, D[0]) for samples that all of them share.
        y: targets: (N,) int64 for cross_entropy, (N, D[L]) with the dtype of params for mse. For M
            models with M in front, or shared as they are.
        backend: ``"auto"`` or a name from ``available()``.
        order: 3, or 2 to keep only what products, quadratic forms and the gradient need.

    Raises:
        ValueError: wrong shapes, labels out of range, an empty batch, NaN or inf in the loss
            (while a CUDA graph is recorded, values are not looked at).
        TypeError: not tensors, or a mix of dtypes or devices.
        RuntimeError: the named backend cannot run this.
    """
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3; got {order!r}")
    if isinstance(params, Tensor) and params.dim() == 2:
        return linearize_models(spec, params, x, y, backend, order)
    return linearize_model(spec, params, x, y, backend, order)


def linearize_model(
    spec: MLPSpec,
    params: Tensor | Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    backend: str,
    order: int,
) -> ModelLinearization:
    """:func:`linearize` for parameters (P,) or ``[W1, b1, ...]``."""
    like = check_params(spec, params)
    x_rows, y_rows = check_batch(spec, like, x, y)
    choice, largest = _plan(spec, backend, like.dtype, like.device)
    state = choice.module.linearize(spec, params, x_rows, y_rows, order)
    # While a CUDA graph is recorded nothing has run yet: there is no loss to look at.
    finite = cuda_graph.recording(like) or abs(state.loss_value) <= largest  # False for NaN
    if not finite:
        raise ValueError(nonfinite_reason(state.loss_value, spec, params, x_rows, y_rows))
    inputs = (params, x, y) if isinstance(params, Tensor) else (*params, x, y)
    return ModelLinearization(spec, state, choice, order, like, inputs)


def linearize_models(
    spec: MLPSpec, params: Tensor, x: Tensor, y: Tensor, backend: str, order: int
) -> ModelsLinearization:
    """:func:`linearize` for the parameters (M, P) of M models."""
    x_all, y_all = check_models(spec, params, x, y)
    choice, _ = _plan(spec, backend, params.dtype, params.device)
    state = choice.module.linearize_models(spec, params, x_all, y_all, order)
    if not cuda_graph.recording(params):
        check_losses(spec, state.loss, params, x_all, y_all)
    return ModelsLinearization(spec, state, choice, order, params, (params, x, y))
