"""The torch.library operators: registration, values, derivatives, torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_here import BACKENDS
from cases import Case, Problem, problem
from networks import Penalised, mlp_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import hvpfast as hf
from hvpfast.functional import torch_ops

ops = torch.ops.hvpfast
CASES = [
    Case(hf.MLPSpec((4, 5, 3), "tanh"), N=6, K=2),
    Case(hf.MLPSpec((3, 4, 2), "softplus", "mse", "sum", bias=False), N=5, K=3, layout="layers"),
]
CASE = CASES[0]
# the reference is slow, and its registration is the same
PAIRS = [(c, b) for c in CASES for b in BACKENDS if (c, b) != (CASE, "reference")]
# torch's own compiler uses what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")


def listed(p: Problem) -> list[Tensor]:
    return [p.params] if isinstance(p.params, Tensor) else p.params


def calls(case: Case, backend: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every operator with arguments that require gradients where that makes sense."""
    p, key = problem(case), case.spec.key
    params = [t.requires_grad_() for t in listed(p)]
    V, U = p.tangents.T.contiguous().requires_grad_(), p.cotangents.T.contiguous()
    one = torch.tensor(0.5, dtype=case.dtype)
    seed = torch.tensor(-3)
    point = (params, p.x, p.y)
    return {
        "loss": (ops.loss, (*point, key, backend)),
        "gradient": (ops.gradient, (*point, key, backend)),
        "hvp": (ops.hvp, (*point, V, key, backend)),
        "ggnvp": (ops.ggnvp, (*point, V[0].detach().requires_grad_(), key, backend)),
        "quadratic": (ops.quadratic, (*point, V, key, False, backend)),
        "hvp_vjp": (ops.hvp_vjp, (*point, V, U, key, True, backend)),
        "penalty": (ops.penalty, (*point, V, None, key, 1, "rademacher", True, backend)),
        "penalty_of_seed": (ops.penalty, (*point, None, seed, key, 2, "normal", False, backend)),
        "penalty_gradient": (
            ops.penalty_gradient,
            (*point, V, None, one, one, key, 1, "rademacher", False, backend),
        ),
    }


# ---- registration ----


@pytest.mark.parametrize(("case", "backend"), PAIRS, ids=str)
def test_opcheck(case: Case, backend: str) -> None:
    for name, (op, args) in calls(case, backend).items():
        if name in ("hvp_vjp", "penalty_gradient"):  # their derivative is an error
            args = ([t.detach() for t in args[0]], *args[1:])
            args = tuple(t.detach() if isinstance(t, Tensor) else t for t in args)
        torch.library.opcheck(op.default, args)


