"""The CUDA engine beyond the conformance body: on emulated kernels, or with --device cuda on a GPU.

Run by test_cuda_emulated.py and by benchmarks/gpu_check. Calls of the runtime fail, and
machines and addresses are made up, on emulated kernels only.
"""

from __future__ import annotations

from collections.abc import Iterator

import device
import pytest
import torch
from cases import DTYPES, FEW, Case, with_dtype
from cuda_problems import LAUNCH, SPECS, WIDE, models, operations
from device import place, placed
from torch import Tensor

import hvpfast as hf
from hvpfast.backends.cuda import many as cuda_models
from hvpfast.backends.cuda import state as cuda
from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource

ENGINE = cuda_models.engine()
assert not isinstance(ENGINE, str)
emulated_only = pytest.mark.skipif(
    not ENGINE.emulated, reason="what it makes up exists on emulated kernels only"
)
MEMORY, DRIVER, NO_DEVICE = 2, 35, 100  # cudaError_t


@pytest.fixture(autouse=True)
def nothing_fails() -> Iterator[None]:
    yield
    if ENGINE.emulated:
        ENGINE.fail_call(-1, 0)
        ENGINE.set_machine(13000, 1, 96 << 10)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1), (126, 1), (127, 1), (128, 1), (7, 9, 5), (300, 70, 5)], ids=str
)
def test_drawn_probes_are_the_same_bits(
    distribution: str, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    """By the blocks that run a small network and by a kernel of their own, P = 2 to 21 425."""
    M, K, seed, spec = 3, 2, 0xFEDCBA9876543210, hf.MLPSpec(sizes, "tanh", "mse")
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(M, 9, d, generator=g, dtype=dtype) for d in (sizes[0], sizes[-1])]
    params = torch.randn(M, spec.num_params, generator=g, dtype=dtype)
    source = ProbeSource(K, distribution, seed, 7)
    given = probe_rows(ProbeSource(M * K, distribution, seed, 7), spec.num_params, dtype)
    state = cuda.linearize_models(spec, *(t.to(device.DEVICE) for t in (params, *data)), 3)
    drawn, rows = (
        state.penalty(probes, False) for probes in (source, given.view(M, K, -1).to(device.DEVICE))
    )
    in_blocks = distribution == "rademacher" and "inside one launch" in state.explain()[0]
    assert (drawn._kept[1] < given.nbytes) == in_blocks  # nothing is kept of what they draw
    assert torch.equal(drawn.penalty, rows.penalty)
    assert torch.equal(drawn.gradient(0.5, 2.0), rows.gradient(0.5, 2.0))


@pytest.mark.parametrize(
    ("sizes", "N"), [((8, 32, 32, 5), 16), ((16, 32, 32, 2), 16), ((16, 16, 16, 5), 32)], ids=str
)
def test_shared_memory_near_what_blocks_have_unasked(sizes: tuple[int, ...], N: int) -> None:
    """Dynamic shared memory of 46 to 48 KiB: with the static part it is more than 48 KiB."""
    case = Case(hf.MLPSpec(sizes, "tanh"), N, 2, torch.float32)
    q = placed(case)
    lin, reference = (
        hf.linearize(case.spec, q.params, q.x, q.y, backend=name) for name in ("cuda", "reference")
    )
    assert "inside one launch" in lin.explain()
    for call in (
        lambda lin: hf.hvp(lin, q.tangents),
        lambda lin: hf.quadratic_form(lin, q.tangents),
        lambda lin: hf.penalty(lin, q.tangents)[2],
    ):
        torch.testing.assert_close(call(lin), call(reference), rtol=1e-3, atol=1e-4)


@emulated_only
@pytest.mark.parametrize("case", [FEW[3], WIDE], ids=str)
@pytest.mark.parametrize("code", [MEMORY, LAUNCH])
def test_every_failing_call_raises(case: Case, code: int) -> None:
    """Each call of the runtime fails once: Python's error names it, and the next run is right."""
    for name, run in operations(case):
        ENGINE.fail_call(-1, 0)
        right = run()
        calls = ENGINE.fail_call(-1, 0)
        assert calls > 3, name
        for index in range(calls):
            ENGINE.fail_call(index, code)
            error = MemoryError if code == MEMORY else RuntimeError
            with pytest.raises(error, match=r"CUDA failed in .*cudaError(Mem|Launch)"):
                run()
        ENGINE.fail_call(-1, 0)
        assert torch.equal(run(), right), name


