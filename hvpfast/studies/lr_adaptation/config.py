"""What the learning-rate study may be asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvpfast.lab.data.mnist1d import split_sizes
from hvpfast.lab.runs.config import Activation, check_least, check_seeds, rising


@dataclass(frozen=True)
class Config:
    """What the study does; every field is an option of the command line."""

    protocol: Literal["sound", "published"] = "sound"
    """three splits, one grid and every arm; or as published, repeated once per seed"""
    num_samples: int = 5000
    """samples of mnist1d, a fifth of them test; 5000 is the official set"""
    val_fraction: float = 0.2
    """part of the train samples that is kept for validation (published: none, test is used)"""
    hidden: tuple[int, ...] = (100,)
    """widths of the hidden layers"""
    activation: Activation = "relu"
    """activation of the hidden layers"""
    epochs: int = 20
    """epochs of every training (published: of the final runs)"""
    batch_size: int = 32
    """samples per step; the smaller last batch of an epoch is used too"""
    learning_rates: tuple[float, ...] = (
        *(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0),
    )
    """learning rates that every arm tries (published: the search goes from first to last)"""
    tune_seeds: tuple[int, ...] = (0, 1, 2)
    """training seeds over which every learning rate is averaged"""
    trials: int = 20
    """published only: trials of each search"""
    tune_epochs: int = 10
    """published only: epochs of a trial"""
    seeds: tuple[int, ...] = tuple(range(30))
    """training seeds of the final runs, the pairs of the comparison; 0-9 means 0 to 9"""
    target_loss: float = 1.25
    """validation loss that the speed of an arm is measured to"""
    evaluations: int = 4
    """evaluations of the validation loss per epoch, the grain of that measure"""
    proxy_seeds: tuple[int, ...] = tuple(range(10))
    """training seeds along which the proxies are compared with the exact diagonal"""
    proxy_epochs: tuple[int, ...] = (1, 5, 20)
    """epochs after which they are compared"""
    root_seed: int = 0
    """every random stream is derived from this number"""
    backend: str = "auto"
    """auto, or a backend that hvpfast info lists"""
    dtype: Literal["float32", "float64"] = "float32"
    """floating-point type of everything"""

    def __post_init__(self) -> None:
        split_sizes(self.num_samples, self.val_fraction)
        check_least(self, 1, "epochs", "batch_size", "trials", "tune_epochs", "evaluations")
        rates = self.learning_rates
        if not rising(rates) or min(rates) <= 0:
            raise ValueError(f"learning_rates must be positive and ascending; got {rates}")
        check_seeds(self, "tune_seeds", "seeds", "proxy_seeds")
        if not self.proxy_epochs or not set(self.proxy_epochs) <= set(range(1, self.epochs + 1)):
            raise ValueError(
                f"proxy_epochs must be epochs from 1 to {self.epochs}; got {self.proxy_epochs}"
            )


PRESETS = {
    "default": Config(),
    "published": Config(
        protocol="published", learning_rates=(1e-5, 1e-1), seeds=tuple(range(20)), tune_seeds=(0,)
    ),
    "smoke": Config(
        num_samples=500,
        epochs=2,
        learning_rates=(3e-3, 3e-2),
        tune_seeds=(0,),
        seeds=(0, 1),
        target_loss=2.2,
        evaluations=2,
        proxy_seeds=(0,),
        proxy_epochs=(1, 2),
    ),
}
