"""One test body for every backend: all operations on every case, judged against float64."""

from __future__ import annotations

import pytest
import torch
from backends_here import refusal, skip_without
from cases import CASES, Case
from conformance import SMALL, assert_conforms, assert_kernels_ran
from covering import covering_cases

from hvpfast.backends import BACKENDS


def runs() -> list[object]:
    """Case by case, every backend that runs it: neighbours share the oracle.

    The cases that a backend refuses, all where it cannot run, are one skipped test per reason.
    """
    params, few = [], set(covering_cases())
    refused: dict[tuple[str, str], list[Case]] = {}
    for case in CASES:
        for name in BACKENDS:
            if name == "reference" and case.dtype != torch.float64:
                continue  # there it is torch's own arithmetic: the error would be 0 by definition
            if (reason := refusal(name, case)) is not None:
                refused.setdefault((name, reason), []).append(case)
                continue
            marks = [pytest.mark.covering] if case in few else []
            params.append(pytest.param(name, case, marks=marks, id=f"{name}-{case}"))
    for (name, _), cases in refused.items():
        label = f"{name}-{len(cases)}_cases"
        params.append(pytest.param(name, cases[0], marks=pytest.mark.covering, id=label))
    return params


@pytest.mark.parametrize(("backend", "case"), runs())
def test_conformance(backend: str, case: Case) -> None:
    skip_without(backend, case)
    assert_conforms(backend, case)


@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name != "reference" and refusal(name, SMALL) is None]
)
def test_kernels_ran(backend: str) -> None:
    assert_kernels_ran(backend)


def test_matrix_is_complete() -> None:
    """Every value of every axis is among the cases, and each name is given once."""
    assert len({str(case) for case in CASES}) == len(CASES)
    seen = {
        (c.spec.activation, c.spec.loss, c.spec.reduction, c.dtype, c.spec.bias, c.spec.num_layers)
        for c in CASES
        if c.spec.num_layers > 1
    }
    assert len(seen) >= 8 * 2 * 2 * 2 * 2 * 3
    for name, values in {
        "N": {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300},
        "K": {0, 1, 2, 7, 64},
        "layout": {"flat", "layers"},
        "strided": {False, True},
    }.items():
        assert values <= {getattr(case, name) for case in CASES}
