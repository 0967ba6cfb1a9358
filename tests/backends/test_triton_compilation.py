"""The Triton kernels compiled without a GPU: no spills, and products of the named precision."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch

import hvpfast as hf
from hvpfast.utils import triton_launch

pytest.importorskip("triton")
if triton_launch.INTERPRETED:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
BACKENDS = Path(hf.__file__).parent / "backends"
TILES = ("own_tile", "own_entries", "own_samples")


def kernel_names() -> set[str]:
    """Every function that is launched: its body asks which program it is, or for its tile."""
    names = set()
    for file in (*BACKENDS.glob("triton/*.py"), BACKENDS / "probes" / "triton.py"):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name in TILES:
                continue
            jitted = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            text = ast.unparse(node)
            if jitted and any(f"{name}(" in text for name in ("program_id", *TILES)):
                names.add(node.name)
    return names


def test_kernels_compile_without_spills() -> None:
    """Every variant in float32 for sm_90, and of every kernel the largest variant elsewhere.

    ``hvpfast bench kernels`` compiles them all.
    """
    from hvpfast.backends.triton.compilation import kernel_records

    records = kernel_records(dtypes=[torch.float32], capabilities=[90])
    assert {"ieee", "tf32x3"} == {
        precision for r in records for precision in re.findall(r"PRECISION=(\w+)", r["variant"])
    }
    records += kernel_records(dtypes=[torch.float32], capabilities=[80], largest_only=True)
    records += kernel_records(dtypes=[torch.float64], largest_only=True)
    for capability, dtype in itertools.product((80, 90), ("fp32", "fp64")):
        those = [r for r in records if (r["capability"], r["dtype"]) == (capability, dtype)]
        assert {r["kernel"] for r in those} == kernel_names()
    spilled = [r for r in records if r["spill_stores"] or r["spill_loads"]]
    assert not spilled, spilled
    assert all(0 < r["registers"] <= 255 and r["shared_bytes"] <= 99 * 1024 for r in records)


def test_a_spill_is_seen() -> None:
    """A tile too large for its threads: the figures are not zero by themselves."""
    from hvpfast.backends.triton import compilation

    problem = compilation.Problem(hf.MLPSpec((40, 32, 10), "tanh"), 8, 64, 2)
    recorded = compilation.launches(problem, torch.float32)
    mixed = next(l for l in recorded if l.kernel.__name__ == "mixed_backward_layer")
    constants = {**mixed.constants, "ROWS": 64, "COLUMNS": 64, "num_warps": 4}
    large = compilation.Launch(mixed.kernel, mixed.arguments, constants)
    record = compilation.record(large, torch.float32, 90)
    assert record.spill_stores > 0
    assert record.spill_loads > 0


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_products_have_the_named_precision(precision: str) -> None:
    """Tensor cores multiply TF32 numbers, three products for one, only where that is asked for."""
    from hvpfast.backends.triton import compilation

    problem = compilation.Problem(hf.MLPSpec((40, 32, 10)), 8, 64, 2, precision=precision)
    recorded = compilation.launches(problem, torch.float32)
    summing = [l for l in recorded if "PRECISION" in l.constants]
    assert len(summing) > 15
    assert {l.constants["PRECISION"] for l in summing} == {precision}
    forward = next(l for l in summing if l.kernel.__name__ == "r_forward_layer")
    ptx = compilation.compiled(forward, 80).asm["ptx"]
    assert ("mma.sync" in ptx) == ("tf32" in ptx) == (precision == "tf32x3")
