"""Curvature logs: values against dense matrices, interruptions, budgets, undisturbed training."""

from __future__ import annotations

import copy
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from child_processes import jobs, until
from dense import classes, dense, perceptron, redraw
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hvpfast.analysis.tracking import logger as tracking
from hvpfast.analysis.tracking.logger import QUANTITIES, CurvatureLogger, read_log

pytestmark = pytest.mark.usefixtures("single_threaded")

LOSS = nn.CrossEntropyLoss()


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int,
    logger: CurvatureLogger | None,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Steps of SGD with momentum on mini-batches; the logger is called after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:8]
        optimizer.zero_grad()
        LOSS(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if logger is not None:
            logger.step()
    return optimizer


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_lines_hold_the_curvature_of_their_step(curvature: str, tmp_path: Path) -> None:
    model, (x, y) = perceptron(), classes(30, 4)
    path = tmp_path / "logs" / "curvature.jsonl"
    with CurvatureLogger(
        model, LOSS, (x, y), path, every=2, quantities=QUANTITIES, seed=3, num_matvecs=60,
        num_eigenvalues=3, tol=1e-6, curvature=curvature,
    ) as logger:  # fmt: skip
        first = logger.measure()
        assert first is not None
        assert first["update_curvature"] is None
        for step in range(1, 7):
            before = flat(model)
            train(model, x, y, 1, None, seed=step)
            update = flat(model) - before
            line = logger.step()
            assert (line is None) == (step % 2 == 1)
            if line is None:
                continue
            A = dense(model, LOSS, x, y, ggn=curvature == "ggn")
            loss = LOSS(model(x), y)
            g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, model.parameters())])
            values = torch.linalg.eigvalsh(A).flip(0)
            close = {
                "loss": loss.item(),
                "gradient_norm": float(g.norm()),
                "gradient_curvature": float(g @ A @ g / (g @ g)),
                "update_curvature": float(update @ A @ update / (update @ update)),
                "sharpness": float(values[0]),
            }
            for name, value in close.items():
                assert line[name] == pytest.approx(value, rel=1e-8, abs=1e-10), name
            assert line["top_eigenvalues"] == pytest.approx(values[:3].tolist(), rel=1e-5)
            assert max(line["top_residuals"]) < 1e-5 * line["sharpness"]
            estimated = {
                "trace": float(A.trace()),
                "frobenius_sq": float(A.square().sum()),
                "diagonal_norm": float(A.diagonal().norm()),
            }
            for name, value in estimated.items():
                assert abs(line[name] - value) < 4 * line[f"{name}_stderr"] + 1e-9, name
                assert line[f"{name}_stderr"] < 0.5 * value
    lines = read_log(path)
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert lines[0] == first
    assert len({line["seed"] for line in lines}) == 4
    assert all(b["seconds"] > a["seconds"] for a, b in itertools.pairwise(lines))
    assert all(line["num_matvecs"] > 60 and line["skipped"] == 0 for line in lines)


def test_searches_start_from_the_last_vectors(tmp_path: Path) -> None:
    model, (x, y) = perceptron(), classes(30, 4)
    logger = CurvatureLogger(
        model, LOSS, (x, y), tmp_path / "log", every=1, quantities="sharpness", seed=0
    )
    with logger:
        first = logger.measure()
        model[0].weight.data.add_(1e-6)
        second = logger.step()
    assert first is not None and second is not None
    assert second["num_matvecs"] < first["num_matvecs"]


