"""Products over a process group against one process with as many threads.

The ranks are processes of ``torchrun`` on this machine, with gloo; every rank holds its shard of
the samples and its share of the cores. The first rank holds another operator with all samples. The
two take turns: ranks together with one share of the threads each, then the first rank alone with
all threads while the others wait. Results are checked against float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.bench import record, tables
from hvpfast.lab.environment import checkout, usable_cores
from hvpfast.lab.measure.timing import Disturbance
from hvpfast.operators.distributed import shard

DESCRIPTION = "Products over processes, each with a shard of the data, against one process."

Case = tuple[tuple[int, ...], str, int, int]  # widths, activation, samples, tangents
CASES: dict[str, Case] = {
    "784-128-128-10 N=16384 K=8": ((784, 128, 128, 10), "sigmoid", 16384, 8),
    "784-128-128-10 N=16384 K=1": ((784, 128, 128, 10), "sigmoid", 16384, 1),
    "784-128-128-10 N=2048 K=8": ((784, 128, 128, 10), "sigmoid", 2048, 8),
    "40-32-32-10 N=4000 K=1": ((40, 32, 32, 10), "relu", 4000, 1),
}
QUICK_CASES = {"20-8-3 N=101 K=2": ((20, 8, 3), "tanh", 101, 2)}
TURN_SECONDS = 0.05  # of calls under the clock, at least one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    add("--threads", type=int, help="of all ranks together (default: the usable cores)")
    add("--rounds", type=int, default=15, help="default: %(default)s")
    add("--quick", action="store_true", help="a tiny case in seconds: does everything work?")
    record.add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """The exit status is 1 when a rank failed or a result was wrong, else 0."""
    threads = arguments.threads or usable_cores()
    settings = {
        "threads": max(arguments.ranks, threads),
        "rounds": 2 if arguments.quick else arguments.rounds,
        "quick": arguments.quick,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc-per-node={arguments.ranks}", "-m", __name__, str(path)]
        packages = filter(None, [str(checkout()), os.environ.get("PYTHONPATH", "")])
        variables = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(packages)}
        busy = Disturbance()
        done = subprocess.run([*command, json.dumps(settings)], env=variables)
        if done.returncode or not path.exists():
            print("a rank failed; its output is above", file=sys.stderr)
            return 1
        rows = json.loads(path.read_text(encoding="utf-8"))
    result = {
        **record.head("distributed"),
        "ranks": arguments.ranks,
        **settings,
        "cores_busy": busy.share(),  # on average, the ranks' own included
        "rows": rows,
    }
    record.publish(result, render(result), arguments.out)
    return int(any(row["status"] != "timed" for row in rows))


def _milliseconds(name: str) -> tables.Show:
    return lambda row: f"{row[name] * 1e3:9.3f} ms"


NAMES: tables.FixedColumns = (("case", "case", "28"), ("operation", "operation", "15"))
COLUMNS: tables.FixedColumns = (
    *NAMES,
    ("1 process", _milliseconds("alone"), ">12"),
    ("ranks", _milliseconds("ranks"), ">12"),
    ("ratio", lambda row: f"{row['alone'] / row['ranks']:.2f}", ">6"),
    ("all-reduce", _milliseconds("reduce"), ">11"),
    ("rate of ranks", lambda row: f"{row['rate']:.3g}/s", ">14"),
)


def render(result: dict[str, Any]) -> str:
    ranks, threads = result["ranks"], result["threads"]
    lines = [
        f"{ranks} ranks with {threads // ranks} threads each, gloo, against 1 process with "
        f"{threads} threads; float32, medians of {result['rounds']} rounds that take turns",
        "ratio: time of one process over that of the ranks; rate: samples times tangents a second",
        "",
        tables.fixed_head(COLUMNS, " "),
    ]
    for row in result["rows"]:
        if row["status"] == "timed":
            lines.append(tables.fixed_line(COLUMNS, row, " "))
        else:
            lines.append(f"{tables.fixed_line(NAMES, row, ' ')} {row['status']}: {row['reason']}")
    return "\n".join(lines)


# What every rank does.


def main() -> None:
    """What torchrun starts: all cases are measured, and the first rank writes the rows."""
    path, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo")
    try:
        rows = []
        for name, case in (QUICK_CASES if settings["quick"] else CASES).items():
            rows += measure(name, case, settings)
        if dist.get_rank() == 0:
            record.write_json(path, rows)
    finally:
        dist.destroy_process_group()


def measure(name: str, case: Case, settings: dict[str, Any]) -> list[dict[str, Any]]:
    sizes, activation, samples, tangents = case
    g = torch.Generator().manual_seed(0)
    model, loss = hf.MLP(sizes, activation, generator=g), nn.CrossEntropyLoss()
    data = (
        torch.randn(samples, sizes[0], generator=g),
        torch.randint(sizes[-1], (samples,), generator=g),
    )
    world, first = dist.group.WORLD, dist.get_rank() == 0
    ours = hf.HessianOperator(model, loss, None, shard(data, world), process_group=world)
    whole = hf.HessianOperator(model, loss, None, data) if first else ours
    V = hf.probes(ours.shape[0], tangents, seed=1)
    calls: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "product": lambda A, V: A @ V,
        "quadratic form": lambda A, V: A.quadratic_form(V),
        "gradient": lambda A, V: A.gradient(),
    }
    rows = []
    for operation, call in calls.items():
        row: dict[str, Any] = {"case": name, "operation": operation}
        together = call(ours, V)
        reason = ""
        if first:
            exact = hf.HessianOperator(model, loss, None, data, dtype=torch.float64)
            reason = disagreement(together, call(whole, V), call(exact, V.double()))
        if agreed_text(reason):
            rows.append({**row, "status": "wrong", "reason": reason})
            continue
        buffer = torch.zeros_like(together)
        forms: dict[str, tuple[Callable[[], Any], bool]] = {
            "alone": (functools.partial(call, whole, V), False),
            "ranks": (functools.partial(call, ours, V), True),
            "reduce": (functools.partial(dist.all_reduce, buffer), True),
        }
        seconds = take_turns(forms, settings)
        medians = {form: statistics.median(times) for form, times in seconds.items()}
        count = samples * (1 if operation == "gradient" else tangents)
        rate = count / medians["ranks"]
        rows.append({**row, "status": "timed", **medians, "rate": rate, "seconds": seconds})
    return rows


def disagreement(ranks: Tensor, alone: Tensor, exact: Tensor) -> str:
    """Why the ranks' result is wrong, judged by the error of one process; "" if it is right."""
    size = float(exact.norm())
    error, own = (float((t.double() - exact).norm()) / size for t in (ranks, alone))
    bound = 2 * own + 16 * torch.finfo(ranks.dtype).eps
    return "" if error <= bound else f"relative error {error:.2e}, that of one process {own:.2e}"


