"""Does penalising Tr(H^2), the squared Frobenius norm of the Hessian, raise the test accuracy?

    baseline     loss = CE
    penalised    loss = CE + lambda Tr(H^2) / B     for each lambda > 0; Tr(H^2) by normal probes

H is the Hessian of the mini-batch's mean cross-entropy, B the batch size. Yes, for a lambda: over
paired seeds its test accuracy is higher than the baseline's, with Holm's correction over the
lambdas. No, or no evidence: it is not. Flatness is measured in every arm alike, lambda = 0 too,
after training: exactly, with fresh probes, and as the penalty saw it.

Random streams are derived from one root seed: split; init, batches, probes of each seed (the same
for every lambda); curvature; landscape. Rows, by their ``table``: data, constant and linear (what
simple predictors score), agreement (of the penalised gradient with torch's), epoch (a point of a
curve), landscape (a line of a grid, or its centre), final.

With other data, models or measures of your own:

    from hvpfast.studies import flatness

    flatness.run(flatness.Config(seeds=(0, 1, 2)), "runs/mine", data=load, model=ConvNet,
                 metrics={"margin": margin})
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvpfast import MLPSpec
from hvpfast.lab.data.splits import Data, Split, describe_data, fold
from hvpfast.lab.measure.predictors import constant_prediction, linear_prediction
from hvpfast.lab.runs.config import engine_of
from hvpfast.lab.runs.folder import Row
from hvpfast.lab.runs.progress import Cell, Task
from hvpfast.lab.runs.run import Study
from hvpfast.lab.runs.run import run as run_study
from hvpfast.studies.flatness import measure
from hvpfast.studies.flatness import report as flatness_report
from hvpfast.studies.flatness.artefacts import artefacts, keep_weights
from hvpfast.studies.flatness.config import PRESETS, Config, arm
from hvpfast.studies.flatness.data import Custom, load
from hvpfast.studies.flatness.figures import figures
from hvpfast.studies.flatness.findings import findings
from hvpfast.studies.flatness.timing import steps_rows
from hvpfast.studies.flatness.train import Make, Network, custom, network, perceptron, train


def engine(own: Custom, config: Config) -> dict[str, str]:
    if own.model is not None:
        backend = f"{config.backend} (by hessian_penalty)"
        return {"backend": backend, "dtype": config.dtype, **own.names()}
    # the widths at the ends come with the data, and no choice depends on them
    spec = MLPSpec((1, *config.hidden, 2), activation=config.activation)
    return engine_of(config, spec, **own.names())


def plan(config: Config) -> list[str]:
    finals = [final_key(lam, seed) for seed in config.seeds for lam in config.lambda_values]
    return ["data", *["steps"] * (config.timing_rounds > 0), *finals]


def final_key(lam: float, seed: int) -> str:
    return f"lambda-{arm(lam)}-seed-{seed:03d}"


def experiment(own: Custom, config: Config, data: Data, cell: Cell) -> None:
    """Compare and time steps, then train and measure every lambda from every seed."""
    if own.model is None:
        config = replace(config, backend=engine(own, config)["backend"])  # chosen once
    make = maker(own, config, data)
    if config.timing_rounds:  # first, while this process works alone
        cell("steps", partial(steps_rows, config, data, make), describe_steps)
    told = partial(describe_data, held_out="held out")
    tasks: list[Task] = [("data", partial(data_rows, own, data), told)]
    for seed, lam in itertools.product(config.seeds, config.lambda_values):
        work = partial(final_rows, own, config, data, make, lam, seed, cell.path)
        tasks.append((final_key(lam, seed), work, describe_final))
    cell.together(tasks)


def maker(own: Custom, config: Config, data: Data) -> Make:
    """Return the function from a seed to its untrained network, the same for every lambda."""
    dtype = getattr(torch, config.dtype)

    def make(seed: int) -> Network:
        stream = fold(config.root_seed, "init", seed)
        if own.model is not None:
            model = custom(own.model, dtype, stream)
        else:
            sizes = (data.train.x.shape[1], *config.hidden, config.outputs or data.num_classes)
            model = perceptron(sizes, config.activation, dtype, stream)
        return network(model, config.backend, config.penalised)

    return make


def data_rows(own: Custom, data: Data) -> Iterator[dict[str, Any]]:
    shape = "x".join(map(str, data.train.x.shape[1:]))
    facts = {"dataset": data.name, "inputs": shape, "num_classes": data.num_classes}
    facts |= {**data.sizes, "held_out_is_test": data.val is data.test, "check": data.check}
    yield {"table": "data", **facts, "own_network": own.model is not None}
    splits: dict[str, Any] = {k: Split(s.x.flatten(1), s.y) for k, s in data.splits.items()}
    flat = replace(data, **splits)
    yield {"table": "constant", **constant_prediction(flat)}
    yield {"table": "linear", **linear_prediction(flat)}


def final_rows(
    own: Custom, config: Config, data: Data, make: Make, lam: float, seed: int, path: Path
) -> Iterator[dict[str, Any]]:
    """Train one network; yield its curve, its landscape if wanted, and the row of its measures."""
    filed = {"arm": arm(lam), "lambda": lam, "seed": seed}
    net = make(seed)
    trained = train(config, data, net, lam, seed)
    for row in trained.epochs:
        yield {"table": "epoch", **filed, **row}
    final = {"table": "final", **filed, "diverged": trained.diverged, "num_params": net.num_params}
    if trained.diverged:
        yield final
        return
    final |= trained.probes | measure.scores(net.model, data)
    final |= measure.curvature(config, net, data, seed)
    final |= own.measure(net.model, data)
    if seed == config.seeds[0]:
        keep_weights(path, arm(lam), net.model)
        if lam in (0.0, config.landscape_lambda):
            for row in measure.landscape_rows(config, net, data, seed):
                yield {"table": "landscape", **filed, **row}
    yield final


def describe_steps(rows: list[Row]) -> str:
    return f"penalised gradient against torch: relative error {rows[0]['gradient_error']:.1e}"


def describe_final(rows: list[Row]) -> str:
    row = rows[-1]
    head = f"lambda {row['arm']:<6} seed {row['seed']:<3}"
    if row["diverged"]:
        return f"{head} diverged"
    exact = row["hessian_fro2"]
    flat = "" if exact is None else f"  Tr(H^2) {exact:.3g}"
    return f"{head} test accuracy {row['test_accuracy']:.4f}{flat}"


def study(own: Custom) -> Study[Config, Data]:
    """Return the study; `own` replaces its data and network, and adds to its measures."""
    return Study(
        name="flatness",
        module="hvpfast.studies.flatness",
        question=flatness_report.QUESTION,
        presets=PRESETS,
        packages=("matplotlib",),
        engine=partial(engine, own),
        load=partial(load, own),
        plan=plan,
        experiment=partial(experiment, own),
        figures=figures,
        findings=findings,
        report=flatness_report.report,
        headline=flatness_report.headline,
        artefacts=artefacts,
    )


def run(
    config: Config,
    out: str | Path,
    *,
    data: Callable[[], Any] | None = None,
    model: Callable[[], nn.Module] | None = None,
    metrics: Mapping[str, Callable[[nn.Module, Data], float]] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Path:
    """Run the study in the folder `out`, with functions of your own where they are given.

    Args:
        config: the configuration; see `Config`. `data` and `model` take the place of
            ``config.data``, ``config.hidden``, ``config.outputs`` and ``config.activation``.
        out: the run folder.
        data: returns ``(x_train, y_train, x_test, y_test)``, arrays or tensors, x (N, ...) floats
            and y (N,) classes from 0, or a `Data` of three splits. Of four arrays the last fifth of
            the train part is held out.
        model: returns a module with fresh weights from torch's global generator, which is seeded
            and restored around the call; its outputs are logits. A `hvpfast.MLP` runs on the fast
            kernels, any other perceptron on them through autograd, anything else (a conv net) on
            the reference backend.
        metrics: functions of the trained module and the data to one number, compared like the
            others; they may use ``data.train``, ``data.val`` and ``data.test``.
        resume: continue the run in `out`, or redraw a finished one; where there is none, start.
        quiet: no progress bar and no lines.

    Returns:
        The path of report.md.

    Raises:
        StudyError: the folder, the environment or the data do not allow the run.
    """
    own = Custom(data, model, dict(metrics or {}))
    preset = None if own == Custom() else "custom"
    return run_study(study(own), config, out, preset=preset, resume=resume, quiet=quiet)


STUDY = study(Custom())
