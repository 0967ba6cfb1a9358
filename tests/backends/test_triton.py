"""The triton backend without a GPU: its reasons, and its kernels in Triton's interpreter."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES
from covering import axes, covering_cases, pairs

import hvpfast as hf
from hvpfast.backends import choose
from hvpfast.backends.cuda import state as cuda
from hvpfast.backends.triton import state as triton
from hvpfast.backends.triton import tf32x3
from hvpfast.mlp.spec import ACTIVATIONS
from hvpfast.utils import triton_launch

TESTS = Path(__file__).parent


def test_cover_is_complete() -> None:
    cases = covering_cases()
    seen = set().union(*(pairs(c) for c in cases))
    names = ("activation", "loss", "reduction", "bias", "dtype")
    for a, b in itertools.combinations(names, 2):
        values = {(axes(c)[a], axes(c)[b]) for c in CASES}
        assert all((a, v, b, w) in seen for v, w in values), (a, b)
    assert {c.spec.num_layers for c in cases} == {1, 2, 3, 4}
    assert {c.layout for c in cases} == {"flat", "layers"}
    assert {c.strided for c in cases} == {False, True}
    assert {c.drawn for c in cases} == {False, True}


def test_kernels_interpreted() -> None:
    """The conformance body and the kernels' own tests, in Triton's interpreter."""
    pytest.importorskip("triton")
    bodies = [
        f"{TESTS / 'test_conformance.py'}::test_conformance[triton-{case}]"
        for case in covering_cases()
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *bodies, str(TESTS / "test_triton_kernels.py")],
        env=environment, capture_output=True, text=True, cwd=TESTS.parents[1], check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.strip().splitlines()[-1]
    passed = re.match(r"(\d+) passed in", summary)  # none skipped
    assert passed, summary
    assert int(passed[1]) > len(bodies)


def test_reason_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: None)
    assert "pip install hvpfast[triton]" in str(triton.unavailable())
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "no CUDA" in str(triton.unavailable())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver" in str(triton.unavailable())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert triton.unavailable() is None


@pytest.mark.parametrize(
    ("spec", "device", "dtype", "reason"),
    [
        (None, "cuda", torch.float32, "multilayer perceptrons only"),
        (hf.MLPSpec((3, 4)), "cpu", torch.float32, "on CUDA tensors; these are on cpu"),
        (hf.MLPSpec((3, 4)), "cuda", torch.bfloat16, "these are torch.bfloat16"),
        (hf.MLPSpec((3, 8193)), "cuda", torch.float32, "at most 8192 outputs"),
        (hf.MLPSpec((3, 4097)), "cuda", torch.float64, "at most 4096 outputs in torch.float64"),
        (hf.MLPSpec((3, 4)), "cuda", torch.float64, "capability 8.0 or newer"),
    ],
)
def test_unsupported(
    spec: hf.MLPSpec | None,
    device: str,
    dtype: torch.dtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert reason in str(triton.unsupported(spec, torch.device(device), dtype))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    good = triton.unsupported(hf.MLPSpec((3, 4)), torch.device("cuda"), torch.float64)
    assert good is None


def test_nothing_waits_for_the_device_or_reads_it() -> None:
    """Every operation goes through on tensors that have no values."""
    pytest.importorskip("triton")
    from hvpfast.backends.triton.compilation import launches, problems

    for problem in problems(torch.float32):
        assert len(launches(problem, torch.float32)) > 20


def test_products_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones and long sums, in full precision or not at all."""
    pytest.importorskip("triton")
    from hvpfast.backends.triton.gemm import torch_is_faster

    single, double = torch.empty(0), torch.empty(0, dtype=torch.float64)
    large, long = (512, 1024, 784, 1), (64, 256, 3072, 3)
    assert torch_is_faster(*large, single)
    assert torch_is_faster(*long, single)
    assert not torch_is_faster(64, 32, 40, 451 * 100, single), "many small ones"
    assert not torch_is_faster(64, 256, 100, 3, single), "few short sums"
    torch.set_float32_matmul_precision("high")
    try:
        assert not torch_is_faster(*large, single)
        assert torch_is_faster(*large, double)
    finally:
        torch.set_float32_matmul_precision("highest")

    def mixed_settings() -> str:
        raise RuntimeError("you have used mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed_settings)
    assert not torch_is_faster(*large, single)


def test_triton_is_not_imported_unasked() -> None:
    code = (
        "import sys, hvpfast as hf; hf.available(); "
        "assert 'triton.language' not in sys.modules, 'imported'"
    )
    # torch itself may import triton; it does not without its compiler
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tf32x3_runs_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, device = hf.MLPSpec((3, 4)), torch.device("cuda")
    monkeypatch.setattr(triton_launch, "INTERPRETED", True)
    assert "full precision" in str(tf32x3.unavailable())
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    assert tf32x3.unavailable() == triton.unavailable()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert tf32x3.unsupported(spec, device, torch.float32) is None
    assert "float32" in str(tf32x3.unsupported(spec, device, torch.float64))
    assert "multilayer perceptrons" in str(tf32x3.unsupported(None, device, torch.float32))
    for module in (cuda, triton):
        monkeypatch.setattr(module, "unavailable", lambda: "not here")
    monkeypatch.setattr(tf32x3, "unavailable", lambda: None)
    chosen = choose("auto", spec, device, torch.float32)
    assert chosen.module.NAME == "reference"
    assert "name it to mean it" in dict(chosen.passed_over)["triton_tf32x3"]
    assert choose("triton_tf32x3", spec, device, torch.float32).module.NAME == "triton_tf32x3"


def test_every_activation_has_a_row() -> None:
    pytest.importorskip("triton")
    from hvpfast.backends.triton.activations import JETS, PIECEWISE_LINEAR

    assert tuple(sorted(JETS)) == tuple(sorted(ACTIVATIONS))
    assert set(PIECEWISE_LINEAR) == {"identity", "relu"}
