"""What every backend must do with a case: all operations, judged against float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from cases import SEED, Case, problem
from device import one_thread, placed
from oracle import assert_within_reference_error, expectations
from torch import Tensor

import hvpfast as hf

CURVATURES = ("hessian", "ggn")
WEIGHTS = (0.75, 1.5)
SMALL = Case(hf.MLPSpec((30, 40, 20, 10), "tanh"), 50, 3, torch.float32)


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


def assert_conforms(backend: str, case: Case) -> None:
    """Fail with every operation whose error is too large."""
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


def assert_kernels_ran(backend: str) -> None:
    """Results are close to the reference but not bitwise equal: it was another computation."""
    ours, reference = (
        [out for _, out, _ in operations(SMALL, linearize(SMALL, name))]
        for name in (backend, "reference")
    )
    vectors = [(a, b) for a, b in zip(ours, reference, strict=True) if a.numel() > 100]
    assert vectors
    for a, b in vectors:
        assert not torch.equal(a, b)
        assert (a - b).norm() <= 1e-4 * b.norm()
