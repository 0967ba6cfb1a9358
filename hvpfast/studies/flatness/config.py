"""What the flatness study may be asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hvpfast.lab.runs.config import Activation, check_least, check_seeds


@dataclass(frozen=True)
class Config:
    """What the study does; every field is an option of the command line."""

    data: Literal["cifar-like", "rbf", "cifar-100"] = "cifar-like"
    """data set: cifar-like (synthetic, of CIFAR-100's shape), rbf (10 features, 5 classes: what the
    published numbers were really run on) or cifar-100 (in --data-dir, or through torchvision)"""
    data_dir: str = "data"
    """folder with the files of cifar-100"""
    n_samples: int = 3000
    """samples to train on and to hold out: a fifth of them, drawn at random, is held out"""
    test_samples: int = 10000
    """further samples, to test on; 0 tests on the held-out fifth, as published"""
    hidden: tuple[int, ...] = (256,)
    """widths of the hidden layers"""
    outputs: int = 0
    """logits; 0 for as many as there are classes (as published: 100, of which rbf uses 5)"""
    activation: Activation = "relu"
    """activation of the hidden layers"""
    learning_rate: float = 0.001
    """learning rate of Adam"""
    num_epochs: int = 50
    """epochs of every training"""
    batch_size: int = 64
    """samples per step, B; what is left of an epoch beyond whole batches is not used"""
    lambda_values: tuple[float, ...] = (0.0, 0.001, 0.01, 0.1, 1.0)
    """weights of Tr(H^2) / B; 0, the baseline, is the first"""
    num_hutchinson_samples: int = 3
    """normal probes per step"""
    penalised: Literal["hessian", "ggn"] = "hessian"
    """matrix whose squared norm is penalised; ggn is the Gauss-Newton part of the Hessian"""
    seeds: tuple[int, ...] = tuple(range(10))
    """training seeds, the pairs of the comparison; 0-9 means 0 to 9"""
    curvature_samples: int = 0
    """train samples on which curvature is measured after training; 0 for all"""
    curvature_probes: int = 16
    """fresh probes for the curvature of a trained network"""
    landscape_lambda: float = 0.01
    """the penalised network that the landscapes show beside the baseline"""
    landscape_points: int = 41
    """points along each side of a landscape, odd, so that its centre is the network"""
    landscape_planes: int = 2
    """random planes, each through the networks of the first seed"""
    landscape_samples: int = 500
    """train samples that the landscapes are losses of"""
    timing_rounds: int = 15
    """rounds in which steps with and without the penalty are timed, ours and torch's; 0 for none"""
    root_seed: int = 0
    """every random stream is derived from this number"""
    backend: str = "auto"
    """auto, or a backend that hvpfast info lists"""
    dtype: Literal["float32", "float64"] = "float32"
    """floating-point type of everything"""

    def __post_init__(self) -> None:
        check_least(
            self, 0, "test_samples", "outputs", "curvature_samples", "timing_rounds",
            "landscape_planes",
        )  # fmt: skip
        check_least(
            self, 1, "n_samples", "num_epochs", "batch_size", "num_hutchinson_samples",
            "curvature_probes", "landscape_samples",
        )  # fmt: skip
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")
        values = self.lambda_values
        apart = len({arm(lam) for lam in values}) == len(values)
        if values[:1] != (0.0,) or not apart or not all(0 <= lam < math.inf for lam in values):
            raise ValueError(
                f"lambda_values must begin with 0, the baseline, then others; got {values}"
            )
        if self.landscape_lambda not in values:
            raise ValueError(
                f"landscape_lambda must be one of lambda_values {values}; "
                f"got {self.landscape_lambda}"
            )
        if self.landscape_points < 3 or self.landscape_points % 2 == 0:
            raise ValueError(
                f"landscape_points must be odd, at least 3; got {self.landscape_points}"
            )
        check_seeds(self, "seeds")


def arm(lam: float) -> str:
    """Return the name of a lambda in rows and files."""
    return f"{lam:g}"


PRESETS = {
    "default": Config(),
    "smooth": Config(activation="gelu"),
    "published": Config(
        data="rbf",
        test_samples=0,
        outputs=100,
        seeds=(42,),
        landscape_points=51,
        landscape_planes=1,
        curvature_probes=256,
    ),
    "smoke": Config(
        data="rbf",
        n_samples=320,
        test_samples=100,
        hidden=(16,),
        num_epochs=3,
        lambda_values=(0.0, 0.01, 1.0),
        seeds=(0, 1),
        curvature_probes=4,
        landscape_points=5,
        landscape_planes=1,
        timing_rounds=1,
    ),
}
