"""How does the Hessian's spectrum of a sigmoid MLP change along a sweep of its L2 penalty?

    L(theta) = CE + lambda ||theta||^2      784-128-128-10, lambda = 0.0002 i, i = 0..450

At every lambda: train from where the one before ended, go to a stationary point, and solve for the
leading 30 eigenpairs of the Hessian. The published protocol is one branch of a possible hysteresis
loop; the other two sweeps (descending; every lambda from the initial state) are trained beside it,
without eigenpairs, at every few lambdas.

A sweep is sequential and an eigenproblem is not: while one process trains the next window of
lambdas, others solve the windows before, so that no chain is cut for the sake of two cores.

Random streams are named and derived from one root seed: init; batches of each lambda; probes.
Rows, by their ``table``: data, trivial, train (a lambda of a sweep), eigen (its pairs), density and
curve (of chosen lambdas). Files: see ``spectral_files.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import hvpfast as hf
from hvpfast import backends
from hvpfast.lab.data.splits import Data
from hvpfast.lab.measure.training import constant_prediction
from hvpfast.lab.report.compare import table
from hvpfast.lab.runs.folder import Row, StudyError
from hvpfast.lab.runs.progress import Cell, Task
from hvpfast.lab.runs.run import Study
from hvpfast.lab.runs.run import run as run_study
from hvpfast.studies.spectral import artefacts as spectral_files
from hvpfast.studies.spectral import data as spectral_data
from hvpfast.studies.spectral import measure as spectral_measures
from hvpfast.studies.spectral import train as spectral_training
from hvpfast.studies.spectral.data import Problem
from hvpfast.studies.spectral.figures import figures
from hvpfast.studies.spectral.findings import QUESTION, by_index, findings, headline
from hvpfast.studies.spectral.report import report
from hvpfast.utils.files import SCRATCH

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
        if (
            not self.indices
            or min(self.indices) < 0
            or list(self.indices) != sorted({*self.indices})
        ):
            raise ValueError(f"indices must be rising integers >= 0; got {self.indices}")
        for name in ("epochs", "patience", "batch_size", "pairs", "window", "group",
                     "density_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.density_probes < 2:
            raise ValueError(f"density_probes must be at least 2; got {self.density_probes}")
        for name in ("branch_every", "polish", "id"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if len({f"{self.step * i:.5f}" for i in self.indices}) < len(self.indices):
            raise ValueError(
                f"lambdas must differ in five decimals, as files are named by them; step is "
                f"{self.step:g}"
            )
        spectral_data.check_sizes(self)

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


def engine(config: Config) -> dict[str, str]:
    """Return the backend, why others were passed over, and what will be written."""
    dtype, device = getattr(torch, config.dtype), torch.device("cpu")
    sizes = (spectral_data.NUM_INPUTS, *config.hidden, spectral_data.NUM_CLASSES)
    spec = hf.MLPSpec(sizes, activation="sigmoid")
    try:
        choice = backends.choose(config.backend, spec, device, dtype)
    except (RuntimeError, ValueError) as error:
        raise StudyError(str(error)) from error
    passed_over = {f"passed over {name}": reason for name, reason in choice.passed_over}
    return {
        "backend": choice.module.NAME,
        "dtype": config.dtype,
        **passed_over,
        "writes": spectral_files.size_text(config),
    }


# cells


def branches(config: Config) -> dict[str, list[int]]:
    """Return the points of the grid of the other sweeps, in their order."""
    if not config.branch_every:
        return {}
    points = sorted({*config.indices[:: config.branch_every], config.indices[-1]})
    names = [name for name in SWEEPS if name != config.sweep]
    return {name: points[::-1] if name == "descending" else points for name in names}


def parts(points: list[int], size: int) -> list[list[int]]:
    """Return consecutive parts of a list."""
    return [points[i : i + size] for i in range(0, len(points), size)]


def plan(config: Config) -> list[str]:
    """Return the key of every cell, in order."""
    keys = ["data"]
    sweeps = {config.sweep: config.chosen, **branches(config)}
    for name, points in sweeps.items():
        keys += [f"train-{name}-{k:03d}" for k in range(len(parts(points, config.window)))]
    keys += [f"eigen-{k:03d}" for k in range(len(parts(config.chosen, config.group)))]
    return keys + [f"density-{i:03d}" for i in config.indices if i in config.density]


def data_rows(config: Config, problem: Problem) -> Iterator[dict[str, Any]]:
    """Describe data and network, and score what needs no network."""
    data, spec = problem.data, problem.spec
    counts = torch.bincount(data.train.y, minlength=data.num_classes).double()
    yield {
        "table": "data",
        "dataset": data.name,
        "num_train": len(data.train.y),
        "num_test": len(data.test.y),
        "check": data.check,
        "sizes": "-".join(map(str, spec.sizes)),
        "num_params": spec.num_params,
        "rank": problem.rank if problem.Q is not None else None,
        "num_reduced": problem.reduced.num_params,
        "majority": float((counts / counts.sum()).max()),
        "writes": spectral_files.size_text(config),
        "backend": config.backend,
    }
    yield {"table": "trivial", "predictor": "class frequencies", **constant_prediction(data)}


def train_rows(
    config: Config, problem: Problem, folder: Path, sweep: str, before: int | None,
    indices: list[int],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Train a window of a sweep from where the one before ended; keep the parameters."""
    keep = spectral_files.state_path
    if before is None or sweep == "fresh":
        flat = spectral_training.start(config, problem)
    else:
        flat = spectral_files.read_state(keep(config, folder, sweep, before), problem.spec)
    begin = time.perf_counter()
    for row, found in spectral_training.chain(config, problem, flat, indices, sweep):
        yield spectral_measures.timing(f"fit-{row['index']}", begin)
        if sweep == config.sweep or row["index"] == indices[-1]:
            path = keep(config, folder, sweep, int(row["index"]))
            spectral_files.keep_state(path, problem.spec, found)
        yield row
        begin = time.perf_counter()