class Dropped(nn.Module):
    """BatchNorm, Dropout and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(self.norm(x)))


@pytest.mark.filterwarnings("ignore::hvpfast.SlowBackendWarning")
@pytest.mark.parametrize("source", ["pair", "loader"])
def test_training_goes_on_as_without_a_logger(source: str, tmp_path: Path) -> None:
    x, y = classes(40, 4)
    results = []
    for logged in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        model = redraw(Dropped().double(), 0)
        model.norm.eval()
        data: Any = (x, y)
        if source == "loader":
            data = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
        logger = None
        if logged:
            logger = CurvatureLogger(
                model, LOSS, data, tmp_path / "log", every=2, quantities=QUANTITIES, seed=1,
                num_matvecs=4, max_matvecs=20,
            )  # fmt: skip
            logger.measure()
        train(model, x, y, 6, logger)
        modes = [module.training for module in model.modules()]
        grads = [p.grad.clone() for p in model.parameters()]
        results.append((flat(model), *grads, model.norm.running_mean, torch.rand(3)))
        draws = random.random(), np.random.get_state()[1].sum()  # noqa: NPY002
        assert modes == [True, False, True, True, True, True, True]
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())
        if not logged:
            expected = draws
        else:
            logger.close()
            assert draws == expected
    for without, with_it in zip(*results, strict=True):
        assert torch.equal(without, with_it)
    assert [line["step"] for line in read_log(tmp_path / "log")] == [0, 2, 4, 6]


def test_measuring_inside_no_grad(tmp_path: Path) -> None:
    model, data = perceptron(), classes(10, 4)
    with CurvatureLogger(model, LOSS, data, tmp_path / "log", backend="reference") as logger:
        with torch.no_grad():
            line = logger.measure()
        assert line is not None
        assert line["gradient_norm"] > 0


def test_logs_go_on_without_half_lines_and_duplicates(tmp_path: Path) -> None:
    model, (x, y), path = perceptron(), classes(20, 4), tmp_path / "log"

    def make(resume: bool) -> CurvatureLogger:
        return CurvatureLogger(
            model, LOSS, (x, y), path, every=2, quantities=("loss", "trace"), seed=3, resume=resume
        )

    with make(False) as logger:
        train(model, x, y, 6, logger)
    content = path.read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"):
        make(False)
    path.write_bytes(content + b'{"step": 8, "lo')
    assert [line["step"] for line in read_log(path)] == [2, 4, 6]
    with make(True) as logger:
        assert path.read_bytes() == content
        train(model, x, y, 8, logger)  # the training from its beginning
    assert [line["step"] for line in read_log(path)] == [2, 4, 6, 8]
    assert path.read_bytes().startswith(content)
    path.write_bytes(b"{}nonsense\n" + content)
    with pytest.raises(ValueError, match="damaged"):
        make(True)
    path.write_bytes(content[:10])  # only a half line
    with make(True) as logger:
        train(model, x, y, 2, logger)
    assert [line["step"] for line in read_log(path)] == [2]


def test_checkpoints_carry_the_logger(tmp_path: Path) -> None:
    x, y = classes(20, 4)
    quantities = ("loss", "trace", "sharpness", "update_curvature")

    def run(path: Path, crash: bool) -> list[dict[str, Any]]:
        model = perceptron()
        options: Any = {"every": 2, "quantities": quantities, "seed": 3, "max_matvecs": 60}
        logger = CurvatureLogger(model, LOSS, (x, y), path, **options)
        train(model, x, y, 5, logger)
        if crash:
            state = copy.deepcopy((model.state_dict(), logger.state_dict()))
            train(model, x, y, 4, logger)  # lost: steps 6 and 8 are logged, then it crashes
            assert [line["step"] for line in read_log(path)] == [2, 4, 6, 8]
            logger.close()
            torch.save(state, tmp_path / "checkpoint")
            loaded = torch.load(tmp_path / "checkpoint", weights_only=True)
            model.load_state_dict(loaded[0])
            logger = CurvatureLogger(model, LOSS, (x, y), path, resume=True, **options)
            logger.load_state_dict(loaded[1])
            assert logger.num_steps == 5
            assert [line["step"] for line in read_log(path)] == [2, 4]
        train(model, x, y, 5, logger, seed=1)
        logger.close()
        return read_log(path)

    plain, resumed = run(tmp_path / "plain", False), run(tmp_path / "resumed", True)
    for lines in (plain, resumed):
        for line in lines:
            del line["seconds"], line["measure_seconds"]
    assert [line["step"] for line in plain] == [2, 4, 6, 8, 10]
    assert plain == resumed


def test_a_budget_leaves_measurements_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    model, data = perceptron(), classes(20, 4)
    logger = CurvatureLogger(
        model, LOSS, data, tmp_path / "log", every=1, quantities="loss", budget=0.1
    )
    measure = logger._measure

    def slow(seed: int) -> Any:
        now[0] += 2.0  # a measurement takes two seconds, a step one
        return measure(seed)

    monkeypatch.setattr(logger, "_measure", slow)
    with logger:
        for _ in range(100):
            now[0] += 1.0
            logger.step()
    lines = read_log(tmp_path / "log")
    assert lines[0]["step"] == 1
    assert len(lines) == 5
    shares = [2.0 * (i + 1) / line["seconds"] for i, line in enumerate(lines)]
    assert max(shares[1:]) <= 0.1
    gaps = [b["step"] - a["step"] - 1 for a, b in itertools.pairwise(lines)]
    assert [line["skipped"] for line in lines[1:]] == gaps
    assert lines[1]["measure_seconds"] == 2.0


def test_a_training_that_diverges_is_logged_and_goes_on(tmp_path: Path) -> None:
    model, (x, y), path = perceptron(), classes(20, 4), tmp_path / "log"
    wrong = x.clone()
    with CurvatureLogger(model, LOSS, (wrong, y), path, every=1, quantities=QUANTITIES) as logger:
        with torch.no_grad():
            model[0].weight[0, 0] = torch.nan
        line = logger.step()
        assert line is not None
        assert line["error"] == "parameters are not finite: 0.weight"
        assert line["loss"] is None
        with torch.no_grad():
            model[0].weight[0, 0] = 0.0
        assert "error" not in (logger.step() or {})
        wrong[3, 1] = torch.nan
        line = logger.step()
        assert line is not None
        assert line["error"].startswith("the loss is nan: x has 1 entries")
        wrong[3, 1] = torch.inf  # tanh makes a finite loss of it, which has no curvature
        line = logger.step()
        assert line is not None
        assert "holds NaN or infinity" in line["error"]
    assert [("error" in line) for line in read_log(path)] == [True, False, True, True]
    bad = CurvatureLogger(model, LOSS, (x, y + 7), tmp_path / "other", every=1, quantities="loss")
    with bad, pytest.raises(ValueError, match="labels must be"):
        bad.step()


JOB = """
from dense import classes, perceptron
from hvpfast.analysis.tracking.logger import CurvatureLogger
def job(path, steps):
    with CurvatureLogger(perceptron(), torch.nn.CrossEntropyLoss(), classes(10, 4), path,
                         every=1, quantities="loss", seed=1, resume=True) as logger:
        for _ in range(int(steps)):
            logger.step()
