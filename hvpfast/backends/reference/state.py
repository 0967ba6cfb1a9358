"""The specification: every operation by torch.func, for any module, loss, dtype and device.

    f(p) = loss(outputs(p)) for the flat parameters p (P,)
    H v = d<grad f, v>/dp                    pullback of grad f (H is symmetric)
    G v = J' (d2 loss/dz2) J v               J = d outputs/dp
    hvp_vjp = d(sum_k <u_k, H v_k>)/dp       penalty = (1/K) sum_k ||H v_k||^2

Slow and obvious on purpose. Tangents are stacked by torch.vmap; where vmap cannot run a model the
tangents are looped over, with a warning that says so.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, func

from hvpfast.backends.messages import class_weights
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.backends.reference import cores
from hvpfast.backends.reference.cores import Cores
from hvpfast.backends.reference.many import ReferenceModels
from hvpfast.mlp.checks import check_labels
from hvpfast.mlp.module_checks import loss_of_outputs
from hvpfast.mlp.spec import MLPSpec, split_flat
from hvpfast.utils import cuda_graph

NAME = "reference"


def unavailable() -> str | None:
    """None: it runs wherever torch does."""
    return None


def unsupported(spec: MLPSpec | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """None: it takes every module, device and floating-point type."""
    return None


def linearize(
    spec: MLPSpec, params: Tensor | Sequence[Tensor], x: Tensor, y: Tensor, order: int = 3
) -> ReferenceState:
    """The state of an MLP at flat parameters (P,) or ``[W1, b1, ...]``; every order is available.

    Raises:
        ValueError: a label is out of range.
    """
    if spec.loss == "cross_entropy" and not cuda_graph.recording(y):
        check_labels(spec, y)
    x, y = x.detach(), y.detach()
    tensors = (params,) if isinstance(params, Tensor) else tuple(params)

    def outputs(p: tuple[Tensor, ...]) -> Tensor:
        return spec.outputs(spec.unflatten(p[0]) if isinstance(params, Tensor) else p, x)

    loss, count = mlp_loss(spec, y, tensors[0])
    normalizer = count if cuda_graph.recording(y) else count()
    state = linearize_function(outputs, loss, tensors, normalizer=normalizer)
    state.cores_at = lambda p, ggn: cores.cores(spec, spec.unflatten(p), x, loss, ggn)
    return state


def linearize_models(
    spec: MLPSpec, params: Tensor, x: Tensor, y: Tensor, order: int = 3
) -> ReferenceModels:
    """The states of M models at (M, P), each with its own x and y or all with the same ones.

    Raises:
        ValueError: a label is out of range.
    """
    own_y = y.dim() > (1 if spec.loss == "cross_entropy" else 2)
    states = []
    for m, flat in enumerate(params):
        try:
            state = linearize(spec, flat, x[m] if x.dim() == 3 else x, y[m] if own_y else y, order)
        except ValueError as error:
            raise ValueError(f"model {m}: {error}") if own_y else error from None
        states.append(state)
    return ReferenceModels(states)


Normalizer = Callable[[], float]


def mlp_loss(
    spec: MLPSpec, y: Tensor, like: Tensor
) -> tuple[Callable[[Tensor], Tensor], Normalizer]:
    """(z -> loss, its normalizer) of a specification for targets y; dtype and device of like."""
    if spec.loss == "mse":
        total = float(y.numel()) if spec.reduction == "mean" else 1.0
        return lambda z: F.mse_loss(z, y, reduction=spec.reduction), lambda: total
    weight = class_weights(spec, like.dtype, like.device)

    def normalizer() -> float:
        if spec.reduction == "sum":
            return 1.0
        counted = y[y != spec.ignore_index]
        return float(counted.numel() if weight is None else weight[counted].double().sum())

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(
            z,
            y,
            weight=weight,
            ignore_index=spec.ignore_index,
            reduction=spec.reduction,
            label_smoothing=spec.label_smoothing,
        )

    return loss, normalizer


def linearize_function(
    outputs_fn: Callable[[tuple[Tensor, ...]], Tensor],
    loss_fn: Callable[[Tensor], Tensor],
    params: Sequence[Tensor],
    *,
    normalizer: float | Normalizer = 1.0,
    owners: Mapping[str, Tensor] | None = None,
) -> ReferenceState:
    """The state of any model with any loss.

    Args:
        outputs_fn: maps a tuple of tensors like ``params`` to outputs; must be functional (no
            in-place change of what it closes over, no randomness).
        loss_fn: maps outputs to a 0-dim loss.
        params: tensors of one floating-point dtype and device; the flat order is theirs.
        normalizer: what the loss divided its sum by, if the caller knows and needs it, or a
            function that finds it out when it is first asked for.
        owners: the model's parameters by name, which ``loss_fn`` must not use itself.

    Raises:
        TypeError: the parameters differ in dtype or device.
        ValueError: no parameters, the loss is not a 0-dim tensor, or it depends on one of
            ``owners``.
    """
    if not params:
        raise ValueError("params is empty: nothing to differentiate")
    if len({(p.dtype, p.device) for p in params}) > 1:
        raise TypeError("params must share one dtype and device; convert them first")
    shapes = [p.shape for p in params]
    numels = [p.numel() for p in params]
    flat = params[0].detach().reshape(-1)
    if len(params) > 1:
        flat = torch.cat([p.detach().reshape(-1) for p in params])

    def outputs(p: Tensor) -> Tensor:
        return outputs_fn(tuple(split_flat(p, shapes, numels)))

    return ReferenceState(outputs, loss_fn, flat, normalizer, owners or {})


class ReferenceState:
    """Derivatives of ``loss_fn(outputs_fn(p))`` at the flat parameters p (P,)."""

    def __init__(
        self,
        outputs_fn: Callable[[Tensor], Tensor],
        loss_fn: Callable[[Tensor], Tensor],
        flat: Tensor,
        normalizer: float | Normalizer,
        owners: Mapping[str, Tensor],
    ) -> None:
        self._normalizer = normalizer
        self._outputs, self._loss_fn, self._flat = outputs_fn, loss_fn, flat
        self._products: dict[bool, Callable[[Tensor], Tensor]] = {}  # ggn -> (v -> H v)
        self.cores_at: Callable[[Tensor, bool], Cores] = _no_cores  # (p, ggn) -> cores
        with torch.no_grad():
            z = outputs_fn(flat)
        self.loss = loss_of_outputs(loss_fn, z, owners)
        if not isinstance(self.loss, Tensor) or self.loss.dim() != 0:
            got = tuple(self.loss.shape) if isinstance(self.loss, Tensor) else type(self.loss)
            raise ValueError(f"the loss must be a 0-dim tensor; got {got}. Reduce it to a scalar")

    @property
    def loss_value(self) -> float:
        return float(self.loss)

    @functools.cached_property
    def normalizer(self) -> float:
        return self._normalizer() if callable(self._normalizer) else self._normalizer

    def _objective(self, p: Tensor) -> Tensor:
        return self._loss_fn(self._outputs(p))

    def _product_at(self, p: Tensor, ggn: bool) -> Callable[[Tensor], Tensor]:
        """The map v -> H v (or G v) at p, on flat vectors (P,)."""
        if not ggn:
            return _pullback(_grad(self._objective), p)[1]
        z, transposed = _pullback(self._outputs, p)  # u -> J' u
        # J v is the pullback of the linear map u -> J' u: no forward-mode rules are needed
        forward = _pullback(transposed, torch.zeros_like(z))[1]
        loss_hessian = _pullback(_grad(self._loss_fn), z)[1]
        return lambda v: transposed(loss_hessian(forward(v)))

    @torch.no_grad()
    def gradient(self) -> Tensor:
        return _grad(self._objective)(self._flat)

    @torch.no_grad()
    def hvp(self, tangents: Tensor, ggn: bool) -> Tensor:
        if tangents.dim() == 1:
            return self.hvp(tangents.unsqueeze(0), ggn)[0]
        if ggn not in self._products:  # recorded once per point, replayed for every product
            self._products[ggn] = self._product_at(self._flat, ggn)
        return over_rows(self._products[ggn], tangents.detach())

    @torch.no_grad()
    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        return (tangents.detach() * self.hvp(tangents, ggn)).sum(1)

    @torch.no_grad()
    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        tangents, cotangents = tangents.detach(), cotangents.detach()

        def inner(p: Tensor) -> Tensor:
            return (cotangents * over_rows(self._product_at(p, ggn), tangents)).sum()

        return _grad(inner)(self._flat)

    def penalty(self, probes: Tensor | ProbeSource, ggn: bool) -> ReferencePenalty:
        if isinstance(probes, ProbeSource):
            probes = probe_rows(probes, self._flat.numel(), self._flat.dtype, self._flat.device)
        rows = probes.detach()
        return ReferencePenalty(
            self, lambda p: over_rows(self._product_at(p, ggn), rows).square().sum(1).mean()
        )

    @torch.no_grad()
    def sample_traces(self, ggn: bool, chosen: Sequence[bool]) -> Tensor:
        return cores.sample_traces(self.cores_at(self._flat, ggn), chosen)

    @torch.no_grad()
    def diagonal(self, ggn: bool) -> Tensor:
        return cores.diagonal(self.cores_at(self._flat, ggn))

    @torch.no_grad()
    def inner_product(self, other: ReferenceState, ggn: bool, chosen: Sequence[bool]) -> float:
        own, its = self.cores_at(self._flat, ggn), other.cores_at(other._flat, ggn)
        return float(cores.inner_product(own, its, chosen))

    def exact_penalty(self, kind: str, ggn: bool, chosen: Sequence[bool]) -> ReferencePenalty:

        def value(p: Tensor) -> Tensor:
            own = self.cores_at(p, ggn)
            if kind == "trace":
                return cores.sample_traces(own, chosen).sum()
            return cores.inner_product(own, own, chosen)

        return ReferencePenalty(self, value)

    @property
    def nbytes(self) -> int:
        """Estimate: three times the bytes that autograd saves in one forward pass."""
        saved: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with torch.enable_grad(), hooks:
            self._objective(self._flat.clone().requires_grad_())
        return 3 * sum(saved.values())


class ReferencePenalty:
    """A penalty p -> value(p) at the point of a state, and its gradient."""

    @torch.no_grad()
    def __init__(self, state: ReferenceState, value: Callable[[Tensor], Tensor]) -> None:
        def both(p: Tensor) -> tuple[Tensor, Tensor]:
            return state._objective(p), value(p)

        self._values: tuple[Tensor, Tensor]
        self._values, self._pullback = func.vjp(both, state._flat)[:2]

    @property
    def loss(self) -> Tensor:
        return self._values[0].detach().clone()

    @property
    def penalty(self) -> Tensor:
        return self._values[1].detach().clone()

    @torch.no_grad()
    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        weights = tuple(
            torch.full_like(v, g) for v, g in zip(self._values, (g_loss, g_penalty), strict=True)
        )
        out: Tensor = self._pullback(weights)[0]
        return out


def _no_cores(p: Tensor, ggn: bool) -> Cores:
    raise NotImplementedError(
        "exact curvature without probes takes multilayer perceptrons with cross-entropy or mse"
    )


def _grad(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    gradient: Callable[[Tensor], Tensor] = func.grad(function)
    return gradient


def _pullback(
    function: Callable[[Tensor], Tensor], at: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(function(at), u -> J' u): recorded once, replayed for every u."""
    value, pullback = func.vjp(function, at)[:2]
    return value, lambda u: pullback(u)[0]


def over_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``function`` applied to each row (K, P) -> (K, P), stacked by vmap where it can be."""
    if rows.shape[0] == 0:
        return torch.zeros_like(rows)
    if rows.shape[0] == 1:
        return function(rows[0]).unsqueeze(0)
    try:
        return torch.vmap(function)(rows)
    except RuntimeError as error:
        warnings.warn(
            f"torch.vmap cannot run this model, so the {rows.shape[0]} tangents are looped over: "
            f"{str(error).splitlines()[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return torch.stack([function(row) for row in rows])
