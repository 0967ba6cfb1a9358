"""The triton backend where it can run: a CUDA device, or Triton's interpreter on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backends_here import skip_without
from cases import Case, problem
from oracle import assert_within_reference_error, oracle
from torch import Tensor

import hvpfast as hf
from hvpfast.backends.cpu import state as cpu
from hvpfast.backends.probes.numpy import numpy_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.backends.reference import state as reference
from hvpfast.backends.triton import state as triton
from hvpfast.mlp.spec import ACTIVATION_TABLE, ACTIVATIONS
from hvpfast.utils import triton_launch

skip_without("triton")
DEVICE = torch.device("cpu" if triton_launch.INTERPRETED else "cuda")
CURVATURES = ("hessian", "ggn")


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


def operations(state: triton.TritonState, V: Tensor, U: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every operation for rows V, U (K, P); names are the oracle's."""
    yield "loss", state.loss
    yield "gradient", state.gradient()
    for ggn, curvature in enumerate(CURVATURES):
        yield f"{curvature} product", state.hvp(V, bool(ggn)).T
        yield f"{curvature} quadratic", state.quadratic(V, bool(ggn))
        yield f"{curvature} vjp", state.hvp_vjp(V, U, bool(ggn))
        penalty = state.penalty(V, bool(ggn))
        yield f"{curvature} penalty", penalty.penalty
        yield f"{curvature} penalty gradient", penalty.gradient(0.0, 1.0)


def check(case: Case) -> None:
    q = problem(case)
    flat, x, y, V, U = on_device(q.flat, q.x, q.y, q.tangents.T, q.cotangents.T)
    state = triton.linearize(case.spec, flat, x.contiguous(), y, 3)
    rows = V.contiguous(), U.contiguous()
    tensors = (q.flat, q.x, q.y, q.tangents, q.cotangents)
    own = oracle(case.spec, *tensors)
    truth = oracle(case.spec, *(t.double() if t.is_floating_point() else t for t in tensors))
    for name, actual in operations(state, *rows):
        assert_within_reference_error(actual.cpu(), truth[name], own[name], f"{case} {name}")


