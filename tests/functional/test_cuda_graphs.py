"""CUDA graphs on a stand-in for them, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends_here import BACKENDS
from graph_stand_in import Stand, stand_in
from torch import Tensor

import hvpfast as hf
from hvpfast.backends.probes.draw import draw
from hvpfast.backends.probes.numpy import numpy_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.backends.probes.torch import draw_by_torch
from hvpfast.utils import cuda_graph

SPEC = hf.MLPSpec((5, 6, 4), "tanh")
WEIGHTED = hf.MLPSpec((5, 6, 4), "silu", class_weights=(1.0, 2.0, 0.5, 1.0), label_smoothing=0.1)
N, K, SEED = 7, 3, 5


engine = SimpleNamespace(backend="reference")  # whose work the running test records


ON_GPU = [name for name in ("reference", "cuda", "triton") if name in BACKENDS]


@pytest.fixture(params=["stand-in", *(ON_GPU if torch.cuda.is_available() else [])])
def stand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in and the reference backend, or None and a backend on a GPU."""
    if request.param == "stand-in":
        with stand_in(monkeypatch) as found:
            yield found
        return
    monkeypatch.setattr(engine, "backend", request.param)
    yield None


def on(stand: Stand | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if stand is not None else tuple(t.cuda() for t in tensors)


def point(stand: Stand | None, seed: int = 0, spec: hf.MLPSpec = SPEC) -> tuple[Tensor, ...]:
    """params (P,), x (N, D0), y (N,), V (P, K)."""
    g = torch.Generator().manual_seed(seed)
    params = 0.5 * torch.randn(spec.num_params, generator=g, dtype=torch.float64)
    x = torch.randn(N, spec.sizes[0], generator=g, dtype=torch.float64)
    y = torch.randint(0, spec.sizes[-1], (N,), generator=g)
    V = torch.randn(K, spec.num_params, generator=g, dtype=torch.float64).T
    return on(stand, params, x, y, V)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# ---- products -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, WEIGHTED])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_product_follows_data_parameters_and_tangents(
    stand: Stand | None, curvature: str, spec: hf.MLPSpec
) -> None:
    params, x, y, V = point(stand, spec=spec)
    apply = hf.hvp if curvature == "hessian" else hf.ggnvp
    product = hf.CapturedHVP(spec, params, x, y, V, curvature=curvature, backend=engine.backend)

    def expected(x: Tensor, y: Tensor, V: Tensor) -> Tensor:
        return apply(hf.linearize(spec, params, x, y, backend=engine.backend), V)

    close(product(), expected(x, y, V))
    others, x2, y2, V2 = point(stand, seed=1, spec=spec)
    close(product(V2), expected(x, y, V2))
    close(product(x=x2, y=y2), expected(x2, y2, V2))
    params.copy_(others)  # in place, as an optimizer does it
    out = product()
    close(out, expected(x2, y2, V2))
    assert product(V).data_ptr() == out.data_ptr(), "the same tensor every time"
    close(out, expected(x2, y2, V))
    product.check()
    if stand is not None:
        assert [graph.replays for graph in stand.graphs] == [5]


@pytest.mark.parametrize("layers", [False, True])
def test_product_of_one_direction(stand: Stand | None, layers: bool) -> None:
    flat, x, y, V = point(stand)
    params = [t.clone() for t in SPEC.unflatten(flat)] if layers else flat
    product = hf.CapturedHVP(SPEC, params, x, y, V[:, 0], backend=engine.backend)
    out = product(V[:, 1])
    assert out.shape == (SPEC.num_params,)
    close(out, hf.hvp(hf.linearize(SPEC, params, x, y, backend=engine.backend), V[:, 1]))


def test_callers_tensors_are_not_written(stand: Stand | None) -> None:
    params, x, y, V = point(stand)
    kept = [t.clone() for t in (params, x, y, V)]
    product = hf.CapturedHVP(SPEC, params, x, y, V, backend=engine.backend)
    product(V + 1, x=x + 1, y=(y + 1) % 4)
    for now, before in zip((params, x, y, V), kept, strict=True):
        assert torch.equal(now, before)


# ---- training steps -------------------------------------------------------------------------

STEPS = cuda_graph.WARMUPS + 3
Make = Callable[[Any], torch.optim.Optimizer]


def momentum(params: Any) -> torch.optim.Optimizer:
    tensors = [params] if isinstance(params, Tensor) else params
    return torch.optim.SGD(tensors, lr=0.1, momentum=0.9)