@emulated_only
def test_device_problems_are_named() -> None:
    ENGINE.set_machine(12080, 1, 96 << 10)
    assert "driver is too old: it has CUDA 12.8 and this build needs 13.0" in (
        ENGINE.device_problem()
    )
    ENGINE.set_machine(0, 1, 96 << 10)
    assert "no NVIDIA driver" in ENGINE.device_problem()
    ENGINE.set_machine(13000, 0, 96 << 10)
    assert "no CUDA device" in ENGINE.device_problem()
    ENGINE.set_machine(13000, 1, 96 << 10)
    assert ENGINE.device_problem() == ""
    calls = ENGINE.fail_call(-1, 0)
    assert calls >= 3
    for code, text in ((DRIVER, "too old"), (NO_DEVICE, "no CUDA device")):
        ENGINE.fail_call(2, code)
        assert text in ENGINE.device_problem()
    ENGINE.fail_call(2, LAUNCH)
    with pytest.raises(RuntimeError, match="cudaGetDeviceCount"):
        ENGINE.device_problem()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, s.sizes)))
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_models_are_each_what_they_are_alone(
    spec: hf.MLPSpec, shared: bool, dtype: torch.dtype
) -> None:
    M = 3
    params, x, y, V, U = models(M, shared, dtype, spec)
    state = cuda.linearize_models(spec, params, x, y, 3)
    source = ProbeSource(2, "normal", 5, 11)
    of_models = {
        "loss": state.loss,
        "normalizers": state.normalizers,
        "gradient": state.gradient(),
        "hvp": state.hvp(V, False),
        "ggn": state.hvp(V, True),
        "quadratic": state.quadratic(V, False),
        "hvp_vjp": state.hvp_vjp(V, U, False),
        "penalty": state.penalty(V, False).penalty,
        "penalty gradient": state.penalty(V, False).gradient(0.7, 0.3),
        "drawn": state.penalty(source, False).gradient(0.0, 1.0),
    }
    for m in range(M):
        alone = cuda.linearize(spec, params[m], *(t if shared else t[m] for t in (x, y)), 3)
        drawn = ProbeSource(2, "normal", 5, 11 + 2 * m)
        expected = {
            "loss": alone.loss,
            "normalizers": place(torch.tensor(alone.normalizer, dtype=torch.float64)),
            "gradient": alone.gradient(),
            "hvp": alone.hvp(V[m], False),
            "ggn": alone.hvp(V[m], True),
            "quadratic": alone.quadratic(V[m], False),
            "hvp_vjp": alone.hvp_vjp(V[m], U[m], False),
            "penalty": alone.penalty(V[m], False).penalty,
            "penalty gradient": alone.penalty(V[m], False).gradient(0.7, 0.3),
            "drawn": alone.penalty(drawn, False).gradient(0.0, 1.0),
        }
        for name, value in expected.items():
            difference = (of_models[name][m] - value).norm()  # sums are divided otherwise
            assert difference <= 200 * torch.finfo(dtype).eps * value.norm(), f"{name}, model {m}"
        own = hf.linearize(
            spec, params[m], *(t if shared else t[m] for t in (x, y)), backend="reference"
        )
        expected_hvp = hf.hvp(own, V[m].T).T
        assert (of_models["hvp"][m] - expected_hvp).norm() <= 1e-4 * expected_hvp.norm()


def test_wrong_labels_are_noticed_when_the_loss_is_read() -> None:
    spec = hf.MLPSpec((4, 3))
    x, y = place(torch.ones(5, 4)), place(torch.tensor([0, 1, 7, 2, -3]))
    params = place(torch.ones(spec.num_params))
    state = cuda.linearize(spec, params, x, y, 3)  # no wait, no error
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\).*y\[2\] = 7"):
        _ = state.loss_value
    with pytest.raises(ValueError, match=r"y\[2\] = 7"):
        hf.linearize(spec, params, x, y, backend="cuda")
    two = cuda.linearize_models(
        spec, params.expand(2, -1).contiguous(), x, torch.stack([y * 0, y]), 3
    )
    with pytest.raises(ValueError, match=r"model 1: .*y\[2\] = 7"):
        _ = two.values


def test_small_networks_say_that_they_are() -> None:
    spec = hf.MLPSpec((4, 3))
    x, y = place(torch.ones(2, 5, 4)), place(torch.zeros(5, dtype=torch.int64))
    many = hf.linearize(spec, place(torch.ones(2, spec.num_params)), x, y, backend="cuda")
    assert "matrix products: inside one launch per operation" in many.explain()


