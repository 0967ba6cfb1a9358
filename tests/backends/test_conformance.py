"""One test body for every backend: all operations on every case, judged against float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext

import helpers
import pytest
import torch
from cases import CASES, SEED, Case, Problem, problem
from covering import covering_cases
from helpers import assert_within_reference_error, expectations, one_thread, place
from torch import Tensor

import hvpfast as hf
from hvpfast.backends import BACKENDS, choose

CURVATURES = ("hessian", "ggn")
WEIGHTS = (0.75, 1.5)


def runs() -> list[object]:
    """Case by case, every backend: neighbours share the oracle."""
    params, few = [], set(covering_cases())
    for case in CASES:
        for name in BACKENDS:
            if name == "reference" and case.dtype != torch.float64:
                continue  # there it is torch's own arithmetic: the error would be 0 by definition
            reason = refusal(name, case)
            skip = pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")
            marks = [skip, pytest.mark.covering] if case in few else [skip]
            params.append(pytest.param(name, case, marks=marks, id=f"{name}-{case}"))
    return params


def refusal(name: str, case: Case) -> str | None:
    """Why a backend cannot run a case on the device of this run, or None."""
    if (reason := hf.available()[name]) is not None:
        return reason
    try:
        choose(name, case.spec, helpers.DEVICE, case.dtype)
    except RuntimeError as error:
        return str(error)
    return None


def placed(case: Case) -> Problem:
    """The case's tensors on the device of this run."""
    q = problem(case)
    params = place(q.params) if isinstance(q.params, Tensor) else [place(t) for t in q.params]
    return Problem(
        place(q.flat), params, place(q.x), place(q.y), place(q.tangents), place(q.cotangents)
    )


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> dict[str, dict[str, Tensor]]:
    """The oracle: truth in float64, torch's own in the case's dtype, truth for nudged inputs."""
    q = problem(case)
    return expectations(case.spec, q.flat, q.x, q.y, q.tangents, q.cotangents)


def linearize(case: Case, backend: str) -> hf.Linearization:
    """The case on a backend."""
    q = placed(case)
    return hf.linearize(case.spec, q.params, q.x, q.y, backend=backend)


def operations(case: Case, lin: hf.Linearization) -> Iterator[tuple[str, Tensor, str]]:
    """(name, result, key of the oracle) of every operation."""
    q = placed(case)
    V, U = q.tangents, q.cotangents
    yield "loss", lin.loss, "loss"
    yield "gradient", lin.grad, "gradient"
    yield "hvp", hf.hvp(lin, V), "hessian product"
    yield "ggnvp", hf.ggnvp(lin, V), "ggn product"
    for curvature in CURVATURES:
        quadratic = hf.quadratic_form(lin, V, curvature=curvature)
        yield f"quadratic {curvature}", quadratic, f"{curvature} quadratic"
        vjp = hf.hvp_vjp(lin, V, U, curvature=curvature)
        yield f"hvp_vjp {curvature}", vjp, f"{curvature} vjp"
        for tangents in ([V] if case.K else []) + ([None] if case.drawn else []):
            loss, penalty, gradient = hf.penalty(
                lin, tangents, num_probes=case.K, seed=SEED, weights=WEIGHTS, curvature=curvature
            )
            name = f"penalty {curvature} {'drawn' if tangents is None else 'explicit'}"
            yield f"{name} loss", loss, "loss"
            yield name, penalty, f"{curvature} penalty"
            yield f"{name} gradient", gradient, f"{curvature} penalty gradient"


def combined_gradient(results: dict[str, Tensor], key: str) -> Tensor:
    """The gradient that the penalty returns: WEIGHTS of loss and penalty."""
    return WEIGHTS[0] * results["gradient"] + WEIGHTS[1] * results[key]


@pytest.mark.parametrize(("backend", "case"), runs())
def test_conformance(backend: str, case: Case) -> None:
    lin = linearize(case, backend)
    assert lin.backend == backend
    assert type(lin.state).__module__ == f"hvpfast.backends.{backend.partition('_')[0]}.state"
    with one_thread() if backend == "reference" else nullcontext():
        results = [(name, out.cpu(), key) for name, out, key in operations(case, lin)]
    expected, failures = _expected(case), []
    for name, actual, key in results:
        gradient_of_both = key.endswith("penalty gradient")
        values = {
            which: combined_gradient(oracle, key) if gradient_of_both else oracle[key]
            for which, oracle in expected.items()
        }
        try:
            assert_within_reference_error(
                actual,
                values["truth"],
                values["own"],
                f"{backend} {case} {name}",
                nudged=values["nudged"],
                floor=1.0 if key == "loss" else 0.0,  # log-sum-exp minus logit, both of order one
            )
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_kernels_ran(backend: str) -> None:
    """Results are close to the reference but not bitwise equal: it was another computation."""
    case = Case(hf.MLPSpec((30, 40, 20, 10), "tanh"), 50, 3, torch.float32)
    if (reason := refusal(backend, case)) is not None:
        pytest.skip(f"{backend}: {reason}")
    ours, reference = (
        [out for _, out, _ in operations(case, linearize(case, name))]
        for name in (backend, "reference")
    )
    vectors = [(a, b) for a, b in zip(ours, reference, strict=True) if a.numel() > 100]
    assert vectors
    for a, b in vectors:
        assert not torch.equal(a, b)
        assert (a - b).norm() <= 1e-4 * b.norm()


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
