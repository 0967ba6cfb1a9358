"""Operators over time: what is kept, chunks, changes, determinism, side effects, memory."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense import classes, close, convnet, custom_loss, dense, perceptron, redraw, tangents
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hvpfast.operators import determinism, hessian
from hvpfast.operators.hessian import GGNOperator, HessianOperator
from hvpfast.utils import memory

LOSS = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pieces(x: Tensor, y: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def conv_case() -> tuple[nn.Module, Tensor, Tensor]:
    return convnet(), *classes(7, 1, 4, 4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("source", ["list", "loader"])
def test_budget_changes_nothing_but_what_is_kept(backend: str, source: str) -> None:
    model, (x, y) = perceptron(), classes(20, 4)
    V = tangents(82, 3)
    shuffled = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)
    data: Any = pieces(x, y, 6, 6, 6, 2) if source == "list" else shuffled
    everything = HessianOperator(model, LOSS, None, data, backend=backend)
    assert "kept between products: 4 of 4" in everything.explain()
    size = everything.linearized.kept_bytes + everything.linearized.batches.nbytes
    expected = dense(model, LOSS, x, y) @ V
    close(everything @ V, expected)
    kept = []
    # a state may stand in blocks up to twice as large, left by others: half and twice its size
    budgets = (size, size - 1, size // 2, 0) if backend == "reference" else (2 * size, size // 4, 0)
    for budget in budgets:
        H = HessianOperator(model, LOSS, None, data, backend=backend, memory_budget=budget)
        close(H @ V, expected)
        close(H @ V, expected)  # a second pass over the data
        close(H.gradient(), everything.gradient())
        close(H.loss, everything.loss)
        kept.append(H.linearized.kept)
        again = f"; {4 - kept[-1]} linearized again in every product"
        assert (again in H.explain()) == (kept[-1] < 4)
        assert H.linearized.kept_bytes + H.linearized.batches.nbytes <= budget
    assert kept[0] == 4
    assert kept[1] < 4
    assert kept[-1] == 0


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
@pytest.mark.parametrize("params", [None, "2.*"])
def test_chunks_change_rounding_only(kind: Any, params: Any) -> None:
    model, (x, y) = perceptron(), classes(9, 4)
    data = pieces(x, y, 5, 4)
    whole = kind(model, LOSS, params, data)
    V = tangents(whole.num_params, 7)
    for chunk_size in (1, 2, 7, 100):
        A = kind(model, LOSS, params, data, chunk_size=chunk_size)
        close(A @ V, whole @ V)
        close(A.quadratic_form(V), whole.quadratic_form(V))
        assert (A @ V[:, :0]).shape == (A.num_params, 0)
        assert f"chunk_size: {chunk_size} tangents at a time" in A.explain()
    one_batch = kind(model, LOSS, params, (x, y), chunk_size=3)
    close(one_batch @ V, kind(model, LOSS, params, (x, y)) @ V)
    assert "chunk_size: auto, up to" in whole.explain()


def test_auto_chunk_follows_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = perceptron(), classes(9, 4)
    monkeypatch.setattr(hessian, "available_bytes", lambda *_, **__: 40_000)
    H = HessianOperator(model, LOSS, None, (x, y))
    assert 1 <= H._chunk() < 8
    V = tangents(82, 8)
    close(H @ V, dense(model, LOSS, x, y) @ V)


def test_memory_errors_say_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = perceptron(), classes(9, 4)
    H = HessianOperator(model, LOSS, None, pieces(x, y, 5, 4), chunk_size=8)
    monkeypatch.setattr(hessian, "_LARGE", 100)
    monkeypatch.setattr(hessian, "available_bytes", lambda *_, **__: 8 * 82 * 10)
    with pytest.raises(MemoryError, match=r"K = 16 products of 82.*take 10.5 kB, and 6.56 kB are "):
        H @ tangents(82, 16)
    assert (H @ tangents(82, 9)).shape == (82, 9)

    def full(*_: Any) -> Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    state = H.linearized._states[0]
    monkeypatch.setattr(type(state), "hvp", full)
    alone = HessianOperator(model, LOSS, None, (x, y), chunk_size=8)
    for operator, columns in ((H, 9), (alone, 8), (alone, 9)):
        with pytest.raises(MemoryError, match=r"8 tangents of 82.*about.*chunk_size=2 takes"):
            operator @ tangents(82, columns)
    monkeypatch.setattr(type(H.linearized.objective), "linearize", full)
    with pytest.raises(MemoryError, match=r"linearizing batch 0 of 5 samples.*smaller batches"):
        H.refresh()


@pytest.mark.parametrize("net", ["perceptron", "convnet"])
def test_changes_are_noticed_and_refresh_moves(net: str) -> None:
    model: Any = perceptron() if net == "perceptron" else convnet()
    x, y = classes(7, 4) if net == "perceptron" else classes(7, 1, 4, 4)
    H = HessianOperator(model, LOSS, None, pieces(x, y, 5, 2), backend="reference")
    eye = torch.eye(H.num_params, dtype=torch.float64)
    v = eye[0]

    def check(change: Any) -> None:
        with torch.no_grad():
            change()
        for use in (lambda: H @ v, lambda: (2 * H) @ v, H.gradient, lambda: list(H.blocks()),
                    lambda: H.quadratic_form(v)):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"changed in place.*H.refresh\(\)"):
                use()
        H.refresh()
        close(H @ eye, dense(model, LOSS, x, y))
        close(H.loss, LOSS(model(x), y).detach())

    check(lambda: next(model.parameters()).mul_(1.5))
    check(lambda: model.load_state_dict({k: t + 0.1 for k, t in model.state_dict().items()}))
    check(lambda: x.add_(0.1))
    check(lambda: y.copy_(y.flip(0)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    LOSS(model(x), y).backward()
    check(optimizer.step)
    parameter = next(model.parameters())
    check(lambda: setattr(parameter, "data", parameter.data * 2))
    if net == "convnet":
        check(lambda: model.norm.running_mean.add_(1.0))


def test_train_mode_of_batchnorm_and_dropout_is_refused() -> None:
    model, x, y = conv_case()
    H = HessianOperator(model, LOSS, None, (x, y), backend="reference")
    model.train()
    message = r"norm is BatchNorm2d in train mode.*model.eval\(\)"
    with pytest.raises(ValueError, match=message):
        HessianOperator(model, LOSS, None, (x, y))
    with pytest.raises(ValueError, match=message):
        H @ torch.ones(H.num_params, dtype=torch.float64)
    model.eval()
    H @ torch.ones(H.num_params, dtype=torch.float64)
    dropout = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3, 3)).double()
    with pytest.raises(ValueError, match=r"2 is Dropout in train mode.*model.eval\(\)"):
        HessianOperator(dropout, LOSS, None, classes(5, 4), check_deterministic=False)
    HessianOperator(dropout.eval(), LOSS, None, classes(5, 4))
    dropout.train()[2].p = 0.0
    HessianOperator(dropout, LOSS, None, classes(5, 4))


class Stochastic(nn.Module):
    """Adds noise in the forward pass, whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 0.1 * torch.randn(len(x), 3, dtype=x.dtype)