def describe_data(rows: list[Row]) -> str:
    """Return the data's line of progress."""
    row = rows[0]
    sizes = "{num_train} train, {num_test} test, {num_params} parameters".format(**row)
    return f"{row['dataset']}: {sizes}; {row['writes']}"


def describe_train(rows: list[Row]) -> str:
    """Return the line of progress of a window of a sweep."""
    head = (
        f"train  {rows[0]['sweep']:<10}  lambda {rows[0]['lambda']:.4f}..{rows[-1]['lambda']:.4f}"
    )
    return f"{head}  test accuracy {rows[0]['test_accuracy']:.3f}..{rows[-1]['test_accuracy']:.3f}"


def describe_eigen(rows: list[Row]) -> str:
    """Return the line of progress of solved eigenproblems."""
    head = f"pairs  {'':<10}  lambda {rows[0]['lambda']:.4f}..{rows[-1]['lambda']:.4f}"
    return f"{head}  largest {rows[0]['value_1']:.3f}..{rows[-1]['value_1']:.3f}"


def describe_density(rows: list[Row]) -> str:
    """Return the line of progress of a density."""
    return f"density            lambda {rows[0]['lambda']:.4f}  trace {rows[0]['trace']:.3f}"


def experiment(config: Config, data: Data, cell: Cell) -> None:
    """Train windows in their order, and beside each of them solve those before."""
    config = replace(config, backend=engine(config)["backend"])  # chosen once for the whole run
    problem, folder = Problem.of(config, data), cell.path
    cell("data", partial(data_rows, config, problem), describe_data)
    sweeps = {config.sweep: config.chosen, **branches(config)}
    groups, solved = parts(config.chosen, config.group), 0
    windows = {name: parts(points, config.window) for name, points in sweeps.items()}
    for k in range(max(map(len, windows.values())) + 1):
        tasks: list[Task] = []
        for name, own in windows.items():
            if k < len(own):
                before = own[k - 1][-1] if k else None
                work = partial(train_rows, config, problem, folder, name, before, own[k])
                tasks.append((f"train-{name}-{k:03d}", work, describe_train))
        while (
            solved < len(groups)
            and min((solved + 1) * config.group, len(config.chosen)) <= k * config.window
        ):
            before = groups[solved - 1][-1] if solved else None
            work = partial(
                spectral_measures.eigen_rows, config, problem, folder, before, groups[solved]
            )
            tasks.append((f"eigen-{solved:03d}", work, describe_eigen))
            solved += 1
        cell.together(tasks)
    tasks = [
        (
            f"density-{i:03d}",
            partial(spectral_measures.density_rows, config, problem, folder, i),
            describe_density,
        )
        for i in config.indices
        if i in config.density
    ]
    cell.together(tasks)


def artefacts(folder: Path, records: list[Row]) -> None:
    """Write the two tables of scores; clear what killed processes left half written."""
    for part in folder.glob(f"*/{SCRATCH}*"):
        part.unlink(missing_ok=True)
    rows = table(records, "train", sweep=records[0]["sweep"])
    spectral_files.keep_metrics(records[0], folder, by_index(rows).values())


STUDY: Study[Config, Data] = Study(
    name="spectral",
    question=QUESTION,
    presets=PRESETS,
    packages=("matplotlib",),
    engine=engine,
    load=spectral_data.load,
    plan=plan,
    experiment=experiment,
    figures=figures,
    findings=findings,
    report=report,
    headline=headline,
    artefacts=artefacts,
)

run = partial(run_study, STUDY)