def agreed_text(mine: str) -> str:
    """The first rank's text, in every rank."""
    texts = [mine]
    dist.broadcast_object_list(texts, src=0)
    return texts[0]


def take_turns(
    forms: dict[str, tuple[Callable[[], Any], bool]], settings: dict[str, Any]
) -> dict[str, list[float]]:
    """Seconds per call of each form by rounds; (call, whether all ranks make it)."""
    first, threads = dist.get_rank() == 0, settings["threads"]
    names = list(forms)
    inner, seconds = dict.fromkeys(names, 1), {name: list[float]() for name in names}
    for done in range(-1, settings["rounds"]):  # the turn before the first counts the calls
        start = max(done, 0) % len(names)
        for name in names[start:] + names[:start]:
            call, everyone = forms[name]
            torch.set_num_threads(threads // dist.get_world_size() if everyone else threads)
            dist.barrier()
            spent = turn(call, inner[name]) if everyone or first else 0.0
            dist.barrier()
            if done >= 0:
                seconds[name].append(spent)
            else:
                inner[name] = int(agreed_text(str(max(1, round(TURN_SECONDS / max(spent, 1e-7))))))
    return seconds


def turn(call: Callable[[], Any], inner: int) -> float:
    """Seconds per call after one that is not timed."""
    call()
    start = time.perf_counter()
    for _ in range(inner):
        call()
    return (time.perf_counter() - start) / inner


if __name__ == "__main__":
    main()
