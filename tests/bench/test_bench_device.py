"""The benchmark on a GPU: what of it can be proven without one, and a run where there is one."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from backends_here import skip_without_gpu

from hvpfast.bench import gpu_peak, marks, report, runner
from hvpfast.bench.cases import DEVICE_CASES, QUICK_CASES, build
from hvpfast.bench.gate import Gate
from hvpfast.bench.providers import PROVIDERS
from hvpfast.bench.settings import Settings
from hvpfast.lab.measure import timing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
    # of an Adam that will be recorded, in its first steps, which are not
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True"),
]
DEEP, FULL = "784-1024-512-256-128-64-10", "784-128-128-10-n60000"
H100 = {"capability": "9.0", "multiprocessors": 132, "clocks.max.sm": "1980 MHz"}


def row(provider: str, kind: str, form: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "case": DEEP,
        "num_tangents": 1,
        "operation": "hvp",
        "provider": provider,
        "kind": kind,
        "form": form,
        "device": "cuda",
        "status": "timed",
        "median_s": seconds,
        "peak_fraction": None,
        "arithmetic_floor_s": None,
        **more,
    }


def judged(*rows: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(m["provider"], m["operation"], m["against"]): m for m in marks.judge(rows)}


def test_product_is_held_against_compiled_torch_and_the_eager_gradient() -> None:
    found = judged(
        row("ours-cuda", "ours", "flat", 40e-6),
        row("ours-cuda", "ours", "flat captured", 10e-6),
        row("ours-triton", "ours", "layers", 90e-6),
        row("torch-compile", "compiled", "vjp(grad)", 130e-6),
        row("torch-graphs", "graphed", "compiled: vjp(grad)", 60e-6),
        row("jax", "compiled", "vjp(grad)", 20e-6),
        row("torch-eager", "eager", "backward", 50e-6, operation="gradient"),
        row("torch-compile", "compiled", "grad", 5e-6, operation="gradient"),
    )
    cuda, triton = (found[name, "hvp", "torch-compile"] for name in marks.ON_GPU)
    assert (cuda["reached"], cuda["met"]) == (pytest.approx(3.25), True)
    assert (cuda["form"], cuda["rival"]) == ("flat", "torch-compile: vjp(grad)")
    assert (triton["reached"], triton["met"]) == (pytest.approx(13 / 9), False)
    cuda, triton = (found[name, "hvp", "gradient"] for name in marks.ON_GPU)
    assert (cuda["reached"], cuda["met"]) == (pytest.approx(0.8), True)
    assert (triton["reached"], triton["met"]) == (pytest.approx(1.8), False)


def test_recorded_step_is_held_against_the_best_of_all_peers() -> None:
    step = {"case": "train-3072-256-100", "num_tangents": 3, "operation": "train_step"}
    found = judged(
        row("ours-cuda", "ours", "flat rademacher fused", 1e-6, **step),
        row("ours-cuda", "ours", "flat normal captured", 30e-6, **step),
        row("torch-eager", "eager", "triple backward", 900e-6, **step),
        row("torch-graphs", "graphed", "eager: triple backward", 140e-6, **step),
        row("jax", "compiled", "vjp(grad) vmap", 160e-6, **step),
    )
    mark = found["ours-cuda", "train_step", "peer"]
    assert mark["form"] == "flat normal captured"
    assert mark["rival"] == "torch-graphs: eager: triple backward"
    assert (mark["reached"], mark["met"]) == (pytest.approx(14 / 3), False)


def test_floor_is_an_upper_bound_and_needs_a_peak() -> None:
    whole = {"case": FULL, "operation": "hvp_warm"}
    floor = {"arithmetic_floor_s": 0.55e-3}
    found = judged(
        row("ours-cuda", "ours", "flat", 0.8e-3, **whole, **floor),
        row("ours-triton", "ours", "flat", 0.9e-3, **whole, **floor),
    )
    met = [found[name, "hvp_warm", "floor"]["met"] for name in marks.ON_GPU]
    assert met == [True, False]
    (cuda, _) = marks.judge([row("ours-cuda", "ours", "flat", 0.8e-3, **whole)])
    assert cuda["met"] is None and cuda["reason"] == "the peak is not known"
    assert "<= 1.5" in report.marks_table([row("ours-cuda", "ours", "flat", 1.0, **whole, **floor)])


def test_rows_of_another_device_do_not_count() -> None:
    assert marks.judge([row("ours-cuda", "ours", "flat", 1.0, device="cpu")]) == []


def test_nominal_peak() -> None:
    rate, source = gpu_peak.nominal(H100, "float32")
    assert rate == pytest.approx(66_908, rel=1e-3)
    assert "132 multiprocessors x 128 float32 units x 2 x 1980 MHz" in source
    assert gpu_peak.nominal(H100, "float64")[0] == pytest.approx(33_454, rel=1e-3)
    assert gpu_peak.nominal({**H100, "capability": "99.0"}, "float32")[0] is None
    none, reason = gpu_peak.nominal({**H100, "clocks.max.sm": "[N/A]"}, "float32")
    assert none is None and "nvidia-smi does not tell" in reason


def test_full_data_case_has_the_documented_work() -> None:
    from hvpfast.bench.counts import minimal

    assert 2 * minimal(DEVICE_CASES[FULL], "hvp_warm", 1)[1] == pytest.approx(36.8e9, rel=1e-3)


def test_left_out_forms_have_a_row() -> None:
    common: dict[str, Any] = {
        "quick": True, "operations": ("hvp",), "providers": ("torch-eager",), "rounds": 1,
    }  # fmt: skip
    result = runner.run_bench(Settings(**common, forms=("*: double backward",)), io.StringIO())
    found = {r["form"]: (r["status"], r["reason"]) for r in result["rows"]}
    assert found["double backward"] == ("timed", None)
    assert found["double backward batched"] == ("left out", "not among the forms asked for")
    result = runner.run_bench(Settings(**common, deadline=0.0), io.StringIO())
    assert {r["status"] for r in result["rows"]} == {"left out"}
    assert {r["reason"] for r in result["rows"]} == {"the run's 0 s were spent"}
    assert "(left out)" in report.render(result)


def test_waiting_clock_waits_for_the_last_result() -> None:
    made, waited = iter(range(9)), list[int]()
    assert timing.waiting(waited.append)(lambda: next(made), 4) > 0
    assert waited == [3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_every_provider_says_so() -> None:
    for name, provider in PROVIDERS.items():
        assert provider.unavailable("cuda"), name
    settings = Settings(quick=True, operations=("hvp",), providers=("torch-graphs", "ours-cuda"))
    result = runner.run_bench(settings, io.StringIO())
    assert result["rows"] == [] and result["skipped"]["ours-cuda"]
    assert result["skipped"]["torch-graphs"] == "CUDA graphs record work on a GPU"
    with pytest.raises(RuntimeError, match="torch sees no GPU"):
        gpu_peak.measure("float32")


def test_memory_is_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="drop it on a GPU"):
        Settings(device="cuda", memory=True)


@pytest.mark.parametrize("provider", ["jax", "torch-eager"])
def test_training_steps_of_peers_pass_the_gate(provider: str) -> None:
    if reason := PROVIDERS[provider].unavailable():
        pytest.skip(reason)
    gate = Gate(build(QUICK_CASES["train-quick"], 1), "train_step")
    form = PROVIDERS[provider].forms("train_step", 1)[0]
    prepared = PROVIDERS[provider].prepare(form, "train_step", gate.problem)
    verdict = gate.judge(prepared, PROVIDERS[provider].kind)
    assert verdict.ok, verdict.reason
    if prepared.restore is not None:  # a step from the start again, moments and count included
        prepared.restore()
        assert gate.judge(prepared, PROVIDERS[provider].kind).ok


def test_quick_run_on_the_gpu() -> None:
    skip_without_gpu()
    settings = Settings(quick=True, device="cuda", rounds=1)
    result = runner.run_bench(settings, io.StringIO())
    bad = [r for r in result["rows"] if r["status"] in ("wrong", "failed")]
    assert not bad, bad
    assert {r["device"] for r in result["rows"]} == {"cuda"}
