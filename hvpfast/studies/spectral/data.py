"""Data and network of the spectral study, and the same network in the row space of its inputs.

With inputs X = L Q, Q (r, D) orthonormal rows, the first layer sees W_1 Q' only: the cross-entropy
of the perceptron with inputs L and first weights W_1 Q' is the same function, and on its complement
the Hessian is zero. Digits at 28x28 are interpolated from 8x8, so that r is below 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import hvpfast as hf
from hvpfast.lab.data.datasets import load_digits, made, resized
from hvpfast.lab.data.image_files import load_mnist
from hvpfast.lab.data.splits import Arrays, Data, three_way
from hvpfast.lab.measure.training import Diverged
from hvpfast.studies.spectral.config import Config

NUM_INPUTS, NUM_CLASSES = 784, 10
MNIST_MEAN_STD = (0.1307, 0.3081)
OPERATOR_BYTES = 2**32
"""Memory of an operator for linearized batches; fixed, as what is kept may change rounding."""
BASIS_BYTES = 2**31
"""Memory of an eigensolver for its basis; where it is full, the solver restarts."""
EVALUATION = 4096
"""Samples that are evaluated at once."""


def load_synthetic(num_train: int = 60_000, num_test: int = 10_000, seed: int = 0) -> Arrays:
    """Make images of MNIST's shape and size: 28x28 bytes, mostly dark, 10 classes, full rank.

    A class has three smooth prototypes on a 7x7 grid; a sample is one of them, with a smooth field
    and pixel noise of its own, cut off below: for timings, and nothing is claimed from it.
    """
    random = np.random.Generator(np.random.Philox(seed))
    num = num_train + num_test
    prototypes = random.standard_normal((NUM_CLASSES, 3, 1, 7, 7))
    y = random.integers(NUM_CLASSES, size=num)
    coarse = prototypes[y, random.integers(3, size=num)]
    coarse += 0.7 * random.standard_normal(coarse.shape)
    x = np.concatenate([resized(part, 28) for part in np.array_split(coarse, 1 + num // 5000)])
    x += np.float32(0.25) * random.standard_normal(x.shape, np.float32)
    pixels = np.clip(np.rint(120 * (x - 0.4)), 0, 255).astype(np.uint8)
    return made("synthetic", pixels, y, num_train, NUM_CLASSES, 255.0)


def load(config: Config) -> Data:
    """Return train and test splits; all pixels are standardised by one mean and one deviation.

    For MNIST these are the two numbers in common use, for the others those of the train pixels.
    There is no validation split (`Data.val` is the test split): no choice depends on the scores.
    """
    if config.data == "mnist":
        arrays, mean_std = load_mnist(config.data_dir), MNIST_MEAN_STD
    else:
        arrays = load_digits() if config.data == "digits" else load_synthetic()
        pixels = arrays.x.astype(np.float64) / arrays.scale
        mean_std = (float(pixels.mean()), float(pixels.std()))
    sizes = {"num_train": config.num_train or None, "num_test": config.num_test or None}
    dtype = getattr(torch, config.dtype)
    return three_way(arrays, 0.0, config.root_seed, dtype, standardise=mean_std, **sizes)


@dataclass(frozen=True)
class Problem:
    """Train split, network and its reduction to the row space of the inputs.

    Attributes:
        data: the splits.
        spec: of the whole network.
        Q: orthonormal rows (r, D) of the row space, float64; None where it is the whole space.
        x: the train inputs in the row space, (N, r).
        reduced: spec of the network with inputs `x`.
        backend: of every product and gradient.
    """

    data: Data
    spec: hf.MLPSpec
    Q: Tensor | None
    x: Tensor
    reduced: hf.MLPSpec
    backend: str

    @classmethod
    def of(cls, config: Config, data: Data) -> Problem:
        """Return the problem of a configuration. Call it where torch runs on one thread."""
        sizes = (data.train.x.shape[1], *config.hidden, NUM_CLASSES)
        spec = hf.MLPSpec(sizes, activation="sigmoid")
        Q = row_space(data.train.x)
        if Q is None:
            return cls(data, spec, None, data.train.x, spec, config.backend)
        x = (data.train.x.double() @ Q.T).to(data.train.x.dtype)
        reduced = hf.MLPSpec((len(Q), *sizes[1:]), activation="sigmoid")
        return cls(data, spec, Q, x, reduced, config.backend)

    @property
    def rank(self) -> int:
        """Dimension r of the row space."""
        return self.reduced.sizes[0]

    def narrow(self, flat: Tensor) -> Tensor:
        """Return the parameters (p,) of the reduced network, float64."""
        wide = flat.detach().double()
        if self.Q is None:
            return wide
        weights = wide[: self.first].view(self.spec.sizes[1], self.spec.sizes[0])
        return torch.cat([(weights @ self.Q.T).reshape(-1), wide[self.first :]])

    def lift(self, rows: Tensor) -> Tensor:
        """Return rows (K, P) from reduced ones (K, p), zero outside the row space."""
        if self.Q is None:
            return rows
        width, r = self.spec.sizes[1], self.rank
        first = rows[:, : width * r].reshape(len(rows), width, r) @ self.Q.to(rows.dtype)
        return torch.cat([first.reshape(len(rows), -1), rows[:, width * r :]], dim=1)

    @property
    def first(self) -> int:
        """Number of weights of the whole network's first layer."""
        return self.spec.sizes[0] * self.spec.sizes[1]

    def model(self, flat: Tensor) -> hf.MLP:
        return network(self.spec, flat, self.data.train.x.dtype)

    def hessian(
        self, flat: Tensor, reduced: bool = True, dtype: torch.dtype | None = None
    ) -> hf.HessianOperator:
        """Return H of the train split's cross-entropy, by default in the row space."""
        spec, x = (self.reduced, self.x) if reduced else (self.spec, self.data.train.x)
        values = self.narrow(flat) if reduced else flat
        dtype = dtype or x.dtype
        return hf.HessianOperator(
            network(spec, values, dtype),
            F.cross_entropy,
            None,
            (x.to(dtype), self.data.train.y),
            backend=self.backend,
            memory_budget=OPERATOR_BYTES,
            check_deterministic=False,
        )

    def gradient(self, flat: Tensor) -> Tensor:
        """Return the gradient (P,) of the train split's cross-entropy, summed in float64."""
        train = self.data.train
        total = torch.zeros(flat.numel(), dtype=torch.float64)
        for x, y in zip(*(torch.split(t, EVALUATION) for t in (train.x, train.y)), strict=True):
            lin = hf.linearize(self.spec, flat, x, y, backend=self.backend, order=2)
            total += lin.grad.double() * (len(y) / len(train.y))
        return total