def test_opcheck_of_random_numbers() -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.fresh_seed.default, (0,), test_utils="test_schema")
    args = (torch.tensor(5), 9, 2, "normal", torch.float64, torch.device("cpu"))
    torch.library.opcheck(ops.probes.default, args, test_utils=checks)
    expected = hf.probes(9, 2, distribution="normal", seed=5, dtype=torch.float64).T
    assert torch.equal(ops.probes(*args), expected)
    assert ops.fresh_seed(0) != ops.fresh_seed(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_those_of_the_functional_layer(case: Case, backend: str) -> None:
    p, spec = problem(case), case.spec
    lin = hf.linearize(spec, p.params, p.x, p.y, backend=backend)
    point = (listed(p), p.x, p.y)
    V, U = p.tangents, p.cotangents
    last = (spec.key, backend)
    flags = (spec.key, True, backend)
    pairs = [
        (ops.loss(*point, *last), lin.loss),
        (ops.gradient(*point, *last), lin.grad),
        (ops.hvp(*point, V.T, *last), hf.hvp(lin, V).T),
        (ops.hvp(*point, V[:, 0], *last), hf.hvp(lin, V[:, 0])),
        (ops.ggnvp(*point, V.T, *last), hf.ggnvp(lin, V).T),
        (ops.quadratic(*point, V.T, *flags), hf.quadratic_form(lin, V, curvature="ggn")),
        (ops.hvp_vjp(*point, V.T, U.T, *flags), hf.hvp_vjp(lin, V, U, curvature="ggn")),
        (ops.penalty(*point, V.T, None, spec.key, backend=backend), hf.penalty(lin, V)[:2]),
    ]
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert ops.hvp(*point, V.T[:0], *last).shape == (0, spec.num_params)


def test_errors() -> None:
    p, key = problem(CASE), CASE.spec.key
    point = (listed(p), p.x, p.y)
    with pytest.raises(ValueError, match=r"tangents must be rows \(K, 43\)"):
        ops.hvp(*point, p.tangents, key)
    with pytest.raises(ValueError, match=r"cotangents must be rows"):
        ops.hvp_vjp(*point, p.tangents.T, p.tangents, key)
    for tangents, seed in [(None, None), (p.tangents.T, torch.tensor(1))]:
        with pytest.raises(ValueError, match="either tangents or a seed"):
            ops.penalty(*point, tangents, seed, key)


# ---- derivatives ----


@pytest.mark.parametrize(("case", "backend"), PAIRS, ids=str)
def test_derivatives(case: Case, backend: str) -> None:
    p = problem(case)
    params = [t.requires_grad_() for t in listed(p)]
    V = p.tangents.T.contiguous().requires_grad_()
    last = (case.spec.key, backend)

    def at(op: Callable[..., Any], *rest: Any) -> Callable[..., Any]:
        return lambda *params: op(list(params), p.x, p.y, *rest)

    def along(op: Callable[..., Any], *rest: Any) -> Callable[..., Any]:
        return lambda V, *params: op(list(params), p.x, p.y, V, *rest)

    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(at(ops.loss, *last), params, **fast)
    assert torch.autograd.gradgradcheck(at(ops.loss, *last), params, **fast)
    assert torch.autograd.gradgradcheck(at(ops.gradient, *last), params, **fast)
    for op in (ops.hvp, ops.ggnvp):
        assert torch.autograd.gradcheck(along(op, *last), (V, *params), **fast)
    for ggn in (False, True):
        flags = (case.spec.key, ggn, backend)
        assert torch.autograd.gradcheck(along(ops.quadratic, *flags), (V, *params), **fast)
        draw = (None, case.spec.key, 1, "rademacher", ggn, backend)
        assert torch.autograd.gradcheck(along(ops.penalty, *draw), (V, *params), **fast)
        draw = (None, torch.tensor(3), case.spec.key, 2, "rademacher", ggn, backend)
        assert torch.autograd.gradcheck(at(ops.penalty, *draw), params, **fast)


def test_a_single_row_and_some_parameters() -> None:
    p, last = problem(CASES[1]), (CASES[1].spec.key, "auto")
    params = listed(p)
    params[1].requires_grad_()
    v = p.tangents[:, 0].clone().requires_grad_()
    form = ops.quadratic(params, p.x, p.y, v, CASES[1].spec.key, False, "auto")
    by_v, by_params = torch.autograd.grad(form, (v, params[1]))
    torch.testing.assert_close(by_v, 2 * ops.hvp(params, p.x, p.y, v, *last).detach())
    assert by_params.shape == params[1].shape


def test_beyond_third_order_raises() -> None:
    found = calls(CASE, "auto")
    for name in ("hvp_vjp", "penalty_gradient"):
        op, args = found[name]
        with pytest.raises(RuntimeError, match="no derivative beyond third order"):
            op(*args).sum().backward()
    op, args = found["penalty"]
    (gradient,) = torch.autograd.grad(op(*args)[1], args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative beyond third order"):
        gradient.sum().backward()


def test_derivatives_that_are_not_provided_raise() -> None:
    p, key = problem(CASE), CASE.spec.key
    (flat,) = listed(p)
    with pytest.raises(RuntimeError, match="not with respect to x or y"):
        ops.loss([flat], p.x.requires_grad_(), p.y, key).backward()
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(lambda q: ops.loss([q], p.x, p.y, key), (flat,), (flat,))
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.hessian(lambda q: ops.loss([q], p.x, p.y, key))(flat)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(flat, flat)
        with pytest.raises(NotImplementedError, match="no forward-mode"):
            ops.gradient([dual], p.x, p.y, key)


# ---- torch.func ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_derivatives(backend: str) -> None:
    p, last = problem(CASE), (CASE.spec.key, backend)
    (flat,), V = listed(p), p.tangents.T

    def loss(q: Tensor) -> Tensor:
        return ops.loss([q], p.x, p.y, *last)

    gradient = torch.func.grad(loss)
    torch.testing.assert_close(gradient(flat), ops.gradient([flat], p.x, p.y, *last))
    hvp = torch.func.grad(lambda q: gradient(q) @ V[0])(flat)
    torch.testing.assert_close(hvp, ops.hvp([flat], p.x, p.y, V[0], *last))
    H = torch.func.jacrev(gradient)(flat)
    torch.testing.assert_close(H @ V[1], ops.hvp([flat], p.x, p.y, V[1], *last))
    # an ensemble: two points at once
    both = torch.func.vmap(gradient)(torch.stack([flat, 2 * flat]))
    torch.testing.assert_close(both, torch.stack([gradient(flat), gradient(2 * flat)]))


def test_vmap_over_tangents_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    p, key = problem(CASE), CASE.spec.key
    params, (K, P) = listed(p), (5, CASE.spec.num_params)
    V = torch.randn(P, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    linearized = []
    once = torch_ops.linearize_model
    monkeypatch.setattr(
        torch_ops,
        "linearize_model",
        lambda *args, **options: linearized.append(1) or once(*args, **options),
    )
    for op, flags in [(ops.hvp, ()), (ops.ggnvp, ()), (ops.quadratic, (True,))]:
        expected = op(params, p.x, p.y, V.T, key, *flags)

        def one(v: Tensor, op: Any = op, flags: tuple[bool, ...] = flags) -> Tensor:
            return op(params, p.x, p.y, v, key, *flags)

        linearized.clear()
        actual = torch.func.vmap(one, in_dims=1)(V)
        assert len(linearized) == 1
        torch.testing.assert_close(actual, expected)
        stacked = torch.func.vmap(one)(V.T.reshape(5, 1, P).expand(5, 2, P))  # (B, K, P)
        torch.testing.assert_close(stacked[:, 1], expected)
        nested = torch.func.vmap(torch.func.vmap(one))(V.T[:4].reshape(2, 2, P))
        torch.testing.assert_close(nested.reshape(4, *nested.shape[2:]), expected[:4])


def test_vmap_over_anything_else_runs_one_by_one() -> None:
    p, key = problem(CASES[1]), CASES[1].spec.key
    params, V = listed(p), p.tangents.T
    scales = torch.tensor([1.0, 0.5], dtype=torch.float64)
    for name, (op, args) in calls(CASES[1], "auto").items():
        options = args[3:]

        def scaled(s: Tensor, op: Any = op, options: tuple[Any, ...] = options) -> Any:
            return op([s * params[0].detach(), *params[1:]], s * p.x, p.y, *options)

        batched = torch.func.vmap(scaled)(scales)
        single = [scaled(s) for s in scales]
        if isinstance(single[0], tuple):
            expected = tuple(torch.stack(parts) for parts in zip(*single, strict=True))
        else:
            expected = torch.stack(single)
        torch.testing.assert_close(batched, expected, msg=name)
    pairs = torch.func.vmap(lambda v, u: ops.hvp_vjp(params, p.x, p.y, v, u, key))(V, V.flip(0))
    expected = torch.stack([ops.hvp_vjp(params, p.x, p.y, V[k], V[-1 - k], key) for k in range(3)])
    torch.testing.assert_close(pairs, expected)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_hessian_penalty_under_torch_func(curvature: str) -> None:
    p = problem(CASE)
    module = Penalised(mlp_of(CASE), seed=3, num_probes=2, curvature=curvature)

    def total(flat: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"model.flat": flat}, (p.x, p.y))

    expected = torch.autograd.grad(module(p.x, p.y), module.model.flat)[0]
    torch.testing.assert_close(torch.func.grad(total)(p.flat), expected)
    ensemble = torch.func.vmap(torch.func.grad(total))(torch.stack([p.flat, 0.5 * p.flat]))
    torch.testing.assert_close(ensemble[0], expected)
    with pytest.raises(RuntimeError, match="no derivative beyond third order"):
        torch.func.grad(lambda q: torch.func.grad(total)(q).sum())(p.flat)
    traced = make_fx(total)(p.flat)
    assert any("hvpfast.penalty" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(2 * p.flat), total(2 * p.flat))
