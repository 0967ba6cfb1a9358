"""The objective of the spectral study and its minimisation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import hvpfast as hf
from hvpfast.lab.data.splits import Split
from hvpfast.lab.runs.folder import StudyError
from hvpfast.studies.spectral import data as spectral_data
from hvpfast.studies.spectral import experiment as spectral
from hvpfast.studies.spectral import measure as spectral_measures
from hvpfast.studies.spectral import train as spectral_training
from hvpfast.studies.spectral.data import Problem

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

SMOKE = replace(spectral.PRESETS["smoke"], backend="reference")
FLOAT64 = replace(SMOKE, dtype="float64")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(FLOAT64, spectral_data.load(FLOAT64))


@pytest.fixture(scope="module")
def trained(problem: Problem) -> torch.Tensor:
    config = replace(FLOAT64, polish=0)
    start = spectral_training.start(config, problem)
    return spectral_training.fit(config, problem, start, 1, "ascending").flat


# oracles


def test_a_network_without_weights_has_nine_eigenvalues() -> None:
    config = replace(FLOAT64, hidden=(128, 128))
    data = spectral_data.load(config)
    balanced = Split(data.train.x, torch.arange(len(data.train.y)) % 10)
    problem = Problem.of(config, replace(data, train=balanced))
    flat = torch.zeros(problem.spec.num_params, dtype=torch.float64)
    found = spectral_measures.eigenpairs(replace(config, tol=1e-6), problem, flat, 1, 12)
    values = found.eigenvalues.sort(descending=True).values
    predicted = spectral_measures.collapse_prediction(problem, flat)
    assert predicted[:9].tolist() == pytest.approx([3.3] * 9, rel=1e-12)
    assert values[:9].tolist() == pytest.approx([3.3] * 9, rel=1e-9)
    assert found.eigenvalues[9:].abs().max() < 1e-12


def test_the_prediction_has_the_values_of_mnists_classes() -> None:
    counts = torch.tensor([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])
    values = spectral_measures.collapsed_eigenvalues(counts / counts.sum(), 32.0)
    known = [3.661, 3.425, 3.351, 3.275, 3.266, 3.256, 3.231, 3.215, 3.010, 0.0]
    assert values.tolist() == pytest.approx(known, abs=6e-4)


def test_pairs_of_the_reduced_network_are_pairs_of_the_whole(
    problem: Problem, trained: torch.Tensor
) -> None:
    assert problem.Q is not None and problem.rank < 64
    H = problem.hessian(trained, reduced=False)
    found = spectral_measures.eigenpairs(replace(FLOAT64, tol=1e-8), problem, trained, 1, 8)
    V = problem.lift(found.eigenvectors.T).T
    assert torch.allclose(V.T @ V, torch.eye(8, dtype=torch.float64), atol=1e-10)
    residuals = (H @ V - V * found.eigenvalues).norm(dim=0)
    assert (residuals <= 1e-7 * found.eigenvalues.abs()).all()
    whole = hf.eigsh(H, 8, tol=1e-8, seed=1, compress=False)
    assert torch.allclose(whole.eigenvalues, found.eigenvalues, rtol=1e-10)


def test_the_gradient_is_that_of_autograd(problem: Problem, trained: torch.Tensor) -> None:
    model = problem.model(trained)
    F.cross_entropy(model(problem.data.train.x), problem.data.train.y).backward()  # type: ignore[no-untyped-call]
    assert model.flat.grad is not None
    assert torch.allclose(problem.gradient(trained), model.flat.grad, atol=1e-14)


def test_inputs_of_full_rank_are_not_reduced() -> None:
    x = torch.randn(40, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert spectral_data.row_space(x) is None
    low = x[:, :5] @ x[:5]
    Q = spectral_data.row_space(low)
    assert Q is not None and len(Q) == 5
    assert torch.allclose(low @ Q.T @ Q, low, atol=1e-10)


# training


def test_the_polish_reaches_a_stationary_point(problem: Problem, trained: torch.Tensor) -> None:
    config = replace(FLOAT64, polish=600, polish_tol=1e-7)
    decay = spectral_training.decay_of(config, 3)
    assert decay == pytest.approx(2 * 3 * 4e-3)
    polished, steps = spectral_training.polish(config, problem, trained, decay)

    def gradient(flat: torch.Tensor) -> float:
        return float((problem.gradient(flat) + decay * flat).norm())

    assert steps < 600
    assert gradient(polished) < 1e-5 < 1e-3 * gradient(trained)
    first = polished[: problem.first].view(-1, 784)
    assert problem.Q is not None
    assert (first - first @ problem.Q.T @ problem.Q).norm() < 1e-10


def test_coupled_decay_is_the_penalty_with_half_the_factor(problem: Problem) -> None:
    explicit, coupled = FLOAT64, replace(FLOAT64, penalty="coupled")
    assert spectral_training.decay_of(explicit, 2) == 2 * spectral_training.decay_of(coupled, 2)
    start = spectral_training.start(FLOAT64, problem)
    one = spectral_training.fit(replace(explicit, epochs=2), problem, start, 1, "ascending")
    twice = replace(coupled, epochs=2, step=2 * coupled.step)
    assert torch.equal(one.flat, spectral_training.fit(twice, problem, start, 1, "ascending").flat)


def test_adam_sees_the_gradient_of_the_objective(problem: Problem) -> None:
    """One step of one batch, against torch's autograd of CE + lambda ||theta||^2."""
    config = replace(FLOAT64, epochs=1, polish=0, batch_size=200, stopping="running-ce")
    start = spectral_training.start(config, problem)
    found = spectral_training.fit(config, problem, start, 3, "ascending").flat
    model = problem.model(start)
    adam = torch.optim.Adam([model.flat], lr=config.learning_rate)
    data, lam = problem.data.train, 3 * config.step
    loss = F.cross_entropy(model(data.x), data.y) + lam * model.flat.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    adam.step()
    assert torch.allclose(found, model.flat.detach(), atol=1e-12)


