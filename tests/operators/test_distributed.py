"""Operators over gloo process groups of two and three processes, against one process.

``torchrun`` starts distributed_worker.py once per number of processes; all its scenarios are run
there, and the tests look at what every process saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import distributed_worker
import pytest
import torch
from dense import close, convnet, dense, perceptron, tangents
from distributed_worker import CASES, SAMPLES, Results, algorithms, data_of, operator, values
from ranks import torchrun
from torch import nn

import hvpfast as hf
from hvpfast.bench.command import main
from hvpfast.bench.suites import distributed as suite
from hvpfast.operators import distributed

WORKER = Path(distributed_worker.__file__)
KINDS = hf.HessianOperator, hf.GGNOperator


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each process saved, by rank."""
    folder = tmp_path_factory.mktemp(f"size{request.param}")
    done = torchrun(request.param, WORKER, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def agree(results: Results, expected: Results, prefix: str = "") -> None:
    """Fail unless every expected entry is there, equal up to rounding."""
    for name, value in expected.items():
        close(results[prefix + name], value, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_ragged_shards_equal_one_process(ranks: list[Any], case: str, kind: Any) -> None:
    expected = values(operator(kind, case, data_of(case)))
    for results in ranks:
        agree(results["equal_to_one_process"], expected, f"{case} {kind.__name__} ")


def test_explain_tells_the_process(ranks: list[Any]) -> None:
    for rank, results in enumerate(ranks):
        text = results["equal_to_one_process"]["explain"]
        assert f"process group: rank {rank} of {len(ranks)}, gloo" in text


def test_products_are_the_same_numbers_in_every_process(ranks: list[Any]) -> None:
    first = ranks[0]["equal_to_one_process"]
    for results in ranks[1:]:
        for name, value in results["equal_to_one_process"].items():
            if name != "explain":
                assert torch.equal(value, first[name]), name


def test_shard_splits_evenly_and_loaders_may_stream(ranks: list[Any]) -> None:
    sizes = [results["evenly"]["samples"] for results in ranks]
    assert sum(sizes) == SAMPLES
    assert max(sizes) - min(sizes) <= 1
    for case, kind in (("perceptron", hf.HessianOperator), ("convnet", hf.GGNOperator)):
        A = operator(kind, case, data_of(case))
        for results in ranks:
            close(results["evenly"][case], A @ tangents(A.shape[0], 2), 1e-12)


def test_shards_without_targets_that_count(ranks: list[Any]) -> None:
    x, y = data_of("perceptron")
    for case, name in (("perceptron", "perceptron"), ("sum", "sum"), ("custom loss", "reference")):
        expected = values(operator(hf.HessianOperator, case, (x[:9], y[:9])))
        for results in ranks:
            found = results["nothing_counts_here"]
            if case != "custom loss":
                agree(found[f"ignored {case}"], expected)
            for kind in ("list", "tensors", "pairs") if case != "custom loss" else ():
                agree(found[f"empty {kind} {case}"], expected)
            if name == "reference":
                agree(found["empty reference"], expected)
    for rank, results in enumerate(ranks):
        found = results["nothing_counts_here"]
        assert found["nowhere"].startswith("ValueError: no target counts")
        assert found["no data"].startswith("ValueError: no target counts")
        assert ("0 batches, 0 samples" in found["explain"]) == (rank > 0)


def test_refresh_subsets_and_blocks(ranks: list[Any]) -> None:
    model = perceptron()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    names = ["2.weight", "2.bias", "0.bias"]
    M = dense(model, nn.CrossEntropyLoss(), *data_of("perceptron"), names)
    net, images = convnet(), data_of("convnet")
    C = dense(net, nn.CrossEntropyLoss(), *images)
    for results in ranks:
        found = results["refresh_and_blocks"]
        assert found["stale"].startswith("RuntimeError: parameters, buffers or data were changed")
        close(found["product"], M @ tangents(len(M), 2), 1e-12)
        for whole, blocks in ((M, found["parts"][:2]), (C, found["parts"][2:])):
            start = 0
            for block in blocks:
                stop = start + len(block)
                close(block, whole[start:stop, start:stop], 1e-12)
                start = stop
            assert start == len(whole)


def test_one_all_reduce_per_call_and_none_alone(ranks: list[Any]) -> None:
    for results in ranks:
        assert results["all_reduces"]["alone"] == 0
        assert results["all_reduces"]["construction"] == 3  # arguments, linearization, determinism
        # product, quadratic form, gradient, refresh, loss, product with no tangent
        assert results["all_reduces"]["calls"] == [1, 1, 1, 1, 0, 1]


DIFFERENCES = {
    "parameters": ("differ in the values of parameter", "load one checkpoint everywhere"),
    "loss": ("differ in the loss", "label_smoothing"),
    "class weights": ("differ in the loss", "tensors"),
    "kind": ("differ in kind: rank 0 has HessianOperator", "GGNOperator"),
    "dtype": ("differ in dtype: rank 0 has torch.float64", "torch.float32"),
    "tangents": ("different tangents to the product", "the same seed="),
    "quadratic": ("different tangents to the quadratic form", "the same seed="),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_processes_that_differ_are_told(ranks: list[Any], what: str) -> None:
    for results in ranks:
        message = results["differences"][what]
        assert message.startswith("DistributedError: ")
        for text in (*DIFFERENCES[what], f"rank {len(ranks) - 1}"):
            assert text in message.replace("rank 1 are", f"rank {len(ranks) - 1} are")


def test_same_seed_is_the_same_probe(ranks: list[Any]) -> None:
    assert all(results["differences"]["same"] == "" for results in ranks)


# scenario: (error where it happens, where it is reported)
FAILURES = {
    "data": ("ValueError: the loss is nan", "in the linearization"),
    "labels": ("ValueError: ", "in the linearization"),
    "kind": ("TypeError: data must be a pair", "in the construction of an operator"),
    "memory": ("MemoryError: the machine is full", "in the product"),
    "nan": ("FloatingPointError: its part of the product holds NaN", "in the product"),
    "changed": ("RuntimeError: parameters, buffers or data were changed", "in the product"),
    "changed, gradient": ("RuntimeError: parameters, buffers or data", "in the gradient"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_in_one_process_is_an_error_in_all(ranks: list[Any], what: str) -> None:
    own, where = FAILURES[what]
    last = len(ranks) - 1
    message = ranks[last]["failures"][what]
    assert message.startswith(own)
    for results in ranks[:last]:
        told = results["failures"][what]
        assert told == f"DistributedError: rank {last} of {len(ranks)} failed {where}: {message}"


def test_a_group_works_on_after_a_failure(ranks: list[Any]) -> None:
    for results in ranks:
        found = results["failures"]
        assert found["afterwards"] == 0
        assert found["overflow"] == ""  # infinite sum of a rank's entries, each of them finite
        assert found["nan everywhere"].startswith("FloatingPointError")
        assert found["changed, refresh"].startswith("DistributedError: the processes differ in")
        assert found["refresh failed"].startswith("RuntimeError: the last refresh() of the oper")


def test_numbers_that_processes_agree_on(ranks: list[Any]) -> None:
    for results in ranks:
        assert results["agreed"] == {"one": 10, "sum": 2**62}


def test_a_group_of_some_processes(ranks: list[Any]) -> None:
    A = operator(hf.HessianOperator, "perceptron", data_of("perceptron"))
    for results in ranks[:-1]:
        assert "not in the process group" in results["subgroup"]["outside"]
    close(ranks[-1]["subgroup"]["inside"], A @ tangents(A.shape[0], 2), 1e-12)


def test_algorithms_equal_one_process(ranks: list[Any]) -> None:
    expected = algorithms(operator(hf.HessianOperator, "perceptron", data_of("perceptron")))
    for results in ranks:
        for name, value in expected.items():
            found = torch.as_tensor(results["algorithms"]["values"][name])
            close(found, torch.as_tensor(value), 1e-9)


def test_seeds_that_are_not_given_are_common(ranks: list[Any]) -> None:
    seeds = ranks[0]["algorithms"]["seeds"]
    assert len(set(seeds)) == 3
    assert all(results["algorithms"]["seeds"] == seeds for results in ranks)


def test_a_lost_process_is_an_error_not_a_wait(tmp_path: Path) -> None:
    done = torchrun(2, WORKER, tmp_path, "lose")
    assert done.returncode != 0
    assert not (tmp_path / "1.pt").exists()
    error = torch.load(tmp_path / "0.pt")["error"]
    assert error.startswith("DistributedError: rank 0 of 2 lost the others in the product")


def test_without_torch_distributed_initialised() -> None:
    with pytest.raises(RuntimeError, match="start the program with torchrun"):
        operator(hf.HessianOperator, "perceptron", data_of("perceptron"), "world")
    with pytest.raises(RuntimeError, match="init_process_group first"):
        distributed.shard(data_of("perceptron"), None)


def test_bench_suite_records_what_it_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distributed", "--quick", "--threads", "2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["ranks"], result["threads"], result["rounds"]) == (2, 2, 2)
    operations = [row["operation"] for row in result["rows"]]
    assert operations == ["product", "quadratic form", "gradient"]
    for row in result["rows"]:
        assert row["status"] == "timed"
        assert min(row[key] for key in ("alone", "ranks", "reduce", "rate")) > 0
    assert (tmp_path / "bench.txt").read_text().strip() in capsys.readouterr().out


def test_bench_suite_refuses_wrong_results() -> None:
    exact = tangents(50, 2)
    alone = exact.float()
    assert suite.disagreement(alone.flip(0).flip(0), alone, exact) == ""
    assert "relative error" in suite.disagreement(alone * (1 + 1e-5), alone, exact)
    assert "relative error" in suite.disagreement(alone * torch.nan, alone, exact)
    row = {"case": "c", "operation": "product", "status": "wrong", "reason": "why"}
    table = suite.render({"ranks": 2, "threads": 2, "rounds": 1, "rows": [row]})
    assert "wrong: why" in table
