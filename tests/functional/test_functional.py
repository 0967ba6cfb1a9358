"""Identities that every backend must satisfy, and the life of a Linearization."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from cases import FEW, Case, problem, with_dtype
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.backends import BACKENDS, choose
from hvpfast.functional import linearize
from hvpfast.mlp.spec import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("single_threaded")

RUNNING = [name for name, reason in hf.available().items() if reason is None]
backends = pytest.mark.parametrize("backend", RUNNING)
cases = pytest.mark.parametrize("case", FEW, ids=str)
PRODUCTS = {"hessian": hf.hvp, "ggn": hf.ggnvp}
curvatures = pytest.mark.parametrize("curvature", PRODUCTS)


def _linearize(case: Case, backend: str, **options: int) -> hf.Linearization:
    q = problem(case)
    return hf.linearize(case.spec, q.params, q.x, q.y, backend=backend, **options)


def _equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@curvatures
@cases
@backends
def test_products_are_linear_and_symmetric(backend: str, case: Case, curvature: str) -> None:
    q, product = problem(case), PRODUCTS[curvature]
    lin, V, U = _linearize(case, backend), q.tangents, q.cotangents
    Y = product(lin, V)
    _equal(U.T @ Y, product(lin, U).T @ V)
    _equal(product(lin, 2 * V - 3 * U), 2 * Y - 3 * product(lin, U))
    assert not product(lin, torch.zeros_like(V)).any()
    stacked = product(lin, torch.cat([V, U, V], 1))
    for k, v in enumerate(torch.cat([V, U, V], 1).T):
        _equal(stacked[:, k], product(lin, v))
    _equal(hf.quadratic_form(lin, V, curvature=curvature), (V * Y).sum(0))
    if curvature == "ggn":
        assert (hf.quadratic_form(lin, V, curvature="ggn") >= 0).all()


@curvatures
@cases
@backends
def test_third_order_identities(backend: str, case: Case, curvature: str) -> None:
    q = problem(case)
    lin, V, U = _linearize(case, backend), q.tangents, q.cotangents
    Y = PRODUCTS[curvature](lin, V)
    vjp = hf.hvp_vjp(lin, V, U, curvature=curvature)
    one_by_one = [hf.hvp_vjp(lin, v, u, curvature=curvature) for v, u in zip(V.T, U.T, strict=True)]
    _equal(vjp, torch.stack(one_by_one).sum(0))
    _equal(vjp, hf.hvp_vjp(lin, U, V, curvature=curvature))  # H and G are symmetric
    loss, penalty, both = hf.penalty(lin, V, weights=(0.5, 2.0), curvature=curvature)
    _equal(loss, lin.loss)
    _equal(penalty, Y.square().sum(0).mean())
    alone = hf.penalty(lin, V, weights=(0.0, 1.0), curvature=curvature)[2]
    _equal(alone, 2 / V.shape[1] * hf.hvp_vjp(lin, V, Y, curvature=curvature))
    _equal(both, 0.5 * lin.grad + 2.0 * alone)
    _equal(hf.penalty(lin, V, weights=(3.0, 0.0), curvature=curvature)[2], 3 * lin.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("activation", ["identity", "relu"])
@backends
def test_ggn_is_hessian_for_linear_model_with_mse(
    backend: str, activation: str, reduction: str
) -> None:
    lin = _linearize(Case(hf.MLPSpec((5, 3), activation, "mse", reduction), 7), backend)
    identity = torch.eye(lin.num_params, dtype=torch.float64)
    _equal(hf.hvp(lin, identity), hf.ggnvp(lin, identity))
    assert not hf.hvp_vjp(lin, identity, identity).any()  # a quadratic has no third derivative


@backends
def test_hessian_is_more_than_ggn_beyond_that(backend: str) -> None:
    case = Case(hf.MLPSpec((5, 4, 3), "identity", "mse"), 7)
    lin, V = _linearize(case, backend), problem(case).tangents
    assert (hf.hvp(lin, V) - hf.ggnvp(lin, V)).norm() > 0.01 * hf.hvp(lin, V).norm()


@cases
@backends
def test_mean_is_sum_divided_by_the_normalizer(backend: str, case: Case) -> None:
    q = problem(case)
    total, mean = (
        hf.linearize(dataclasses.replace(case.spec, reduction=r), q.flat, q.x, q.y, backend=backend)
        for r in ("sum", "mean")
    )
    assert total.normalizer == 1.0
    _equal(mean.loss * mean.normalizer, total.loss)
    _equal(hf.hvp(mean, q.tangents) * mean.normalizer, hf.hvp(total, q.tangents))


@backends
def test_normalizer_counts(backend: str) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 2, 1, 2])

    def normalizer(y: Tensor = y, **fields: object) -> float:
        spec = hf.MLPSpec((3, 3), **fields)  # type: ignore[arg-type]
        return hf.linearize(spec, torch.zeros(12), x, y, backend=backend).normalizer

    assert normalizer() == 4
    assert normalizer(ignore_index=2) == 2
    assert normalizer(class_weights=(1.0, 2.0, 0.5)) == 4.0
    assert normalizer(class_weights=(1.0, 2.0, 0.5), ignore_index=2) == 3.0
    assert normalizer(torch.zeros(4, 3), loss="mse") == 12
    assert normalizer(torch.zeros(4, 3), loss="mse", reduction="sum") == 1


@backends
def test_batches_add_up(backend: str) -> None:
    """Sums over a split batch are sums over the batch, in every operation that is linear in it."""
    case = Case(hf.MLPSpec((5, 6, 3), "gelu", reduction="sum"), 37)
    q = problem(case)
    parts = [
        hf.linearize(case.spec, q.flat, q.x[s], q.y[s], backend=backend)
        for s in (slice(0, 16), slice(16, 17), slice(17, 37))
    ]
    lin = _linearize(case, backend)
    _equal(sum((part.loss for part in parts), torch.zeros(())).double(), lin.loss)
    for operation in (hf.hvp, hf.ggnvp, hf.quadratic_form):
        _equal(sum(operation(part, q.tangents) for part in parts), operation(lin, q.tangents))
    vjps = [hf.hvp_vjp(part, q.tangents, q.cotangents) for part in parts]
    _equal(torch.stack(vjps).sum(0), hf.hvp_vjp(lin, q.tangents, q.cotangents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@backends
def test_shapes_of_results(backend: str, dtype: torch.dtype) -> None:
    case = with_dtype(FEW[2], dtype)
    lin, q, P = _linearize(case, backend), problem(case), case.spec.num_params
    assert (lin.num_params, lin.dtype, lin.device) == (P, dtype, torch.device("cpu"))
    assert lin.backend == backend
    assert lin.loss.shape == ()
    assert lin.grad.shape == (P,)
    assert lin.grad is lin.grad, "computed once"
    for columns, form in (((P,), ()), ((P, 0), (0,)), ((P, 1), (1,)), ((P, 3), (3,))):
        V = torch.ones(columns, dtype=dtype)
        for product in PRODUCTS.values():
            out = product(lin, V)
            assert (out.shape, out.dtype) == (columns, dtype)
            assert out.mT.is_contiguous() if len(columns) == 2 else out.is_contiguous()
        assert hf.quadratic_form(lin, V).shape == form
        assert hf.hvp_vjp(lin, V, V).shape == (P,)
    assert not hf.hvp_vjp(lin, q.tangents[:, :0], q.tangents[:, :0]).any()


@backends
def test_flat_layers_and_modules_agree(backend: str) -> None:
    case = Case(hf.MLPSpec((5, 6, 3), "silu"), 9)
    q = problem(case)
    mlp = hf.MLP(case.spec.sizes, "silu", dtype=torch.float64)
    with torch.no_grad():
        mlp.flat.copy_(q.flat)
    sources = [q.flat, case.spec.unflatten(q.flat), tuple(case.spec.unflatten(q.flat))]
    sources += [hf.params_of(mlp), hf.params_of(mlp.to_sequential())]
    outs = []
    for params in sources:
        lin = hf.linearize(case.spec, params, q.x, q.y, backend=backend)
        outs.append(
            torch.cat([lin.grad, hf.hvp(lin, q.tangents[:, 0]), hf.penalty(lin, seed=1)[2]])
        )
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@backends
def test_inputs_of_any_layout(backend: str) -> None:
    case = Case(hf.MLPSpec((6, 5, 3), "tanh"), 8)
    q = problem(case)
    expected = hf.hvp(_linearize(case, backend), q.tangents)
    images = q.x.reshape(8, 1, 2, 3)
    transposed = q.x.T.contiguous().T
    spread = torch.stack([q.y, q.y], 1)[:, 0]
    for x, y in ((images, q.y), (transposed, q.y), (q.x, spread)):
        lin = hf.linearize(case.spec, q.flat, x, y, backend=backend)
        assert torch.equal(hf.hvp(lin, q.tangents), expected)
    row_major = q.tangents.contiguous()
    assert torch.equal(hf.hvp(_linearize(case, backend), row_major), expected)
    spaced = torch.stack([q.tangents[:, 0]] * 2, 1)[:, 0]
    assert torch.equal(hf.hvp(_linearize(case, backend), spaced), hf.hvp(
        _linearize(case, backend), q.tangents[:, 0]))  # fmt: skip


@backends
def test_no_side_effects(backend: str) -> None:
    case = Case(hf.MLPSpec((5, 6, 3), "softplus"), 9)
    q = problem(case)
    params = nn.Parameter(q.flat.clone())
    x = q.x.clone().requires_grad_()
    V = q.tangents.clone().requires_grad_()
    rng = torch.get_rng_state()
    before = [t.detach().clone() for t in (params, x, V)]
    lin = hf.linearize(case.spec, params, x, q.y, backend=backend)
    results = [lin.loss, lin.grad, hf.hvp(lin, V), hf.ggnvp(lin, V), hf.quadratic_form(lin, V)]
    results += [hf.hvp_vjp(lin, V, V), *hf.penalty(lin, V), *hf.penalty(lin, num_probes=2)]
    assert not any(t.requires_grad for t in results)
    assert torch.equal(rng, torch.get_rng_state())
    for t, value in zip((params, x, V), before, strict=True):
        assert t.grad is None
        assert t.requires_grad
        assert torch.equal(t, value)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@backends
def test_saturated_outputs_stay_finite(backend: str, loss: str) -> None:
    """Far into every saturation, where exp overflows: finite and right."""
    for activation in ACTIVATIONS:
        spec = hf.MLPSpec((4, 6, 3), activation, loss)
        q = problem(Case(spec, 10))
        wide = hf.linearize(spec, 300 * q.flat, q.x, q.y, backend="reference")
        for dtype in (torch.float32, torch.float64):
            flat, x, V = (300 * q.flat).to(dtype), q.x.to(dtype), q.tangents.to(dtype)
            y = q.y if loss == "cross_entropy" else q.y.to(dtype)
            lin = hf.linearize(spec, flat, x, y, backend=backend)
            for ours, truth in (
                (lin.loss, wide.loss),
                (lin.grad, wide.grad),
                (hf.hvp(lin, V), hf.hvp(wide, q.tangents)),
                (hf.hvp_vjp(lin, V, V), hf.hvp_vjp(wide, q.tangents, q.tangents)),
                (hf.penalty(lin, V)[2], hf.penalty(wide, q.tangents)[2]),
            ):
                assert torch.isfinite(ours).all(), activation
                if (backend, dtype) == ("reference", torch.float32):
                    continue  # torch computes 1 - tanh^2, which keeps no digits in saturation
                assert (ours - truth).norm() <= 1e-3 * truth.norm() + 1e-30, activation


@backends
def test_penalty_draws_probes_from_the_seed(backend: str) -> None:
    case = Case(hf.MLPSpec((5, 6, 3), "tanh"), 9)
    lin, P = _linearize(case, backend), case.spec.num_params
    first, second = (hf.penalty(lin, num_probes=3, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    explicit = hf.penalty(lin, hf.probes(P, 3, seed=5, dtype=torch.float64))
    for a, b in zip(first, explicit, strict=True):
        _equal(a, b)
    other = hf.penalty(lin, num_probes=3, seed=6)
    assert not torch.equal(first[1], other[1])
    fresh = [hf.penalty(lin, num_probes=3)[1] for _ in range(2)]
    assert not torch.equal(*fresh)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@backends
def test_penalty_estimates_the_frobenius_norm(backend: str, distribution: str) -> None:
    for sizes, N in (((5, 6, 3), 9), ((40, 8, 3), 10)):  # D[0] below and above the batch
        lin = _linearize(Case(hf.MLPSpec(sizes, "tanh"), N), backend)
        P = lin.num_params
        exact = hf.hvp(lin, torch.eye(P, dtype=torch.float64)).square().sum()
        draws = torch.stack(
            [
                hf.penalty(lin, num_probes=50, distribution=distribution, seed=s)[1]
                for s in range(20)
            ]
        )
        assert abs(draws.mean() - exact) < 4.5 * draws.std() / 20**0.5


@backends
def test_stale_linearization_raises(backend: str) -> None:
    case = Case(hf.MLPSpec((5, 6, 3), "tanh"), 9)
    q = problem(case)
    layers = [t.clone() for t in case.spec.unflatten(q.flat)]
    for params, changed in (
        (q.flat, q.flat),
        (q.flat, q.flat[3:5]),
        (layers, layers[2]),
        (q.flat, q.x),
        (q.flat, q.y),
    ):
        lin = hf.linearize(case.spec, params, q.x, q.y, backend=backend)
        hf.hvp(lin, q.tangents)
        changed.mul_(1)
        for call in (
            lambda lin, V: lin.grad,
            hf.hvp,
            hf.ggnvp,
            hf.quadratic_form,
            lambda lin, V: hf.hvp_vjp(lin, V, V),
            hf.penalty,
            lambda lin, V: lin.check_current(),
        ):
            with pytest.raises(RuntimeError, match=r"changed in place.*linearize again"):
                call(lin, q.tangents)


@backends
def test_an_optimizer_step_makes_it_stale(backend: str) -> None:
    mlp = hf.MLP((5, 3))
    q = problem(Case(hf.MLPSpec((5, 3)), 4, dtype=torch.float32))
    lin = hf.linearize(hf.MLPSpec((5, 3)), mlp.flat, q.x, q.y, backend=backend)
    mlp.flat.grad = lin.grad
    torch.optim.Adam(mlp.parameters()).step()
    with pytest.raises(RuntimeError, match="changed in place"):
        hf.hvp(lin, q.tangents)


@backends
def test_order_two_keeps_less(backend: str) -> None:
    case = Case(hf.MLPSpec((5, 6, 3), "tanh"), 9)
    q = problem(case)
    lin, full = _linearize(case, backend, order=2), _linearize(case, backend)
    assert torch.equal(hf.hvp(lin, q.tangents), hf.hvp(full, q.tangents))
    assert lin.state.nbytes <= full.state.nbytes
    for call in (lambda: hf.hvp_vjp(lin, q.tangents, q.tangents), lambda: hf.penalty(lin)):
        with pytest.raises(RuntimeError, match=r"order=2; call linearize\(..., order=3\)"):
            call()


@backends
def test_the_linearization_keeps_its_memory_alive(backend: str) -> None:
    case = Case(hf.MLPSpec((50, 60, 3), "tanh"), 90)
    q = problem(case)
    lin = hf.linearize(
        case.spec, q.flat.clone(), q.x.clone(), q.y.clone(), backend=backend
    )  # nothing else refers to these
    junk = [torch.full_like(t, 7) for t in (q.flat, q.x, q.y) for _ in range(20)]
    again = _linearize(case, backend)
    assert torch.equal(hf.hvp(lin, q.tangents), hf.hvp(again, q.tangents))
    assert len(junk) == 60


def test_inference_tensors() -> None:
    case = Case(hf.MLPSpec((5, 3)), 4)
    with torch.inference_mode():
        q = problem(case)
        lin = hf.linearize(case.spec, q.flat, q.x, q.y)
        out = hf.hvp(lin, q.tangents)
    q = problem(case)
    torch.testing.assert_close(out, hf.hvp(_linearize(case, "reference"), q.tangents))


def test_auto_takes_the_first_backend_that_can_run() -> None:
    case = Case(hf.MLPSpec((5, 6, 3), "tanh"), 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        lin = _linearize(case, "auto")
    assert lin.backend == RUNNING[0]
    text = lin.explain()
    assert f"backend: {RUNNING[0]}" in text
    assert "MLP (5, 6, 3) tanh, cross_entropy (mean), P = 57, torch.float64 on cpu" in text
    half = hf.linearize(
        case.spec, torch.zeros(57).half(), torch.ones(2, 5).half(), torch.tensor([0, 1])
    )
    assert half.backend == "reference"
    assert "passed over cpu: " in half.explain()
    assert "backend reference" in repr(half)


def test_a_missing_extension_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = pytest.importorskip("hvpfast.backends.cpu.state")
    monkeypatch.setattr(cpu, "unavailable", lambda: "it is not built")
    monkeypatch.setattr(linearize, "_warned", set())
    linearize._plan.cache_clear()
    try:
        case = Case(hf.MLPSpec((5, 6, 3), "tanh"), 9)
        with pytest.warns(RuntimeWarning, match=r"slow reference backend.*it is not built"):
            lin = _linearize(case, "auto")
        assert lin.backend == "reference"
        assert "passed over cpu: it is not built" in lin.explain()
        assert hf.available()["cpu"] == "it is not built"
        _linearize(Case(hf.MLPSpec((4, 3)), 9), "auto")  # no second warning: it would be an error
        with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: cpu: it is not built"):
            _linearize(case, "cpu")
    finally:
        linearize._plan.cache_clear()


def test_a_backend_that_cannot_be_imported_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvpfast.backends.BACKENDS", {"nowhere": "nowhere.state", **BACKENDS})
    assert "cannot be imported" in str(hf.available()["nowhere"])
    with pytest.raises(RuntimeError, match=r"nowhere.*cannot be imported"):
        choose("nowhere", None, torch.device("cpu"), torch.float32)