def noisy_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) * (1 + torch.rand((), dtype=z.dtype))


@pytest.mark.parametrize("check", ["auto", True])
def test_random_models_and_losses_are_caught(check: Any) -> None:
    model, data = Stochastic(), classes(6, 4)
    options: Any = {"backend": "reference", "check_deterministic": check, "reduction": "mean"}
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"not deterministic.*check_deterministic=False"):
        HessianOperator(model, LOSS, None, data, **options)
    with pytest.raises(RuntimeError, match=r"not deterministic.*losses that differ by"):
        HessianOperator(model.net, noisy_loss, None, data, **options)
    options["check_deterministic"] = False
    H = HessianOperator(model, LOSS, None, data, **options)
    H @ torch.ones(H.num_params, dtype=torch.float64)
    assert "determinism: not checked" in H.explain()
    assert torch.equal(torch.get_rng_state(), state)


def test_cheap_check_runs_once_per_kind_of_model_mode_and_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x, y = conv_case()
    determinism._passed.clear()
    compared = []
    original = determinism._compare
    monkeypatch.setattr(
        determinism, "_compare", lambda what, *a: (compared.append(what), original(what, *a))
    )

    def build(data: Any, **options: Any) -> str:
        H = HessianOperator(model, LOSS, None, data, backend="reference", **options)
        return H.explain().splitlines()[-1]

    assert "two evaluations of one batch agree" in build((x, y))
    assert "checked before" in build((x, y))
    assert len(compared) == 1
    build((x.clone(), y))
    assert len(compared) == 2
    model.head.train()
    build((x, y))
    assert len(compared) == 3
    assert "products over all data agree" in build((x, y), check_deterministic=True)
    assert len(compared) == 4
    assert "not checked" in build((x, y), check_deterministic=False)
    known = HessianOperator(perceptron(), LOSS, None, classes(5, 4))
    assert "the backend evaluates the MLP itself" in known.explain()
    full = HessianOperator(perceptron(), LOSS, None, classes(5, 4), check_deterministic=True)
    assert "products over all data agree" in full.explain()
    monkeypatch.setattr(determinism, "_REMEMBERED", 2)
    build((x.clone(), y))
    assert len(determinism._passed) <= 4


