"""Exact curvature from per-sample cores against dense matrices, on every backend."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from backends_here import BACKENDS
from cases import FEW, SIZES, Case, problem, with_dtype
from dense import classes, close, convnet, dense, perceptron
from device import one_thread
from oracle import assert_within_reference_error, dense_ggn, dense_hessian
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.functional.linearize import linearize
from hvpfast.mlp.spec import ACTIVATIONS, LOSSES, MLPSpec
from hvpfast.utils import memory

pytestmark = pytest.mark.usefixtures("single_threaded")

TOLERANCE = 1e-10
CASES = [
    *FEW,
    *(
        Case(MLPSpec(SIZES[hidden][i % 2], activation, loss, bias=bias), (1, 5, 9)[i % 3])
        for i, (hidden, activation, loss, bias) in enumerate(
            itertools.product((0, 1, 2, 3), ACTIVATIONS, LOSSES, (True, False))
        )
        if hidden > 0 or activation == "relu"
    ),
    Case(MLPSpec((3, 4, 2, 3, 2, 3), "tanh"), 6),  # columns of M at every distance
    Case(MLPSpec((6, 4, 5, 3), "silu", ignore_index=1, reduction="sum"), 18),
]


@functools.cache
def matrix(case: Case, ggn: bool, begin: int = 0, end: int | None = None) -> Tensor:
    """H or G of some samples, dense."""
    p = problem(case)
    part = slice(begin, end)
    return (dense_ggn if ggn else dense_hessian)(case.spec, p.flat, p.x[part], p.y[part])


def selections(spec: MLPSpec) -> list[list[bool]]:
    """Flags of [W1, b1, ...]: all, the first, the last, and a mixture."""
    count = len(spec.shapes)
    some = [i % 3 != 1 for i in range(count)]
    first, last = [[i == k for i in range(count)] for k in (0, count - 1)]
    return [[True] * count, first, last, some]


def entries(spec: MLPSpec, chosen: list[bool]) -> Tensor:
    """The chosen entries of the flat vector, as a mask (P,)."""
    return torch.cat([torch.full((n,), flag) for n, flag in zip(spec.numels, chosen, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_trace_diagonal_and_frobenius_norm(case: Case, backend: str) -> None:
    p = problem(case)
    state = linearize(case.spec, p.params, p.x, p.y, backend=backend, order=2).state
    for ggn in (False, True):
        H = matrix(case, ggn)
        close(state.diagonal(ggn), H.diagonal(), TOLERANCE)
        for chosen in selections(case.spec):
            mask = entries(case.spec, chosen)
            block = H[mask][:, mask]
            close(state.sample_traces(ggn, chosen).sum(), block.trace(), TOLERANCE)
            found = state.inner_product(state, ggn, chosen)
            close(torch.tensor(found, dtype=torch.float64), block.square().sum(), TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ggn", [False, True])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_samples_and_pairs_of_batches(case: Case, ggn: bool, backend: str) -> None:
    p = problem(case)
    spec, every = case.spec, selections(case.spec)[0]
    state = linearize(spec, p.params, p.x, p.y, backend=backend, order=2).state
    total = 1.0 if spec.reduction == "sum" else state.normalizer
    cut = 2
    parts, matrices = [], []
    for part in (slice(0, cut), slice(cut, len(p.x))):
        x, y = p.x[part], p.y[part]
        parts.append(linearize(spec, p.params, x, y, backend=backend, order=2).state)
        matrices.append(matrix(case, ggn, part.start, part.stop))
    A, B = matrices
    found = parts[0].inner_product(parts[1], ggn, every)
    close(torch.tensor(found, dtype=torch.float64), (A * B).sum(), TOLERANCE)
    traces = state.sample_traces(ggn, every)
    for n in range(len(p.x)):
        one = linearize(spec, p.params, p.x[n : n + 1], p.y[n : n + 1], backend="reference").state
        own = matrix(case, ggn, n, n + 1).trace()
        share = 1.0 if spec.reduction == "sum" else one.normalizer / total
        close(traces[n], share * own, TOLERANCE)


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_float32_within_the_reference_error(case: Case) -> None:
    p = problem(with_dtype(case, torch.float32))
    double = problem(case)
    every = selections(case.spec)[0]
    for ggn in (False, True):
        values = []
        for q, backend in ((p, "cpu"), (double, "reference"), (p, "reference")):
            state = linearize(case.spec, q.params, q.x, q.y, backend=backend).state
            square = torch.tensor(state.inner_product(state, ggn, every), dtype=q.flat.dtype)
            gradient = state.exact_penalty("fro2", ggn, every).gradient(0.0, 1.0)
            diagonal = state.diagonal(ggn)
            values.append({"diagonal": diagonal, "tr H^2": square, "gradient": gradient})
        for name in values[0]:
            actual, truth, same = (v[name] for v in values)
            assert_within_reference_error(actual, truth, same, f"{case}: {name}")


@pytest.mark.skipif(hf.available()["cpu"] is not None, reason="needs the extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(5, 4, 3), (4, 3, 4, 3, 2)])
def test_chunks_of_many_samples(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    spec = MLPSpec(sizes, "tanh")
    N = 1100 if dtype == torch.float32 else 560  # more panels than one chunk takes
    g = torch.Generator().manual_seed(3)
    flat = 0.5 * torch.randn(spec.num_params, generator=g).to(dtype)
    x = torch.randn(N, sizes[0], generator=g).to(dtype)
    y = torch.randint(sizes[-1], (N,), generator=g)
    every = selections(spec)[0]
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    states = [linearize(spec, flat, x, y, backend=b).state for b in ("cpu", "reference")]
    for kind in ("fro2", "trace"):
        own, truth = (s.exact_penalty(kind, False, every) for s in states)
        close(own.penalty, truth.penalty, tolerance)
        close(own.gradient(0.5, 2.0), truth.gradient(0.5, 2.0), tolerance)
    close(states[0].diagonal(False), states[1].diagonal(False), tolerance)
    parts = [linearize(spec, flat, x[i], y[i]).state for i in (slice(0, 500), slice(500, N))]
    found = parts[0].inner_product(parts[1], False, every)
    assert found == pytest.approx(parts[1].inner_product(parts[0], False, every), rel=tolerance)


@pytest.mark.skipif(hf.available()["cpu"] is not None, reason="needs the extension")
def test_same_bits_for_any_number_of_threads() -> None:
    results = []
    for sizes, N in (((9, 17, 20, 5), 1100), ((20, 32, 10), 64)):
        case = Case(MLPSpec(sizes, "gelu"), N, dtype=torch.float32)
        p, every = problem(case), selections(case.spec)[0]
        for threads in (1, 2, 3):
            with one_thread():
                torch.set_num_threads(threads)
                state = linearize(case.spec, p.params, p.x, p.y).state
                penalty = state.exact_penalty("fro2", False, every)
                square = state.inner_product(state, False, every)
                gradient = penalty.gradient(0.3, 0.7)
                results.append((penalty.penalty, square, gradient, state.diagonal(False)))
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
        results.clear()


@pytest.mark.skipif(hf.available()["cpu"] is not None, reason="needs the extension")
def test_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvpfast.backends import _cpu
    from hvpfast.backends.cpu import state as cpu

    case = FEW[1]
    p, every = problem(case), selections(case.spec)[0]
    truth = linearize(case.spec, p.params, p.x, p.y, backend="reference").state
    plan = cpu.plan
    for isa in _cpu.isas():
        monkeypatch.setattr(cpu, "plan", lambda spec, isa=isa: plan(spec, isa))
        penalty = cpu.linearize(case.spec, p.flat, p.x, p.y, 3).exact_penalty("fro2", False, every)
        expected = truth.exact_penalty("fro2", False, every)
        close(penalty.penalty, expected.penalty, 1e-12)
        close(penalty.gradient(1.0, 1.0), expected.gradient(1.0, 1.0), 1e-12)


# ---- operators ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", [hf.HessianOperator, hf.GGNOperator])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("budget", ["auto", 0])
def test_cores_of_an_operator(operator: type, reduction: str, backend: str, budget: object) -> None:
    model, (x, y) = perceptron(), classes(13, 4)
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 2.0]).double(), ignore_index=2,
                                  reduction=reduction)  # fmt: skip
    data = [(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])]
    H = operator(model, loss_fn, None, data, backend=backend, memory_budget=budget)
    truth = dense(model, loss_fn, x, y, ggn=operator is hf.GGNOperator)
    cores = H.cores()
    close(cores.trace(), truth.trace(), TOLERANCE)
    close(cores.diagonal(), truth.diagonal(), TOLERANCE)
    close(cores.frobenius_sq(), truth.square().sum(), TOLERANCE)
    traces = cores.sample_traces()
    assert traces.shape == (13,)
    close(traces.sum(), truth.trace(), TOLERANCE)
    assert (traces[y == 2] == 0).all()


def test_batches_that_do_not_count() -> None:
    model, (x, y) = perceptron(), classes(6, 4)
    loss_fn = nn.CrossEntropyLoss(ignore_index=-1)
    y[2:4] = -1
    data = [(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:])]
    traces = hf.HessianOperator(model, loss_fn, None, data).cores().sample_traces()
    assert traces.shape == (6,) and (traces[2:4] == 0).all()
    close(traces.sum(), dense(model, loss_fn, x, y).trace(), TOLERANCE)


@pytest.mark.parametrize("names", [["2.weight"], ["4.*", "0.bias"], ["2.bias", "0.weight"]])
def test_parameter_subsets(names: list[str]) -> None:
    model, (x, y) = perceptron(), classes(9, 4)
    loss_fn = nn.CrossEntropyLoss()
    H = hf.HessianOperator(model, loss_fn, names, (x, y))
    truth = dense(model, loss_fn, x, y, H.param_names)
    cores = H.cores()
    close(cores.trace(), truth.trace(), TOLERANCE)
    close(cores.diagonal(), truth.diagonal(), TOLERANCE)
    close(cores.frobenius_sq(), truth.square().sum(), TOLERANCE)
    for block in hf.HessianOperator(model, loss_fn, None, (x, y)).blocks():
        own = dense(model, loss_fn, x, y, block.param_names)
        close(block.cores().frobenius_sq(), own.square().sum(), TOLERANCE)


def test_changed_parameters_and_other_models_are_refused() -> None:
    model, data = perceptron(), classes(9, 4)
    H = hf.HessianOperator(model, nn.CrossEntropyLoss(), None, data)
    cores = H.cores()
    before = cores.frobenius_sq()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="refresh"):
        cores.frobenius_sq()
    with pytest.raises(RuntimeError, match="refresh"):
        cores.trace()
    H.refresh()
    assert cores.frobenius_sq() != before
    other = hf.HessianOperator(
        convnet(), nn.CrossEntropyLoss(), None, classes(5, 1, 4, 4), backend="reference"
    )
    with pytest.raises(NotImplementedError, match="multilayer perceptrons"):
        other.cores()
    with pytest.raises(NotImplementedError, match="multilayer perceptrons"):
        other.linearized._states[0].diagonal(False)


def test_cost_counts_pairs() -> None:
    model = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 10))
    costs = []
    for count in (64, 128):
        x, y = torch.zeros(count, 40), torch.zeros(count, dtype=torch.int64)
        H = hf.HessianOperator(model, nn.CrossEntropyLoss(), None, (x, y))
        costs.append(H.cores().cost())
    small, large = costs
    # B_1, B_2, U, Y with Z twice, alpha, beta of one pair; the last product of one sample
    per_pair = 528 + 55 + 320 + 640 + 40 + 32 + 10
    assert large.trace == 2 * small.trace and large.matvec == 2 * small.matvec
    pairs = 128 * 129 / 2 - 2 * 64 * 65 / 2
    assert large.frobenius_sq - 2 * small.frobenius_sq == pytest.approx(pairs * per_pair)
    assert small.matvec == 64 * (2 * 40 * 32 + 6 * 32 * 10)


@pytest.mark.skipif(hf.available()["cpu"] is not None, reason="needs the extension")
def test_memory_is_stated_where_it_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf.MLP((2, 6000, 2))
    data = (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    cores = hf.HessianOperator(model, nn.CrossEntropyLoss(), None, data).cores()
    monkeypatch.setattr(memory, "available_bytes", lambda *args, **options: 2**20)
    message = r"exact tr H\^2 of a 2-6000-2 perceptron takes [\d.]+ GB .*'hutchinson'"
    with pytest.raises(MemoryError, match=message):
        cores.frobenius_sq()
    with pytest.raises(MemoryError, match="gradient of the exact"):
        hf.hessian_penalty(model, nn.CrossEntropyLoss(), data, estimator="exact")
    assert cores.trace().isfinite()


@pytest.mark.skipif(hf.available()["cpu"] is not None, reason="needs the extension")
def test_states_of_different_networks_are_refused() -> None:
    states = []
    for sizes in ((3, 4, 2), (3, 5, 2)):
        p = problem(Case(MLPSpec(sizes), 4))
        states.append(linearize(MLPSpec(sizes), p.params, p.x, p.y).state)
    with pytest.raises(ValueError, match="one network"):
        states[0].inner_product(states[1], False, [True] * 4)
