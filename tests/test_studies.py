"""The Hessian-norm study and its parts: data, statistics, training, findings, report."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import hvpfast as hf
from hvpfast.studies import data, findings, hessian_norm, hessian_norm_report, tuning
from hvpfast.studies.arguments import field_docs
from hvpfast.studies.folder import StudyError
from hvpfast.studies.statistics import paired, sign_flip_p
from hvpfast.studies.training import Diverged, curvature, linearize

for package in ("mnist1d", "optuna", "matplotlib"):
    pytest.importorskip(package)

SMOKE = replace(hessian_norm.PRESETS["smoke"], backend="reference")
BASELINE = {"learning_rate": 1e-2, "rho": 0.0}


@pytest.fixture(scope="module")
def small() -> data.Data:
    return hessian_norm.load(SMOKE)


# data


@pytest.mark.parametrize("num_samples", [2000, 5000])
def test_mnist1d_is_the_published_one_and_global_generators_stay(num_samples: int) -> None:
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    expected = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    made = data.mnist1d(num_samples, 0.2, 0, torch.float64)
    assert made.check == "equal by SHA-256"
    assert random.getstate() == expected[0]
    assert (np.random.get_state()[1] == expected[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), expected[2])
    assert made.test.x.shape == (num_samples // 5, 40)
    assert made.test.x.dtype == torch.float64
    assert made.test.y.dtype == torch.int64


def test_verify_tolerates_a_flipped_rounding_and_nothing_else() -> None:
    made = data.make_mnist1d(2000)
    x, y = (np.concatenate([made[k], made[f"{k}_test"]]) for k in ("x", "y"))
    offset = (1e6 * x) % 1 - 0.5
    at = np.unravel_index(np.abs(offset).argmin(), x.shape)  # the value nearest a rounding edge
    flipped = x.copy()
    flipped[at] -= 2e-6 * offset[at]
    assert round(1e6 * flipped[at]) != round(1e6 * x[at])
    assert data.verify(flipped, y) == "equal to 1e-9"
    for wrong in (x + 1e-7 * (np.arange(40) == 3), np.roll(x, 1, axis=0), x[:, ::-1], -x):
        with pytest.raises(StudyError, match="other data than the published 2000"):
            data.verify(wrong, y)
    with pytest.raises(StudyError, match="other data"):
        data.verify(x, np.roll(y, 1))
    assert data.verify(x[:50], y[:50]) == "nothing published for this size"


def test_splits_are_disjoint_complete_and_named_by_the_root_seed(small: data.Data) -> None:
    made = data.make_mnist1d(500)
    pool = {row.tobytes() for row in np.asarray(made["x"], np.float32)}
    parts = [{row.tobytes() for row in s.x.numpy()} for s in (small.train, small.val, small.test)]
    assert parts[0] | parts[1] == pool
    assert [len(part) for part in parts] == [320, 80, 100]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    again = data.mnist1d(500, 0.2, 0, torch.float32)
    assert torch.equal(again.val.x, small.val.x)
    assert not torch.equal(data.mnist1d(500, 0.2, 1, torch.float32).val.x, small.val.x)


def test_split_sizes() -> None:
    assert data.split_sizes(5000, 0.2) == (3200, 800, 1000)
    assert data.split_sizes(2000, 0.2) == (1280, 320, 400)
    for num_samples in (0, -10, 505):
        with pytest.raises(ValueError, match="multiple of 10"):
            data.split_sizes(num_samples, 0.2)
    for val_fraction in (-0.1, 0.0, 0.01, 0.99, 1.0, math.nan):
        with pytest.raises(ValueError, match="val_fraction must leave samples"):
            data.split_sizes(20, val_fraction)


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mnist1d.data", None)
    with pytest.raises(StudyError, match=r"mnist1d.*pip install 'hvpfast\[studies\]'"):
        data.make_mnist1d(500)


def test_named_streams_are_fixed_and_distinct() -> None:
    assert data.fold(0, "split") == 3769940940748469125
    names = [
        (0, "init", "tune", 1),
        (0, "init", "final", 1),
        (1, "init", "tune", 1),
        (0, "init", 1),
    ]
    seeds = {data.fold(root, *rest) for root, *rest in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


# statistics and findings


def test_paired_interval_is_students() -> None:
    d = np.random.default_rng(0).normal(0.3, 1.0, 12)
    found = paired(d.tolist())
    low, high = stats.ttest_1samp(d, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.mean == pytest.approx(d.mean(), rel=1e-12)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_sign_flip_p_counts_every_pattern(n: int) -> None:
    d = np.random.default_rng(n).integers(-2, 5, n).astype(float)  # integers: ties occur
    sums = [abs(np.dot(signs, d)) for signs in itertools.product([1, -1], repeat=n)]
    assert sign_flip_p(d) == np.mean([s >= abs(d.sum()) for s in sums])


def test_what_has_no_interval_is_no_evidence() -> None:
    assert paired([]).evidence is False
    assert paired([0.4]) == paired([0.4])
    assert (paired([0.4]).mean, paired([0.4]).low, paired([0.4]).p) == (0.4, None, None)
    assert sign_flip_p(np.zeros(5)) == 1.0
    assert sign_flip_p(np.ones(41)) is None


def test_compare_says_lower_higher_or_no_evidence() -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(1, 2, 8)
    noise = rng.normal(0, 0.01, 8)
    verdicts = [findings.compare(base, base + shift + noise)["verdict"] for shift in (-0.1, 0, 0.1)]
    assert verdicts == ["lower", "no evidence of a difference", "higher"]
    third = findings.compare(base, base / 3, ratio=True)
    assert (third["kind"], third["verdict"]) == ("ratio", "lower")
    assert third["mean"] == pytest.approx(1 / 3)
    assert findings.compare([1.0, -1.0], [1.0, 1.0], ratio=True)["kind"] == "difference"


def test_words_for_numbers() -> None:
    assert [findings.number(v, 3) for v in (None, 0.0, 1e-5, 0.12345, 1.5e7)] == [
        "–", "0", "1e-05", "0.123", "1.50e+07"
    ]  # fmt: skip
    assert findings.change(-0.25, "difference") == "-0.2500"
    assert findings.change(0.25, "ratio") == "×0.25"
    assert findings.count(1, "seed") == "1 seed"
    assert findings.wrap("# A\nb\nc\n\n- d\n  e\n| f |\n") == "# A\nb c\n\n- d e\n| f |\n"


# tuning


def test_search_tries_shared_points_first_follows_its_seed_and_survives_failures() -> None:
    import optuna

    def search(seed: int) -> tuple[Any, list[tuple[float, float]]]:
        tried: list[tuple[float, float]] = []

        def evaluate(number: int, point: dict[str, float]) -> float:
            assert number == len(tried)
            tried.append((point["a"], point["b"]))
            return math.inf if number == 2 else abs(math.log(point["a"])) + point["b"]

        space = {"a": (1e-2, 1e2), "b": (1e-3, 1.0)}
        first = [{"a": 0.1}, {"a": 10.0}, {"a": 1.0}]
        return tuning.minimise(evaluate, space, first, 8, seed), tried

    verbosity = optuna.logging.get_verbosity()
    best, tried = search(3)
    assert [a for a, _ in tried[:3]] == [0.1, 10.0, 1.0]
    assert all(1e-2 <= a <= 1e2 and 1e-3 <= b <= 1 for a, b in tried)
    assert (best, tried) == search(3)
    assert tried != search(4)[1]
    values = [abs(math.log(a)) + b for i, (a, b) in enumerate(tried) if i != 2]
    assert abs(math.log(best["a"])) + best["b"] == min(values)
    assert optuna.logging.get_verbosity() == verbosity
    assert tuning.minimise(lambda *_: math.inf, {"a": (1, 2)}, [], 2, 0) is None


# training and measuring


def test_the_baseline_is_plain_torch_training(small: data.Data) -> None:
    trained = hessian_norm.train(SMOKE, small, BASELINE, "final", 5)
    start = hf.MLP((40, 32, 32, 10), generator=data.generator(0, "init", "final", 5))
    layers = [nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p, value in zip(model.parameters(), start.weights, strict=True):
            p.copy_(value)
    optimizer, batches = (
        torch.optim.Adam(model.parameters(), lr=1e-2),
        data.generator(0, "batches", "final", 5),
    )
    losses = []
    for _ in range(SMOKE.epochs):
        for batch in torch.randperm(320, generator=batches).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                model(small.train.x[batch]), small.train.y[batch]
            ).backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(model(small.val.x), small.val.y)))
    assert [row["val_loss"] for row in trained.epochs[1:]] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_penalised_gradient_is_double_backward_with_the_same_probe(
    small: data.Data, backend: str
) -> None:
    config = replace(SMOKE, activation="tanh", dtype="float64")
    model = hf.MLP((40, 32, 32, 10), "tanh", dtype=torch.float64)
    split = data.Split(small.train.x[:50].double(), small.train.y[:50])
    loss, penalty, grad = hessian_norm.objective(
        hessian_norm.spec(config), model, split, backend, 0.03, 11
    )
    v = hf.probes(model.flat.numel(), seed=11, dtype=torch.float64)[:, 0]
    ce = nn.functional.cross_entropy(model(split.x), split.y)
    (g,) = torch.autograd.grad(ce, model.flat, create_graph=True)
    (hv,) = torch.autograd.grad(g @ v, model.flat, create_graph=True)
    (expected,) = torch.autograd.grad(ce + 0.03 * hv.square().sum(), model.flat)
    assert loss == pytest.approx(ce.item(), rel=1e-12)
    assert penalty == pytest.approx(hv.square().sum().item(), rel=1e-10)
    assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(grad, g)  # the penalty does reach the parameters


def test_arms_of_a_seed_share_weights_and_batches_and_seeds_do_not(small: data.Data) -> None:
    def run(point: dict[str, float], purpose: str, seed: int) -> list[Any]:
        return [
            row["val_loss"] for row in hessian_norm.train(SMOKE, small, point, purpose, seed).epochs
        ]

    base = run(BASELINE, "final", 0)
    assert run({**BASELINE, "rho": 1e-12}, "final", 0) == pytest.approx(base, rel=1e-4)
    assert run({**BASELINE, "rho": 1e-3}, "final", 0)[0] == base[0]
    assert run({**BASELINE, "rho": 1e-3}, "final", 0)[2] != pytest.approx(base[2], rel=1e-4)
    assert run(BASELINE, "final", 0) == base
    assert run(BASELINE, "tune", 0)[0] != base[0]
    assert run(BASELINE, "final", 1)[0] != base[0]


def test_training_leaves_global_state_alone(small: data.Data) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    hessian_norm.train(SMOKE, small, {**BASELINE, "rho": 1e-3}, "final", 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rho", [0.0, 1e-3])
def test_divergence_is_a_result(small: data.Data, rho: float) -> None:
    point = {"learning_rate": 1e30, "rho": rho}
    trained = hessian_norm.train(SMOKE, small, point, "final", 0)
    assert trained.diverged
    (*_, final) = hessian_norm.final_rows(SMOKE, small, "penalised", 0, point)
    assert final["diverged"]
    assert "test_loss" not in final
    rows = list(hessian_norm.trial_rows(SMOKE, small, "baseline", 0, point))
    assert hessian_norm.mean_loss(rows) == math.inf


def test_linearize_does_not_take_a_fault_for_a_divergence(small: data.Data) -> None:
    spec, model = hessian_norm.spec(SMOKE), hf.MLP((40, 32, 32, 10))
    broken = data.Split(small.train.x, small.train.y * torch.nan)
    with pytest.raises((TypeError, ValueError)):
        linearize(spec, model, replace(broken, y=small.train.y + 5.5), "reference", 2)
    with torch.no_grad():
        model.flat.fill_(torch.nan)
    with pytest.raises(Diverged):
        linearize(spec, model, small.train, "reference", 2)


def test_curvature_estimates_the_exact_norm_and_trace() -> None:
    spec = hf.MLPSpec((3, 4, 3), activation="tanh")
    model = hf.MLP(spec.sizes, "tanh", dtype=torch.float64)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3
    lin = hf.linearize(spec, model.flat, x, y, backend="reference", order=2)
    hessian = hf.hvp(lin, torch.eye(spec.num_params, dtype=torch.float64))
    found = curvature(lin, 400, seed=5)
    for name, exact in (("fro2", hessian.square().sum()), ("trace", hessian.trace())):
        estimate, stderr = found[f"hessian_{name}"], found[f"hessian_{name}_stderr"]
        assert estimate is not None
        assert stderr is not None
        assert 0 < stderr < abs(float(exact))
        assert abs(estimate - float(exact)) < 5 * stderr
    assert curvature(lin, 1, seed=5)["hessian_fro2_stderr"] is None


# configuration and report


def test_every_option_is_documented() -> None:
    assert set(field_docs(hessian_norm.Config)) == {f.name for f in fields(hessian_norm.Config)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"learning_rates": ()}, "learning_rates must be positive"),
        ({"learning_rates": (0.1, -0.1)}, "learning_rates must be positive"),
        ({"rho_min": 1.0}, "rho_min and rho_max"),
        ({"trials": 2}, "trials must cover the 7"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"tune_seeds": ()}, "tune_seeds must be different"),
    ],
)
def test_a_wrong_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(hessian_norm.Config(), **change)


def test_no_number_of_the_report_is_typed_by_hand() -> None:
    text = re.sub(r"\{\w+\}", "", hessian_norm_report.TEMPLATE)
    assert not re.search(r"\d", text)
    assert not re.search(r"\d", hessian_norm_report.QUESTION.replace("MNIST-1D", ""))


def final(arm: str, seed: int, test: float, train: float) -> dict[str, Any]:
    return {
        "table": "final", "cell": "", "arm": arm, "seed": seed, "learning_rate": 0.01,
        "rho": 0.1 * (arm == "penalised"), "diverged": False, "test_loss": test,
        "train_loss": train, "gap": test - train, "hessian_fro2": 2.0 + seed, "backend": "cpu",
        "sizes": "40-10", "num_params": 410,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shift", "start"), [(-0.5, "Yes. "), (0.5, "No, it is worse. "), (0.0, "No evidence. ")]
)
def test_the_answer_follows_from_the_interval(shift: float, start: str) -> None:
    rng = np.random.default_rng(0)
    finals = []
    for seed in range(6):
        base, noise = rng.uniform(1, 2), rng.normal(0, 0.05)
        finals += [
            final("baseline", seed, base, 0.9),
            final("penalised", seed, base + shift + noise, 0.9),
        ]
    comparison = {m: hessian_norm_report.compared(finals, m) for m in hessian_norm_report.MEASURES}
    found = {"comparison": comparison, "level": 0.95}
    assert hessian_norm_report.answer(found).startswith(start)
    assert "6 paired seeds, 95 % interval" in hessian_norm_report.answer(found)
    assert ("covers zero" in hessian_norm_report.answer(found)) == (shift == 0)
    assert "shows no evidence" in hessian_norm_report.reading(comparison)