def batches(stand: Stand | None) -> list[tuple[Tensor, Tensor]]:
    return [point(stand, seed=i)[1:3] for i in range(STEPS)]


def trained(
    params: Any, data: list[tuple[Tensor, Tensor]], probes: list[Tensor], **options: Any
) -> list[tuple[float, float]]:
    """The same steps without a recording."""
    optimizer, values = momentum(params), []
    for (x, y), V in zip(data, probes, strict=True):
        lin = hf.linearize(SPEC, params, x, y, backend=engine.backend)
        loss, penalty, gradient = hf.penalty(lin, V, weights=(1.0, 0.1), **options)
        values.append((float(loss), float(penalty)))
        if isinstance(params, Tensor):
            params.grad = gradient
        else:
            for p, g in zip(params, SPEC.unflatten(gradient), strict=True):
                p.grad = g
        optimizer.step()
    return values


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("layers", [False, True])
def test_run_is_the_same_recorded_or_not(
    stand: Stand | None, layers: bool, distribution: str
) -> None:
    flat = point(stand)[0]
    data = batches(stand)

    def start() -> Any:
        return [t.clone() for t in SPEC.unflatten(flat)] if layers else flat.clone()

    expected_params, params = start(), start()
    probes = [
        hf.probes(flat.numel(), K, distribution=distribution, seed=SEED, first=t * K,
                  dtype=flat.dtype, device=flat.device)
        for t in range(STEPS)
    ]  # fmt: skip
    expected = trained(expected_params, data, probes)
    step = hf.CapturedStep(
        SPEC, params, momentum(params), *data[0], num_probes=K, distribution=distribution,
        seed=SEED, weights=(1.0, 0.1), backend=engine.backend,
    )  # fmt: skip
    found = []
    for x, y in data:
        loss, penalty = step(x, y)
        found.append((float(loss), float(penalty)))
    close(torch.tensor(found), torch.tensor(expected))
    for a, b in zip(_list(params), _list(expected_params), strict=True):
        close(a, b)
    if stand is not None:
        assert [graph.replays for graph in stand.graphs] == [STEPS - cuda_graph.WARMUPS]


def test_a_run_is_taken_up_again(stand: Stand | None) -> None:
    """With the parameters of an earlier step, and the probes that it had."""
    flat, x, y, _ = point(stand)

    def made(params: Tensor) -> hf.CapturedStep:
        return hf.CapturedStep(
            SPEC, params, torch.optim.SGD([params], lr=0.1), x, y, num_probes=K, seed=SEED,
            backend=engine.backend,
        )  # fmt: skip

    params = flat.clone()
    step = made(params)
    for _ in range(2):
        step()
    middle = params.clone()
    expected = [tuple(map(float, step())) for _ in range(4)]
    params.copy_(middle)
    step.seek(2)
    assert [tuple(map(float, step())) for _ in range(4)] == expected
    again = made(middle)
    again.seek(2)
    close(torch.tensor([tuple(map(float, again())) for _ in range(4)]), torch.tensor(expected))
    with pytest.raises(ValueError, match="t must be an integer >= 0; got -1"):
        step.seek(-1)
    given = hf.CapturedStep(
        SPEC, params, momentum(params), x, y, tangents=point(stand)[3], backend=engine.backend
    )
    with pytest.raises(ValueError, match="draws no probes"):
        given.seek(0)


def _list(params: Any) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else params


def test_given_probes_and_ggn(stand: Stand | None) -> None:
    flat, data = point(stand)[0], batches(stand)
    probes = [point(stand, seed=50 + i)[3] for i in range(STEPS)]
    expected_params, params = flat.clone(), flat.clone()
    expected = trained(expected_params, data, probes, curvature="ggn")
    step = hf.CapturedStep(
        SPEC, params, momentum(params), *data[0], tangents=probes[0], weights=(1.0, 0.1),
        curvature="ggn", backend=engine.backend,
    )  # fmt: skip
    found = [tuple(map(float, step(x, y, V))) for (x, y), V in zip(data, probes, strict=True)]
    close(torch.tensor(found), torch.tensor(expected))
    close(params, expected_params)


