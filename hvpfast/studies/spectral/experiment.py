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
curve (of chosen lambdas). Files: see ``artefacts.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import hvpfast as hf
from hvpfast.lab.data.splits import Data
from hvpfast.lab.measure.predictors import constant_prediction
from hvpfast.lab.runs.config import engine_of
from hvpfast.lab.runs.folder import Row
from hvpfast.lab.runs.progress import Cell, Task
from hvpfast.lab.runs.run import Study
from hvpfast.lab.runs.run import run as run_study
from hvpfast.studies.spectral import artefacts as files
from hvpfast.studies.spectral import measure, train
from hvpfast.studies.spectral.config import PRESETS, SWEEPS, Config
from hvpfast.studies.spectral.data import NUM_CLASSES, NUM_INPUTS, Problem, load
from hvpfast.studies.spectral.figures import figures
from hvpfast.studies.spectral.findings import findings
from hvpfast.studies.spectral.report import QUESTION, headline, report


def engine(config: Config) -> dict[str, str]:
    sizes = (NUM_INPUTS, *config.hidden, NUM_CLASSES)
    spec = hf.MLPSpec(sizes, activation="sigmoid")
    return {**engine_of(config, spec), "writes": files.size_text(config)}


# cells


def windows_of(config: Config) -> dict[str, list[list[int]]]:
    """Return by sweep, the main one first, its points of the grid in the parts that cells train."""
    sweeps: dict[str, list[int]] = {config.sweep: config.chosen}
    if config.branch_every:
        points = sorted({*config.indices[:: config.branch_every], config.indices[-1]})
        for name in SWEEPS:
            sweeps.setdefault(name, points[::-1] if name == "descending" else points)
    return {name: parts(points, config.window) for name, points in sweeps.items()}


def parts(points: list[int], size: int) -> list[list[int]]:
    """Return the list in consecutive parts of `size`; the last one may be shorter."""
    return [points[i : i + size] for i in range(0, len(points), size)]


def plan(config: Config) -> list[str]:
    windows, groups = windows_of(config), parts(config.chosen, config.group)
    trained = [f"train-{name}-{k:03d}" for name, own in windows.items() for k in range(len(own))]
    solved = [f"eigen-{k:03d}" for k in range(len(groups))]
    densities = [f"density-{i:03d}" for i in config.indices if i in config.density]
    return ["data", *trained, *solved, *densities]


def data_rows(config: Config, problem: Problem) -> Iterator[dict[str, Any]]:
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
        "writes": files.size_text(config),
        "backend": config.backend,
    }
    yield {"table": "trivial", "predictor": "class frequencies", **constant_prediction(data)}


def train_rows(
    config: Config, problem: Problem, folder: Path, sweep: str, before: int | None,
    indices: list[int],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Train a window of a sweep from where the one before ended; keep the parameters."""
    keep = files.state_path
    if before is None or sweep == "fresh":
        flat = train.start(config, problem)
    else:
        flat = files.read_state(keep(config, folder, sweep, before), problem.spec)
    begin = time.perf_counter()
    for row, found in train.chain(config, problem, flat, indices, sweep):
        yield measure.timing(f"fit-{row['index']}", begin)
        if sweep == config.sweep or row["index"] == indices[-1]:
            path = keep(config, folder, sweep, int(row["index"]))
            files.keep_state(path, problem.spec, found)
        yield row
        begin = time.perf_counter()


def describe_data(rows: list[Row]) -> str:
    row = rows[0]
    sizes = "{num_train} train, {num_test} test, {num_params} parameters".format(**row)
    return f"{row['dataset']}: {sizes}; {row['writes']}"


def describe_train(rows: list[Row]) -> str:
    first, last = rows[0], rows[-1]
    head = f"train  {first['sweep']:<10}  lambda {first['lambda']:.4f}..{last['lambda']:.4f}"
    return f"{head}  test accuracy {first['test_accuracy']:.3f}..{last['test_accuracy']:.3f}"


def describe_eigen(rows: list[Row]) -> str:
    head = f"pairs  {'':<10}  lambda {rows[0]['lambda']:.4f}..{rows[-1]['lambda']:.4f}"
    return f"{head}  largest {rows[0]['value_1']:.3f}..{rows[-1]['value_1']:.3f}"


def describe_density(rows: list[Row]) -> str:
    return f"density            lambda {rows[0]['lambda']:.4f}  trace {rows[0]['trace']:.3f}"


def experiment(config: Config, data: Data, cell: Cell) -> None:
    """Train the windows in their order; beside each, solve what earlier windows have trained."""
    config = replace(config, backend=engine(config)["backend"])  # chosen once for the whole run
    problem, folder = Problem.of(config, data), cell.path
    cell("data", partial(data_rows, config, problem), describe_data)
    windows, groups = windows_of(config), parts(config.chosen, config.group)
    for k in range(max(map(len, windows.values())) + 1):
        tasks: list[Task] = []
        for name, own in windows.items():
            if k < len(own):
                before = own[k - 1][-1] if k else None
                work = partial(train_rows, config, problem, folder, name, before, own[k])
                tasks.append((f"train-{name}-{k:03d}", work, describe_train))
        for g, group in enumerate(groups):
            last = min((g + 1) * config.group, len(config.chosen))
            if (k - 1) * config.window < last <= k * config.window:
                before = groups[g - 1][-1] if g else None
                work = partial(measure.eigen_rows, config, problem, folder, before, group)
                tasks.append((f"eigen-{g:03d}", work, describe_eigen))
        cell.together(tasks)
    tasks = []
    for i in sorted({*config.indices} & {*config.density}):
        work = partial(measure.density_rows, config, problem, folder, i)
        tasks.append((f"density-{i:03d}", work, describe_density))
    cell.together(tasks)


STUDY: Study[Config, Data] = Study(
    name="spectral",
    module="hvpfast.studies.spectral",
    question=QUESTION,
    presets=PRESETS,
    packages=("matplotlib",),
    engine=engine,
    load=load,
    plan=plan,
    experiment=experiment,
    figures=figures,
    findings=findings,
    report=report,
    headline=headline,
    artefacts=files.artefacts,
)

run = partial(run_study, STUDY)
