"""What the spectral study may be asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvpfast.lab.runs.config import check_least, rising
from hvpfast.lab.runs.folder import StudyError

GRID = 451
"""Points of the published grid."""
SWEEPS = ("ascending", "descending", "fresh")


@dataclass(frozen=True)
class Config:
    """What the study does; every field is an option of the command line."""

    data: Literal["digits", "mnist", "synthetic"] = "digits"
    """digits (scikit-learn's, at 28x28), mnist (from --data-dir), or synthetic of its shape"""
    data_dir: str = ""
    """folder with MNIST's files"""
    num_train: int = 0
    """train samples; 0 for all"""
    num_test: int = 0
    """test samples; 0 for all"""
    hidden: tuple[int, ...] = (128, 128)
    """widths of the hidden layers"""
    step: float = 2e-4
    """lambda is this times a point of the grid"""
    indices: tuple[int, ...] = tuple(range(GRID))
    """points of the grid, rising; 0-450 means 0 to 450"""
    penalty: Literal["explicit", "coupled"] = "explicit"
    """lambda ||theta||^2 in the loss, or Adam's weight_decay = lambda (half of it)"""
    sweep: Literal["ascending", "descending", "fresh"] = "ascending"
    """lambda by lambda from where the last one ended, up or down, or each from the initial state"""
    branch_every: int = 5
    """the other two sweeps are trained at every so many lambdas of this one; 0 for not at all"""
    epochs: int = 50
    """epochs per lambda, at most"""
    patience: int = 5
    """epochs without a better value after which training stops"""
    stopping: Literal["effective", "running-ce"] = "effective"
    """by the objective of the train split; or, as published, by an epoch's running cross-entropy"""
    learning_rate: float = 1.5e-3
    """of Adam, fresh for every lambda"""
    batch_size: int = 64
    """samples per step"""
    polish: int = 300
    """steps of full-batch L-BFGS after training, at most; 0 for none"""
    polish_tol: float = 1e-6
    """largest entry of the gradient at which the polish stops"""
    pairs: int = 30
    """eigenpairs of largest magnitude"""
    tol: float = 1e-4
    """their residuals ||H y - theta y|| / |theta|"""
    keep: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100, 150, 200, 250, 300, 350, 400, 450)
    """points of the grid whose eigenvectors and gradients are kept as files"""
    keep_format: Literal["csv", "npy"] = "npy"
    """format of the eigenvectors' files: 44 MB or 14 MB for 30 of 118,282 numbers"""
    density: tuple[int, ...] = (0, 5, 50, 150, 450)
    """points of the grid whose spectral density is measured"""
    density_steps: int = 80
    """Lanczos steps of a density"""
    density_probes: int = 4
    """probes of a density"""
    window: int = 20
    """lambdas of a sweep that one cell trains"""
    group: int = 10
    """neighbouring lambdas whose eigenpairs one cell solves"""
    id: int = 0
    """number of the model in the names of files"""
    root_seed: int = 0
    """every random stream is derived from this number"""
    backend: str = "auto"
    """auto, or a backend that hvpfast info lists"""
    dtype: Literal["float32", "float64"] = "float32"
    """floating-point type of network and products"""

    def __post_init__(self) -> None:
        if not rising(self.indices) or min(self.indices) < 0:
            raise ValueError(f"indices must be rising integers >= 0; got {self.indices}")
        check_least(
            self, 1, "epochs", "patience", "batch_size", "pairs", "window", "group", "density_steps"
        )
        check_least(self, 2, "density_probes")
        for name in ("branch_every", "polish", "id"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if len({f"{self.step * i:.5f}" for i in self.indices}) < len(self.indices):
            raise ValueError(
                f"lambdas must differ in five decimals, as files are named by them; step is "
                f"{self.step:g}"
            )
        if self.num_train < 0 or self.num_test < 0:
            raise ValueError("num_train and num_test must be numbers of samples, or 0 for all")
        if self.data == "mnist" and not self.data_dir:
            raise StudyError("--data mnist needs --data-dir, the folder with MNIST's files")

    @property
    def chosen(self) -> list[int]:
        """The points of the grid in the order of the sweep."""
        return list(self.indices) if self.sweep != "descending" else list(self.indices)[::-1]

    @property
    def kept(self) -> list[int]:
        """Points whose eigenvectors and gradients are kept."""
        return sorted({*self.keep} & {*self.indices})


PRESETS = {
    "default": Config(),
    "smoke": Config(
        num_train=200,
        num_test=100,
        hidden=(16, 16),
        step=4e-3,
        indices=(0, 1, 2, 3, 20),
        branch_every=2,
        epochs=8,
        polish=30,
        pairs=12,
        keep=(0, 20),
        density=(1, 20),
        density_steps=20,
        density_probes=2,
        window=2,
        group=2,
    ),
    "published": Config(
        data="mnist",
        data_dir="data",
        penalty="coupled",
        stopping="running-ce",
        polish=0,
        branch_every=0,
        keep=tuple(range(GRID)),
        keep_format="csv",
        density=(),
    ),
    "timing": Config(
        data="synthetic", indices=(5, 50, 150), branch_every=0, polish=0, keep=(), density=(),
        window=1, group=1,
    ),
}  # fmt: skip
