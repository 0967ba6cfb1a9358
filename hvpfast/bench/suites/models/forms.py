"""Ways to the products of many models at once: ours, vmap, batched matrix products, JAX."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import hvpfast as hf
from hvpfast.bench.cases import Case, build
from hvpfast.bench.measure import Form, clock
from hvpfast.bench.providers import PROVIDERS, transforms
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers.jax_jit import mlp_loss
from hvpfast.bench.providers.torch_compile import own_code
from hvpfast.bench.providers.torch_graphs import recorded

T = torch.func
SLACK = 32.0
TRUTH_CHUNK = 32  # models whose float64 truth is computed at once
ENGINES = ("cpu", "cuda", "triton", "reference")


@dataclass(frozen=True)
class Models:
    """M models of one case: params (M, P), x (M, N, D0), y (M, N), tangents (M, K, P)."""

    case: Case
    params: Tensor
    x: Tensor
    y: Tensor
    tangents: Tensor

    @property
    def num_models(self) -> int:
        return len(self.params)

    @property
    def num_tangents(self) -> int:
        return self.tangents.shape[1]

    @property
    def device(self) -> str:
        return self.params.device.type

    @classmethod
    def build(cls, case: Case, num_models: int, num_tangents: int, device: str) -> Models:
        """Each model its own draw of the case: parameters, data off the kinks, normal tangents."""
        drawn = [
            build(replace(case, name=f"{case.name}, model {m}"), num_tangents)
            for m in range(num_models)
        ]
        arrays = zip(*((p.flat(), p.x, p.y, p.normal) for p in drawn), strict=True)
        return cls(case, *common.tensors([np.stack(models) for models in arrays], device))

    def to(self, dtype: torch.dtype) -> Models:
        return self._each(lambda t: t.to(dtype), "params", "x", "tangents")

    def part(self, first: int, last: int) -> Models:
        """Models first ... last - 1."""
        return self._each(lambda t: t[first:last], "params", "x", "y", "tangents")

    def _each(self, change: Callable[[Tensor], Tensor], *names: str) -> Models:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """(..., P) as one tensor (..., *shape) per parameter."""
        numels = [int(np.prod(shape)) for shape in self.case.shapes]
        parts = torch.split(flat, numels, dim=-1)
        return tuple(
            p.reshape(*flat.shape[:-1], *shape).contiguous()
            for p, shape in zip(parts, self.case.shapes, strict=True)
        )


@dataclass(frozen=True)
class ModelsForm(Form):
    """``rows`` makes a tensor (M, K, P) of what ``call`` returned."""

    rows: Callable[[Any], Tensor]


def forms(problem: Models) -> dict[tuple[str, str, str], Callable[[], ModelsForm]]:
    """(provider, kind, form) -> what prepares it; forms that cannot run here are left out."""
    table: dict[tuple[str, str, str], Callable[[], ModelsForm]] = {}
    for name in ENGINES:
        if PROVIDERS[f"ours-{name}"].unavailable(problem.device) is None:
            table[f"ours-{name}", "ours", "models at once"] = partial(_ours, problem, name)
    table["ours-loop", "loop", "one model at a time"] = partial(_loop, problem)
    for mode in transforms.MODES:
        table["torch-func", "eager", f"vmap {mode}"] = partial(_func, problem, mode)
    for batched in (True, False):
        name = "bmm, " + ("batched tangents" if batched else "tangents in a loop")
        table["torch-bmm", "eager", name] = partial(_bmm, problem, batched)
    for mode in transforms.MODES:
        table["torch-compile", "compiled", f"vmap {mode}"] = partial(_compiled, problem, mode)
    if problem.device != "cpu":
        for (_, kind, name), make in list(table.items()):
            if kind in ("eager", "compiled"):
                table["torch-graphs", "graphed", name] = partial(_recorded, problem, name, make)
    if PROVIDERS["jax"].unavailable(problem.device) is None:
        for mode in transforms.MODES:
            table["jax", "compiled", f"vmap {mode}"] = partial(_jax, problem, mode)
    return table


def truth(problem: Models) -> tuple[Tensor, float]:
    """The products in float64 (M, K, P), and the error allowed, relative to each model's largest.

    Allowed is twice torch's own error in the dtype of the problem, and a few roundings.
    """
    exact, own = [], 0.0
    for first in range(0, problem.num_models, TRUTH_CHUNK):
        part = problem.part(first, first + TRUTH_CHUNK)
        wide, same = (_rows(_products(p, "vjp(grad)")) for p in (part.to(torch.float64), part))
        scale = wide.flatten(1).abs().amax(1)
        own = max(own, float(((same.double() - wide).flatten(1).abs().amax(1) / scale).max()))
        exact.append(wide)
    return torch.cat(exact), 2 * own + SLACK * torch.finfo(problem.params.dtype).eps


# ---- ours ----


def _ours(problem: Models, backend: str) -> ModelsForm:
    spec = hf.MLPSpec(problem.case.sizes, problem.case.activation)
    V = problem.tangents.transpose(1, 2)  # (M, P, K), its rows contiguous

    def call() -> Any:
        lin = hf.linearize(spec, problem.params, problem.x, problem.y, backend=backend, order=2)
        return hf.hvp(lin, V)

    return ModelsForm(call, clock(problem.device), lambda out: out.transpose(1, 2))


def _loop(problem: Models) -> ModelsForm:
    """hvpfast without its model axis."""
    spec = hf.MLPSpec(problem.case.sizes, problem.case.activation)
    points = list(zip(problem.params, problem.x, problem.y, problem.tangents, strict=True))

    def call() -> Any:
        return [hf.hvp(hf.linearize(spec, p, x, y, order=2), rows.T) for p, x, y, rows in points]

    return ModelsForm(call, clock(problem.device), lambda out: torch.stack([v.T for v in out]))


# ---- torch ----


def _one_model(case: Case, mode: str) -> Callable[..., Any]:
    """(params, x, y, V) of one model -> H V; V has K in front."""
    act = common.ACTIVATIONS[case.activation]

    def products(params: Any, x: Tensor, y: Tensor, V: Any) -> Any:
        return transforms.products(
            T, lambda p: common.mlp_loss(p, x, y, act), f"{mode} vmap", params, V
        )

    return products


def _arguments(problem: Models) -> tuple[Any, Tensor, Tensor, Any]:
    return problem.split(problem.params), problem.x, problem.y, problem.split(problem.tangents)


def _products(problem: Models, mode: str) -> Any:
    return T.vmap(_one_model(problem.case, mode))(*_arguments(problem))


def _rows(found: Sequence[Tensor]) -> Tensor:
    """Tensors (M, K, *shape) as (M, K, P)."""
    return torch.cat([leaf.detach().flatten(2) for leaf in found], dim=2)


def _func(problem: Models, mode: str) -> ModelsForm:
    arguments = _arguments(problem)
    function = T.vmap(_one_model(problem.case, mode))
    return ModelsForm(lambda: function(*arguments), clock(problem.device), _rows)


def _compiled(problem: Models, mode: str) -> ModelsForm:
    arguments = _arguments(problem)
    one = _one_model(problem.case, mode)

    def whole(params: Any, x: Tensor, y: Tensor, V: Any) -> Any:
        return T.vmap(one)(params, x, y, V)

    function: Any = torch.compile(own_code(whole), fullgraph=True, dynamic=False)
    return ModelsForm(lambda: function(*arguments), clock(problem.device), _rows)


def _bmm(problem: Models, batched: bool) -> ModelsForm:
    """Double backward through batched products: the losses' sum has every model's gradient."""
    params, x, y, V = _arguments(problem)
    params = tuple(p.requires_grad_() for p in params)
    act, M = common.ACTIVATIONS[problem.case.activation], problem.num_models
    stacked = tuple(v.transpose(0, 1).contiguous() for v in V)  # (K, M, *shape)

    def call() -> Any:
        a = x
        for i in range(0, len(params), 2):
            z = torch.baddbmm(params[i + 1][:, None], a, params[i].transpose(1, 2))
            a = z if i == len(params) - 2 else act(z)
        loss = F.cross_entropy(a.flatten(0, 1), y.flatten()) * M
        g = torch.autograd.grad(loss, params, create_graph=True)
        if batched:
            return torch.autograd.grad(g, params, stacked, is_grads_batched=True)
        found = [
            torch.autograd.grad(g, params, tuple(v[k] for v in stacked), retain_graph=True)
            for k in range(len(stacked[0]))
        ]
        return tuple(torch.stack(leaves) for leaves in zip(*found, strict=True))

    return ModelsForm(
        call, clock(problem.device), lambda out: _rows([leaf.transpose(0, 1) for leaf in out])
    )


def _recorded(problem: Models, name: str, make: Callable[[], ModelsForm]) -> ModelsForm:
    form = make()
    return replace(form, call=recorded(problem.device, name, form.call))


# ---- JAX ----


def _jax(problem: Models, mode: str) -> ModelsForm:
    jax: Any = importlib.import_module("jax")
    activation = problem.case.activation

    def one(params: Any, x: Any, y: Any, V: Any) -> Any:
        return transforms.products(
            jax, lambda p: mlp_loss(p, x, y, activation), f"{mode} vmap", params, V
        )

    params, x, y, V = _arguments(problem)
    arrays = jax.device_put(
        (tuple(map(common.array, params)), common.array(x), common.array(y),
         tuple(map(common.array, V))),
        jax.devices(problem.device)[0],
    )  # fmt: skip
    function = jax.jit(jax.vmap(one))

    def rows(out: Any) -> Tensor:
        return _rows([torch.tensor(np.asarray(leaf), device=problem.device) for leaf in out])

    return ModelsForm(lambda: function(*arrays), clock(problem.device, jax.block_until_ready), rows)
