"""What the studies share: MNIST-1D, random streams, statistics, findings, tuning, measuring."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import hvpfast as hf
from hvpfast.lab.data import mnist1d, splits
from hvpfast.lab.measure import tuning
from hvpfast.lab.measure.curvature import exact_curvature
from hvpfast.lab.measure.predictors import constant_prediction, linear_prediction
from hvpfast.lab.measure.training import Diverged, linearize
from hvpfast.lab.report import words
from hvpfast.lab.report.comparison import compare, holm_correct
from hvpfast.lab.report.statistics import (
    NUM_FLIPS,
    bootstrap_interval,
    holm,
    paired,
    random_sign_flip_p,
    sign_flip_p,
)
from hvpfast.lab.runs.folder import StudyError

for package in ("mnist1d", "optuna", "matplotlib"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def small() -> splits.Data:
    return mnist1d.mnist1d(500, 0.2, 0, torch.float32)


# data


@pytest.mark.parametrize("num_samples", [2000, 5000])
def test_mnist1d_is_the_published_one_and_global_generators_stay(num_samples: int) -> None:
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    expected = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    made = mnist1d.mnist1d(num_samples, 0.2, 0, torch.float64)
    assert made.check == "equal by SHA-256"
    assert random.getstate() == expected[0]
    assert (np.random.get_state()[1] == expected[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), expected[2])
    assert made.test.x.shape == (num_samples // 5, 40)
    assert made.test.x.dtype == torch.float64
    assert made.test.y.dtype == torch.int64


def test_verify_tolerates_a_flipped_rounding_and_nothing_else() -> None:
    made = mnist1d.make_mnist1d(2000)
    x, y = (np.concatenate([made[k], made[f"{k}_test"]]) for k in ("x", "y"))
    offset = (1e6 * x) % 1 - 0.5
    at = np.unravel_index(np.abs(offset).argmin(), x.shape)  # the value nearest a rounding edge
    flipped = x.copy()
    flipped[at] -= 2e-6 * offset[at]
    assert round(1e6 * flipped[at]) != round(1e6 * x[at])
    assert mnist1d.verify(flipped, y) == "equal to 1e-9"
    for wrong in (x + 1e-7 * (np.arange(40) == 3), np.roll(x, 1, axis=0), x[:, ::-1], -x):
        with pytest.raises(StudyError, match="other data than the published 2000"):
            mnist1d.verify(wrong, y)
    with pytest.raises(StudyError, match="other data"):
        mnist1d.verify(x, np.roll(y, 1))
    assert mnist1d.verify(x[:50], y[:50]) == "nothing published for this size"


def test_splits_are_disjoint_complete_and_named_by_the_root_seed(small: splits.Data) -> None:
    made = mnist1d.make_mnist1d(500)
    pool = {row.tobytes() for row in np.asarray(made["x"], np.float32)}
    parts = [{row.tobytes() for row in s.x.numpy()} for s in (small.train, small.val, small.test)]
    assert parts[0] | parts[1] == pool
    assert [len(part) for part in parts] == [320, 80, 100]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    again = mnist1d.mnist1d(500, 0.2, 0, torch.float32)
    assert torch.equal(again.val.x, small.val.x)
    assert not torch.equal(mnist1d.mnist1d(500, 0.2, 1, torch.float32).val.x, small.val.x)


def test_protocols_without_validation_use_the_test_split(small: splits.Data) -> None:
    made = mnist1d.mnist1d(500, 0.0, 0, torch.float32)
    assert made.val is made.test
    assert torch.equal(made.test.x, small.test.x)
    assert len(made.train.y) == 400


def test_split_sizes() -> None:
    assert mnist1d.split_sizes(5000, 0.2) == (3200, 800, 1000)
    assert mnist1d.split_sizes(2000, 0.2) == (1280, 320, 400)
    for num_samples in (0, -10, 505):
        with pytest.raises(ValueError, match="multiple of 10"):
            mnist1d.split_sizes(num_samples, 0.2)
    for val_fraction in (-0.1, 0.0, 0.01, 0.99, 1.0, math.nan):
        with pytest.raises(ValueError, match="val_fraction must leave samples"):
            mnist1d.split_sizes(20, val_fraction)


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mnist1d.data", None)
    with pytest.raises(StudyError, match=r"mnist1d.*pip install 'hvpfast\[studies\]'"):
        mnist1d.make_mnist1d(500)


def test_named_streams_are_fixed_and_distinct() -> None:
    assert splits.fold(0, "split") == 3769940940748469125
    names = [
        (0, "init", "tune", 1),
        (0, "init", "final", 1),
        (1, "init", "tune", 1),
        (0, "init", 1),
    ]
    seeds = {splits.fold(root, *rest) for root, *rest in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


# statistics and findings


def test_paired_interval_is_students() -> None:
    d = np.random.default_rng(0).normal(0.3, 1.0, 12)
    found = paired(d.tolist())
    low, high = stats.ttest_1samp(d, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.mean == pytest.approx(d.mean(), rel=1e-12)


def test_bootstrap_interval_is_scipys_bca() -> None:
    d = np.random.default_rng(3).exponential(1.0, 25) - 0.4
    low, high = bootstrap_interval(d, 0.95)
    expected = stats.bootstrap(
        (d,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    spread = d.std() / 5
    assert abs(low - expected.low) < 0.05 * spread
    assert abs(high - expected.high) < 0.05 * spread
    assert bootstrap_interval(d, 0.95) == (low, high)
    assert bootstrap_interval(np.full(4, 0.25), 0.95) == (0.25, 0.25)
    found = paired(d.tolist())
    assert (found.boot_low, found.boot_high) == (low, high)


@pytest.mark.parametrize("n", [12, 30])
def test_intervals_cover_the_mean_about_as_often_as_they_say(n: int) -> None:
    rng = np.random.default_rng(5)
    results = [paired(rng.normal(0.5, 1.0, n).tolist()) for _ in range(120)]
    student = np.mean([r.low <= 0.5 <= r.high for r in results])
    boot = np.mean([r.boot_low <= 0.5 <= r.boot_high for r in results])
    assert 0.91 < student < 0.985
    assert 0.86 < boot < 0.985  # a bootstrap of few numbers is a little too narrow


@pytest.mark.parametrize("n", [2, 5, 9])
def test_sign_flip_p_counts_every_pattern(n: int) -> None:
    d = np.random.default_rng(n).integers(-2, 5, n).astype(float)  # integers: ties occur
    sums = [abs(np.dot(signs, d)) for signs in itertools.product([1, -1], repeat=n)]
    assert sign_flip_p(d) == np.mean([s >= abs(d.sum()) for s in sums])


def test_what_has_no_interval_is_no_evidence() -> None:
    assert paired([]).evidence is False
    assert paired([0.4]) == paired([0.4])
    assert (paired([0.4]).mean, paired([0.4]).low, paired([0.4]).p) == (0.4, None, None)
    assert paired([0.4]).p_resolution is None
    assert sign_flip_p(np.zeros(5)) == 1.0
    assert sign_flip_p(np.ones(41)) is None


def test_many_pairs_get_a_drawn_p_with_its_resolution() -> None:
    d = np.random.default_rng(2).normal(0.25, 1.0, 40)
    exact, drawn = sign_flip_p(d), random_sign_flip_p(d)
    assert exact is not None
    assert abs(drawn - exact) < 4 * math.sqrt(exact / NUM_FLIPS)
    assert paired(d.tolist()).p_resolution == 2.0**-39
    found = paired(np.ones(41).tolist())
    assert found.p == found.p_resolution == 1 / (NUM_FLIPS + 1)
    assert found.t is None


def test_holm_steps_down_and_leaves_out_what_was_not_tested() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(2000):  # no effect anywhere: any finding is false
        wrong += min(p for p in holm(list(rng.uniform(size=5))) if p is not None) < 0.05
    assert wrong / 2000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert wrong / 2000 > 0.03


def test_compare_says_lower_higher_or_no_evidence() -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(1, 2, 8)
    noise = rng.normal(0, 0.01, 8)
    verdicts = [compare(base, base + shift + noise)["verdict"] for shift in (-0.1, 0, 0.1)]
    assert verdicts == ["lower", "no evidence of a difference", "higher"]
    third = compare(base, base / 3, ratio=True)
    assert (third["kind"], third["verdict"]) == ("ratio", "lower")
    assert third["mean"] == pytest.approx(1 / 3)
    assert compare([1.0, -1.0], [1.0, 1.0], ratio=True)["kind"] == "difference"


def test_holm_correction_of_comparisons_keeps_their_direction() -> None:
    rng = np.random.default_rng(4)
    base = rng.uniform(1, 2, 12)
    pairs = {name: base + shift + rng.normal(0, 0.01, 12) for name, shift in
             (("less", -0.1), ("more", 0.1), ("same", 0.0))}  # fmt: skip
    found = holm_correct({k: compare(base, v) for k, v in pairs.items()})
    assert [found[k]["verdict_holm"] for k in pairs] == [
        "lower", "higher", "no evidence of a difference"
    ]  # fmt: skip
    assert found["less"]["p_holm"] == pytest.approx(3 * found["less"]["p"])
    half = compare(base, base / 2, ratio=True)
    assert holm_correct({"a": half})["a"]["verdict_holm"] == "lower"
    assert words.interval(half, "boot_").startswith("[×0.5")


def test_p_values_that_were_drawn_are_bounds() -> None:
    many, few = compare([0.0] * 50, [1.0] * 50), compare([0.0] * 9, [1.0] * 9)
    assert words.p_value(many) == "≤ 1e-05"
    assert words.p_value(few) == "0.0039"
    assert words.p_value(compare([1.0], [2.0])) == "–"


def test_words_for_numbers() -> None:
    assert [words.number(v, 2) for v in (297.3, 114.9, -12345.6, 99.7)] == [
        "300", "110", "-12000", "100",
    ]  # fmt: skip
    assert [words.number(v, 3) for v in (None, 0.0, 1e-5, 0.12345, 1.5e7)] == [
        "–", "0", "1e-05", "0.123", "1.50e+07"
    ]  # fmt: skip
    assert words.change(-0.25, "difference") == "-0.2500"
    assert words.change(0.25, "ratio") == "×0.25"
    assert words.count(1, "seed") == "1 seed"
    assert words.wrap("# A\nb\nc\n\n- d\n  e\n| f |\n") == "# A\nb c\n\n- d e\n| f |\n"


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


# measuring


def test_linearize_does_not_take_a_fault_for_a_divergence(small: splits.Data) -> None:
    spec, model = hf.MLPSpec((40, 8, 10)), hf.MLP((40, 8, 10))
    broken = splits.Split(small.train.x, small.train.y * torch.nan)
    with pytest.raises((TypeError, ValueError)):
        linearize(spec, model, replace(broken, y=small.train.y + 5.5), "reference", 2)
    with torch.no_grad():
        model.flat.fill_(torch.nan)
    with pytest.raises(Diverged):
        linearize(spec, model, small.train, "reference", 2)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize(
    ("sizes", "num"), [((3, 4, 3), 20), ((3, 4, 3), 90), ((2, 3, 4, 3), 1100), ((2, 3), 30)]
)
def test_exact_curvature_is_that_of_the_dense_matrix(
    kind: str, sizes: tuple[int, ...], num: int
) -> None:
    model = hf.MLP(sizes, "tanh", dtype=torch.float64, generator=splits.generator(0, "test"))
    x = torch.randn(num, sizes[0], dtype=torch.float64, generator=splits.generator(1, "test"))
    y = torch.arange(num) % 3
    spec = hf.MLPSpec(model.sizes, activation="tanh")
    lin = hf.linearize(spec, model.flat, x, y, backend="reference", order=2)
    identity = torch.eye(spec.num_params, dtype=torch.float64)
    dense = hf.hvp(lin, identity) if kind == "hessian" else hf.ggnvp(lin, identity)
    found = exact_curvature(model, splits.Split(x, y), "auto", kind)
    assert found[f"{kind}_fro2"] == pytest.approx(float(dense.square().sum()), rel=1e-10)
    assert found[f"{kind}_trace"] == pytest.approx(float(dense.trace()), rel=1e-10)


def test_predictors_without_a_network(small: splits.Data) -> None:
    constant = constant_prediction(small)
    shares = torch.bincount(small.train.y, minlength=10).double() / 320
    assert constant["test_loss"] == pytest.approx(float(-shares.log()[small.test.y].mean()))
    linear = linear_prediction(small)
    assert linear["test_loss"] < constant["test_loss"]
    assert linear["train_accuracy"] > 0.3
    rng = np.random.default_rng(0)
    x = torch.as_tensor(rng.normal(size=(300, 2)))
    y = (x[:, 0] > x[:, 1]).long()
    parts = [splits.Split(x[a:b], y[a:b]) for a, b in ((0, 200), (200, 250), (250, 300))]
    easy = linear_prediction(splits.Data(*parts, check="", num_classes=2))
    assert easy["test_accuracy"] > 0.95
    assert easy["decay"] == 1e-4
