"""What an operator linearizes: a model with a loss, as an MLP of the backends or as a function.

Both kinds have ``tensors``, whose concatenation is the flat vector (F,) of their products;
``update()``, which reads the values of the parameters; and ``linearize(batch)`` at these values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvpfast import backends
from hvpfast.backends.contract import State
from hvpfast.backends.reference import state as reference
from hvpfast.functional.linearize import linearize_model
from hvpfast.mlp.module import NotAnMLPError
from hvpfast.mlp.module_checks import check_deterministic_modules, warn_slow
from hvpfast.mlp.recognised import plan_of
from hvpfast.mlp.spec import MLPSpec, split_flat
from hvpfast.operators.batch import Batch
from hvpfast.operators.parameters import Entry, owners_of
from hvpfast.operators.reduction import BatchWeight
from hvpfast.utils.functional_call import functional_call

Link = tuple[dict[str, Any], str, object]


def links_of(model: nn.Module) -> list[Link]:
    """(dictionary, name, value) of every submodule, parameter and buffer."""
    return [
        (values, name, value)
        for module in model.modules()
        for values in (module._modules, module._parameters, module._buffers)
        for name, value in values.items()
    ]


class Watch:
    """Notices that tensors were changed in place, that their storage or they were replaced.

    Args:
        tensors: whose changes are noticed.
        links: what stands where in a model: see :func:`links_of`.
    """

    def __init__(self, tensors: Sequence[Tensor], links: Sequence[Link]) -> None:
        self._tensors = [t for t in tensors if not t.is_inference()]  # these have no counter
        self._links = links
        self._mark = self._marks()

    def _marks(self) -> tuple[int, list[int]]:
        # counters only grow: a change of any changes the sum
        tensors = self._tensors
        return sum(map(_version, tensors)), [t.data_ptr() for t in tensors]

    def changed(self) -> bool:
        """Whether a tensor changed (changes through ``.data`` cannot be seen)."""
        if self._marks() != self._mark:
            return True
        return any(values.get(name) is not value for values, name, value in self._links)


_version = operator.attrgetter("_version")


ANEW = "make a new operator"


def same_kind(
    names: Sequence[str], before: Sequence[Tensor], now: Sequence[Tensor | None]
) -> list[Tensor]:
    """The tensors that stand now where others stood, if they have the same shapes and kinds.

    Raises:
        ValueError: one is gone, or is of another shape, dtype or device.
    """
    found = []
    for name, old, new in zip(names, before, now, strict=True):
        kind = old.shape, old.dtype, old.device
        if new is None or (new.shape, new.dtype, new.device) != kind:
            what = "gone" if new is None else f"{tuple(new.shape)} {new.dtype} on {new.device}"
            was = f"{tuple(old.shape)} {old.dtype} on {old.device}"
            raise ValueError(f"parameter {name} is {what}, and it was {was}: {ANEW}")
        found.append(new)
    return found


class MLPObjective:
    """A multilayer perceptron with a loss that the backends know."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        spec: MLPSpec,
        backend: str,
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self._loss_fn = model, loss_fn
        self.tensors: Sequence[Tensor] = plan_of(model, loss_fn).parameters()
        self.dtype, self.device = dtype or self.tensors[0].dtype, self.tensors[0].device
        self.spec, self._backend, self.backend = spec, backend, backend
        self.text = ""  # that of the first linearization
        self.update()

    def update(self) -> None:
        """Read the present values of the parameters, without a copy if they have the dtype.

        Raises:
            ValueError: model and loss are no longer what they were.
        """
        try:
            plan = plan_of(self.model, self._loss_fn)
        except NotAnMLPError as error:
            raise ValueError(f"{error}, and it was an MLP: {ANEW}") from error
        if plan.spec != self.spec:
            raise ValueError(f"the network is {plan.spec}, and it was {self.spec}: {ANEW}")
        self._flat = plan.layout is None
        names = ("flat",) if self._flat else self.spec.names
        self.tensors = same_kind(names, self.tensors, plan.parameters())
        self._params = [t.detach().to(self.dtype) for t in self.tensors]

    def linearize(self, batch: Batch) -> State:
        """The state of one batch."""
        params = self._params[0] if self._flat else self._params
        lin = linearize_model(self.spec, params, batch.x, batch.y, self._backend, 2)
        if not self.text:
            self.backend, self.text = lin.backend, lin.explain()
        return lin.state

    def watched(self) -> list[Tensor]:
        """Tensors whose change ends the validity of the states."""
        return list(self.tensors)

    def check_modes(self) -> None:
        """Do nothing: the states do not run the modules."""