def test_the_best_state_is_kept_and_not_the_last(problem: Problem) -> None:
    """A rate that is far too large: the objective rises, patience ends the training."""
    config = replace(FLOAT64, learning_rate=0.3, epochs=30, patience=3, polish=0)
    start = spectral_training.start(config, problem)
    values = []
    for epochs in range(1, 31):
        found = spectral_training.fit(replace(config, epochs=epochs), problem, start, 2, "fresh")
        loss, _, _ = spectral_data.scores(
            problem.model(found.flat), problem.data.train.x, problem.data.train.y
        )
        decay = spectral_training.decay_of(config, 2)
        values.append(loss + decay / 2 * spectral_training.square(found.flat))
        if found.stopped == "patience":
            break
    assert found.stopped == "patience"
    assert found.epochs == found.best_epoch + 3
    assert values == sorted(values, reverse=True)  # of the best state so far: never rises
    last = replace(config, stopping="running-ce")
    assert not torch.equal(spectral_training.fit(last, problem, start, 2, "fresh").flat, found.flat)


def test_a_sweep_is_one_chain_whatever_its_windows(problem: Problem, tmp_path: Path) -> None:
    config = replace(FLOAT64, epochs=2, polish=3)

    def sweep(windows: list[list[int]], name: str) -> list[Any]:
        rows: list[Any] = []
        for k, window in enumerate(windows):
            before = windows[k - 1][-1] if k else None
            work = spectral.train_rows(
                config, problem, tmp_path / name, "ascending", before, window
            )
            rows += [row for row in work if row["table"] == "train"]
        return rows

    assert sweep([[0, 1, 2]], "one") == sweep([[0], [1, 2]], "two")


def test_a_training_that_diverges_says_so(problem: Problem) -> None:
    config = replace(FLOAT64, learning_rate=1e300)
    start = spectral_training.start(config, problem)
    with pytest.raises(StudyError, match=r"diverged at lambda 0\.004"):
        list(spectral_training.chain(config, problem, start, [1], "ascending"))
