"""Trained networks for measurements of spectra: data sets by name, fixed seeds, nothing stored."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.lab.data.mnist1d import make_mnist1d
from hvpfast.mlp.spec import ACTIVATION_TABLE

SEED = 0


@dataclass(frozen=True)
class Trained:
    """A network at the end of its training, with the data that its loss is taken over.

    Attributes:
        model: torch's own layers.
        x, y: (N, D[0]) float32 and class labels (N,).
        loss, accuracy: on x, y.
    """

    model: nn.Sequential
    x: Tensor
    y: Tensor
    loss: float
    accuracy: float


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits, 8 x 8 pixels in [0, 1] interpolated to 28 x 28."""
    try:
        datasets: Any = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise RuntimeError(
            f"this case needs scikit-learn, which cannot be imported ({error}): "
            "pip install 'hvpfast[bench]'"
        ) from error
    data = datasets.load_digits()
    small = torch.from_numpy(data.images / 16.0)[:, None]
    large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    return large.reshape(-1, 784).float(), torch.from_numpy(data.target).long()


def shifted_digits(count: int, most: int = 3) -> tuple[Tensor, Tensor]:
    """Digits drawn with replacement, rolled by up to ``most`` pixels in both directions."""
    x, y = digits()
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randint(len(x), (count,), generator=generator)
    shifts = torch.randint(-most, most + 1, (count, 2), generator=generator).tolist()
    images = x[chosen].view(-1, 28, 28)
    rolled = [torch.roll(im, s, (0, 1)) for im, s in zip(images, shifts, strict=True)]
    return torch.stack(rolled).reshape(count, 784), y[chosen]


def mnist1d(num_samples: int) -> tuple[Tensor, Tensor]:
    """The train part, four fifths, of MNIST-1D with ``num_samples`` samples of 40 numbers."""
    made = make_mnist1d(num_samples)
    return torch.as_tensor(made["x"]).float(), torch.as_tensor(made["y"]).long()


def synthetic(count: int, columns: int, classes: int) -> tuple[Tensor, Tensor]:
    """Normal inputs around one mean per class."""
    generator = torch.Generator().manual_seed(SEED)
    means = torch.randn(classes, columns, generator=generator)
    y = torch.randint(classes, (count,), generator=generator)
    return means[y] + torch.randn(count, columns, generator=generator), y


def train(
    sizes: tuple[int, ...],
    activation: str,
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    batch: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    model: nn.Sequential | None = None,
    seed: int = SEED,
) -> Trained:
    """Adam on cross-entropy for ``steps`` batches of shuffled epochs, of a new net or of a copy."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    mlp = hf.MLP(sizes, activation, generator=generator)
    if model is not None:
        with torch.no_grad():
            mlp.flat.copy_(nn.utils.parameters_to_vector(model.parameters()))
    spec = hf.spec_of(mlp, nn.CrossEntropyLoss())
    optimizer = torch.optim.Adam(mlp.parameters(), lr=lr, weight_decay=weight_decay)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(y), generator=generator)])
        now, order = order[:batch], order[batch:]
        mlp.flat.grad = hf.linearize(spec, mlp.flat.detach(), x[now], y[now], order=2).grad
        optimizer.step()
    found = _sequential(sizes, activation, mlp.flat.detach())
    with torch.no_grad():
        z = found(x)
        loss, hits = F.cross_entropy(z, y), z.argmax(1) == y
    return Trained(found, x, y, float(loss), float(hits.double().mean()))


def _sequential(sizes: tuple[int, ...], activation: str, flat: Tensor) -> nn.Sequential:
    _, kind, options = ACTIVATION_TABLE[activation]
    layers: list[nn.Module] = []
    for d_in, d in itertools.pairwise(sizes):
        # draws no random numbers
        linear = nn.utils.skip_init(nn.Linear, d_in, d)  # type: ignore[no-untyped-call]
        layers += [linear, kind(**options)]
    model = nn.Sequential(*layers[:-1])
    nn.utils.vector_to_parameters(flat, model.parameters())
    return model
