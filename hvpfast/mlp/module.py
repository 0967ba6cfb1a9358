"""The perceptron module with one flat parameter, and the recogniser of other modules and losses.

:class:`MLP` keeps its P parameters as one vector; :func:`spec_of` and :func:`params_of` see through
``nn.Sequential``. The description itself, with shapes and the flat order, is in ``spec.py``.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpfast.mlp.spec import (
    ACTIVATION_TABLE,
    ACTIVATIONS,
    REDUCTIONS,
    MLPSpec,
    check_sizes,
    forward,
    layer_shapes,
    split_flat,
)
from hvpfast.utils.choice import check_choice
from hvpfast.utils.torch_private import alterations_of, hooks_of_all_modules


class NotAnMLPError(ValueError):
    """The module or loss is not one that :class:`MLPSpec` describes; the message is the reason."""


class MLP(nn.Module):
    """Multilayer perceptron with ONE flat parameter: optimisers and kernels see one vector.

    Args:
        sizes: widths ``(D[0], ..., D[L])``.
        activation: one of ``ACTIVATIONS``, between layers.
        bias: whether the layers have biases.
        dtype: floating-point type of the parameters (torch's default if None).
        device: where the parameters live.
        generator: source of the initial values; torch's global generator if None, as for any
            ``nn.Module``. The values are those that ``nn.Linear`` layers created in order get.

    Attributes:
        flat: the parameter (P,), in the flat order of :class:`MLPSpec`.

    Raises:
        ValueError: ``sizes`` or ``activation`` is not as described above.
    """

    flat: nn.Parameter

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "relu",
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.sizes, self.activation, self.bias = check_sizes(sizes), activation, bool(bias)
        self._shapes = tuple(layer_shapes(self.sizes, self.bias))
        self._numels = tuple(math.prod(shape) for shape in self._shapes)
        self.flat = nn.Parameter(torch.empty(sum(self._numels), dtype=dtype, device=device))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters again: uniform in +-1/sqrt(fan_in), as ``nn.Linear`` does."""
        bound = 0.0
        for tensor in self.weights:
            if tensor.dim() == 2:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
                bound = 1 / math.sqrt(tensor.shape[1])
            else:
                tensor.uniform_(-bound, bound, generator=generator)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Views ``(W1, b1, W2, ...)`` of :attr:`flat`."""
        return tuple(split_flat(self.flat, self._shapes, self._numels))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (N, D[L]) for inputs (N, D[0])."""
        return forward(self.weights, x, self.activation, self.bias)

    @classmethod
    def from_sequential(cls, module: nn.Module) -> MLP:
        """A copy of a ``nn.Sequential`` of the kind that :func:`spec_of` recognises.

        Raises:
            NotAnMLPError: the module is something else; the message says what.
        """
        sizes, activation, bias, tensors = _recognise(module)
        mlp = cls(sizes, activation, bias, dtype=tensors[0].dtype, device="meta")
        mlp.flat = nn.Parameter(torch.cat([t.detach().reshape(-1) for t in tensors]))
        return mlp

    def to_sequential(self) -> nn.Sequential:
        """A ``nn.Sequential`` of ``nn.Linear`` and activations, with copies of the parameters."""
        _, module_type, attributes = ACTIVATION_TABLE[self.activation]
        weights = [w.detach().clone() for w in self.weights]
        modules: list[nn.Module] = []
        step = 2 if self.bias else 1
        for i in range(0, len(weights), step):
            if i:
                modules.append(module_type(**attributes))
            d_out, d_in = weights[i].shape
            linear = nn.Linear(d_in, d_out, bias=self.bias, device="meta")
            linear.weight = nn.Parameter(weights[i])
            if self.bias:
                linear.bias = nn.Parameter(weights[i + 1])
            modules.append(linear)
        return nn.Sequential(*modules)

    def extra_repr(self) -> str:
        """Arguments shown by ``repr``."""
        return f"{self.sizes}, activation={self.activation!r}, bias={self.bias}"


def spec_of(
    module: nn.Module, loss_fn: Callable[..., Any], reduction: str | None = None
) -> MLPSpec:
    """The :class:`MLPSpec` of a module and a loss, if they are an MLP with a known loss.

    Recognised modules: :class:`MLP`, ``nn.Linear``, and (nested) ``nn.Sequential`` of an optional
    ``Flatten``, ``Linear`` layers and one kind of activation between them. Recognised losses:
    ``nn.CrossEntropyLoss``, ``nn.MSELoss``, ``F.cross_entropy``, ``F.mse_loss`` and
    ``functools.partial`` of the two functions; a bare function means ``reduction="mean"``.

    Args:
        module: the network.
        loss_fn: the loss, called as ``loss_fn(outputs, y)``.
        reduction: the reduction that the caller expects, or None for the loss's own.

    Raises:
        NotAnMLPError: not recognised; the message is the reason.
        ValueError: ``reduction`` contradicts the loss's own.
    """
    sizes, activation, bias, _ = _recognise(module)
    loss, fields = _recognise_loss(loss_fn)
    if reduction is not None and reduction != fields["reduction"]:
        raise ValueError(
            f"reduction={reduction!r} was asked for, but the loss has {fields['reduction']!r}; "
            f"leave reduction out or give a loss with reduction={reduction!r}"
        )
    try:
        return MLPSpec(sizes=sizes, activation=activation, loss=loss, bias=bias, **fields)
    except ValueError as error:
        raise NotAnMLPError(str(error)) from error


def params_of(module: nn.Module) -> Tensor | list[Tensor]:
    """The module's own parameters, not copies: ``flat`` of an :class:`MLP`, else ``[W1, b1, ...]``.

    Raises:
        NotAnMLPError: the module is not a multilayer perceptron; the message is the reason.
    """
    tensors = _recognise(module)[3]
    return tensors[0] if type(module) is MLP else tensors


_Recognised = tuple[tuple[int, ...], str, bool, list[Tensor]]


def _recognise(module: nn.Module) -> _Recognised:
    """(sizes, activation, bias, parameter tensors), or NotAnMLPError with the reason."""
    if hooks_of_all_modules():
        raise NotAnMLPError("hooks are registered for all modules")
    if type(module) is MLP and not _altered(module):
        return module.sizes, module.activation, module.bias, [module.flat]
    linears, activations = _linears_and_activations(module)
    if not linears:
        raise NotAnMLPError("the model has no Linear layer")
    if activations[-1] != "identity":
        raise NotAnMLPError(f"the model ends in {activations[-1]}; an MLP ends in a Linear layer")
    kinds = sorted(set(activations[:-1])) or ["identity"]
    if len(kinds) > 1:
        raise NotAnMLPError(f"the model mixes activations ({', '.join(kinds)}); an MLP has one")
    with_bias = {layer.bias is not None for layer in linears}
    if len(with_bias) > 1:
        raise NotAnMLPError("some Linear layers have a bias, some have none; an MLP has one kind")
    for before, after in itertools.pairwise(linears):
        if before.out_features != after.in_features:
            raise NotAnMLPError(
                f"a Linear layer with {after.in_features} inputs follows one with "
                f"{before.out_features} outputs"
            )
    tensors = [t for layer in linears for t in (layer.weight, layer.bias) if t is not None]
    if len({id(t) for t in tensors}) < len(tensors):
        raise NotAnMLPError("Linear layers share a parameter; in an MLP each has its own")
    if not all(t.is_contiguous() for t in tensors):
        raise NotAnMLPError("a parameter is not contiguous; replace it by a contiguous copy")
    if len({(t.dtype, t.device) for t in tensors}) > 1:
        raise NotAnMLPError("the parameters differ in dtype or device")
    sizes = (linears[0].in_features, *(layer.out_features for layer in linears))
    return sizes, kinds[0], with_bias.pop(), tensors


def _linears_and_activations(module: nn.Module) -> tuple[list[nn.Linear], list[str]]:
    """The Linear layers, and for each the activation that follows it ("identity" for none)."""
    linears: list[nn.Linear] = []
    activations: list[str] = []
    for name, layer in _leaves(module, ""):
        kind = type(layer).__name__
        where = f"layer {name} is {kind}" if name else f"the model is {kind}"
        if _altered(layer):
            raise NotAnMLPError(f"{where} with hooks or another forward")
        if type(layer) is nn.Linear:
            _check_parameters(layer, where)
            linears.append(layer)
            activations.append("identity")
        elif type(layer) is nn.Dropout:
            if layer.training and layer.p > 0:
                raise NotAnMLPError(
                    f"{where} in train mode, which is random; call model.eval() or set p to 0"
                )
        elif type(layer) is nn.Flatten:
            if linears or (layer.start_dim, layer.end_dim) != (1, -1):
                raise NotAnMLPError(f"{where}; an MLP may only begin with a plain Flatten()")
        elif type(layer) is not nn.Identity:
            activation = _activation_of(layer)
            if activation is None:
                known = ", ".join(ACTIVATIONS)
                raise NotAnMLPError(f"{where}; an MLP is made of Linear layers and {known}")
            if not linears or activations[-1] != "identity":
                raise NotAnMLPError(f"{where}, which does not follow a Linear layer")
            activations[-1] = activation
    return linears, activations


def _check_parameters(layer: nn.Linear, where: str) -> None:
    """Raise NotAnMLPError unless weight and bias are parameters of the layer's own shapes."""
    shapes = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    for name, shape in shapes.items():
        tensor = getattr(layer, name, None)
        if tensor is None and name == "bias":
            continue
        if tensor is not layer._parameters.get(name):
            raise NotAnMLPError(f"{where} whose {name} is not a parameter")
        if tensor is None or tuple(tensor.shape) != shape:
            raise NotAnMLPError(f"{where} whose {name} is not {shape}, as the layer says")


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    plain = type(module).forward is nn.Sequential.forward and not _altered(module)
    if isinstance(module, nn.Sequential) and plain:
        for child_name, child in module._modules.items():  # children() skips a module used twice
            assert child is not None
            yield from _leaves(child, f"{name}.{child_name}" if name else child_name)
    else:
        yield name, module


def _altered(module: nn.Module) -> bool:
    """Whether a call of the module computes something else than its class says."""
    forward = type(module).forward
    own = any(_is_written_in(forward, kind.__module__) for kind in type(module).__mro__[:-1])
    return not own or bool(alterations_of(module))


def _is_written_in(function: Any, module_name: str) -> bool:
    """Whether a Python function is written in the file of that module: nobody put another there."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == sys.modules[module_name].__file__


def _activation_of(layer: nn.Module) -> str | None:
    for name, (_, kind, attributes) in ACTIVATION_TABLE.items():
        if type(layer) is kind and all(getattr(layer, k) == v for k, v in attributes.items()):
            return name
    return None


_LOSS_OPTIONS = ("weight", "ignore_index", "label_smoothing", "reduction")


def _recognise_loss(loss_fn: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """(loss, the MLPSpec fields it sets), or NotAnMLPError with the reason."""
    if type(loss_fn) is nn.CrossEntropyLoss or type(loss_fn) is nn.MSELoss:
        if _altered(loss_fn):
            raise NotAnMLPError(
                f"the loss is {type(loss_fn).__name__} with hooks or another forward"
            )
        function = F.cross_entropy if type(loss_fn) is nn.CrossEntropyLoss else F.mse_loss
        options = {k: getattr(loss_fn, k) for k in _LOSS_OPTIONS if hasattr(loss_fn, k)}
    elif isinstance(loss_fn, functools.partial):
        function, options = loss_fn.func, dict(loss_fn.keywords)
        if loss_fn.args or not set(options) <= set(_LOSS_OPTIONS):
            raise NotAnMLPError(f"the loss is a partial with arguments not known here: {loss_fn}")
    else:
        function, options = loss_fn, {}
    if not all(_is_written_in(f, F.__name__) for f in (F.cross_entropy, F.mse_loss)):
        raise NotAnMLPError(
            "torch.nn.functional has another cross_entropy or mse_loss than torch's"
        )
    if function is not F.cross_entropy and function is not F.mse_loss:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise NotAnMLPError(
            f"the loss is {name}; known are nn.CrossEntropyLoss, nn.MSELoss and their functions"
        )
    fields: dict[str, Any] = {"reduction": options.get("reduction", "mean")}
    if fields["reduction"] not in REDUCTIONS:
        known = " and ".join(REDUCTIONS)
        raise NotAnMLPError(f"the loss reduces by {fields['reduction']!r}; known are {known}")
    if function is F.mse_loss:
        if options.get("weight") is not None:
            raise NotAnMLPError("the loss is mse_loss with weight, which is not known here")
        return "mse", fields
    if options.get("weight") is not None:
        fields["class_weights"] = tuple(options["weight"].tolist())
    fields["ignore_index"] = options.get("ignore_index", -100)
    fields["label_smoothing"] = options.get("label_smoothing", 0.0)
    return "cross_entropy", fields