class Drifting:
    """A loader that gives other data in every reading."""

    def __init__(self) -> None:
        self.reading = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = classes(6, 4)
        self.reading += 1
        yield x + self.reading, y


def test_full_check_reads_the_data_again() -> None:
    HessianOperator(perceptron(), LOSS, None, Drifting())
    with pytest.raises(RuntimeError, match=r"two readings gave different batches.*list\(data\)"):
        HessianOperator(perceptron(), LOSS, None, Drifting(), check_deterministic=True)
    with pytest.raises(RuntimeError, match="the data changed between two readings"):
        HessianOperator(perceptron(), LOSS, None, Drifting(), memory_budget=0)


class Counting(nn.Module):
    """Writes to a buffer in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.net(x)


@pytest.mark.parametrize("net", ["perceptron", "convnet", "counting"])
@pytest.mark.parametrize("budget", ["auto", 0])
def test_nothing_of_the_caller_changes(net: str, budget: Any) -> None:
    model: Any = {"perceptron": perceptron, "convnet": convnet, "counting": Counting}[net]()
    x, y = classes(7, 1, 4, 4) if net == "convnet" else classes(7, 4)
    next(model.parameters()).requires_grad_(False)
    for p in list(model.parameters())[1:3]:
        p.grad = torch.full_like(p, 0.5)
    model.train(net == "perceptron")
    x.requires_grad_()
    options: Any = {"memory_budget": budget, "check_deterministic": True}
    options["backend"] = "auto" if net == "perceptron" else "reference"

    def snapshot() -> list[Any]:
        own = [(p.data_ptr(), p._version, p.requires_grad) for p in model.parameters()]
        grads = [None if p.grad is None else p.grad.sum().item() for p in model.parameters()]
        buffers = [b.clone().tolist() for b in model.buffers()]
        modes = [m.training for m in model.modules()]
        legacy = np.random.get_state()[1].tolist()  # noqa: NPY002
        generators = [torch.get_rng_state().tolist(), legacy, random.getstate()]
        return [own, grads, buffers, modes, generators, x.grad, y.tolist(), x.tolist()]

    before = snapshot()
    for kind in (HessianOperator, GGNOperator):
        data = DataLoader(TensorDataset(x.detach(), y), batch_size=3, shuffle=True)
        for source in ((x, y), data):
            A = kind(model, LOSS, None, source, **options)
            V = tangents(A.num_params, 2).requires_grad_()
            given = V.detach().clone()
            A @ V, A.gradient(), A.quadratic_form(V), A.explain(), A.refresh()
            for block in A.blocks():
                block @ torch.ones(block.shape[0], dtype=torch.float64)
            A.to_scipy() @ np.ones(A.num_params)
            assert V.grad is None
            assert torch.equal(V, given)
    assert snapshot() == before


def test_results_are_the_same_under_any_grad_mode() -> None:
    model, x, y = conv_case()
    H = HessianOperator(model, LOSS, None, (x, y), backend="reference")
    v = tangents(H.num_params, 1)[:, 0]
    expected = H @ v
    with torch.no_grad():
        close(H @ v, expected, 0.0)
        close(HessianOperator(model, LOSS, None, (x, y), backend="reference") @ v, expected, 1e-14)
    with torch.inference_mode():
        close(H @ v, expected, 0.0)
    flat = perceptron()
    K = HessianOperator(flat, LOSS, None, classes(5, 4))
    w = tangents(82, 1)[:, 0]
    expected = K @ w
    with torch.inference_mode():
        close(K @ w, expected, 0.0)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("budget", ["auto", 0])
def test_memory_is_flat_over_products(budget: Any) -> None:
    model, (x, y) = (
        redraw(nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 3)), 0),
        classes(64, 50, dtype=torch.float32),
    )
    H = HessianOperator(model, LOSS, None, pieces(x, y, 40, 24), memory_budget=budget)
    v = tangents(H.num_params, 1, dtype=torch.float32)[:, 0]
    for _ in range(50):
        H @ v
    gc.collect()
    objects, before = len(gc.get_objects()), resident_bytes()
    for _ in range(1000):
        H @ v
    gc.collect()
    assert len(gc.get_objects()) - objects < 50
    assert resident_bytes() - before < 20 * v.numel() * 4  # 1000 leaked vectors were 43 MB


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, (x, y) = perceptron(), classes(6, 4)
    H = HessianOperator(model, LOSS, None, pieces(x, y, 4, 2), progressbar=True)
    assert "linearize" in capsys.readouterr().err
    close(H @ tangents(82, 2), dense(model, LOSS, x, y) @ tangents(82, 2))
    shown = capsys.readouterr().err
    assert "product" in shown
    assert "2/2" in shown
    HessianOperator(model, LOSS, None, (x, y)) @ tangents(82, 2)
    assert capsys.readouterr().err == ""


def test_results_repeat_bit_for_bit() -> None:
    model, (x, y) = perceptron(dtype=torch.float32), classes(30, 4, dtype=torch.float32)
    V = tangents(82, 3, dtype=torch.float32)
    for budget in ("auto", 0):
        H = HessianOperator(model, LOSS, None, pieces(x, y, 13, 17), memory_budget=budget)
        first = H @ V
        assert all(torch.equal(H @ V, first) for _ in range(20))


def test_custom_loss_on_blocks_and_budget() -> None:
    model, x, y = conv_case()
    options: Any = {"reduction": "mean", "backend": "reference", "memory_budget": 0}
    H = HessianOperator(model, custom_loss, None, pieces(x, y, 4, 3), **options)
    M, start = dense(model, custom_loss, x, y), 0
    for block in H.blocks():
        stop = start + block.shape[0]
        close(block @ torch.eye(block.shape[0], dtype=M.dtype), M[start:stop, start:stop])
        assert "2 linearized again" in block.explain()
        start = stop


def test_free_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2000 kB\n",
        "/sys/fs/cgroup/memory.max": "1500000\n",
        "/sys/fs/cgroup/memory.current": "500000\n",
    }
    monkeypatch.setattr(memory, "_read", files.get)
    assert memory._system_available() == 1_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory._system_available() == 2000 * 1024
    files.clear()
    assert memory._system_available() > 0
