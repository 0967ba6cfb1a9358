"""Data of operators: reductions and weights of batches, reading, random state, memory budgets."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hvpfast.operators.batch import Batch, batch_size
from hvpfast.operators.data import Batches
from hvpfast.operators.reduction import BatchWeight, reduction_of
from hvpfast.utils.memory import available_bytes, budget_of, bytes_text, out_of_memory
from hvpfast.utils.random_state import RandomState

CPU = torch.device("cpu")


def samples(n: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 4


def custom(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).abs().mean()


@pytest.mark.parametrize(
    ("loss", "given", "expected"),
    [
        (nn.CrossEntropyLoss(), None, "mean"),
        (nn.MSELoss(reduction="sum"), None, "sum"),
        (nn.MSELoss(reduction="sum"), "sum", "sum"),
        (nn.KLDivLoss(reduction="batchmean"), None, "mean"),
        (F.cross_entropy, None, "mean"),
        (F.mse_loss, "mean", "mean"),
        (functools.partial(F.cross_entropy, reduction="sum"), None, "sum"),
        (functools.partial(F.mse_loss), None, "mean"),
        (custom, "mean", "mean"),
        (custom, "sum", "sum"),
    ],
)
def test_reduction_is_read_or_given(loss: Any, given: str | None, expected: str) -> None:
    assert reduction_of(loss, given) == expected


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        (custom, None, r'custom is not known.*pass reduction="mean"'),
        (lambda z, y: z.sum(), None, "not known"),
        (nn.CrossEntropyLoss(), "sum", "reduces by 'mean'; drop reduction="),
        (F.mse_loss, "sum", "reduces by 'mean'"),
        (nn.MSELoss(reduction="none"), None, "must reduce by"),
        (custom, "average", 'must be "mean", "sum" or None'),
    ],
)
def test_reduction_errors(loss: Any, given: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduction_of(loss, given)


def mean_denominator(loss_sum: Tensor, loss_mean: Tensor) -> float:
    return float(loss_sum / loss_mean)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_weight_is_the_denominator_of_torch(weighted: bool, smoothing: float) -> None:
    z, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 4
    y[3] = y[5] = 2
    options = {
        "weight": torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64) if weighted else None,
        "ignore_index": 2,
        "label_smoothing": smoothing,
    }
    mean, total = nn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(reduction="sum", **options)
    expected = mean_denominator(total(z, y), mean(z, y))
    assert BatchWeight(mean)(Batch(z, y)) == pytest.approx(expected, rel=1e-12)
    partial = functools.partial(F.cross_entropy, **options)
    assert BatchWeight(partial)(Batch(z, y)) == pytest.approx(expected, rel=1e-12)
    assert BatchWeight(total)(Batch(z, y)) == 1.0


@pytest.mark.parametrize(
    ("loss", "z_shape", "y"),
    [
        (nn.CrossEntropyLoss, (5, 3), torch.full((5, 3), 1 / 3, dtype=torch.float64)),
        (nn.CrossEntropyLoss, (5, 3, 2), torch.tensor([[0, 1]] * 4 + [[-100, 2]])),
        (nn.NLLLoss, (5, 3), torch.tensor([0, 1, 2, -100, 1])),
        (nn.MSELoss, (5, 3), torch.ones(5, 3, dtype=torch.float64)),
        (nn.L1Loss, (5, 3), torch.ones(5, 3, dtype=torch.float64)),
        (nn.BCEWithLogitsLoss, (5, 3), torch.ones(5, 3, dtype=torch.float64)),
        (nn.HuberLoss, (5, 2), torch.ones(5, 2, dtype=torch.float64)),
    ],
)
def test_weights_of_known_losses(loss: Any, z_shape: tuple[int, ...], y: Tensor) -> None:
    z = torch.rand(z_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = mean_denominator(loss(reduction="sum")(z, y), loss()(z, y))
    assert BatchWeight(loss())(Batch(z, y)) == pytest.approx(expected, rel=1e-12)


def test_weight_of_other_losses_is_the_number_of_samples() -> None:
    x, y = samples(7)
    assert BatchWeight(custom, "mean")(Batch(x, y)) == 7.0
    assert BatchWeight(nn.MultiMarginLoss())(Batch(x, y)) == 7.0
    assert BatchWeight(custom, "mean")(Batch({"a": x}, None)) == 7.0
    with pytest.raises(ValueError, match="first dimension counts samples"):
        batch_size(Batch("text", None))


def test_weight_names_classes_out_of_range() -> None:
    weight = BatchWeight(nn.CrossEntropyLoss(weight=torch.ones(3)))
    with pytest.raises(ValueError, match=r"classes 0 to 2.*from 0 to 3"):
        weight(Batch(*samples(8)))


def test_pairs_and_lists_stay_where_they_are() -> None:
    x, y = samples()
    for data in ((x, y), [x, y]):
        batches = Batches(data, CPU)
        assert len(batches) == 1
        assert next(iter(batches)).x is x
        assert batches.nbytes == 0
    parts = [(x[:4], y[:4]), [x[4:], y[4:]]]
    batches = Batches(parts, CPU, budget=0)
    assert batches.held
    assert (len(batches), batches.num_samples) == (2, 10)
    assert [b.x.shape[0] for b in batches] == [4, 6]
    nested = Batches(({"a": x, "b": (x, x)}, y), CPU)
    assert next(iter(nested)).x["b"][1] is x


def test_conversion_is_counted_and_leaves_integers() -> None:
    x, y = samples()
    batches = Batches((x, y), CPU, torch.float64)
    batch = next(iter(batches))
    assert (batch.x.dtype, batch.y.dtype) == (torch.float64, torch.int64)
    assert batches.nbytes == 10 * 3 * 8
    beyond = Batches((x, y), CPU, torch.float64, budget=100)
    assert not beyond.held
    assert beyond.nbytes == 0
    assert torch.equal(next(iter(beyond)).x, batch.x)
    leaf = x.clone().requires_grad_()
    assert not next(iter(Batches((leaf, y), CPU))).x.requires_grad


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples augmented with noise from every global generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(3) + random.random() + np.random.rand()  # noqa: NPY002
        return noise + index, torch.tensor(index % 4)


def test_loader_is_held_or_read_again() -> None:
    loader = DataLoader(TensorDataset(*samples()), batch_size=4)
    held, read = Batches(loader, CPU), Batches(loader, CPU, budget=50)
    assert (held.held, read.held) == (True, False)
    assert held.nbytes == 10 * (3 * 4 + 8)
    assert "in memory" in held.describe()
    assert "read again" in read.describe()
    for _ in range(2):
        for one, other in zip(held, read, strict=True):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.y, other.y)


@pytest.mark.parametrize("own_generator", [False, True])
def test_shuffling_and_augmentation_repeat_and_leave_random_state(own_generator: bool) -> None:
    generator = torch.Generator().manual_seed(3) if own_generator else None
    loader = DataLoader(Noisy(), batch_size=3, shuffle=True, generator=generator)
    own = generator.get_state() if generator else torch.zeros(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    batches = Batches(loader, CPU, budget=0)
    first = [b.x.clone() for b in batches]
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]
    assert generator is None or torch.equal(generator.get_state(), own)
    torch.rand(7)  # the caller's random numbers go on; the operator's data do not change
    assert all(torch.equal(a, b.x) for a, b in zip(first, batches, strict=True))
    assert batches.repeats()


class Drifting:
    """Gives other data, or another number of batches, in every reading."""

    def __init__(self, what: str) -> None:
        self.what, self.reading = what, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = samples()
        step = self.reading if self.what == "values" else 0
        yield x[:5] + step, y[:5]
        if self.what == "values" or (self.what == "fewer") == (self.reading == 0):
            yield x[5:], y[5:]
        self.reading += 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("values", "batch 0 is not what it was"),
        ("fewer", "1 batches came instead of 2"),
        ("more", "batch 1 is not what it was"),
    ],
)
def test_changed_data_are_noticed(what: str, message: str) -> None:
    batches = Batches(Drifting(what), CPU, budget=0)
    with pytest.raises(RuntimeError, match=f"{message}.*list\\(data\\)"):
        list(batches)
    assert not Batches(Drifting(what), CPU).repeats()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((b for b in [samples()]), TypeError, r"only once.*list\(data\)"),
        (iter([samples()]), TypeError, "only once"),
        (TensorDataset(*samples()), TypeError, r"Dataset.*DataLoader\(dataset, batch_size"),
        (samples()[0], TypeError, r"pair \(x, y\).*got Tensor"),
        (None, TypeError, "got NoneType"),
        (3, TypeError, "got int"),
        ([], ValueError, "data is empty"),
        ([samples()[0]], TypeError, "batch 0 of data must be a pair.*got Tensor"),
        ([samples(), (*samples(), 1)], TypeError, "batch 1 of data must be a pair.*tuple of 3"),
        ([samples(), samples(0)], ValueError, "batch 1 is empty"),
    ],
)
def test_data_errors(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Batches(data, CPU)


def _refuse() -> int:
    raise ValueError("no such shape")


def test_random_state_plays_on_and_can_be_copied() -> None:
    outside = torch.get_rng_state()
    state = RandomState()
    again = copy.copy(state)
    with state:
        first = torch.rand(3)
    with state:
        second = torch.rand(3)
    with again:
        both = torch.rand(3), torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(torch.stack(both), torch.stack((first, second)))
    with pytest.raises(ValueError, match="no such shape"), state:
        torch.rand(3).reshape(_refuse())
    assert torch.equal(torch.get_rng_state(), outside)


def test_memory_words() -> None:
    free = available_bytes(CPU)
    assert free > 2**20
    assert available_bytes(CPU, max_age=100.0) == free
    assert budget_of("auto", 1000) == 500
    assert budget_of(1e6, 0) == 1_000_000
    assert budget_of(float("inf"), 0) >= 2**62
    for wrong in ("all", -1, None, True, float("nan")):
        with pytest.raises(ValueError, match="memory_budget must be"):
            budget_of(wrong, 1000)
    assert [bytes_text(b) for b in (12, 1.5e3, 2e9, 3e12)] == ["12 B", "1.5 kB", "2 GB", "3 TB"]
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not out_of_memory(RuntimeError("shapes differ"))
