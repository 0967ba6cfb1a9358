"""torch's default device and dtype are the caller's: results are the same under others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvpfast as hf

pytestmark = [
    pytest.mark.usefixtures("single_threaded"),
    pytest.mark.filterwarnings("ignore::hvpfast.mlp.module_checks.SlowBackendWarning"),
]
LOSS = nn.CrossEntropyLoss()


def perceptron() -> nn.Module:
    g = torch.Generator().manual_seed(0)
    return hf.MLP((5, 6, 3), "tanh", generator=g, device="cpu", dtype=torch.float32)


def network() -> nn.Module:
    """Of the general route."""
    model = nn.Sequential(
        nn.Conv1d(1, 2, 3, device="cpu", dtype=torch.float32),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6, 3, device="cpu", dtype=torch.float32),
    )
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, device="cpu", dtype=torch.float32))
    return model


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    shape = (7, 5) if isinstance(model, hf.MLP) else (7, 1, 5)
    x = torch.randn(shape, generator=g, device="cpu", dtype=torch.float32)
    return x, torch.randint(3, (7,), generator=g, device="cpu")


def operator(make: Callable[[], nn.Module]) -> hf.HessianOperator:
    model = make()
    return hf.HessianOperator(model, LOSS, None, batch(model))


def penalised(make: Callable[[], nn.Module], **options: Any) -> list[Tensor]:
    model = make()
    loss, penalty = hf.hessian_penalty(model, LOSS, batch(model), seed=0, **options)
    (loss + penalty).backward()
    return [loss.detach(), penalty.detach(), *(p.grad for p in model.parameters())]


def surface(path: Path) -> Tensor:
    model = perceptron()
    found = hf.landscape.plane(
        model, LOSS, None, batch(model), num_points=3, seed=0, path=path / "s.npz"
    )
    return torch.as_tensor(found.losses, device="cpu")


def products(make: Callable[[], nn.Module]) -> Tensor:
    H = operator(make)
    return H @ hf.probes(H.shape[0], 2, seed=0, device="cpu", dtype=torch.float32)


def density() -> list[Tensor]:
    curve = hf.spectral_density(operator(network), seed=0, num_probes=2).curve(num_points=20)
    return [curve.grid, curve.density]


def adapted() -> list[Tensor]:
    model = perceptron()
    x, y = batch(model)
    optimiser = hf.optim.AdaHessian(model.parameters(), lr=0.1, seed=0)
    for _ in range(2):
        optimiser.zero_grad()
        LOSS(model(x), y).backward()
        optimiser.step(operator=hf.HessianOperator(model, LOSS, None, (x, y)))
    return [p.detach() for p in model.parameters()]


CALLS: dict[str, Callable[[Path], Any]] = {
    "probes": lambda _: hf.probes(51, 2, seed=0, device="cpu", dtype=torch.float32),
    "normal probes": lambda _: hf.probes(
        9, 3, seed=1, device="cpu", dtype=torch.float64, distribution="normal"
    ),
    "product": lambda _: products(perceptron),
    "product of any module": lambda _: products(network),
    "penalty": lambda _: penalised(perceptron),
    "exact penalty": lambda _: penalised(perceptron, estimator="exact"),
    "penalty of any module": lambda _: penalised(network),
    "trace": lambda _: hf.trace(operator(perceptron), 8, seed=0).ci(),
    "xtrace": lambda _: hf.trace(operator(network), 12, method="xtrace", seed=0).estimate,
    "xdiag": lambda _: hf.diagonal(operator(perceptron), 12, method="xdiag", seed=0).estimate,
    "frobenius_sq": lambda _: hf.frobenius_sq(operator(network), 8, seed=0).estimate,
    "exact trace": lambda _: hf.trace(operator(perceptron), method="exact").estimate,
    "eigsh": lambda _: hf.eigsh(operator(perceptron), 2, seed=0).eigenvalues,
    "eigsh of any module": lambda _: hf.eigsh(operator(network), 2, seed=0).eigenvectors,
    "density": lambda _: hf.spectral_density(operator(network), seed=0, num_probes=2).ritz_values,
    "density curve": lambda _: density(),
    "landscape": surface,
    "AdaHessian": lambda _: adapted(),
}


def flattened(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in flattened(part)]
    return [value]


@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_defaults(name: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir(), (tmp_path / "meta").mkdir(), (tmp_path / "double").mkdir()
    expected = flattened(CALLS[name](tmp_path / "plain"))
    with torch.device("meta"):
        on_meta = flattened(CALLS[name](tmp_path / "meta"))
    torch.set_default_dtype(torch.float64)
    try:
        in_double = flattened(CALLS[name](tmp_path / "double"))
    finally:
        torch.set_default_dtype(torch.float32)
    for found in (on_meta, in_double):
        for a, b in zip(found, expected, strict=True):
            if isinstance(b, Tensor):
                assert a.device.type == "cpu" and a.dtype == b.dtype and torch.equal(a, b)
            else:
                assert a == b
