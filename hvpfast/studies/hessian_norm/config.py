"""What the Hessian-norm study may be asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvpfast.lab.data.mnist1d import split_sizes
from hvpfast.lab.runs.config import Activation, check_least, check_seeds, rising


@dataclass(frozen=True)
class Config:
    """What the study does; every field is an option of the command line."""

    protocol: Literal["sound", "published"] = "sound"
    """sound, or as published: tuned on the test split, one random search per arm, two seeds"""
    num_samples: int = 5000
    """samples of mnist1d, a fifth of them test; 5000 is the official set, 2000 a small one"""
    val_fraction: float = 0.2
    """part of the train samples that is kept for validation (sound)"""
    hidden: tuple[int, ...] = (32, 32)
    """widths of the hidden layers"""
    activation: Activation = "relu"
    """activation of the hidden layers"""
    smooth_activation: Activation = "gelu"
    """activation of the two arms that are to be smooth (sound)"""
    epochs: int = 20
    """epochs of every training; as published, of the final ones"""
    batch_size: int = 128
    """samples per step; the smaller last batch of an epoch is used too"""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    """learning rates that every arm shares (sound)"""
    rhos: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """weights of the penalty (sound)"""
    decays: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    """decoupled weight decays, a knob for the baseline (sound)"""
    radii: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """radii of sharpness-aware minimisation (SAM), another one (sound)"""
    tune_seeds: tuple[int, ...] = tuple(range(5))
    """training seeds over which every trial is averaged (sound)"""
    seeds: tuple[int, ...] = tuple(range(30))
    """training seeds of the final runs, the pairs of the comparison; 0-9 means 0 to 9 (sound)"""
    torch_seeds: tuple[int, ...] = (0,)
    """seeds that torch autograd trains as well, to compare the time; of the final ones (sound)"""
    repetitions: int = 40
    """how often the whole protocol is repeated (published)"""
    root_seed: int = 0
    """every random stream is derived from this number"""
    backend: str = "auto"
    """auto, or a backend that hvpfast info lists"""
    dtype: Literal["float32", "float64"] = "float32"
    """floating-point type of everything"""

    def __post_init__(self) -> None:
        split_sizes(self.num_samples, self.val_fraction)
        check_least(self, 1, "epochs", "batch_size", "repetitions")
        for name in ("learning_rates", "rhos", "decays", "radii"):
            values = getattr(self, name)
            if not rising(values) or min(values) <= 0:
                raise ValueError(f"{name} must be positive and rising, at least one; got {values}")
        check_seeds(self, "tune_seeds", "seeds")
        if not set(self.torch_seeds) <= set(self.seeds):
            raise ValueError(f"torch_seeds must be among the seeds; got {self.torch_seeds}")


PRESETS = {
    "default": Config(),
    "smoke": Config(
        num_samples=500,
        hidden=(8,),
        epochs=2,
        learning_rates=(3e-3, 3e-2),
        rhos=(1e-3, 1e-2),
        decays=(0.1,),
        radii=(0.05,),
        tune_seeds=(0,),
        seeds=(0, 1),
        repetitions=2,
    ),
    "published": Config(protocol="published"),
}