class FunctionObjective:
    """Any model with any loss, evaluated by ``torch.func`` on the reference backend."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        tensors: Sequence[Tensor],
        weight: BatchWeight,
        dtype: torch.dtype | None,
        reason: str,
    ) -> None:
        self.model, self._loss_fn, self._weight = model, loss_fn, weight
        self._reason = reason
        self.tensors, self._convert_to = tensors, dtype
        self.dtype = dtype or tensors[0].dtype
        self.device = tensors[0].device
        for t in tensors if dtype is None else ():
            if (t.dtype, t.device) != (self.dtype, self.device):
                raise TypeError(
                    "the chosen parameters must have one dtype and device; got "
                    f"{self.dtype} on {self.device} and {t.dtype} on {t.device}: choose others, or "
                    "pass dtype="
                )
        self.backend, self.text = reference.NAME, f"backend: {reference.NAME}, because {reason}"
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = [names[id(t)] for t in tensors]
        self._shapes = [t.shape for t in tensors]
        self._numels = [t.numel() for t in tensors]
        self.update()

    def update(self) -> None:
        """Read the present values of the parameters and buffers.

        Raises:
            ValueError: a parameter is gone, or is of another shape, dtype or device.
        """
        named = dict(self.model.named_parameters())
        self.tensors = same_kind(self._names, self.tensors, [named.get(n) for n in self._names])
        self._flat = torch.cat([self._cast(t).reshape(-1) for t in self.tensors])
        chosen = set(self._names)
        self._constants = {n: self._cast(p) for n, p in named.items() if n not in chosen}
        self._owners = named
        self._buffers = {name: self._cast(b) for name, b in self.model.named_buffers()}

    def narrowed(self, tensors: Sequence[Tensor]) -> FunctionObjective:
        """The same function of fewer parameters; the others are constants."""
        rest = self._weight, self._convert_to, self._reason
        return FunctionObjective(self.model, self._loss_fn, tensors, *rest)

    def linearize(self, batch: Batch) -> reference.ReferenceState:
        """The state of one batch."""

        def outputs(params: tuple[Tensor, ...]) -> Any:
            values = split_flat(params[0], self._shapes, self._numels)
            own = dict(zip(self._names, values, strict=True))
            # copies: a forward pass may write to buffers, and the model's must not change
            buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
            everything = {**self._constants, **buffers, **own}
            return functional_call(self.model, everything, (batch.x,))

        def loss(outputs: Any) -> Tensor:
            value: Tensor = self._loss_fn(outputs, batch.y)
            return value

        state = reference.linearize_function(
            outputs,
            loss,
            (self._flat,),
            normalizer=self._weight(batch),
            owners=self._owners,
        )
        if not bool(torch.isfinite(state.loss)):
            raise ValueError(
                f"the loss is {float(state.loss)}: look for NaN or inf in the parameters and the "
                "data, or for an overflow in the model"
            )
        return state

    def watched(self) -> list[Tensor]:
        """Tensors whose change ends the validity of the states."""
        return [*self.model.parameters(), *self.model.buffers()]

    def check_modes(self) -> None:
        """Raise ValueError if a module is in a train mode in which the loss is random."""
        check_deterministic_modules(self.model)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._convert_to if tensor.is_floating_point() else None)


def objective_for(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    entries: Sequence[Entry],
    weight: BatchWeight,
    batch: Batch | None,
    backend: str,
    dtype: torch.dtype | None,
) -> MLPObjective | FunctionObjective:
    """The objective: an MLP if the model, the loss and the data allow it, else a function.

    ``batch`` is one of the data, None if there are none.

    Raises:
        RuntimeError: the named backend cannot run this; the message says why.
    """
    try:
        spec = spec_for(model, loss_fn, batch)
        return MLPObjective(model, loss_fn, spec, backend, dtype)
    except NotAnMLPError as error:
        reason = str(error)
    objective = FunctionObjective(model, loss_fn, owners_of(entries), weight, dtype, reason)
    try:
        backends.choose(backend, None, objective.device, objective.dtype)
    except RuntimeError as error:
        raise RuntimeError(
            f"backend {backend!r} cannot run this, which is not an MLP: {reason}. "
            "Pass backend='auto' or 'reference'"
        ) from error
    if backend == "auto":
        warn_slow(model, reason, stacklevel=4)
    return objective


def spec_for(model: nn.Module, loss_fn: Callable[..., Any], batch: Batch | None) -> MLPSpec:
    """The specification of the MLP.

    Raises:
        NotAnMLPError: the model, the loss or the batch is not that of an MLP.
    """
    spec = plan_of(model, loss_fn).spec
    if batch is None:
        return spec
    x, y = batch
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise NotAnMLPError(f"the data are not tensors but {type(x).__name__}, {type(y).__name__}")
    if spec.loss == "cross_entropy" and y.is_floating_point():
        raise NotAnMLPError("the targets are class probabilities, not class indices")
    flattens = any(isinstance(module, nn.Flatten) for module in model.modules())
    if x.dim() > 2 and x.shape[-1] == spec.sizes[0] and not flattens:
        raise NotAnMLPError(f"x is {tuple(x.shape)}: the layers act on its last dimension")
    return spec
