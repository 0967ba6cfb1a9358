"""hessian_penalty: values and gradients against the oracle, and autograd's rules."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from backends_here import BACKENDS
from cases import FEW, Case, problem, with_dtype
from networks import Small, gradients, loss_module, mlp_of, small
from oracle import assert_within_reference_error, dense_hessian, oracle
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.functional.hessian_penalty import engine, hessian_penalty

CURVATURES = ("hessian", "ggn")
WEIGHTS = (0.7, 0.3)


@pytest.fixture(name="small")
def _small() -> Small:
    return small()


# ---- values and gradients ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_matches_the_oracle(case: Case, dtype: torch.dtype, backend: str) -> None:
    case = with_dtype(case, dtype)
    p = problem(case)
    same = oracle(case.spec, p.flat, p.x, p.y, p.tangents, p.cotangents)
    wide = problem(with_dtype(case, torch.float64))
    y = wide.y if case.spec.loss == "mse" else p.y
    exact = (p.flat.double(), p.x.double(), y, p.tangents.double(), p.cotangents.double())
    truth = oracle(case.spec, *exact)
    loss_fn = loss_module(case.spec, dtype)
    mlp = mlp_of(case, p.flat)
    for model, curvature in [(mlp, "hessian"), (mlp.to_sequential(), "ggn")]:
        loss, penalty = hessian_penalty(
            model, loss_fn, (p.x, p.y), curvature=curvature, tangents=p.tangents, backend=backend
        )
        assert loss.requires_grad
        assert penalty.requires_grad
        (WEIGHTS[0] * loss + WEIGHTS[1] * penalty).backward()

        def weighted(results: dict[str, Tensor], curvature: str = curvature) -> Tensor:
            third = results[f"{curvature} penalty gradient"]
            return WEIGHTS[0] * results["gradient"] + WEIGHTS[1] * third

        for name, actual, key in [
            ("loss", loss, "loss"),
            ("penalty", penalty, f"{curvature} penalty"),
        ]:
            label = f"{backend} {case} {curvature} {name}"
            assert_within_reference_error(actual.detach(), truth[key], same[key], label)
        assert_within_reference_error(
            gradients(model), weighted(truth), weighted(same), f"{backend} {case} {curvature} grad"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_gradcheck(case: Case, curvature: str, backend: str) -> None:
    p = problem(case)
    model, loss_fn = mlp_of(case, p.flat), loss_module(case.spec, case.dtype)

    def both(flat: Tensor) -> tuple[Tensor, Tensor]:
        assert flat is model.flat
        return hessian_penalty(
            model, loss_fn, (p.x, p.y), curvature=curvature, num_probes=2, seed=5, backend=backend
        )

    # the slow mode compares every entry of the gradient, the fast mode one random combination
    assert torch.autograd.gradcheck(both, model.flat, fast_mode=backend == "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_is_the_functional_penalty(small: Small, distribution: str, backend: str) -> None:
    model, loss_fn, (x, y) = small
    draw = {"num_probes": 3, "distribution": distribution, "seed": 2**64 - 3}
    lin = hf.linearize(hf.spec_of(model, loss_fn), model.flat, x, y, backend=backend)
    expected = hf.penalty(lin, weights=WEIGHTS, **draw)
    loss, penalty = hessian_penalty(model, loss_fn, (x, y), backend=backend, **draw)
    (WEIGHTS[0] * loss + WEIGHTS[1] * penalty).backward()
    assert model.flat.grad is not None
    for actual, wanted in zip((loss, penalty, model.flat.grad), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_seeds(small: Small) -> None:
    model, loss_fn, data = small

    def penalty(seed: int | Tensor | None) -> float:
        return hessian_penalty(model, loss_fn, data, seed=seed)[1].item()

    assert penalty(7) == penalty(7)
    assert penalty(7) != penalty(8)
    assert penalty(None) != penalty(None)
    assert penalty(torch.tensor(7)) == penalty(7)
    assert penalty(torch.tensor(-1)) == penalty(2**64 - 1)  # int64 in two's complement
    with pytest.raises(ValueError, match="seed"):
        penalty(-1)


def test_mean_over_probes_estimates_the_frobenius_norm(small: Small) -> None:
    model, loss_fn, (x, y) = small
    truth = dense_hessian(hf.spec_of(model, loss_fn), model.flat, x, y).square().sum()
    with torch.no_grad():
        estimate = hessian_penalty(model, loss_fn, (x, y), num_probes=4000, seed=1)[1]
    assert abs(estimate / truth - 1) < 0.1


# ---- autograd's rules ----


def test_each_output_alone_and_in_place_sums(small: Small) -> None:
    model, loss_fn, data = small

    def gradient(w_loss: float, w_penalty: float) -> Tensor:
        loss, penalty = hessian_penalty(model, loss_fn, data, seed=1)
        total = w_loss * loss + w_penalty * penalty
        return torch.autograd.grad(total, model.flat)[0]

    loss, penalty = hessian_penalty(model, loss_fn, data, seed=1)
    of_loss = torch.autograd.grad(loss, model.flat, retain_graph=True)[0]
    of_penalty = torch.autograd.grad(penalty, model.flat)[0]
    torch.testing.assert_close(of_loss, gradient(1, 0))
    torch.testing.assert_close(of_penalty, gradient(0, 1))
    torch.testing.assert_close(gradient(2, -3), 2 * of_loss - 3 * of_penalty)
    loss, penalty = hessian_penalty(model, loss_fn, data, seed=1)
    loss += 0.5 * penalty
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert model.flat.grad is not None
    torch.testing.assert_close(model.flat.grad, 2 * (of_loss + 0.5 * of_penalty))


def test_backward_twice_needs_retain_graph(small: Small) -> None:
    loss, _ = hessian_penalty(*small, seed=1)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("sequential", [False, True])
def test_second_derivative_raises(small: Small, sequential: bool) -> None:
    model, loss_fn, data = small
    module: nn.Module = model.to_sequential() if sequential else model
    loss, penalty = hessian_penalty(module, loss_fn, data, seed=1)
    params = list(module.parameters())
    for output in (penalty, loss):
        # a constant incoming gradient, where once_differentiable would drop the term silently
        first = torch.autograd.grad(output, params, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.grad(first[0].sum(), params, allow_unused=True)


@pytest.mark.parametrize("which", ["params", "x"])
def test_change_before_backward_raises(small: Small, which: str) -> None:
    model, loss_fn, (x, y) = small
    loss, penalty = hessian_penalty(model, loss_fn, (x, y), seed=1)
    with torch.no_grad():
        (model.flat if which == "params" else x).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()


def test_derivative_in_x_raises(small: Small) -> None:
    model, loss_fn, (x, y) = small
    x.requires_grad_()
    loss, penalty = hessian_penalty(model, loss_fn, (x, y), seed=1)
    with pytest.raises(RuntimeError, match="not to x"):
        (loss + penalty).backward()


def test_derivative_in_tangents(small: Small) -> None:
    model, loss_fn, (x, y) = small
    V = hf.probes(model.flat.numel(), 2, seed=1, dtype=torch.float64).requires_grad_()
    _, penalty = hessian_penalty(model, loss_fn, (x, y), tangents=V)
    H = dense_hessian(hf.spec_of(model, loss_fn), model.flat, x, y)
    torch.testing.assert_close(torch.autograd.grad(penalty, V)[0], H @ H @ V.detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_only_without_grad_mode(small: Small, mode: type) -> None:
    expected = [t.item() for t in hessian_penalty(*small, seed=1)]
    with mode():
        results = hessian_penalty(*small, seed=1)
    assert [t.item() for t in results] == expected
    assert not any(t.requires_grad for t in results)


def test_side_effects_and_memory(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn, data = small
    states = []
    recorded = engine.recorded

    def watched(state: object, *args: object) -> object:
        probe = type("Watched", (), {})()  # states have no weak references
        states.append(weakref.ref(probe))
        holder = _Holder(state, probe)
        return recorded(holder, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "recorded", watched)
    before = torch.get_rng_state()
    gc.disable()
    try:
        loss, penalty = hessian_penalty(model, loss_fn, data)
        assert states[0]() is not None
        (loss + penalty).backward()
        assert states[0]() is None, "backward keeps the residuals"
        loss, penalty = hessian_penalty(model, loss_fn, data)
        del loss, penalty
        assert states[1]() is None, "the results are in a reference cycle"
    finally:
        gc.enable()
    assert torch.equal(before, torch.get_rng_state())


class _Holder:
    def __init__(self, state: object, probe: object) -> None:
        self.state, self.probe = state, probe

    def __getattr__(self, name: str) -> object:
        return getattr(self.state, name)


def test_training_step_in_place(small: Small) -> None:
    model, loss_fn, data = small
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    totals = []
    for _ in range(30):
        loss, penalty = hessian_penalty(model, loss_fn, data, seed=3, num_probes=4)
        total = loss + 0.1 * penalty
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0]


# ---- errors ----


def test_options_are_checked(small: Small) -> None:
    with pytest.raises(ValueError, match="curvature must be one of"):
        hessian_penalty(*small, curvature="fisher")
    with pytest.raises(ValueError, match="distribution must be one of"):
        hessian_penalty(*small, distribution="sphere")
    with pytest.raises(ValueError, match="one or more"):
        hessian_penalty(*small, num_probes=0)
    with pytest.raises(ValueError, match="backend must be one of"):
        hessian_penalty(*small, backend="gpu")
    model, loss_fn, (x, y) = small
    with pytest.raises(ValueError, match="Did you mean"):
        hessian_penalty(model, loss_fn, (x, y), tangents=torch.zeros(2, 39, dtype=torch.float64))
    with pytest.raises(TypeError, match="data must be one batch"):
        hessian_penalty(model, loss_fn, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be torch"):
        hessian_penalty(model, loss_fn, (x.float(), y))
    with pytest.raises(ValueError, match="the loss is nan"):
        hessian_penalty(model, loss_fn, (x * torch.nan, y))