@emulated_only
def test_bad_addresses_are_refused() -> None:
    spec = hf.MLPSpec((4, 3))
    x, y = torch.ones(5, 4), torch.zeros(5, dtype=torch.int64)
    params = torch.ones(spec.num_params)
    raw = torch.zeros(4 * spec.num_params + 4, dtype=torch.uint8)
    crooked = torch.frombuffer(
        raw.numpy().data, dtype=torch.float32, count=spec.num_params, offset=2
    )
    with pytest.raises(ValueError, match="tangents starts at an address that is no multiple of 4"):
        cuda.linearize(spec, params, x, y, 3).hvp(crooked[None], False)
    with pytest.raises(ValueError, match="params starts at an address"):
        cuda.linearize(spec, crooked, x, y, 3)
    point = cuda.linearize(spec, params, x, y, 3)._models._point
    foreign = ENGINE.Where(0, 0x100, 0, 0)
    with pytest.raises(ValueError, match="stream belongs to CUDA device 1"):
        point.gradient(params.data_ptr(), foreign)
    ENGINE.set_machine(12060, 1, 96 << 10)  # a driver that cannot tell
    point.gradient(params.data_ptr(), foreign)


def test_bad_input_is_refused() -> None:
    q = placed(WIDE)
    wide = cuda.linearize(WIDE.spec, q.flat, q.x, q.y, 3)
    raw = place(torch.zeros(1, dtype=torch.uint8))
    where = ENGINE.Where(0, 0, raw.data_ptr(), 1)
    with pytest.raises(ValueError, match="workspace has 1 bytes, too few"):
        wide._models._point.hvp(q.flat.data_ptr(), 1, False, q.flat.data_ptr(), where)
    for call in (
        lambda: wide.sample_traces(False, [True, True]),
        lambda: wide.diagonal(False),
        lambda: wide.inner_product(wide, False, [True, True]),
        lambda: wide.exact_penalty("fro2", False, [True, True]),
    ):
        with pytest.raises(NotImplementedError, match="backends cpu and reference"):
            call()


def test_too_little_memory_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = hf.MLPSpec((40, 64, 3), "tanh")
    x, y = place(torch.ones(500, 40)), place(torch.zeros(500, dtype=torch.int64))
    state = cuda.linearize(spec, place(torch.ones(spec.num_params)), x, y, 3)
    one, two = (sum(state._models._point.num_bytes("hvp", K, False)) for K in (1, 2))
    monkeypatch.setattr(cuda_models, "available_bytes", lambda device: one + 5 * (two - one))

    def refuse(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("none left")

    V = place(torch.ones(64, spec.num_params))
    real = torch.empty
    monkeypatch.setattr(cuda_models.torch, "empty", refuse)
    with pytest.raises(MemoryError, match=r"K = 64 tangents .* enough for K = 6: take fewer"):
        state.hvp(V, False)
    with pytest.raises(MemoryError, match="N = 500 samples"):
        state._models._memory("gradient")
    monkeypatch.setattr(cuda_models.torch, "empty", real)
    state.hvp(V[:6], False)


class Uncounted:
    """A point that is not asked how much memory its operations take."""

    def __init__(self, point: object) -> None:
        self._point = point

    def __getattr__(self, name: str) -> object:
        assert name != "num_bytes", "the sizes of a known shape are counted again"
        return getattr(self._point, name)


def test_memory_is_counted_once_per_shape() -> None:
    q = placed(WIDE)
    rows = q.tangents.T.contiguous()

    def results(state: cuda.CudaState) -> list[Tensor]:
        return [
            state.gradient(),
            state.hvp(rows, False),
            state.quadratic(rows, True),
            state.hvp_vjp(rows, rows, False),
            state.penalty(rows, False).gradient(0.5, 1.0),
        ]

    first, again = (cuda.linearize(WIDE.spec, q.flat, q.x, q.y, 3) for _ in range(2))
    expected = results(first)
    again._models._point = Uncounted(again._models._point)
    for mine, theirs in zip(results(again), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("case", [with_dtype(c, torch.float32) for c in FEW[:2]], ids=str)
def test_repeated_runs_are_bitwise_equal(case: Case) -> None:
    for name, run in operations(case):
        assert torch.equal(run(), run()), name
