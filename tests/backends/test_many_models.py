"""Many models at once: every backend, every operation, judged model by model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from backends_here import BACKENDS, refusal
from cases import CASES, FEW, SEED, Case, with_dtype
from conformance import CURVATURES, WEIGHTS
from device import one_thread, place
from many_models import Models, few, linearize, models
from oracle import assert_within_reference_error, expectations
from torch import Tensor

import hvpfast as hf
from hvpfast.backends import BACKENDS as TABLE
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.mlp.spec import ACTIVATIONS

ALONE = ("cpu", "reference")  # backends on which a model gives the same bits alone
# Each activation, loss, depth and option; one batch of more than one tile, one wide first layer.
SOME = [with_dtype(case, dtype) for case in FEW for dtype in (torch.float32, torch.float64)] + [
    case for case in CASES if case.dtype == torch.float32 and case.N in (129, 450)
]
on_each = pytest.mark.parametrize("backend", BACKENDS)


def operations(
    lin: hf.Linearization, V: Tensor, U: Tensor, drawn: Tensor | None
) -> Iterator[tuple[str, Tensor, str]]:
    """(name, result, key of the oracle) of every operation, of one model or of many.

    ``drawn``: the probes (P, K) that the model has of SEED; None for many models, which draw them.
    """
    yield "loss", lin.loss, "loss"
    yield "gradient", lin.grad, "gradient"
    yield "hvp", hf.hvp(lin, V), "hessian product"
    yield "ggnvp", hf.ggnvp(lin, V), "ggn product"
    yield "hvp of one", hf.hvp(lin, V[..., 0]), "hessian product of one"
    for curvature in CURVATURES:
        quadratic = hf.quadratic_form(lin, V, curvature=curvature)
        yield f"quadratic {curvature}", quadratic, f"{curvature} quadratic"
        vjp = hf.hvp_vjp(lin, V, U, curvature=curvature)
        yield f"hvp_vjp {curvature}", vjp, f"{curvature} vjp"
        for probes in (V, drawn):
            loss, penalty, gradient = hf.penalty(
                lin, probes, num_probes=2, seed=SEED, weights=WEIGHTS, curvature=curvature
            )
            given = probes is V
            name = f"penalty {curvature} {'given' if given else 'drawn'}"
            yield f"{name} loss", loss, "loss"
            yield name, penalty, f"{curvature} penalty" if given else ""
            yield f"{name} gradient", gradient, f"{curvature} penalty gradient" if given else ""
        trace = hf.penalty(lin, drawn, num_probes=2, seed=SEED, kind="trace", curvature=curvature)
        yield f"trace penalty {curvature}", trace[1], ""
        yield f"trace penalty {curvature} gradient", trace[2], ""


def value(results: dict[str, Tensor], key: str) -> Tensor:
    """What the oracle says of an operation."""
    if key == "hessian product of one":
        return results["hessian product"][:, 0]
    if key.endswith("penalty gradient"):
        return WEIGHTS[0] * results["gradient"] + WEIGHTS[1] * results[key]
    return results[key]


def runs() -> list[object]:
    """Case by case, every backend that runs it."""
    params = []
    for i, case in enumerate(SOME):
        for name in BACKENDS:
            if refusal(name, case) is not None:
                continue  # test_conformance.py says why
            if name == "reference" and case.dtype != torch.float64:
                continue  # there the oracle has the same errors by definition
            shared = i % 2 == 1, i // 2 % 2 == 1
            label = f"{name}-{case}-{'x' if shared[0] else ''}{'y' if shared[1] else ''}shared"
            params.append(pytest.param(name, case, *shared, id=label))
    return params


@pytest.mark.parametrize(("backend", "case", "x_shared", "y_shared"), runs())
def test_conformance(backend: str, case: Case, x_shared: bool, y_shared: bool) -> None:
    q = models(case, 3, x_shared, y_shared)
    tensors = (q.params, q.x, q.y, q.tangents, q.cotangents)
    there = Models(q.spec, *(place(t) for t in tensors))
    P, failures = q.spec.num_params, []
    with one_thread() if backend == "reference" else nullcontext():
        lin = linearize(there, backend)
        family = f"hvpfast.backends.{backend.partition('_')[0]}"
        assert type(lin.state).__module__.startswith(family)
        together = [
            (name, out.cpu(), key)
            for name, out, key in operations(lin, there.tangents, there.cotangents, None)
        ]
        assert lin.normalizers.dtype == torch.float64
        for m in range(3):
            flat, x, y = q.alone(m)
            V, U = q.tangents[m], q.cotangents[m]
            drawn = hf.probes(P, 2, seed=SEED, first=2 * m, dtype=case.dtype)
            one = hf.linearize(q.spec, *there.alone(m), backend=backend)
            assert float(lin.normalizers[m]) == one.normalizer
            expected = expectations(q.spec, flat, x, y, V, U)
            for (name, results, key), (_, alone, _) in zip(
                together, operations(one, place(V), place(U), place(drawn)), strict=True
            ):
                alone = alone.cpu()
                label = f"{backend} {case} model {m} {name}"
                if backend in ALONE and not torch.equal(results[m], alone):
                    failures.append(f"{label}: not the bits of the model alone")
                try:
                    if key:
                        assert_within_reference_error(
                            results[m],
                            value(expected["truth"], key),
                            value(expected["own"], key),
                            label,
                            nudged=value(expected["nudged"], key),
                            floor=1.0 if key == "loss" else 0.0,
                        )
                    else:  # no oracle of these probes: the model alone is judged elsewhere
                        torch.testing.assert_close(results[m], alone)
                except AssertionError as error:
                    failures.append(str(error))
    assert not failures, "\n".join(failures)


def test_every_backend_is_in_the_matrix() -> None:
    assert set(TABLE) == set(hf.available())
    assert {case.spec.activation for case in SOME} >= set(ACTIVATIONS)


@pytest.mark.skipif("cpu" not in BACKENDS, reason=str(hf.available()["cpu"]))
@pytest.mark.parametrize("M", [1, 2, 7])
def test_cpu_bits_do_not_depend_on_threads(M: int) -> None:
    spec = hf.MLPSpec((40, 32, 10), "tanh")
    q = models(Case(spec, 64, 3, torch.float32), M)
    before, expected = torch.get_num_threads(), None
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 4)
            lin = linearize(q, "cpu")
            results = [out for _, out, _ in operations(lin, q.tangents, q.cotangents, None)]
            bits = torch.cat([out.reshape(-1) for out in results])
            expected = bits if expected is None else expected
            assert torch.equal(bits, expected), f"run {run}, {1 + run % 4} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("backend", "sizes"),
    # wide on the cpu backend, which does not form the first layer then
    [(name, (6, 5, 3)) for name in BACKENDS] + [("cpu", (300, 60, 4))] * ("cpu" in BACKENDS),
)
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_sources_are_numbered_through(
    backend: str, sizes: tuple[int, ...], distribution: str
) -> None:
    """Model m has the probes first + m K, ..., in whatever basis a backend draws them."""
    q = models(Case(hf.MLPSpec(sizes), 9, 2))
    source = ProbeSource(3, distribution, SEED, first=4)
    with one_thread() if backend == "reference" else nullcontext():
        together = linearize(q, backend).state.penalty(source, False)
        gradients = together.gradient(0.5, 2.0)
        for m in range(3):
            assert source.of_model(m) == ProbeSource(3, distribution, SEED, 4 + 3 * m)
            state = hf.linearize(q.spec, *q.alone(m), backend=backend).state
            one = state.penalty(source.of_model(m), False)
            torch.testing.assert_close(together.penalty[m], one.penalty, rtol=1e-12, atol=0)
            torch.testing.assert_close(gradients[m], one.gradient(0.5, 2.0))


@pytest.fixture
def q() -> Models:
    return few()


@on_each
def test_shapes(q: Models, backend: str) -> None:
    lin = linearize(q, backend)
    M, P = q.params.shape
    assert (lin.num_models, lin.num_params, lin.backend) == (M, P, backend)
    assert lin.loss.shape == (M,) and lin.grad.shape == (M, P)
    assert lin.state.nbytes > 0
    assert hf.hvp(lin, q.tangents).shape == (M, P, 2)
    assert hf.hvp(lin, q.tangents[:, :, 0]).shape == (M, P)
    assert hf.hvp(lin, q.tangents[:, :, :0]).shape == (M, P, 0)
    assert hf.quadratic_form(lin, q.tangents[:, :, 0]).shape == (M,)
    assert hf.quadratic_form(lin, q.tangents[:, :, :0]).shape == (M, 0)
    nothing = hf.hvp_vjp(lin, q.tangents[:, :, :0], q.tangents[:, :, :0])
    assert nothing.shape == (M, P) and not nothing.any()
    assert "3 models" in lin.explain() and "3 models" in repr(lin)
    rowmajor = q.tangents.contiguous()  # the transpose must be copied
    assert torch.equal(hf.hvp(lin, rowmajor), hf.hvp(lin, q.tangents))


@on_each
def test_results_are_detached_and_the_callers_own(q: Models, backend: str) -> None:
    expected = linearize(q, backend)
    for t in (q.params, q.x, q.tangents):
        t.requires_grad_()
    lin = linearize(q, backend)
    results = list(operations(lin, q.tangents, q.tangents, None))
    wanted = list(operations(expected, q.tangents, q.tangents, None))
    for (name, result, _), (_, other, _) in zip(results, wanted, strict=True):
        assert not result.requires_grad, name
        torch.testing.assert_close(result, other)
        if name != "gradient":  # which is kept
            result.zero_()
    again = {name: result for name, result, _ in operations(lin, q.tangents, q.tangents, None)}
    for name, other, _ in wanted:
        torch.testing.assert_close(again[name], other, msg=f"{name}: a result was the state's own")


@on_each
def test_drawn_probes_are_reproducible(q: Models, backend: str) -> None:
    lin = linearize(q, backend)
    for distribution in ("rademacher", "normal"):
        first, again, other = (
            hf.penalty(lin, num_probes=2, seed=seed, distribution=distribution)[1]
            for seed in (5, 5, 6)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(hf.penalty(lin)[1], hf.penalty(lin)[1])  # fresh entropy
