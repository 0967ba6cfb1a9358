"""The CUDA engine on a GPU with networks whose products are large: pytest --device cuda."""

from __future__ import annotations

import pytest
import torch
from backends_here import skip_without
from cases import DTYPES, Case
from conformance import assert_conforms, linearize
from device import placed

import hvpfast as hf

SPEC = hf.MLPSpec((512, 512, 512, 10), "gelu")
CASE = Case(SPEC, 256, 2, torch.float32)

skip_without("cuda", CASE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_products_are_right(dtype: torch.dtype) -> None:
    """By cuBLAS, where there is one: judged like all others, in full precision."""
    assert_conforms("cuda", Case(SPEC, 256, 2, dtype))


def test_cublas_runs_where_torch_has_it() -> None:
    text = linearize(CASE, "cuda").explain()
    assert "matrix products: cuBLAS (libcublas.so." in text
    assert "already loaded" in text


def test_large_products_in_a_graph() -> None:
    """Replays compute anew, with the workspace of the recording."""
    q = placed(CASE)
    recorded = hf.CapturedHVP(SPEC, q.flat, q.x, q.y, q.tangents, backend="cuda")
    for factor in (1.0, 0.5):
        product = recorded(x=factor * q.x)
        lin = hf.linearize(SPEC, q.flat, factor * q.x, q.y, backend="cuda")
        expected = hf.hvp(lin, q.tangents)
        assert (product - expected).norm() <= 1e-5 * expected.norm()
