"""What one process of test_distributed.py does: started by torchrun, it saves what it saw.

    torchrun ... distributed_worker.py FOLDER [SCENARIO]

Every scenario returns tensors, texts of errors and counts by name. The tests compare the tensors
with one process that has all the data.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dense import classes, convnet, custom_loss, perceptron, tangents
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvpfast as hf
from hvpfast.operators import distributed

Results = dict[str, Any]

SAMPLES = 23
WEIGHTED = nn.CrossEntropyLoss(
    weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), ignore_index=1, label_smoothing=0.1
)
# name: (model, loss, reduction to name, shape of a sample)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, str | None, tuple[int, ...]]] = {
    "perceptron": (perceptron, nn.CrossEntropyLoss(), None, (4,)),
    "class weights": (perceptron, WEIGHTED, None, (4,)),
    "sum": (perceptron, nn.CrossEntropyLoss(reduction="sum"), None, (4,)),
    "custom loss": (perceptron, custom_loss, "mean", (4,)),
    "convnet": (convnet, nn.CrossEntropyLoss(), None, (1, 4, 4)),
}


def data_of(case: str) -> tuple[Tensor, Tensor]:
    """All samples of a case."""
    return classes(SAMPLES, *CASES[case][3])


def ragged(data: tuple[Tensor, Tensor], rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """A shard in batches of 5 or less: one sample for rank 0, most of the others for the last."""
    bounds = [0, 1, 8, SAMPLES] if size == 3 else [0, 1, SAMPLES]
    x, y = (t[bounds[rank] : bounds[rank + 1]] for t in data)
    return list(zip(x.split(5), y.split(5), strict=True))


def operator(kind: Any, case: str, data: Any, group: Any = None, **options: Any) -> Any:
    """An operator of a case; the reference backend for what is not a perceptron."""
    make, loss, reduction, _ = CASES[case]
    backend = "reference" if case in ("custom loss", "convnet") else "auto"
    options = {"reduction": reduction, "backend": backend, "process_group": group} | options
    return kind(make(), loss, None, data, **options)


def values(A: Any) -> Results:
    """Everything that an operator gives."""
    V = tangents(A.shape[0], 3)
    return {
        "loss": A.loss,
        "gradient": A.gradient(),
        "product": A @ V,
        "vector": A @ V[:, 0],
        "left": V.T @ A,
        "quadratic": A.quadratic_form(V),
        "algebra": (2 * A.shift(0.1) - A) @ V,
    }


def error_of(call: Callable[[], Any]) -> str:
    """Type and message of what a call raises; "" if nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Scenarios:
    """One method per scenario, run in this order by every process."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group: Any = dist.group.WORLD
        self.last = self.rank == self.size - 1

    def equal_to_one_process(self) -> Results:
        results: Results = {}
        for case in CASES:
            shard = ragged(data_of(case), self.rank, self.size)
            for kind in (hf.HessianOperator, hf.GGNOperator):
                A = operator(kind, case, shard, self.group)
                results |= {f"{case} {kind.__name__} {k}": v for k, v in values(A).items()}
        results["explain"] = A.explain()
        return results

    def evenly(self) -> Results:
        shard = distributed.shard(data_of("perceptron"), self.group)
        loader = DataLoader(TensorDataset(*shard), batch_size=3)
        A = operator(hf.HessianOperator, "perceptron", loader, self.group, memory_budget=0)
        images = distributed.shard(data_of("convnet"), self.group)
        B = operator(hf.GGNOperator, "convnet", images, self.group, check_deterministic=True)
        return {
            "perceptron": A @ tangents(A.shape[0], 2),
            "convnet": B @ tangents(B.shape[0], 2),
            "samples": len(shard[0]),
        }

    def nothing_counts_here(self) -> Results:
        results: Results = {}
        x, y = data_of("perceptron")
        first, rest = (x[:9], y[:9]), (x[9:], torch.full_like(y[9:], -100))
        for case in ("perceptron", "sum"):
            data = first if self.rank == 0 else rest
            results[f"ignored {case}"] = values(
                operator(hf.HessianOperator, case, data, self.group)
            )
            for name, empty in (("list", []), ("tensors", (x[:0], y[:0])), ("pairs", [rest] * 0)):
                data = first if self.rank == 0 else empty
                A = operator(hf.HessianOperator, case, data, self.group)
                results[f"empty {name} {case}"] = values(A)
        reference = {"backend": "reference", "check_deterministic": True}
        A = operator(hf.HessianOperator, "custom loss", data, self.group, **reference)
        results["empty reference"] = values(A)
        results["explain"] = A.explain()
        call = lambda: operator(hf.HessianOperator, "perceptron", rest, self.group)  # noqa: E731
        results["nowhere"] = error_of(call)
        results["no data"] = error_of(
            lambda: operator(hf.HessianOperator, "perceptron", [], self.group)
        )
        return results

    def refresh_and_blocks(self) -> Results:
        model, loss = perceptron(), nn.CrossEntropyLoss()
        shard = ragged(data_of("perceptron"), self.rank, self.size)
        H = hf.HessianOperator(model, loss, ["2.*", "0.bias"], shard, process_group=self.group)
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        stale = error_of(lambda: H @ tangents(H.shape[0], 1))
        H.refresh()
        parts = [B @ torch.eye(B.shape[0], dtype=B.dtype) for B in H.blocks()]
        net = convnet()
        shard = ragged(data_of("convnet"), self.rank, self.size)
        C = hf.HessianOperator(net, loss, None, shard, backend="reference",
                               process_group=self.group)  # fmt: skip
        parts += [B @ torch.eye(B.shape[0], dtype=B.dtype) for B in C.blocks()]
        return {"stale": stale, "product": H @ tangents(H.shape[0], 2), "parts": parts}

    def all_reduces(self) -> Results:
        counts, original, gather = [], dist.all_reduce, dist.all_gather_object

        def counted(*args: Any, **options: Any) -> Any:
            counts[-1] += 1
            return original(*args, **options)

        dist.all_reduce, dist.all_gather_object = counted, None
        try:
            A = operator(hf.HessianOperator, "perceptron", data_of("perceptron"))
            V = tangents(A.shape[0], 4)
            counts.append(0)
            A @ V
            counts.append(0)
            dist.all_gather_object = gather
            A = operator(hf.HessianOperator, "perceptron", data_of("perceptron"), self.group)
            dist.all_gather_object = None
            calls = (lambda: A @ V, lambda: A.quadratic_form(V), A.gradient, A.refresh,
                     lambda: A.loss, lambda: A @ V[:, :0])  # fmt: skip
            for call in calls:
                counts.append(0)
                call()
        finally:
            dist.all_reduce, dist.all_gather_object = original, gather
        return {"alone": counts[0], "construction": counts[1], "calls": counts[2:]}

    def differences(self) -> Results:
        def made(model: nn.Module, loss: Any = WEIGHTED, kind: Any = hf.HessianOperator,
                 **options: Any) -> str:  # fmt: skip
            data = data_of("perceptron")
            return error_of(
                lambda: kind(model, loss, None, data, process_group=self.group, **options)
            )

        other = perceptron()
        if self.last:
            with torch.no_grad():
                other[2].bias[1] += 1e-9
        kinds = hf.HessianOperator, hf.GGNOperator
        weights = torch.tensor([0.5, 2.0, 1.0 + self.last], dtype=torch.float64)
        A = operator(hf.HessianOperator, "perceptron", data_of("perceptron"), self.group)
        n = A.shape[0]
        return {
            "parameters": made(other),
            "loss": made(perceptron(), nn.CrossEntropyLoss(label_smoothing=0.1 * self.last)),
            "class weights": made(perceptron(), nn.CrossEntropyLoss(weight=weights)),
            "kind": made(perceptron(), kind=kinds[self.last]),
            "dtype": made(perceptron(), nn.CrossEntropyLoss(),
                          dtype=torch.float32 if self.last else None),
            "tangents": error_of(lambda: A @ hf.probes(n, 2, seed=self.rank, dtype=A.dtype)),
            "quadratic": error_of(
                lambda: A.quadratic_form(hf.probes(n, seed=self.rank, dtype=A.dtype))
            ),
            "same": error_of(lambda: A @ hf.probes(n, 2, seed=3, dtype=A.dtype)),
        }  # fmt: skip

    def failures(self) -> Results:
        x, y = (t.clone() for t in data_of("perceptron"))
        if self.last:
            x[2, 1] = torch.nan
        results = {"data": error_of(
            lambda: operator(hf.HessianOperator, "perceptron", (x, y), self.group))}  # fmt: skip
        x, y = (t.clone() for t in data_of("perceptron"))
        y[3] = 7 if self.last else 2
        results["labels"] = error_of(
            lambda: operator(hf.HessianOperator, "perceptron", (x, y), self.group)
        )
        bad = iter([]) if self.last else (x, y)
        results["kind"] = error_of(
            lambda: operator(hf.HessianOperator, "perceptron", bad, self.group)
        )
        A = operator(hf.HessianOperator, "perceptron", data_of("perceptron"), self.group)
        V, own = tangents(A.shape[0], 2), A._own_product
        expected = A @ V

        def without_memory(rows: Tensor) -> Tensor:
            raise MemoryError("the machine is full")

        def not_finite(rows: Tensor) -> Tensor:
            out = own(rows)
            out[1, 3] = torch.nan
            return out

        for name, broken in (("memory", without_memory), ("nan", not_finite)):
            A._own_product = broken if self.last else own
            results[name] = error_of(lambda: A @ V)
        A._own_product = lambda rows: own(rows) * 0 + 1e308  # its sum overflows
        results["overflow"] = error_of(lambda: A @ V)
        A._own_product = own
        results["nan everywhere"] = error_of(lambda: A @ (V * torch.nan))
        results["afterwards"] = float((A @ V - expected).abs().max())
        model = perceptron()
        B = hf.HessianOperator(model, WEIGHTED, None, data_of("perceptron"),
                               process_group=self.group)  # fmt: skip
        if self.last:
            with torch.no_grad():
                model[0].bias.add_(1.0)
        for name, call in (
            ("changed", lambda: B @ V),
            ("changed, gradient", B.gradient),
            ("changed, refresh", B.refresh),
            ("refresh failed", lambda: B @ V),
        ):
            results[name] = error_of(call)
        return results

    def agreed(self) -> Results:
        A = operator(hf.HessianOperator, "perceptron", data_of("perceptron"), self.group)
        return {"one": A.agreed(10 + self.rank), "sum": (A + 2 * A).agreed(2**62 + self.rank)}

    def subgroup(self) -> Results:
        group = dist.new_group([self.size - 1])
        data = data_of("perceptron")
        made = lambda: operator(hf.HessianOperator, "perceptron", data, group)  # noqa: E731
        if not self.last:
            return {"outside": error_of(made)}
        return {"inside": made() @ tangents(made().shape[0], 2)}

    def algorithms(self) -> Results:
        shard = ragged(data_of("perceptron"), self.rank, self.size)
        H = operator(hf.HessianOperator, "perceptron", shard, self.group)
        return {"values": algorithms(H), "seeds": drawn_seeds(H)}


def algorithms(H: Any) -> Results:
    """Estimators, eigenvalues and densities with the seeds of the tests."""
    from hvpfast.analysis.density.quadrature import spectral_density
    from hvpfast.analysis.eigen.solver import eigsh
    from hvpfast.analysis.estimators.estimate import diagonal, frobenius_sq, trace

    return {
        "trace": trace(H, 20, seed=5).estimate,
        "hutch++": trace(H, 20, seed=5, method="hutch++").estimate,
        "xtrace": trace(H, 20, seed=5, method="xtrace").estimate,
        "rtol": trace(H, 20, seed=5, rtol=0.1).estimate,
        "exact": trace(H, method="exact").estimate,
        "diagonal": diagonal(H, method="exact").estimate,
        "frobenius": frobenius_sq(H, 10, seed=6).estimate,
        "eigenvalues": eigsh(H, k=4, tol=1e-8, seed=7).eigenvalues,
        "density": spectral_density(H, 5, 3, seed=8).ritz_values,
    }


def drawn_seeds(H: Any) -> list[int]:
    """The seeds that algorithms draw where none is given."""
    from hvpfast.analysis.density.quadrature import spectral_density
    from hvpfast.analysis.eigen.solver import eigsh
    from hvpfast.analysis.estimators.estimate import trace

    seeds = trace(H, 4).seed, eigsh(H, k=1).seed, spectral_density(H, 3, 2).seed
    return [int(seed or 0) for seed in seeds]


def lose_a_process(folder: Path) -> None:
    """The last process ends inside a product; the others save their error."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others, too
    data = data_of("perceptron")
    A = operator(hf.HessianOperator, "perceptron", data, dist.group.WORLD)
    if dist.get_rank() == dist.get_world_size() - 1:
        A._own_product = lambda rows: os._exit(3)
    error = error_of(lambda: A @ tangents(A.shape[0], 2))
    torch.save({"error": error}, folder / f"{dist.get_rank()}.pt")


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    if sys.argv[2:] == ["lose"]:
        lose_a_process(folder)
        return
    scenarios = Scenarios()
    names = [name for name in vars(Scenarios) if not name.startswith("_")]
    results = {name: getattr(scenarios, name)() for name in names}
    torch.save(results, folder / f"{scenarios.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