def test_check_looks_at_labels_and_loss(stand: Stand | None) -> None:
    params, x, y, _ = point(stand)
    step = hf.CapturedStep(SPEC, params, momentum(params), x, y, seed=0, backend=engine.backend)
    step.check()  # nothing has run
    for _ in range(STEPS):
        step()
    step.check()
    step(x.fill_(float("nan")))
    with pytest.raises(ValueError, match="x has 35 entries that are NaN"):
        step.check()


def test_check_names_a_label_out_of_range(stand: Stand | None) -> None:
    if stand is None:
        pytest.skip("torch's own kernel stops the device at such a label")
    params, x, y, V = point(stand)
    product = hf.CapturedHVP(SPEC, params, x, y, V, backend=engine.backend)
    product._data.fill("y", torch.full_like(y, 9))
    with pytest.raises(ValueError, match=r"got y\[0\] = 9"):
        product.check()


# ---- what must fail -------------------------------------------------------------------------


def test_reading_the_device_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    params, x, y, V = point(Stand())
    with stand_in(monkeypatch):
        with pytest.raises(RuntimeError, match="the sum cannot be recorded as a CUDA graph"):
            cuda_graph.Recording(params.device, "the sum", lambda: params.sum().item())
        monkeypatch.setattr(cuda_graph, "recording", lambda like: False)
        with pytest.raises(RuntimeError, match="hessian product cannot be recorded"):
            hf.CapturedHVP(SPEC, params, x, y, V, backend=engine.backend)


def test_without_a_gpu_it_says_so() -> None:
    params, x, y, V = point(Stand())
    reason = (
        r"work on a GPU, but params are on cpu: (this torch was built without|torch sees no|mo)"
    )
    with pytest.raises(RuntimeError, match=reason):
        hf.CapturedHVP(SPEC, params, x, y, V)
    with pytest.raises(RuntimeError, match=reason):
        hf.CapturedStep(SPEC, params, momentum(params), x, y)


def test_inputs_keep_their_shapes(stand: Stand | None) -> None:
    params, x, y, V = point(stand)
    product = hf.CapturedHVP(SPEC, params, x, y, V, backend=engine.backend)
    for wrong, error, message in (
        ({"x": x[:3]}, ValueError, r"x must be \(7, 5\), as it was recorded; got \(3, 5\)"),
        ({"x": x.float()}, TypeError, "x must be torch.float64"),
        ({"y": y.tolist()}, TypeError, "y must be a tensor; got list"),
        ({"tangents": V[:, :2]}, ValueError, r"tangents must be \(\d+, 3\)"),
        ({"tangents": V.float()}, TypeError, "must be torch.float64"),
    ):
        with pytest.raises(error, match=message):
            product(**wrong)


def test_parameters_stay_where_they_are(stand: Stand | None) -> None:
    params, x, y, V = point(stand)
    product = hf.CapturedHVP(SPEC, params, x, y, V, backend=engine.backend)
    params.data = params.clone()
    with pytest.raises(RuntimeError, match="other memory after the recording"):
        product()


def test_step_refuses_what_it_cannot_mean(stand: Stand | None) -> None:
    params, x, y, V = point(stand)
    with pytest.raises(ValueError, match="exactly the parameters of the step"):
        hf.CapturedStep(SPEC, params, momentum(params.clone()), x, y)
    with pytest.raises(ValueError, match="Adam keeps its count of steps on the host"):
        hf.CapturedStep(SPEC, params, torch.optim.Adam([params]), x, y)
    with pytest.raises(ValueError, match="needs one or more; got 0"):
        hf.CapturedStep(SPEC, params, momentum(params), x, y, num_probes=0)
    with pytest.raises(ValueError, match="curvature must be"):
        hf.CapturedStep(SPEC, params, momentum(params), x, y, curvature="fisher")
    drawn = hf.CapturedStep(SPEC, params, momentum(params), x, y, backend=engine.backend)
    with pytest.raises(ValueError, match="this step draws its probes"):
        drawn(tangents=V)


# ---- probes on the device -------------------------------------------------------------------


SEEDS = (0, 2**64 - 1, 12345678901234)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("seed", SEEDS)
def test_device_probes_are_bit_equal(distribution: str, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for function in (draw, draw_by_torch):
        for P, first in ((1, 0), (5001, 7), (130, 2**32 - 3)):
            out = torch.empty(3, P, device=device)
            function(out, distribution, seed, torch.tensor(first, device=device))
            expected = numpy_rows(ProbeSource(3, distribution, seed, first), P)
            assert torch.equal(out.cpu(), torch.from_numpy(expected))
