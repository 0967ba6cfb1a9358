"""Any module with any loss, by ``torch.func`` on the reference backend."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

from torch import Tensor, nn

from hvpfast.backends import BACKENDS
from hvpfast.backends.reference.state import linearize_function
from hvpfast.functional.hessian_penalty.call import PenaltyCall
from hvpfast.functional.hessian_penalty.recorded import recorded
from hvpfast.functional.penalty_kinds import penalty_of
from hvpfast.mlp.checks import tangent_rows
from hvpfast.mlp.module_checks import check_deterministic_modules, warn_slow
from hvpfast.utils.choice import check_choice
from hvpfast.utils.functional_call import functional_call
from hvpfast.utils.torch_private import tree_leaves


def by_reference(
    model: nn.Module, loss_fn: Callable[..., Any], x: Any, y: Any, call: PenaltyCall, reason: str
) -> tuple[Tensor, Tensor]:
    """(loss, penalty) of a module or loss that is no perceptron's, for this reason."""
    backend = call.backend
    check_choice("backend", backend, ("auto", *BACKENDS))
    if backend not in ("auto", "reference"):
        raise RuntimeError(f"backend {backend!r} takes multilayer perceptrons, but {reason}")
    check_deterministic_modules(model)
    if backend == "auto":
        warn_slow(model, reason, stacklevel=4)
    every = dict(model.named_parameters())
    named = {name: p for name, p in every.items() if p.requires_grad} or every
    params = tuple(named.values())

    def outputs(tensors: tuple[Tensor, ...]) -> Any:
        return functional_call(model, dict(zip(named, tensors, strict=True)), (x,))

    lin = linearize_function(outputs, lambda z: loss_fn(z, y), params, owners=every)
    loss = float(lin.loss)
    if not isfinite(loss):
        raise ValueError(f"the loss is {loss}; parameters, inputs and targets must be finite")
    numels = [p.numel() for p in params]
    probes = call.probes()
    if isinstance(probes, Tensor):
        probes = tangent_rows(probes, sum(numels), params[0])
    fixed = [t for t in tree_leaves((x, y, call.tangents)) if isinstance(t, Tensor)]
    state = penalty_of(lin, call.kind, probes, call.ggn, params[0], sum(numels))
    return recorded(state, ([p.shape for p in params], numels), fixed, params)
