"""Philox test vectors, the distributions, and that probes depend on (seed, index, entry) alone."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from backends_here import on_gpu, skip_without_gpu

import hvpfast as hf
from hvpfast.backends.probes import draw as drawing
from hvpfast.backends.probes.draw import probe_rows, probes_of_models
from hvpfast.backends.probes.numpy import _words, numpy_rows, philox
from hvpfast.backends.probes.source import ProbeSource

DISTRIBUTIONS = ("rademacher", "normal")


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known answers for philox4x32 with 10 rounds
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    words = np.array([int(w, 16) for w in counter.split()], np.uint32)
    k0, k1 = (int(w, 16) for w in key.split())
    out = philox(words, (k0, k1))
    assert [f"{w:08x}" for w in out] == expected.split()


def test_rademacher_bits() -> None:
    """Entry i is the bit i mod 32 of word (i mod 128) div 32 of block i div 128: set means -1."""
    seed = 0xFEDCBA9876543210
    V = hf.probes(300, 2, seed=seed, first=5)
    for probe in (5, 6):
        words = _words(3, probe, 0, seed)
        for i in (0, 1, 31, 32, 63, 127, 128, 200, 299):
            bit = int(words[i // 128, i % 128 // 32]) >> (i % 32) & 1
            assert V[i, probe - 5] == 1 - 2 * bit


def test_normal_matches_float64_box_muller() -> None:
    seed, P = 7, 400_000
    words = _words(P // 4, 3, 1, seed).astype(np.int64)
    u = ((words[:, 0::2] >> 8) + 1) / 2**24
    angle = 2 * np.pi * (words[:, 1::2] >> 8) / 2**24
    radius = np.sqrt(-2 * np.log(u))
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1)
    drawn = hf.probes(P, distribution="normal", seed=seed, first=3)[:, 0].numpy()
    # a few float32 roundings of numbers up to the largest radius, 5.8
    assert np.abs(drawn - exact).max() < 4 * np.finfo(np.float32).eps * 5.8
    assert np.isfinite(drawn).all()


def test_normal_extreme_words() -> None:
    """The least and the largest uniform give the largest radius and 0, both finite."""
    from hvpfast.backends.probes.numpy import _cos_sin, _radius

    words = np.array([0, 0xFFFFFFFF, 0x80000000, 0x00000100, 0x7FFFFFFF], np.uint32)
    u = ((words.astype(np.int64) >> 8) + 1) / 2**24
    np.testing.assert_allclose(_radius(words), np.sqrt(-2 * np.log(u)), rtol=1e-6, atol=0)
    assert _radius(words)[1] == 0
    every_quadrant = np.arange(0, 2**32, 2**32 // 4096, dtype=np.uint64).astype(np.uint32)
    cos, sin = _cos_sin(every_quadrant)
    angle = 2 * np.pi * (every_quadrant >> 8).astype(np.float64) / 2**24
    np.testing.assert_allclose(cos, np.cos(angle), atol=2e-7)
    np.testing.assert_allclose(sin, np.sin(angle), atol=2e-7)


def test_normal_distribution() -> None:
    x = hf.probes(500_000, distribution="normal", seed=11)[:, 0].double().numpy()
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        sample = x**power
        assert abs(sample.mean() - moment) < 4.5 * sample.std() / np.sqrt(x.size)
    tail = 2 * scipy.stats.norm.sf(3.5) * x.size
    assert abs((np.abs(x) > 3.5).sum() - tail) < 4.5 * np.sqrt(tail)


def test_rademacher_distribution() -> None:
    x = hf.probes(500_000, seed=12)[:, 0]
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(x.mean())) < 4.5 / x.numel() ** 0.5
    runs = int((x[1:] != x[:-1]).sum())  # changes of sign: binomial(n - 1, 1/2)
    assert abs(runs - (x.numel() - 1) / 2) < 4.5 * x.numel() ** 0.5 / 2


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_probes_are_uncorrelated(distribution: str) -> None:
    """Over probes, entries, shifted entries and neighbouring seeds."""
    P = 100_000
    V = hf.probes(P, 12, distribution=distribution, seed=5).double()
    W = hf.probes(P, 4, distribution=distribution, seed=6).double()
    high = hf.probes(P, 4, distribution=distribution, seed=5 + (1 << 32)).double()
    A = torch.cat([V, W, high], 1)
    gram = (A.T @ A / P - torch.eye(20, dtype=torch.float64)).fill_diagonal_(0)
    assert gram.abs().max() < 5 / P**0.5
    for lag in (1, 2, 3, 4, 32, 128):
        assert abs(float((V[lag:] * V[:-lag]).mean())) < 5 / (V.numel()) ** 0.5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_reproducible_in_parts(distribution: str) -> None:
    draw = {"distribution": distribution, "seed": 2**64 - 1}
    V = hf.probes(1001, 6, **draw)
    assert torch.equal(V, hf.probes(1001, 6, **draw))
    assert torch.equal(V[:, 2:5], hf.probes(1001, 3, first=2, **draw))
    assert torch.equal(V[:130], hf.probes(130, 6, **draw)), "entries do not depend on P"
    assert torch.equal(V.double(), hf.probes(1001, 6, dtype=torch.float64, **draw))
    assert not torch.equal(V, hf.probes(1001, 6, distribution=distribution, seed=1))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_global_random_state_is_untouched(distribution: str) -> None:
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fresh = [hf.probes(64, distribution=distribution) for _ in range(2)]
    assert not torch.equal(*fresh), "seed=None takes fresh entropy"
    assert torch.equal(before, torch.get_rng_state())
    assert (before_numpy == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_extension_draws_the_same_bits(distribution: str) -> None:
    _cpu = pytest.importorskip("hvpfast.backends._cpu")
    seed, P = 0xFEDCBA9876543210, 100_003
    expected = torch.from_numpy(numpy_rows(ProbeSource(3, distribution, seed, 9), P))
    for begin, end in ((0, P), (0, 1), (1, 2), (5, 134), (127, 129), (4096, 4099), (77, P)):
        for dtype in (torch.float32, torch.float64):
            for count, threads in ((1, 1), (3, 1), (3, 2), (3, 3)):
                out = torch.full((count, end - begin), torch.nan, dtype=dtype)
                place = begin, end, out.data_ptr(), dtype == torch.float64
                _cpu.draw(distribution, seed, 9, 0, 1, count, *place, threads)
                wanted = expected[:count, begin:end].to(dtype)
                assert torch.equal(out, wanted), (begin, end, dtype, count, threads)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_those_of_numpy(distribution: str, dtype: torch.dtype) -> None:
    """However they are drawn: with the extension, or without it."""
    for P, K in ((1, 3), (127, 2), (1001, 5)):
        source = ProbeSource(K, distribution, 2**63 + 5, 7)
        expected = torch.from_numpy(numpy_rows(source, P)).to(dtype)
        assert torch.equal(probe_rows(source, P, dtype), expected)


def test_shapes_and_layout() -> None:
    for K in (0, 1, 3):
        V = hf.probes(10, K, seed=0)
        assert V.shape == (10, K)
        assert V.T.is_contiguous()
    assert hf.probes(0, 2, seed=0).shape == (0, 2)
    assert hf.probes(5, dtype=torch.bfloat16).dtype == torch.bfloat16
    rows = probe_rows(ProbeSource(2, "normal", 3), 9, torch.float64)
    assert torch.equal(rows.T, hf.probes(9, 2, distribution="normal", seed=3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"distribution": "gaussian"}, ValueError, "rademacher, normal; got 'gaussian'"),
        ({"seed": 2**64}, ValueError, "below 2\\*\\*64"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0; got -1"),
        ({"seed": 1.5}, ValueError, "seed must be an integer"),
        ({"num_probes": -1}, ValueError, "num_probes"),
        ({"first": 2**32}, ValueError, "below 2\\*\\*32"),
        ({"num_params": -3}, ValueError, "num_params"),
        ({"dtype": torch.int64}, TypeError, "floating-point"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hf.probes(**{"num_params": 4, **arguments})  # type: ignore[arg-type]


def test_fresh_seed() -> None:
    seeds = {hf.fresh_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_probes_of_models(distribution: str, dtype: torch.dtype) -> None:
    source = ProbeSource(3, distribution, 21, 2)
    rows = probes_of_models(source, 50, 4, 301, dtype)
    assert rows.shape == (4, 3, 301) and rows.dtype == dtype
    for m in range(4):
        own = numpy_rows(ProbeSource(3, distribution, 21, 2 + 50 * m), 301)
        assert torch.equal(rows[m], torch.from_numpy(own).to(dtype))
    out = torch.empty_like(rows)
    assert probes_of_models(source, 50, 4, 301, dtype, out=out) is out and torch.equal(out, rows)
    with pytest.raises(ValueError, match="below 2"):
        probes_of_models(source, 2**31, 4, 301, dtype)


def test_a_gpu_draws_its_own_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def drawn_there(*arguments: object) -> torch.Tensor:
        asked.append(arguments)
        return torch.zeros(3, 2, 5)

    monkeypatch.setattr(drawing, "kernels_run_on", lambda device: device.type == "cuda")
    monkeypatch.setattr(drawing, "rows_of_models", drawn_there)
    source, gpu = ProbeSource(2, "normal", 3, 7), torch.device("cuda")
    assert probe_rows(source, 5, torch.float32, "cuda").shape == (2, 5)
    assert probes_of_models(source, 9, 3, 5, torch.float64, gpu).shape == (3, 2, 5)
    probe_rows(source, 5, torch.float32, "cpu")
    assert asked == [
        (source, 0, 1, 5, torch.float32, gpu),
        (source, 9, 3, 5, torch.float64, gpu),
    ]


@pytest.mark.parametrize("distribution", on_gpu(DISTRIBUTIONS))
@pytest.mark.parametrize("dtype", on_gpu([torch.float32, torch.float64, torch.float16]))
def test_probes_of_a_gpu_are_those_of_the_cpu(distribution: str, dtype: torch.dtype) -> None:
    skip_without_gpu()
    source = ProbeSource(3, distribution, 2**64 - 5, 11)
    assert torch.equal(
        probe_rows(source, 1001, dtype, "cuda").cpu(), probe_rows(source, 1001, dtype)
    )
    assert torch.equal(
        probes_of_models(source, 50, 4, 301, dtype, "cuda").cpu(),
        probes_of_models(source, 50, 4, 301, dtype),
    )
