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
from hvpfast.lab.report.records import table
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
from hvpfast.studies.spectral.findings import by_index, findings
from hvpfast.studies.spectral.report import QUESTION, headline, report
from hvpfast.utils.files import SCRATCH


def engine(config: Config) -> dict[str, str]:
    """Return the facts that decide the numbers (see `engine_of`), and what will be written."""
    sizes = (NUM_INPUTS, *config.hidden, NUM_CLASSES)
    spec = hf.MLPSpec(sizes, activation="sigmoid")
    return {**engine_of(config, spec), "writes": files.size_text(config)}


# cells


def branches(config: Config) -> dict[str, list[int]]:
    """Return the other two sweeps: name to their points of the grid, in the order of training."""
    if not config.branch_every:
        return {}
    points = sorted({*config.indices[:: config.branch_every], config.indices[-1]})
    names = [name for name in SWEEPS if name != config.sweep]
    return {name: points[::-1] if name == "descending" else points for name in names}


def parts(points: list[int], size: int) -> list[list[int]]:
    """Return the list in consecutive parts of `size`; the last one may be shorter."""
    return [points[i : i + size] for i in range(0, len(points), size)]


def plan(config: Config) -> list[str]:
    """Return the key of every cell, in the order of the records."""
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
    """Return the line of progress: the data set, sizes, and what will be written."""
    row = rows[0]
    sizes = "{num_train} train, {num_test} test, {num_params} parameters".format(**row)
    return f"{row['dataset']}: {sizes}; {row['writes']}"


def describe_train(rows: list[Row]) -> str:
    """Return the line of progress of a window of a sweep: lambdas and test accuracies."""
    head = (
        f"train  {rows[0]['sweep']:<10}  lambda {rows[0]['lambda']:.4f}..{rows[-1]['lambda']:.4f}"
    )
    return f"{head}  test accuracy {rows[0]['test_accuracy']:.3f}..{rows[-1]['test_accuracy']:.3f}"


def describe_eigen(rows: list[Row]) -> str:
    """Return the line of progress of a group of lambdas: their largest eigenvalues."""
    head = f"pairs  {'':<10}  lambda {rows[0]['lambda']:.4f}..{rows[-1]['lambda']:.4f}"
    return f"{head}  largest {rows[0]['value_1']:.3f}..{rows[-1]['value_1']:.3f}"


def describe_density(rows: list[Row]) -> str:
    """Return the line of progress of a density: its lambda and trace."""
    return f"density            lambda {rows[0]['lambda']:.4f}  trace {rows[0]['trace']:.3f}"


def experiment(config: Config, data: Data, cell: Cell) -> None:
    """Train the windows in their order; beside each, solve what earlier windows have trained."""
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
            work = partial(measure.eigen_rows, config, problem, folder, before, groups[solved])
            tasks.append((f"eigen-{solved:03d}", work, describe_eigen))
            solved += 1
        cell.together(tasks)
    tasks = []
    for i in config.indices:
        if i in config.density:
            work = partial(measure.density_rows, config, problem, folder, i)
            tasks.append((f"density-{i:03d}", work, describe_density))
    cell.together(tasks)


def artefacts(folder: Path, records: list[Row]) -> None:
    """Write the two tables of scores; delete files that killed processes left half written."""
    for part in folder.glob(f"*/{SCRATCH}*"):
        part.unlink(missing_ok=True)
    rows = table(records, "train", sweep=records[0]["sweep"])
    files.keep_metrics(records[0], folder, by_index(rows).values())


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
    artefacts=artefacts,
)

run = partial(run_study, STUDY)
