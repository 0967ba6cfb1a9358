"""hf.optim: scaled steps against formulas in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dense import dense, perceptron
from optimizing import adam, batches, flat, run
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.optim import CURVATURES, AdaHessian, HessianLRAdaptation

pytestmark = pytest.mark.usefixtures("single_threaded")


def expected(model: nn.Module, data: list[tuple[Tensor, Tensor]], curvature: str) -> Tensor:
    """The parameters after plain gradient steps of 1e-2 on g / (sqrt(s) + 1e-8), from formulas."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    theta = flat(model)

    def gradient(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        pieces = at.split([s.numel() for s in shapes])
        own = {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(model, own, (x,)), y)
        return torch.autograd.grad(loss, at)[0]

    s, x2 = torch.zeros_like(theta), torch.zeros_like(theta)
    last_gradient = last_theta = None
    twin = copy.deepcopy(model)
    for t, (x, y) in enumerate(data):
        g, ratio = gradient(theta, x, y), None
        if curvature == "difference" and last_gradient is not None:
            s = 0.9 * s + 0.1 * (g - last_gradient) ** 2
            ratio = s
        elif curvature == "secant" and last_theta is not None:
            s = 0.9 * s + 0.1 * (g - gradient(last_theta, x, y)) ** 2
            x2 = 0.9 * x2 + 0.1 * (theta - last_theta) ** 2
            ratio = s / x2
        elif curvature in ("hutchinson", "exact"):
            nn.utils.vector_to_parameters(theta, twin.parameters())
            H = dense(twin, F.cross_entropy, x, y)
            v = hf.probes(len(theta), seed=7, dtype=torch.float64, first=t)[:, 0]
            c = torch.diag(H) if curvature == "exact" else v * (H @ v)
            s = 0.9 * s + 0.1 * c**2
            ratio = s
        last_gradient, last_theta = g, theta
        theta = theta - 1e-2 * (g if ratio is None else g / (ratio.sqrt() + 1e-8))
    return theta


@pytest.mark.parametrize("curvature", CURVATURES)
def test_steps_are_those_of_the_formula(curvature: str) -> None:
    model, data = perceptron(), batches(5)
    truth = expected(copy.deepcopy(model), data, curvature)
    base = torch.optim.SGD(model.parameters(), lr=1e-2)
    run(model, HessianLRAdaptation(base, curvature, seed=7), data)
    assert torch.allclose(flat(model), truth, rtol=1e-9, atol=1e-11)
    plain = expected(perceptron(), data, "none")
    assert not torch.allclose(flat(model), plain, rtol=1e-3)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_flat_perceptron_on_the_functional_path_takes_the_same_steps(curvature: str) -> None:
    model, data = perceptron(), batches(4)
    mlp = hf.MLP.from_sequential(model)
    spec = hf.MLPSpec((4, 5, 6, 3), activation="tanh")
    run(model, HessianLRAdaptation(adam(model.parameters()), curvature, seed=7), data)
    optimizer = HessianLRAdaptation(adam([mlp.flat]), curvature, seed=7)
    for x, y in data:

        def evaluate(x: Tensor = x, y: Tensor = y) -> hf.Linearization:
            lin = hf.linearize(spec, mlp.flat, x, y, order=2)
            mlp.flat.grad = lin.grad
            return lin

        if curvature == "secant":
            optimizer.step(evaluate)
        elif curvature == "difference":
            evaluate()
            optimizer.step()
        else:
            optimizer.step(operator=evaluate())
    assert torch.allclose(flat(mlp), flat(model), rtol=1e-8, atol=1e-10)


def test_with_constant_curvature_adam_is_not_changed() -> None:
    A = torch.diag(torch.tensor([1.0, 20.0, 300.0], dtype=torch.float64))
    ways = []
    for wrap in (False, True):
        p = nn.Parameter(torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))
        base = torch.optim.Adam([p], lr=1e-2, eps=0.0)
        wrapped = HessianLRAdaptation(base, "exact", eps=0.0, bias_correction=True)
        for _ in range(20):
            p.grad = A @ p.detach() + 0.1
            wrapped.step(operator=A) if wrap else base.step()
        ways.append(p.detach().clone())
    assert torch.allclose(*ways, rtol=1e-12)


def test_the_secant_of_a_quadratic_is_its_curvature() -> None:
    h = torch.tensor([0.5, 4.0, 90.0], dtype=torch.float64)
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = HessianLRAdaptation(torch.optim.SGD([p], lr=1e-3), "secant")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (h * p**2).sum()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    found = optimizer.rms_curvature(p)
    assert found is not None
    assert torch.allclose(found, h, rtol=1e-9)


def test_the_difference_of_noise_is_the_noise_and_not_a_curvature() -> None:
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = HessianLRAdaptation(torch.optim.SGD([p], lr=0.0), beta=0.999, bias_correction=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5000):
        p.grad = 3 + sigma * torch.randn(3, generator=generator, dtype=torch.float64)
        optimizer.step()
    found = optimizer.rms_curvature(p)
    assert found is not None
    assert torch.allclose(found, 2**0.5 * sigma, rtol=0.06)


def test_without_bias_correction_the_first_scaled_step_is_too_long() -> None:
    sizes = []
    for corrected in (False, True):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = HessianLRAdaptation(
            torch.optim.SGD([p], lr=1.0), eps=0.0, bias_correction=corrected
        )
        for gradient in (1.0, 3.0):
            before = p.item()
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
        sizes.append(before - p.item())
    assert sizes == pytest.approx([3 / (0.1**0.5 * 2), 3 / 2])


def test_dead_coordinates_stay_and_gradients_are_left_as_they_were() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = HessianLRAdaptation(adam([p]))
    for t in range(3):
        gradient = torch.tensor([float(t), 0.0])
        p.grad = gradient
        optimizer.step()
        assert p.grad is gradient
        assert gradient.tolist() == [t, 0.0]
    assert p[1] == 1
    assert torch.isfinite(p).all()
    assert p[0] < 1


def test_parameters_without_a_gradient_are_passed_over() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = HessianLRAdaptation(torch.optim.SGD([a, b], lr=0.1))
    for _ in range(2):
        a.grad = torch.randn(2, generator=torch.Generator().manual_seed(0))
        optimizer.step()
    assert b.tolist() == [1, 1]
    assert b not in optimizer.state


def test_adahessian_is_adam_with_the_diagonal_in_the_denominator() -> None:
    model, data = perceptron(), batches(4)
    start = flat(model)
    optimizer = AdaHessian(model.parameters(), 0.05, (0.8, 0.95), weight_decay=0.1, seed=3)
    theta, m, w = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, (x, y) in enumerate(data):
        H = dense(model, F.cross_entropy, x, y)
        v = hf.probes(len(theta), seed=3, dtype=torch.float64, first=t)[:, 0]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]
        m = 0.8 * m + 0.2 * g
        w = 0.95 * w + 0.05 * (v * (H @ v)) ** 2
        step = (m / (1 - 0.8 ** (t + 1))) / ((w / (1 - 0.95 ** (t + 1))).sqrt() + 1e-8)
        theta = theta * (1 - 0.05 * 0.1) - 0.05 * step
        optimizer.step(operator=hf.HessianOperator(model, F.cross_entropy, None, (x, y)))
    assert torch.allclose(flat(model), theta, rtol=1e-9, atol=1e-11)