def network(spec: hf.MLPSpec, flat: Tensor, dtype: torch.dtype) -> hf.MLP:
    random = torch.Generator()  # its numbers are overwritten, and the global generator's stay
    model = hf.MLP(spec.sizes, spec.activation, dtype=dtype, generator=random)
    with torch.no_grad():
        model.flat.copy_(flat)
    return model


def row_space(x: Tensor) -> Tensor | None:
    """Return orthonormal rows (r, D) that span those of x (N, D), or None for r above D / 2.

    Directions in which no input is longer than 1e-6 of the longest count as rounding.
    """
    wide = x.double()
    squares, vectors = torch.linalg.eigh(wide.T @ wide)
    # an eigenvalue bounds every input's square there, and is at most N times the largest of them
    longest = float(wide.square().sum(1).max())
    kept = squares > 1e-12 * longest
    if 2 * int(kept.sum()) > x.shape[1]:
        return None
    rows: Tensor = vectors[:, kept].T.contiguous()
    return rows


def scores(model: hf.MLP, x: Tensor, y: Tensor) -> tuple[float, Tensor, float]:
    """Return mean cross-entropy, hits (N,) and the spread of the logits over samples.

    The spread is the root mean square, over outputs, of their standard deviations over samples: a
    network that ignores its inputs has none.

    Raises:
        Diverged: the cross-entropy is not finite.
    """
    with torch.no_grad():
        logits = torch.cat([model(part) for part in torch.split(x, EVALUATION)]).double()
    loss = float(F.cross_entropy(logits, y))
    if not np.isfinite(loss):
        raise Diverged
    spread = float(logits.var(0, correction=0).mean().sqrt())
    return loss, logits.argmax(1) == y, spread
