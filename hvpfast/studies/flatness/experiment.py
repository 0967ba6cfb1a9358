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
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hvpfast import MLPSpec, backends
from hvpfast.lab.data.splits import Data, fold
from hvpfast.lab.measure.training import constant_prediction, linear_prediction
from hvpfast.lab.runs.folder import Row, StudyError
from hvpfast.lab.runs.progress import Cell, Task
from hvpfast.lab.runs.run import Study
from hvpfast.lab.runs.run import run as run_study
from hvpfast.studies.flatness import measure as measures
from hvpfast.studies.flatness import report as flatness_report
from hvpfast.studies.flatness.artefacts import artefacts, keep_weights
from hvpfast.studies.flatness.data import Custom, flattened, load
from hvpfast.studies.flatness.figures import figures
from hvpfast.studies.flatness.findings import findings
from hvpfast.studies.flatness.timing import agreement_rows, timing_rows
from hvpfast.studies.flatness.train import Network, custom, network, perceptron, train

Make = Callable[[int], Network]
"""An untrained network from a seed."""


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
    activation: Literal["relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "softplus"] = "relu"
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
        at_least = {"test_samples": 0, "outputs": 0, "curvature_samples": 0, "timing_rounds": 0,
                    "landscape_planes": 0}  # fmt: skip
        for name in ("n_samples", "num_epochs", "batch_size", "num_hutchinson_samples",
                     "curvature_probes", "landscape_samples"):  # fmt: skip
            at_least[name] = 1
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
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
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds must be different integers >= 0, at least one; got {self.seeds}"
            )


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


def engine(own: Custom, config: Config) -> dict[str, str]:
    """Return the backend that ``config.backend`` means here, and what the user's functions are."""
    told = {"dtype": config.dtype, **own.names()}
    if own.model is not None:
        return {"backend": f"{config.backend} (by hessian_penalty)", **told}
    dtype, device = getattr(torch, config.dtype), torch.device("cpu")
    # the kernels decide by depth, activation and loss; the widths at the ends come with the data
    spec = MLPSpec((1, *config.hidden, 2), activation=config.activation)
    try:
        choice = backends.choose(config.backend, spec, device, dtype)
    except (RuntimeError, ValueError) as error:
        raise StudyError(str(error)) from error
    passed_over = {f"passed over {name}": reason for name, reason in choice.passed_over}
    return {"backend": choice.module.NAME, **told, **passed_over}


def plan(config: Config) -> list[str]:
    """Return the key of every cell, in order."""
    finals = [final_key(lam, seed) for seed in config.seeds for lam in config.lambda_values]
    return ["data", *["steps"] * (config.timing_rounds > 0), *finals]


def final_key(lam: float, seed: int) -> str:
    """Return the key of the cell of one final run."""
    return f"lambda-{arm(lam)}-seed-{seed:03d}"


def experiment(own: Custom, config: Config, data: Data, cell: Cell) -> None:
    """Compare and time steps, then train and measure every lambda from every seed."""
    if own.model is None:
        config = replace(config, backend=engine(own, config)["backend"])  # chosen once
    make = maker(own, config, data)
    if config.timing_rounds:  # first, while this process works alone
        cell("steps", partial(steps_rows, config, data, make), describe_steps)
    tasks: list[Task] = [("data", partial(data_rows, own, data), describe_data)]
    for seed, lam in itertools.product(config.seeds, config.lambda_values):
        work = partial(final_rows, own, config, data, make, lam, seed, cell.path)
        tasks.append((final_key(lam, seed), work, describe_final))
    cell.together(tasks)


def maker(own: Custom, config: Config, data: Data) -> Make:
    """Return what makes an untrained network from a seed: the same for every lambda."""
    dtype = getattr(torch, config.dtype)

    def make(seed: int) -> Network:
        stream = fold(config.root_seed, "init", seed)
        if own.model is not None:
            return network(custom(own.model, dtype, stream), config.backend, config.penalised)
        num_outputs = config.outputs or data.num_classes
        sizes = (data.train.x.shape[1], *config.hidden, num_outputs)
        model = perceptron(sizes, config.activation, dtype, stream)
        return network(model, config.backend, config.penalised)

    return make


def steps_rows(config: Config, data: Data, make: Make) -> Iterator[dict[str, Any]]:
    """Compare the penalised step with torch's: first its numbers, then its time."""
    yield from agreement_rows(config, data, make)
    yield from timing_rows(config, data, make)


def data_rows(own: Custom, data: Data) -> Iterator[dict[str, Any]]:
    """Describe the data, and score the predictors that any network has to beat."""
    sizes = {f"num_{name}": len(getattr(data, name).y) for name in ("train", "val", "test")}
    shape = "x".join(map(str, data.train.x.shape[1:]))
    facts = {"dataset": data.name, "inputs": shape, "num_classes": data.num_classes}
    facts |= {**sizes, "held_out_is_test": data.val is data.test, "check": data.check}
    yield {"table": "data", **facts, "own_network": own.model is not None}
    flat = flattened(data)
    yield {"table": "constant", **constant_prediction(flat)}
    yield {"table": "linear", **linear_prediction(flat)}


def final_rows(
    own: Custom, config: Config, data: Data, make: Make, lam: float, seed: int, path: Path
) -> Iterator[dict[str, Any]]:
    """Train one network: its curve, its landscape where wanted, and the row of its measures."""
    filed = {"arm": arm(lam), "lambda": lam, "seed": seed}
    net = make(seed)
    trained = train(config, data, net, lam, seed)
    for row in trained.epochs:
        yield {"table": "epoch", **filed, **row}
    final = {"table": "final", **filed, "diverged": trained.diverged, "num_params": net.num_params}
    if trained.diverged:
        yield final
        return
    final |= trained.probes | measures.scores(net.model, data)
    final |= measures.curvature(config, net, data, seed)
    final |= own.measure(net.model, data)
    if seed == config.seeds[0]:
        keep_weights(path, arm(lam), net.model)
        if lam in (0.0, config.landscape_lambda):
            for row in measures.landscape_rows(config, net, data, seed):
                yield {"table": "landscape", **filed, **row}
    yield final


def describe_data(rows: list[Row]) -> str:
    """Return the data's line of progress."""
    sizes = "{num_train} train, {num_val} held out, {num_test} test".format(**rows[0])
    return f"{rows[0]['dataset']}: {sizes}"


def describe_steps(rows: list[Row]) -> str:
    """Return the line of progress of the check and the timing against torch."""
    return f"penalised gradient against torch: relative error {rows[0]['gradient_error']:.1e}"


def describe_final(rows: list[Row]) -> str:
    """Return a final run's line of progress."""
    row = rows[-1]
    head = f"lambda {row['arm']:<6} seed {row['seed']:<3}"
    if row["diverged"]:
        return f"{head} diverged"
    exact = row["hessian_fro2"]
    flat = "" if exact is None else f"  Tr(H^2) {exact:.3g}"
    return f"{head} test accuracy {row['test_accuracy']:.4f}{flat}"


def study(own: Custom | None = None) -> Study[Config, Data]:
    """Return the study, with the user's own functions where there are some."""
    own = own or Custom()
    return Study(
        name="flatness",
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
            and put back around the call; its outputs are logits. A `hvpfast.MLP` runs on the fast
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


STUDY = study()
