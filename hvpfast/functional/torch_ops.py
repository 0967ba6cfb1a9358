"""Operators ``torch.ops.hvpfast.*``: the contract for torch.compile and torch.func.

Parameters come as a list: one flat tensor (P,), or the per-layer tensors ``[W1, b1, W2, ...]``. The
network and its loss come as the string ``MLPSpec.key``. Operators keep no state: each linearizes
anew. Tangents are rows, (K, P) or (P,), and products have the shape of their tangents.

    loss(params, x, y, spec)                                      L                              ()
    gradient(params, x, y, spec)                                  dL/dparams                   (P,)
    hvp(params, x, y, tangents, spec)                             H v_k                      (K, P)
    ggnvp(params, x, y, tangents, spec)                           G v_k                      (K, P)
    quadratic(params, x, y, tangents, spec, ggn)                  v_k' H v_k                   (K,)
    hvp_vjp(params, x, y, tangents, cotangents, spec, ggn)        d sum_k u_k' H v_k /dparams  (P,)
    penalty(params, x, y, tangents, seed, spec, num_probes, distribution, ggn)
                                                                  L, mean_k |H v_k|^2        (), ()
    penalty_gradient(params, x, y, tangents, seed, g_loss, g_penalty, spec, ...)
                                              d (g_loss * loss + g_penalty * penalty) /dparams (P,)
    fresh_seed(call)                                              int64 from fresh entropy       ()
    probes(seed, num_params, num_probes, distribution, dtype, device)    random rows         (K, P)

``backend="auto"`` is the last argument of all but the last two. ``penalty`` takes ``tangents``, or
None and an int64 ``seed`` () with which it draws ``num_probes`` probes as ``hvpfast.penalty`` does.

Derivatives with respect to params and tangents form the chain loss -> gradient -> hvp -> hvp_vjp;
past third order, and with respect to x and y, they raise. ``torch.func.vmap`` over tangents alone
becomes the K axis of one product; over anything else the operator runs once per element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvpfast.backends.contract import PenaltyState
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource, fresh_seed
from hvpfast.functional import torch_ops_rules as rules
from hvpfast.functional.linearization import ModelLinearization
from hvpfast.functional.linearize import linearize_model
from hvpfast.functional.penalty_kinds import probes_given
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils.torch_private import with_torch_func

ops = torch.ops.hvpfast

_VmapRule = Callable[[Any], Callable[..., tuple[Any, Any]]]

_POINT = "Tensor[] params, Tensor x, Tensor y"
_PROBES = "Tensor? tangents, Tensor? seed"
_DRAW = 'int num_probes=1, str distribution="rademacher", bool ggn=False'
_LAST = 'str backend="auto"'
_SCHEMAS = (
    f"loss({_POINT}, str spec, {_LAST}) -> Tensor",
    f"gradient({_POINT}, str spec, {_LAST}) -> Tensor",
    f"hvp({_POINT}, Tensor tangents, str spec, {_LAST}) -> Tensor",
    f"ggnvp({_POINT}, Tensor tangents, str spec, {_LAST}) -> Tensor",
    f"quadratic({_POINT}, Tensor tangents, str spec, bool ggn=False, {_LAST}) -> Tensor",
    f"hvp_vjp({_POINT}, Tensor tangents, Tensor cotangents, str spec, bool ggn=False, {_LAST})"
    " -> Tensor",
    f"penalty({_POINT}, {_PROBES}, str spec, {_DRAW}, {_LAST}) -> (Tensor, Tensor)",
    f"penalty_gradient({_POINT}, {_PROBES}, Tensor g_loss, Tensor g_penalty, str spec, {_DRAW},"
    f" {_LAST}) -> Tensor",
)


# ---- kernels: what runs on real tensors ----


def _linearize(
    params: list[Tensor], x: Tensor, y: Tensor, spec: str, backend: str, order: int
) -> ModelLinearization:
    params = [p if p.is_contiguous() else p.contiguous() for p in params]
    given = params[0] if len(params) == 1 and params[0].dim() == 1 else params
    return linearize_model(MLPSpec.from_key(spec), given, x, y, backend, order)


def _columns(rows: Tensor, spec: str, name: str = "tangents") -> Tensor:
    num_params = MLPSpec.from_key(spec).num_params
    if rows.dim() not in (1, 2) or rows.shape[-1] != num_params:
        raise ValueError(
            f"{name} must be rows (K, {num_params}), or ({num_params},); got {tuple(rows.shape)}"
        )
    return rows.T if rows.dim() == 2 else rows


def _rows(columns: Tensor) -> Tensor:
    return columns.T if columns.dim() == 2 else columns


def _loss(params: list[Tensor], x: Tensor, y: Tensor, spec: str, backend: str) -> Tensor:
    return _linearize(params, x, y, spec, backend, 2).loss


def _gradient(params: list[Tensor], x: Tensor, y: Tensor, spec: str, backend: str) -> Tensor:
    return _linearize(params, x, y, spec, backend, 2).grad


def _product(ggn: bool) -> Callable[..., Tensor]:
    def product(
        params: list[Tensor], x: Tensor, y: Tensor, tangents: Tensor, spec: str, backend: str
    ) -> Tensor:
        lin = _linearize(params, x, y, spec, backend, 2)
        return _rows(lin.product(_columns(tangents, spec), ggn))

    return product


def _quadratic(
    params: list[Tensor], x: Tensor, y: Tensor, tangents: Tensor, spec: str, ggn: bool, backend: str
) -> Tensor:
    lin = _linearize(params, x, y, spec, backend, 2)
    return lin.quadratic(_columns(tangents, spec), ggn)


def _hvp_vjp(
    params: list[Tensor],
    x: Tensor,
    y: Tensor,
    tangents: Tensor,
    cotangents: Tensor,
    spec: str,
    ggn: bool,
    backend: str,
) -> Tensor:
    lin = _linearize(params, x, y, spec, backend, 3)
    return lin.hvp_vjp(_columns(tangents, spec), _columns(cotangents, spec, "cotangents"), ggn)


def _penalty_state(
    params: list[Tensor],
    x: Tensor,
    y: Tensor,
    tangents: Tensor | None,
    seed: Tensor | None,
    spec: str,
    num_probes: int,
    distribution: str,
    ggn: bool,
    backend: str,
) -> PenaltyState:
    if (tangents is None) == (seed is None):
        raise ValueError("give either tangents or a seed, and None for the other")
    lin = _linearize(params, x, y, spec, backend, 3)
    columns = None if tangents is None else _columns(tangents, spec)
    value = None if seed is None else int(seed) % 2**64  # int64 holds seeds in two's complement
    return lin.penalty(probes_given(columns, num_probes, distribution, value), "fro2", ggn)


def _penalty(*args: Any) -> tuple[Tensor, Tensor]:
    state = _penalty_state(*args)
    return state.loss, state.penalty


def _penalty_gradient(*args: Any) -> Tensor:
    *point_and_probes, g_loss, g_penalty = args[:7]
    return _penalty_state(*point_and_probes, *args[7:]).gradient(float(g_loss), float(g_penalty))


def _fresh_seed(call: int) -> Tensor:
    return torch.tensor(fresh_seed(), dtype=torch.int64, device="cpu")


def _probes(
    seed: Tensor,
    num_params: int,
    num_probes: int,
    distribution: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    source = ProbeSource(num_probes, distribution, int(seed) % 2**64)
    return probe_rows(source, num_params, dtype, device)


# ---- fake kernels: shapes and dtypes ----


def _fake_scalar(params: list[Tensor], *rest: object) -> Tensor:
    return params[0].new_empty(())


def _fake_scalars(params: list[Tensor], *rest: object) -> tuple[Tensor, Tensor]:
    return params[0].new_empty(()), params[0].new_empty(())


def _fake_flat(params: list[Tensor], *rest: object) -> Tensor:
    return params[0].new_empty((sum(p.numel() for p in params),))


def _fake_rows(params: list[Tensor], x: Tensor, y: Tensor, rows: Tensor, *rest: object) -> Tensor:
    return rows.new_empty(rows.shape)


def _fake_forms(params: list[Tensor], x: Tensor, y: Tensor, rows: Tensor, *rest: object) -> Tensor:
    return rows.new_empty(rows.shape[:-1])


def _fake_seed(call: int) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def _fake_probes(
    seed: Tensor,
    num_params: int,
    num_probes: int,
    distribution: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty((num_probes, num_params), dtype=dtype, device=device)


# ---- registration ----


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any], rules.Rule, _VmapRule]] = {
    # name: kernel, fake kernel, derivative, vmap rule
    "loss": (_loss, _fake_scalar, rules.loss_rule, rules.each_element),
    "gradient": (_gradient, _fake_flat, rules.gradient_rule, rules.each_element),
    "hvp": (_product(False), _fake_rows, rules.product_rule(False), rules.stacked_rows),
    "ggnvp": (_product(True), _fake_rows, rules.product_rule(True), rules.stacked_rows),
    "quadratic": (_quadratic, _fake_forms, rules.quadratic_rule, rules.stacked_rows),
    "hvp_vjp": (_hvp_vjp, _fake_flat, rules.no_rule, rules.each_element),
    "penalty": (_penalty, _fake_scalars, rules.penalty_rule, rules.each_element),
    "penalty_gradient": (_penalty_gradient, _fake_flat, rules.no_rule, rules.each_element),
}


def _on_tensors(overload: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """What the dispatcher runs on real tensors."""
    completed = rules.completion(overload)
    return with_torch_func(lambda *args: kernel(*completed(args)))


def _register() -> Any:
    library: Any = torch.library.Library("hvpfast", "DEF")  # type: ignore[no-untyped-call]  # torch
    for schema in _SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, (kernel, fake, derivative, vmap_rule) in _OPERATORS.items():
        qualified = f"hvpfast::{name}"
        overload = getattr(ops, name).default
        library.impl(name, _on_tensors(overload, kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=library)
        autograd = rules.autograd_kernel(overload, kernel, derivative)
        library.impl(name, autograd, "Autograd", with_keyset=True)
        torch.library.register_vmap(qualified, vmap_rule(getattr(ops, name)), lib=library)
    library.define(
        "fresh_seed(int call) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
    )
    library.impl("fresh_seed", _fresh_seed, "CompositeExplicitAutograd")
    torch.library.register_fake("hvpfast::fresh_seed", _fake_seed, lib=library)
    library.define(
        "probes(Tensor seed, SymInt num_params, int num_probes, str distribution,"
        " ScalarType dtype, Device device) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    library.impl("probes", _probes, "CompositeExplicitAutograd")
    torch.library.register_fake("hvpfast::probes", _fake_probes, lib=library)
    return library


_LIBRARY = _register()  # the operators live as long as this object
