"""The specification against dense matrices, finite differences and models that are not MLPs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import FEW, Case, problem
from oracle import dense_ggn, dense_hessian
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.backends.reference import state as reference

pytestmark = pytest.mark.usefixtures("single_threaded")

CURVATURES = ("hessian", "ggn")
SMOOTH = [case for case in FEW if case.spec.activation != "relu"]
cases = pytest.mark.parametrize("case", FEW, ids=str)
smooth_cases = pytest.mark.parametrize("case", SMOOTH, ids=str)
curvatures = pytest.mark.parametrize("curvature", CURVATURES)


def _linearize(case: Case, flat: Tensor) -> hf.Linearization:
    q = problem(case)
    return hf.linearize(case.spec, flat, q.x, q.y, backend="reference")


def _close(a: Tensor, b: Tensor, rtol: float) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= rtol * b.norm() + 1e-14


def central_difference(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> Tensor:
    """d function(at + h along) / dh, by Richardson extrapolation of central differences."""
    h = 2e-3 / float(along.abs().max())

    def slope(step: float) -> Tensor:
        return (function(at + step * along) - function(at - step * along)) / (2 * step)

    return (slope(h) - 20 * slope(h / 2) + 64 * slope(h / 4)) / 45


@cases
def test_dense_matrices(case: Case) -> None:
    q = problem(case)
    lin = _linearize(case, q.flat)
    identity = torch.eye(case.spec.num_params, dtype=torch.float64)
    H, G = dense_hessian(case.spec, q.flat, q.x, q.y), dense_ggn(case.spec, q.flat, q.x, q.y)
    _close(hf.hvp(lin, identity), H, 1e-12)
    _close(hf.ggnvp(lin, identity), G, 1e-12)
    assert torch.linalg.eigvalsh(G)[0] > -1e-12 * G.norm()
    _close(hf.quadratic_form(lin, identity), H.diagonal(), 1e-12)
    _close(hf.quadratic_form(lin, identity, curvature="ggn"), G.diagonal(), 1e-12)
    _, penalty, _ = hf.penalty(lin, identity)
    _close(penalty * case.spec.num_params, H.square().sum(), 1e-12)


@smooth_cases
def test_gradient_and_hvp_are_derivatives(case: Case) -> None:
    q = problem(case)
    lin, v = _linearize(case, q.flat), q.tangents[:, 0]
    slope = central_difference(lambda p: _linearize(case, p).loss, q.flat, v)
    _close(lin.grad @ v, slope, 1e-8)
    slope = central_difference(lambda p: _linearize(case, p).grad, q.flat, v)
    _close(hf.hvp(lin, v), slope, 1e-8)


@curvatures
@smooth_cases
def test_third_order_are_derivatives(case: Case, curvature: str) -> None:
    q = problem(case)
    V, U = q.tangents, q.cotangents
    along = problem(Case(case.spec, case.N + 1)).tangents[:, 0]
    product = hf.hvp if curvature == "hessian" else hf.ggnvp
    lin = _linearize(case, q.flat)

    def inner(p: Tensor) -> Tensor:
        return (U * product(_linearize(case, p), V)).sum()

    vjp = hf.hvp_vjp(lin, V, U, curvature=curvature)
    _close(vjp @ along, central_difference(inner, q.flat, along), 1e-7)

    def both(p: Tensor) -> Tensor:
        other = _linearize(case, p)
        return 0.5 * other.loss + 3.0 * product(other, V).square().sum(0).mean()

    loss, penalty, gradient = hf.penalty(lin, V, weights=(0.5, 3.0), curvature=curvature)
    _close(gradient @ along, central_difference(both, q.flat, along), 1e-7)
    _close(0.5 * loss + 3.0 * penalty, both(q.flat), 1e-12)


def test_third_derivative_is_symmetric() -> None:
    case = SMOOTH[0]
    q = problem(case)
    lin, (u, v) = _linearize(case, q.flat), q.tangents.T
    w = q.cotangents[:, 0]
    values = [hf.hvp_vjp(lin, a, b) @ c for a, b, c in ((u, v, w), (v, u, w), (w, v, u), (u, w, v))]
    torch.testing.assert_close(torch.stack(values), values[0].expand(4), rtol=1e-12, atol=1e-14)


def _conv_net() -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
        ).double()
    x = torch.randn(5, 1, 6, 6, generator=g, dtype=torch.float64)
    return model, x, torch.randint(0, 3, (5,), generator=g)


def _focal(z: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(z, 1)[torch.arange(y.numel()), y]
    return -((1 - log_p.exp()).square() * log_p).mean()


def test_any_model_and_loss() -> None:
    model, x, y = _conv_net()
    names, params = zip(*model.named_parameters(), strict=True)

    def outputs(p: tuple[Tensor, ...]) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, p, strict=True)), (x,))

    def loss(p: Tensor) -> Tensor:
        parts = p.split([q.numel() for q in params])
        shaped = tuple(part.view_as(q) for part, q in zip(parts, params, strict=True))
        return _focal(outputs(shaped), y)

    state = reference.linearize_function(outputs, lambda z: _focal(z, y), params, normalizer=5.0)
    flat = torch.cat([p.detach().reshape(-1) for p in params])
    P = flat.numel()
    H = torch.autograd.functional.hessian(loss, flat)
    g = torch.Generator().manual_seed(1)
    V, U = (torch.randn(3, P, generator=g, dtype=torch.float64) for _ in range(2))
    _close(state.gradient(), torch.autograd.functional.jacobian(loss, flat), 1e-12)
    _close(state.hvp(V, False), V @ H, 1e-12)
    assert state.normalizer == 5.0
    assert state.nbytes > 0
    assert all(p.grad is None and p.requires_grad for p in params)

    def products(p: Tensor) -> Tensor:
        at = torch.autograd.functional.hessian(loss, p, create_graph=True)
        return V @ at

    leaf = flat.clone().requires_grad_()
    (vjp,) = torch.autograd.grad((U * products(leaf)).sum(), leaf)
    _close(state.hvp_vjp(V, U, False), vjp, 1e-12)
    leaf = flat.clone().requires_grad_()
    total = 0.5 * loss(leaf) + 2.0 * products(leaf).square().sum(1).mean()
    penalty = state.penalty(V, False)
    _close(penalty.gradient(0.5, 2.0), torch.autograd.grad(total, leaf)[0], 1e-12)
    _close(0.5 * penalty.loss + 2.0 * penalty.penalty, total.detach(), 1e-12)
    # the ggn: J' D J with D the Hessian of the loss in the outputs
    J = torch.cat([j.reshape(15, -1) for j in torch.autograd.functional.jacobian(
        lambda *p: outputs(p), params)], 1)  # fmt: skip
    D = torch.autograd.functional.hessian(lambda z: _focal(z, y), model(x).detach())
    _close(state.hvp(V, True), V @ (J.T @ D.reshape(15, 15) @ J), 1e-12)


class _Cube(torch.autograd.Function):
    """x^3, with a gradient whose own backward pass looks at values, which vmap cannot do."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _CubeBackward.apply(grad, *ctx.saved_tensors)