@pytest.fixture
def torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every product is left to torch."""
    from hvpfast.backends.triton import gemm

    asked = []

    def always(*arguments: object) -> bool:
        asked.append(arguments)
        return True

    monkeypatch.setattr(gemm, "torch_is_faster", always)
    yield
    assert asked


@pytest.mark.usefixtures("torch_multiplies")
@pytest.mark.parametrize(
    ("sizes", "activation", "bias"),
    [((5, 7, 6, 3), "tanh", True), ((4, 5, 3), "relu", False), ((6, 2), "identity", True)],
)
def test_products_left_to_torch(sizes: tuple[int, ...], activation: str, bias: bool) -> None:
    check(Case(hf.MLPSpec(sizes, activation, bias=bias), 6, 2))


@pytest.mark.parametrize("bias", [True, False])
def test_first_layer_by_samples(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """||u_1||^2 and u_1 [x; 1] from the samples' inner products, where u_1 is never formed."""
    from hvpfast.backends.triton import penalty

    monkeypatch.setattr(penalty, "LEAST_GRAM_WEIGHTS", 1)
    calls = []
    first_layer = penalty._first_layer
    monkeypatch.setattr(penalty, "_first_layer", lambda *a: (calls.append(a), first_layer(*a))[1])
    check(Case(hf.MLPSpec((40, 6, 5, 3), "gelu", "mse", bias=bias), 5, 2))
    assert len(calls) == 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_far_out(activation: str, dtype: torch.dtype) -> None:
    """act and act' at saturated, tiny and large arguments; every derivative finite."""
    ends = (0.0, 1e-6, 1e-3, 0.6, 0.7, 5.0, 19.9, 20.1, 41.0, 90.0, 1e4)
    z = torch.tensor([s * t for t in ends for s in (1, -1)], dtype=dtype)[:, None]
    spec = hf.MLPSpec((1, 1, 1), activation, "mse", bias=False)
    ones = torch.ones(2, dtype=dtype)
    state = triton.linearize(spec, *on_device(ones, z, torch.zeros_like(z)), 3)
    at = z.double().requires_grad_()
    value = ACTIVATION_TABLE[activation][0](at)
    (slope,) = torch.autograd.grad(value.sum(), at)
    eps = torch.finfo(dtype).eps
    lin = state._models._lin
    for actual, expected in ((lin.a[1], value), (lin.s1[1], slope)):
        assert actual is not None
        error = (actual[0].cpu().double() - expected.detach()).abs()
        assert (error <= 32 * eps * expected.abs().clamp(min=1)).all(), error
    V = ones[None].to(DEVICE)
    assert state.hvp_vjp(V, V, False).isfinite().all()


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("seed", "first"), [(0xFEDCBA9876543210, 7), (1, 2**32 - 4), (16, 0)])
def test_probes_are_bit_equal(distribution: str, dtype: torch.dtype, seed: int, first: int) -> None:
    """Of two models, also with a probe in common; numbered by the host or on the device."""
    from hvpfast.backends.probes.triton import draw_by_triton as draw

    counter = torch.tensor(first, device=DEVICE)
    for P, stride, start in ((1, None, first), (1037, None, counter), (300, 1, first)):
        drawn = torch.empty(2, 2, P, dtype=dtype, device=DEVICE)
        draw(drawn, distribution, seed, start, stride)
        apart = 2 if stride is None else stride
        for m in range(2):
            expected = numpy_rows(ProbeSource(2, distribution, seed, first + m * apart), P)
            assert torch.equal(drawn[m].cpu(), torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize(("loss", "shared"), [("cross_entropy", False), ("mse", True)])
def test_models_equal_single_models(loss: str, shared: bool) -> None:
    """M models at once are bit for bit the models one by one; ``shared``: one batch for all."""
    M, N, K = 2, 7, 2
    spec = hf.MLPSpec((5, 6, 4), "silu", loss, ignore_index=2 if loss != "mse" else -100)
    g = torch.Generator().manual_seed(3)
    lead = () if shared else (M,)
    y = torch.randint(0, 4, (*lead, N), generator=g)
    if loss == "mse":
        y = torch.randn(*lead, N, 4, generator=g)
    params, x, V, U = (
        torch.randn(*shape, generator=g)
        for shape in ((M, spec.num_params), (*lead, N, 5), *2 * ((M, K, spec.num_params),))
    )
    params, x, y, V, U = on_device(params, x, y, V, U)
    source = ProbeSource(K, "rademacher", 5, 10)
    models = triton.linearize_models(spec, params, x, y, 3)
    given, drawn = models.penalty(V, False), models.penalty(source, True)
    together = [
        models.loss,
        models.normalizers,
        models.gradient(),
        models.hvp(V, False),
        models.quadratic(V, False),
        models.hvp_vjp(V, U, True),
        given.penalty,
        given.gradient(0.5, 2.0),
        drawn.penalty,
        drawn.gradient(1.0, 1.0),
    ]
    for m in range(M):
        one = triton.linearize(spec, params[m], x if shared else x[m], y if shared else y[m], 3)
        assert models.loss_values[m] == one.loss_value
        penalty = one.penalty(V[m], False)
        own_probes = one.penalty(ProbeSource(K, "rademacher", 5, 10 + m * K), True)
        alone = [
            one.loss,
            torch.tensor(one.normalizer, dtype=torch.float64, device=DEVICE),
            one.gradient(),
            one.hvp(V[m], False),
            one.quadratic(V[m], False),
            one.hvp_vjp(V[m], U[m], True),
            penalty.penalty,
            penalty.gradient(0.5, 2.0),
            own_probes.penalty,
            own_probes.gradient(1.0, 1.0),
        ]
        for i, (of_models, of_one) in enumerate(zip(together, alone, strict=True)):
            assert torch.equal(of_models[m], of_one), i


@pytest.mark.usefixtures("torch_multiplies")
def test_products_of_models_left_to_torch() -> None:
    M, N, K = 2, 7, 3
    spec = hf.MLPSpec((5, 6, 4, 3), "tanh")
    g = torch.Generator().manual_seed(4)
    shapes = (M, spec.num_params), (N, 5), *2 * ((M, K, spec.num_params),)
    params, x, V, U = on_device(
        *(torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    )
    y = torch.randint(0, 3, (M, N), generator=g).to(DEVICE)
    models = triton.linearize_models(spec, params, x, y, 3)
    for m in range(M):
        one = triton.linearize(spec, params[m], x, y[m], 3)
        for of_models, of_one in (
            (models.gradient(), one.gradient()),
            (models.hvp(V, False), one.hvp(V[m], False)),
            (models.quadratic(V, False), one.quadratic(V[m], False)),
            (models.hvp_vjp(V, U, False), one.hvp_vjp(V[m], U[m], False)),
            (models.penalty(V, False).gradient(1.0, 1.0), one.penalty(V[m], False).gradient(1, 1)),
        ):
            torch.testing.assert_close(of_models[m], of_one, rtol=1e-12, atol=1e-13)


def test_labels_out_of_range_are_told_when_the_loss_is_read() -> None:
    spec = hf.MLPSpec((3, 4))
    x = torch.zeros(2, 5, 3, device=DEVICE)
    y = torch.tensor([[0, 1, 2, 3, 0], [0, -100, 3, 4, -1]], device=DEVICE)
    models = triton.linearize_models(spec, torch.zeros(2, 16, device=DEVICE), x, y, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^model 1: labels .* got y\[3\] = 4\. Is the last"):
            _ = models.loss
    one = triton.linearize(spec, torch.zeros(16, device=DEVICE), x[0], y[1], 3)
    with pytest.raises(ValueError, match=r"^labels must be in \[0, 4\) .* got y\[3\] = 4"):
        _ = one.loss_value
    assert one.penalty(ProbeSource(1, "normal", 0), False).loss.isnan(), "unread, never a number"


def test_too_little_memory_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvpfast.backends.triton import memory
    from hvpfast.backends.triton.linearization import Linearization

    def none_left(self: Linearization, *shape: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    spec = hf.MLPSpec((3, 4, 2), "tanh")
    P, x, y = spec.num_params, torch.zeros(5, 3, device=DEVICE), torch.zeros(5, 2, device=DEVICE)
    params, V = torch.zeros(P, device=DEVICE), torch.zeros(7, P, device=DEVICE)
    y = y[:, 0].long()
    state = triton.linearize(spec, params, x, y, 3)
    penalty = state.penalty(V, False)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2000)
    with monkeypatch.context() as patched:
        patched.setattr(Linearization, "empty", none_left)
        for operation, call, fits in (
            ("hvp", lambda: state.hvp(V, False), 2000 // (4 * (2 * 5 * 6 + P))),
            ("quadratic", lambda: state.quadratic(V, False), 2000 // (4 * 2 * 5 * 6)),
            ("hvp_vjp", lambda: state.hvp_vjp(V, V, True), 2000 // (4 * 8 * 5 * 6)),
            ("penalty", lambda: state.penalty(V, False), 2000 // (4 * (4 * 5 * 6 + 2 * P))),
            ("penalty", lambda: state.penalty(ProbeSource(7, "normal", 0), False), 2),
            ("penalty gradient", lambda: penalty.gradient(1.0, 1.0), 3),
        ):
            text = rf"^{operation} of 1 model.* 7 tangents .* 2 kB .* about {fits} tangents"
            with pytest.raises(MemoryError, match=text):
                call()
        with pytest.raises(MemoryError, match=r"linearize of 1 model.* 5 samples .* about 13 "):
            triton.linearize(spec, params, x, y, 3)
    assert state.hvp(V, False).shape == (7, P), "nothing is broken by it"


def test_nothing_counts() -> None:
    spec = hf.MLPSpec((3, 4))
    x, y = torch.zeros(2, 3, device=DEVICE), torch.full((2,), -100, device=DEVICE)
    with pytest.raises(ValueError, match="the mean cross-entropy is undefined"):
        hf.linearize(spec, torch.zeros(16, device=DEVICE), x, y, backend="triton")


def test_exact_curvature_names_the_backends_that_have_it() -> None:
    spec = hf.MLPSpec((3, 4), loss="mse")
    x, y = torch.zeros(2, 3, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    lin = hf.linearize(spec, torch.zeros(16, device=DEVICE), x, y, backend="triton")
    chosen = [True, True]
    for call in (
        lambda: lin.state.sample_traces(False, chosen),
        lambda: lin.state.diagonal(False),
        lambda: lin.state.inner_product(lin.state, False, chosen),
        lambda: lin.state.exact_penalty("trace", False, chosen),
    ):
        with pytest.raises(NotImplementedError, match="'cpu' and 'reference' have it"):
            call()


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="on CPU tensors the interpreter only")
def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = hf.MLPSpec((3, 4))
    monkeypatch.setattr(cpu, "unavailable", lambda: "not built")
    choice = hf.backends.choose("auto", spec, torch.device("cpu"), torch.float32)
    assert choice.module is reference
    assert ("triton", triton.NAMED_ONLY) in choice.passed_over
    assert hf.backends.choose("triton", spec, torch.device("cpu"), torch.float32).module is triton
