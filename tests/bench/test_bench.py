"""The benchmark suite: its gate, its counts, its records, and a quick run of all of it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvpfast.backends import BACKENDS
from hvpfast.bench import gate, marks, record, report, runner, tables
from hvpfast.bench.cases import CASES, KINK_MARGIN, QUICK_CASES, build, smallest_z
from hvpfast.bench.counts import minimal, minimal_bytes, schedules
from hvpfast.bench.providers import PROVIDERS, Prepared
from hvpfast.bench.providers.torch_eager import TorchEager
from hvpfast.lab.environment import timing_conditions
from hvpfast.lab.measure import timing

# Forward mode in torch compiles its decompositions with torch.jit.script.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]
QUICK = QUICK_CASES["quick"]
EAGER = ("torch-eager",)


class Distorted:
    """torch-eager with its outputs changed by ``distort``."""

    name = "distorted"
    kind = "eager"

    def __init__(self, distort: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.distort = distort

    def unavailable(self, device: str = "cpu") -> str | None:
        return None

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        return TorchEager().forms(operation, num_tangents)[:1]

    def prepare(self, form: str, operation: str, problem: Any) -> Prepared:
        honest = TorchEager().prepare(form, operation, problem)
        return replace(honest, outputs=lambda out: self.distort(honest.outputs(out)))


def scaled(outputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value * (1 + 1e-3) for name, value in outputs.items()}


def one_row_dropped(outputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:-1] if value.ndim else value for name, value in outputs.items()}


def one_sign(outputs: dict[str, Any]) -> dict[str, Any]:
    changed = {name: value.copy() for name, value in outputs.items()}
    for value in changed.values():
        value.flat[np.abs(value).argmax()] *= -1
    return changed


def not_a_number(outputs: dict[str, Any]) -> dict[str, Any]:
    changed = {name: value.copy() for name, value in outputs.items()}
    for value in changed.values():
        value.flat[0] = math.nan
    return changed


# ---- counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "operation", "once", "per_tangent"),
    [
        ("40-32-10", "gradient", 225_280, 0),
        ("40-32-10", "hvp", 122_880, 286_720),
        ("3072-256-100", "gradient", 105_578_496, 0),
        ("3072-256-100", "hvp", 53_608_448, 110_493_696),
    ],
)
def test_product_counts(name: str, operation: str, once: float, per_tangent: float) -> None:
    (macs,) = schedules(CASES[name], operation).values()
    assert (macs.once, macs.per_tangent) == (once, per_tangent)


def test_penalty_counts() -> None:
    tiny = schedules(CASES["40-32-10"], "penalty_normal")
    assert tiny["products"].per_tangent == 573_440
    assert tiny["gram"].per_tangent == 540_672
    assert tiny["implicit"].per_tangent == 524_288
    assert (tiny["products"].once, tiny["gram"].once) == (286_720, 368_640)
    assert schedules(CASES["40-32-10"], "quadratic")["adjoint"].per_tangent == 143_360
    wide = schedules(CASES["3072-256-100"], "penalty_normal")
    expected = {  # millions, for K = 1 and 8, as derived by hand
        "products": (287.7, 1528),
        "gram": (194.4, 738),
        "implicit": (144.6, 339),
    }
    for schedule, totals in expected.items():
        for K, millions in zip((1, 8), totals, strict=True):
            assert wide[schedule].total(K) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_minimal_schedule() -> None:
    wide, large = CASES["3072-256-100"], CASES["784-128-128-10"]
    assert minimal(wide, "penalty", 3)[0] == "gram"
    assert minimal(wide, "penalty_normal", 3)[0] == "implicit"
    assert minimal(large, "penalty", 8)[0] == "products"
    assert minimal(large, "quadratic", 8)[0] == "adjoint"
    m_1, rest = 16384 * 784 * 128, 16384 * (128 * 128 + 128 * 10)
    assert minimal(large, "hvp", 8)[1] == m_1 + 2 * rest + 8 * (2 * m_1 + 6 * rest)
    with pytest.raises(ValueError, match="no operation count for 'nothing'"):
        schedules(wide, "nothing")


def test_bytes() -> None:
    P = 6 * 5 + 5 + 5 * 4 + 4
    assert QUICK.num_params == P
    assert minimal_bytes(QUICK, "hvp", 2, 4) == 4 * (P + 8 * 6 + 2 * P + 2 * P) + 8 * 8
    assert minimal_bytes(QUICK, "quadratic", 2, 4) == 4 * (P + 8 * 6 + 2 * P) + 8 * 8
    assert minimal_bytes(QUICK, "penalty_normal", 2, 8) == 8 * (P + 8 * 6 + P) + 8 * 8


# ---- problems -------------------------------------------------------------------------------


def test_problem_is_reproducible_and_off_the_kinks() -> None:
    case = CASES["40-32-10"]
    first, again = build(case, 2), build(case, 2)
    for a, b in zip(
        (*first.params, first.x, first.y), (*again.params, again.x, again.y), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert smallest_z(case, first.params, first.x).min() > KINK_MARGIN
    assert set(np.unique(first.rademacher)) == {-1.0, 1.0}
    assert first.tangents("penalty_normal") is first.normal
    np.testing.assert_array_equal(first.flat(first.split(first.normal[1])), first.normal[1])
    assert [s.shape for s in first.stack(first.normal)] == [(2, *s) for s in case.shapes]


def test_problem_is_the_same_in_both_dtypes() -> None:
    single, double = build(QUICK, 1), build(QUICK, 1).astype("float64")
    np.testing.assert_array_equal(single.x.astype("float64"), double.x)
    assert double.x.dtype == np.float64


# ---- the gate -------------------------------------------------------------------------------


@pytest.mark.parametrize("distort", [scaled, one_row_dropped, one_sign, not_a_number])
@pytest.mark.parametrize("operation", ["gradient", "hvp", "quadratic", "penalty"])
def test_gate_rejects(operation: str, distort: Any) -> None:
    provider, judge = Distorted(distort), gate.Gate(build(QUICK, 2), operation)
    verdict = judge.judge(provider.prepare("double backward", operation, judge.problem), "eager")
    assert not verdict.ok
    assert verdict.reason


@pytest.mark.parametrize("name", ["quick", "train-quick"])
def test_gate_accepts_every_form_of_torch(name: str) -> None:
    case = QUICK_CASES[name]
    for operation in case.operations:
        judge = gate.Gate(build(case, 2), operation)
        for provider in (PROVIDERS["torch-eager"], PROVIDERS["torch-func"]):
            for form in provider.forms(operation, 2):
                verdict = judge.judge(provider.prepare(form, operation, judge.problem), "eager")
                assert verdict.ok, (provider.name, operation, form, verdict.reason)


def test_gate_refuses_nothing_to_compare() -> None:
    assert not gate.compare({}, {}, {}, "float32").ok


def test_gate_judges_drawn_probes_by_their_means() -> None:
    problem = build(QUICK, 2)
    rng = np.random.default_rng(0)

    def drawing(scale: float) -> Prepared:
        def call() -> Any:
            normal = scale * rng.standard_normal(problem.normal.shape).astype("float32")
            return gate.truth("penalty_normal", replace(problem, normal=normal))

        return Prepared(call, lambda out: out, drawn=True)

    judge = gate.Gate(problem, "penalty_normal")
    assert judge.judge(drawing(1.0), "ours").ok
    verdict = judge.judge(drawing(1.5), "ours")  # penalty 2.25 times too large
    assert not verdict.ok
    assert "mean penalty" in verdict.reason


def test_wrong_provider_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "distorted", Distorted(scaled))
    result = runner.run_bench(
        runner.Settings(
            quick=True, operations=("hvp",), providers=("distorted", "torch-eager"), rounds=1
        ),
        io.StringIO(),
    )
    rows: dict[str, list[dict[str, Any]]] = {
        "distorted": [],
        "torch-eager": [],
    }  # of the second the fastest forms are timed
    for row in result["rows"]:
        rows[row["provider"]].append(row)
    assert [(row["status"], row["median_s"]) for row in rows["distorted"]] == [("wrong", None)]
    assert "timed" in {row["status"] for row in rows["torch-eager"]}
    assert "wrong: distorted: double backward: hvp max: error" in report.render(result)


def test_broken_provider_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Distorted):
        def prepare(self, form: str, operation: str, problem: Any) -> Prepared:
            raise RuntimeError("no such form")

    monkeypatch.setitem(PROVIDERS, "broken", Broken(scaled))
    result = runner.run_bench(
        runner.Settings(quick=True, operations=("hvp",), providers=("broken",)), io.StringIO()
    )
    assert {row["status"] for row in result["rows"]} == {"failed"}
    assert "RuntimeError: no such form" in report.render(result)


# ---- timing ---------------------------------------------------------------------------------


def test_interleave_rotates_and_counts() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    ticks: list[int] = []
    times = timing.interleave(
        {"a": call("a"), "b": call("b"), "c": call("c")}, dict.fromkeys("abc", 0.1), 3, ticks.append
    )
    assert order == list("abcbcacab")
    assert ticks == [1, 2, 3]
    assert all(len(t.seconds) == 3 and t.inner == 1 for t in times.values())


def test_a_call_that_breaks_is_left_out() -> None:
    turns = iter([None, None, ValueError("no more")])

    def breaks() -> None:
        if (error := next(turns)) is not None:
            raise error

    told: list[tuple[str, str]] = []
    calls = {"a": breaks, "b": lambda: None}
    times = timing.interleave(
        calls, dict.fromkeys("ab", 0.1), 4, broken=lambda name, e: told.append((name, str(e)))
    )
    assert told == [("a", "no more")]
    assert set(times) == {"b"} and len(times["b"].seconds) == 4
    with pytest.raises(StopIteration):
        timing.interleave(calls, dict.fromkeys("ab", 0.1), 1)


def test_short_calls_are_repeated_under_the_clock() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    times = timing.interleave({"a": call}, {"a": 1e-5}, 2)
    assert times["a"].inner == 200
    assert calls == 2 * (200 + 100)


def test_quartiles() -> None:
    times = timing.Times((3.0, 1.0, 2.0, 4.0, 5.0), 1)
    assert times.median == 3.0
    assert times.quartiles == (2.0, 4.0)


# ---- records and reports --------------------------------------------------------------------


def test_environment_is_complete() -> None:
    found = timing_conditions()
    assert json.loads(json.dumps(found)) == found
    for key in ("date", "cpu_model", "cpu_affinity", "python", "torch_config", "torch_threads"):
        assert found[key], key
    assert found["packages"]["torch"] == torch.__version__
    assert set(found["backends"]) == set(BACKENDS)
    assert "commit" in found


def test_records_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "bench.json"
    record.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write_json(path, {"a": math.nan})

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        record.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"]


def row(provider: str, kind: str, form: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "case": "40-32-10",
        "num_tangents": 1,
        "operation": "penalty",
        "provider": provider,
        "kind": kind,
        "form": form,
        "status": "timed",
        "median_s": seconds,
        "peak_fraction": None,
        **more,
    }


def test_marks_take_the_fastest_rival_and_the_given_probes() -> None:
    rows = [
        row("ours-cpu", "ours", "flat", 10e-6),
        row("ours-cpu", "ours", "flat drawn", 5e-6),
        row("ours-autograd", "ours", "MLP", 20e-6),
        row("jax", "compiled", "grad(jvp)", 80e-6),
        row("torch-compile", "compiled", "vjp(grad)", 70e-6),
        row("torch-eager", "eager", "triple backward", 300e-6),
        row("torch-func", "eager", "vjp(grad)", 200e-6, status="screened"),
    ]
    found = {(m["provider"], m["against"]): m for m in marks.judge(rows)}
    assert found["ours-cpu", "compiled"]["reached"] == pytest.approx(7.0)
    assert found["ours-cpu", "compiled"]["met"] is True
    assert found["ours-cpu", "compiled"]["rival"] == "torch-compile: vjp(grad)"
    assert found["ours-cpu", "eager"]["reached"] == pytest.approx(30.0)
    assert found["ours-cpu", "eager"]["met"] is False
    assert found["ours-autograd", "compiled"]["reached"] == pytest.approx(3.5)


def test_marks_say_what_is_missing() -> None:
    (compiled, *_) = marks.judge([row("ours-cpu", "ours", "flat", 1e-5)])
    assert compiled["met"] is None
    assert compiled["reason"] == "no row of kind compiled was timed"
    (mark,) = marks.judge(
        [row("ours-cpu", "ours", "flat", 1.0, case="784-128-128-10", num_tangents=8,
             operation="quadratic", status="wrong")]
    )  # fmt: skip
    assert mark["reason"] == "ours-cpu was not timed"


def test_training_mark_is_an_upper_bound() -> None:
    step = {"case": "train-3072-256-100", "num_tangents": 3, "operation": "train_step"}
    rows = [
        row("ours-cpu", "ours", "flat", 13e-6, **step),
        row("torch-plain", "plain", "Sequential fused", 10e-6, **step),
        row("torch-plain", "plain", "compiled Sequential fused", 5e-6, **step),
    ]
    (mark, autograd) = marks.judge(rows)
    assert mark["reached"] == pytest.approx(1.3)
    assert mark["met"] is True
    assert autograd["met"] is None


def test_memory_is_held_against_the_leanest_form_of_torch() -> None:
    rows = [
        row("ours-cpu", "ours", "flat", 1e-5, memory={"first": 300, "steady": 300}),
        row("ours-cpu", "ours", "layers", 2e-5, memory={"first": 100, "steady": 100}),
        row("torch-eager", "eager", "triple backward", 1e-4, memory={"first": 500, "steady": 1}),
        row("torch-eager", "eager", "per probe", 2e-4, memory={"first": 250, "steady": 1}),
        row("jax", "compiled", "grad(jvp)", 2e-4, memory={"reason": "took too long"}),
    ]
    (found,) = marks.judge_memory(rows)
    assert (found["ours"], found["rival"], found["met"]) == (300, 250, False)
    assert "NO" in report.memory_table(rows)
    assert report.memory_table([]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5e-6, "1.5 us"), (0.1234, "123 ms"), (2.0, "2 s"), (None, "-")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert tables.duration(seconds) == text
