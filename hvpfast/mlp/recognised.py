"""What a model and a loss were recognised as, kept for the next call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast.mlp.module import MLP, spec_of
from hvpfast.mlp.spec import ACTIVATION_TABLE, MLPSpec
from hvpfast.utils.torch_private import alterations_of, hooks_of_all_modules

# Attributes of modules that decide what spec_of makes of them.
_WATCHED: dict[type, tuple[str, ...]] = {
    nn.Dropout: ("p",),
    nn.Flatten: ("start_dim", "end_dim"),
    **{module: tuple(attributes) for _, module, attributes in ACTIVATION_TABLE.values()},
}


class Plan:
    """The specification of a model with a loss, and where the parameters are found.

    A plan holds no reference to the model itself, which it must not keep alive.

    Attributes:
        spec: the :class:`MLPSpec`.
        layout: shapes and numels of the parameters, None if the model has one flat parameter.
    """

    __slots__ = ("_loss", "_model", "_places", "_slots", "_structure", "_weight", "layout", "spec")

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any]) -> None:
        self.spec: MLPSpec = spec_of(model, loss_fn)
        self.layout = None if type(model) is MLP else (self.spec.shapes, self.spec.numels)
        self._structure = _structure(model)
        self._loss = _loss_state(loss_fn)
        self._weight = getattr(loss_fn, "weight", None)  # kept alive: its id stays its own
        places = [
            (module._parameters, name, tensor)
            for module in model.modules()
            for name, tensor in module._parameters.items()
        ]
        self._slots = [(slots, name) for slots, name, tensor in places if tensor is not None]
        self._places = [
            (slots, name, None if tensor is None else weakref.ref(tensor))
            for slots, name, tensor in places
        ]
        key = id(model)
        self._model = weakref.ref(model, lambda _: _plans.pop(key, None))

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is the plan of the model, whose parameters are the same objects."""
        if self._model() is not model:
            return False
        for slots, name, reference in self._places:
            tensor = slots.get(name)
            # the reference of a tensor that is gone gives None
            if (tensor is None) != (reference is None):
                return False
            if reference is not None and reference() is not tensor:
                return False
        return True

    def parameters(self) -> list[Tensor]:
        """The model's parameters in flat order: ``[flat]`` or ``[W1, b1, W2, ...]``."""
        return [slot[name] for slot, name in self._slots]  # type: ignore[misc]


_plans: dict[int, Plan] = {}  # by id of the model


def plan_of(model: nn.Module, loss_fn: Callable[..., Any]) -> Plan:
    """The plan of a multilayer perceptron with a known loss.

    Raises:
        NotAnMLPError: they are something else; the message is the reason.
    """
    plan = _plans.get(id(model))
    if (
        plan is None
        or not plan.is_of(model)
        or plan._structure != _structure(model)
        or plan._loss != _loss_state(loss_fn)
    ):
        plan = _plans[id(model)] = Plan(model, loss_fn)
    return plan


def _structure(model: nn.Module) -> object:
    """The modules below ``model``, and of each its class, mode, hooks and watched attributes."""
    state = model.__dict__
    if type(model) is MLP:
        own = state["sizes"], state["activation"], state["bias"], MLP.forward
        return own, alterations_of(model), hooks_of_all_modules()
    seen: list[object] = [hooks_of_all_modules()]
    modules = [model]
    for module in modules:
        state = module.__dict__
        kind = type(module)
        seen += (kind, kind.forward, state["training"], alterations_of(module))
        if kind in _WATCHED:
            seen += [state[name] for name in _WATCHED[kind]]
        children = state["_modules"]
        if children:
            seen += children.values()
            modules += children.values()
    return seen


def _loss_state(loss_fn: Callable[..., Any]) -> object:
    """What decides a loss: the function, or the class and the options of a module."""
    if type(loss_fn) is FunctionType:
        return loss_fn
    if not isinstance(loss_fn, nn.Module):
        return object()  # a partial: equal to nothing, and recognised anew in every call
    state = loss_fn.__dict__
    weight = state["_buffers"].get("weight")
    return (
        type(loss_fn),
        type(loss_fn).forward,
        F.cross_entropy,
        F.mse_loss,
        state.get("reduction"),
        state.get("ignore_index"),
        state.get("label_smoothing"),
        weight if weight is None else (id(weight), weight._version),
        alterations_of(loss_fn),
    )