"""


def test_killed_at_any_moment_the_log_holds_whole_lines(tmp_path: Path) -> None:
    path, chance = tmp_path / "log", random.Random(1)
    path.touch()
    with jobs(JOB) as killable:
        for _ in range(5):
            size, job = path.stat().st_size, killable.start(path, 10**6)
            until(lambda size=size: path.stat().st_size > size)
            time.sleep(0.05 * chance.random())
            killable.kill(job)
            steps = [line["step"] for line in read_log(path)]
            assert steps == list(range(1, len(steps) + 1))
        killable.start(path, len(steps) + 3)
        assert killable.wait() == 0
    assert [line["step"] for line in read_log(path)] == list(range(1, len(steps) + 4))
    assert path.read_bytes().endswith(b"\n")


def test_bad_input(tmp_path: Path) -> None:
    model, data = perceptron(), classes(10, 4)
    wrong: Any
    for wrong, message in (
        ({"every": 0}, "every must be"),
        ({"num_eigenvalues": 0}, "num_eigenvalues must be"),
        ({"quantities": ("loss", "curl")}, "quantities are loss, .*; got 'curl'"),
        ({"budget": 1.5}, "budget must be"),
        ({"curvature": "fisher"}, "curvature must be"),
        ({"params": "7.*"}, "no parameter matches"),
    ):
        with pytest.raises(ValueError, match=message):
            CurvatureLogger(model, LOSS, data, tmp_path / "log", **wrong)
    assert not (tmp_path / "log").exists()
    logger = CurvatureLogger(model, LOSS, data, tmp_path / "log", quantities="loss")
    logger.close()
    with pytest.raises(ValueError, match="closed"):
        logger.measure()
    assert json.loads(json.dumps(logger.state_dict()["seed"])) == logger.state_dict()["seed"]