class _CubeBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return 3 * grad * x * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, along: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        grad, x = ctx.saved_tensors
        assert bool(along.isfinite().all())
        return 3 * along * x * x, 6 * along * grad * x


def test_loops_and_says_so_where_vmap_cannot() -> None:
    p = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    state = reference.linearize_function(
        lambda q: q[0], lambda z: _Cube.apply(z).sum(), (p,), normalizer=1.0
    )
    V = torch.eye(3, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="torch.vmap cannot run this model, so the 3 tangents"):
        H = state.hvp(V, False)
    torch.testing.assert_close(H, torch.diag(6 * p))
    torch.testing.assert_close(state.hvp(V[:1], False), torch.diag(6 * p)[:1])  # no vmap for one


def test_function_arguments_are_checked() -> None:
    p, q = torch.ones(3), torch.ones(2, dtype=torch.float64)
    with pytest.raises(TypeError, match="share one dtype"):
        reference.linearize_function(lambda t: t[0], lambda z: z.sum(), (p, q))
    with pytest.raises(ValueError, match="params is empty"):
        reference.linearize_function(lambda t: t[0], lambda z: z.sum(), ())
    with pytest.raises(ValueError, match=r"the loss must be a 0-dim tensor; got \(3,\)"):
        reference.linearize_function(lambda t: t[0], lambda z: z, (p,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    case = Case(hf.MLPSpec((6, 5, 3), "tanh"), 8)
    q = problem(case)
    exact = hf.hvp(_linearize(case, q.flat), q.tangents)
    lin = hf.linearize(case.spec, q.flat.to(dtype), q.x.to(dtype), q.y, backend="reference")
    Y = hf.hvp(lin, q.tangents.to(dtype))
    assert Y.dtype == dtype
    assert (Y.double() - exact).norm() < 0.1 * exact.norm()


def test_any_grad_mode() -> None:
    """The same result with grad on, off, and in inference mode; nothing is recorded."""
    case = SMOOTH[1]
    q = problem(case)
    params = nn.Parameter(q.flat)
    results = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            lin = _linearize(case, params)
            out = [lin.grad, hf.hvp(lin, q.tangents), hf.ggnvp(lin, q.tangents)]
            out += [hf.hvp_vjp(lin, q.tangents, q.cotangents), *hf.penalty(lin, q.tangents)]
        assert not any(t.requires_grad for t in out)
        results.append(out)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    assert params.grad is None


def test_softplus_above_torchs_threshold() -> None:
    """Above 20 the specification is torch's softplus: linear, so its curvature is gone."""
    spec = hf.MLPSpec((1, 1, 1), "softplus", "mse", "sum", bias=False)
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    lin = hf.linearize(
        spec, torch.tensor([21.0, 1.0], dtype=torch.float64), x, y, backend="reference"
    )
    assert float(lin.loss) == 441.0
