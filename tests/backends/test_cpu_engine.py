"""The CPU engine: same bits for any number of threads, every instruction set, flat memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import hvpfast as hf
from hvpfast.backends.cpu import state as cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

# One chunk; many chunks and tiles; a wide first layer (rows split, Gram matrix); deep and smooth.
SHAPES = {
    "small": ((40, 32, 10), "relu", 64, 3),
    "many samples": ((20, 16, 12, 5), "tanh", 1500, 2),
    "wide": ((900, 80, 7), "relu", 50, 2),
    "wide smooth": ((900, 80, 7), "silu", 33, 3),
}


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problem(name: str) -> tuple[hf.MLPSpec, Tensor, Tensor, Tensor, Tensor]:
    sizes, activation, n, k = SHAPES[name]
    spec = hf.MLPSpec(sizes, activation)
    g = torch.Generator().manual_seed(5)
    params = torch.randn(spec.num_params, generator=g) * 0.2
    x = torch.randn(n, sizes[0], generator=g)
    y = torch.randint(sizes[-1], (n,), generator=g)
    return spec, params, x, y, torch.randn(k, spec.num_params, generator=g)


def everything(spec: hf.MLPSpec, params: Tensor, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Every operation's result in one vector."""
    lin = hf.linearize(spec, params, x, y, backend="cpu")
    V = rows.T
    parts = [lin.loss, lin.grad, hf.hvp(lin, V), hf.ggnvp(lin, V), hf.quadratic_form(lin, V)]
    parts += [hf.hvp_vjp(lin, V, V.flip(1)), hf.hvp_vjp(lin, V, V.flip(1), curvature="ggn")]
    parts += hf.penalty(lin, V, weights=(0.3, 0.7))
    for distribution in ("rademacher", "normal"):
        parts += hf.penalty(lin, num_probes=2, distribution=distribution, seed=3)
    return torch.cat([part.reshape(-1) for part in parts])


@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_threads_or_runs(name: str) -> None:
    case = problem(name)
    torch.set_num_threads(1)
    expected = everything(*case)
    assert expected.isfinite().all()
    for run in range(100 if name == "small" else 12):
        torch.set_num_threads(1 + run % 3)
        assert torch.equal(everything(*case), expected), f"run {run}, {1 + run % 3} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", cpu._cpu.isas() if cpu.unavailable() is None else [])
def test_every_instruction_set_agrees(isa: str, dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype is torch.float32 else 1e-13
    for name in SHAPES:
        spec, params, x, y, rows = problem(name)
        params, x, rows = params.to(dtype), x.to(dtype), rows.to(dtype)
        plan = cpu.plan(spec, isa)
        assert plan.isa == isa
        suffix = "float64" if dtype is torch.float64 else "float32"
        engine = getattr(plan, f"linearize_flat_{suffix}")(
            params.data_ptr(), x.data_ptr(), x.shape[1], y.data_ptr(), 1, len(x), True, 2
        )
        out = torch.full_like(rows, float("nan"))
        engine.hvp(rows.data_ptr(), len(rows), False, out.data_ptr(), 2)
        best = hf.hvp(hf.linearize(spec, params, x, y, backend="cpu"), rows.T).T
        assert (out - best).abs().max() <= tolerance * best.abs().max()
        third = torch.full_like(params, float("nan"))
        engine.hvp_vjp(rows.data_ptr(), out.data_ptr(), len(rows), False, third.data_ptr(), 2)
        lin = hf.linearize(spec, params, x, y, backend="cpu")
        best = hf.hvp_vjp(lin, rows.T, out.T)
        assert (third - best).abs().max() <= tolerance * best.abs().max()


def test_implicit_normal_probes_have_the_same_distribution() -> None:
    spec, params, x, y, _ = problem("wide")
    x[3] = x[4]  # a singular Gram matrix
    lin = hf.linearize(spec, params, x, y, backend="cpu")

    def moments(draws: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        values = torch.stack([penalty for _, penalty, _ in draws]).double()
        gradients = torch.stack([gradient for _, _, gradient in draws]).double()
        return values.mean(), values.std() / len(draws) ** 0.5, gradients.mean(0)

    P, K = spec.num_params, 32
    own = [
        hf.penalty(lin, num_probes=K, distribution="normal", seed=seed, weights=(0.0, 1.0))
        for seed in range(40)
    ]
    given = [
        hf.penalty(lin, hf.probes(P, K, distribution="normal", seed=100 + seed), weights=(0.0, 1.0))
        for seed in range(40)
    ]
    (mean, error, gradient), (mean_given, error_given, gradient_given) = (
        moments(own),
        moments(given),
    )
    assert abs(mean - mean_given) <= 4 * (error**2 + error_given**2).sqrt()
    assert (gradient - gradient_given).norm() <= 0.2 * gradient_given.norm()
    # other numbers than the explicit probes of the same seed: the implicit path ran
    explicit = hf.penalty(lin, hf.probes(P, K, distribution="normal", seed=0))[1]
    assert not torch.isclose(own[0][1], explicit, rtol=1e-4)


def test_implicit_normal_gradient_is_that_of_the_value() -> None:
    """Along one parameter direction, with the probes' randomness held by the seed."""
    spec, params, x, y, rows = problem("wide smooth")
    params, x = params.double(), x.double()
    direction = rows[0].double() / rows[0].norm()

    def value(step: float) -> float:
        lin = hf.linearize(spec, params + step * direction, x, y, backend="cpu")
        return hf.penalty(lin, num_probes=3, distribution="normal", seed=1)[1].item()

    lin = hf.linearize(spec, params, x, y, backend="cpu")
    gradient = hf.penalty(lin, num_probes=3, distribution="normal", seed=1, weights=(0.0, 1.0))[2]
    h = 1e-5
    assert gradient @ direction == pytest.approx((value(h) - value(-h)) / (2 * h), rel=1e-6)


def test_memory_is_flat() -> None:
    small, wide = problem("small"), problem("wide")

    def rounds(count: int) -> None:
        for i in range(count):
            everything(*(wide if i % 20 == 0 else small))

    rounds(100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds(1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before <= 4096  # KiB
