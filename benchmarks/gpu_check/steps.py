"""The steps: what is built, proven and measured, in this order, with these limits."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from builder import nvcc
from processes import Step

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENGINES = ("cuda", "triton")
DEEP, FULL = "784-1024-512-256-128-64-10", "784-128-128-10-n60000"
STEP = "train-3072-256-100"
# A compiled form takes half a minute: of a training step, only the kinds that are the fastest
# elsewhere. What the patterns leave out has a row in the record that says so.
OURS = ("ours-cuda: *", "ours-triton: *", "ours-reference: *")
DEEP_FORMS = (*OURS, "torch-eager: *", "torch-func: *", "torch-compile: grad",
              "torch-compile: vjp*", "torch-graphs: eager*", "jax: vjp*")  # fmt: skip
DEEP_ORDER = ("--operations", "gradient", "hvp_warm", "hvp")  # what compiles longest comes last
STEP_FORMS = (*OURS, "torch-eager: *", "torch-compile: vjp(grad) *", "torch-graphs: eager*",
              "torch-graphs: compiled: vjp(grad) *", "jax: * vmap")  # fmt: skip
FULL_FORMS = (*OURS, "torch-eager: *", "torch-func: *", "torch-graphs: eager*", "jax: vjp*")
RESERVE = 40.0  # seconds for the form begun last, half a minute where it is compiled, and the clock
WORTH = 0.7  # of its time that a benchmark needs to be begun
# JAX beside torch on one GPU takes memory as it needs it, not most of it at once.
QUIET_JAX = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
SPARSE = "3"  # small.py's every third case: Triton compiles each for itself


def plan(work: Path, *, dry: bool = False) -> list[Step]:
    """All steps, in order; each says what it misses on this machine.

    Args:
        work: folder for what the steps leave behind.
        dry: the same kinds of steps on the CPU, on tiny cases.
    """
    facts = work / "environment.json"
    command = [sys.executable, str(HERE / "environment.py"), str(facts)]
    steps = [Step("environment", "environment", command, 60, _env(), read=partial(_json, facts))]
    if dry:
        return [*steps, *_dry(work)]
    cores = max(2, min(14, (os.cpu_count() or 2) - 2))
    tests, cuda_tests = (
        [f"{ROOT}/tests/{name}.py" for name in names]
        for names in (
            (
                "functional/test_cuda_graphs",
                "backends/test_triton_kernels",
                "bench/test_bench_device",
            ),
            ("backends/test_cuda_device", "backends/cuda_behaviour"),
        )
    )
    return [
        *steps,
        # Triton needs no extension: it uses the device while they are built. Every variant of a
        # kernel takes a quarter of a second to compile: few cases, and what the sanitizers need.
        _build("cpu", work, _no_build("cpu")),
        _build("cuda", work, _no_build("cuda")),
        _conformance("triton", work, "build", covering=True, processes=cores),
        Step("small-triton", "build", _small("triton", SPARSE), 150, _env()),
        _conformance("cuda", work, "conformance", processes=cores),
        # The promised speeds, each benchmark alone on the machine; forms are judged, then timed.
        _bench("full", 60, work, "--cases", FULL, "--forms", *FULL_FORMS),
        _bench("deep", 110, work, *DEEP_ORDER, "--cases", DEEP, "--forms", *DEEP_FORMS),
        _models(75, work, "--device", "cuda"),
        _bench("step", 110, work, "--cases", STEP, "--forms", *STEP_FORMS),
        _tests("gpu-tests", tests, work, processes=4),
        # Tests that make the runtime fail need emulated kernels: they are skipped, and counted.
        _tests("cuda-tests", cuda_tests, work, "build-cuda"),
        _conformance("triton_tf32x3", work, "prove", covering=True, processes=4),
        *(_sanitized(tool, name) for name in ENGINES for tool in ("memcheck", "racecheck")),
        _figure(work),
    ]


def _dry(work: Path) -> list[Step]:
    quick = ["--quick", "--threads", "1"]
    few = ["--rounds", "1", "--providers", "ours-cpu", "ours-reference", "torch-eager"]
    return [
        _conformance("cpu", work, "prove", "cpu", chosen="and tanh and f64 and N3"),
        Step("small-cpu", "prove", _small("cpu", "1", "cpu"), 60, _env()),
        _sanitized("memcheck", "triton"),
        _bench("deep", 90, work, "--cases", "quick", *quick, *few, device="cpu"),
        _models(90, work, *quick),
        _figure(work),
    ]


def _env(**more: str) -> dict[str, str]:
    """Variables of a step: this checkout is its hvpfast."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **more}


def _build(target: str, work: Path, missing: str) -> Step:
    command = [sys.executable, str(HERE / "builder.py"), target, str(work)]
    return Step(f"build-{target}", "build", command, 170, _env(), missing)


def _no_build(target: str) -> str:
    if not shutil.which("cmake"):
        return "cmake is not installed"
    if target == "cuda" and nvcc() is None:
        return "nvcc is not on the PATH nor under /usr/local/cuda"
    return ""


def _conformance(
    backend: str,
    work: Path,
    group: str,
    device: str = "cuda",
    *,
    chosen: str = "",
    covering: bool = False,
    processes: int = 1,
) -> Step:
    """The one conformance body on one backend; the names of its tests begin with the backend's.

    With ``covering`` those of its cases that meet every pair of values of two axes, and all of
    those with several models.
    """
    name = f"conformance-{backend}"
    bodies = [
        f"{ROOT}/tests/backends/{name}.py::test_conformance"
        for name in ("test_conformance", "test_many_models")
    ]
    few = "and (covering or shared)" if covering else ""
    words = [*bodies, "-k", f"{backend}- {chosen} {few}".strip()]
    command, outcomes = _pytest(name, work, device, words, processes)
    needs = "build-cuda" if backend == "cuda" else ""
    env = _env(OMP_NUM_THREADS="1")  # the oracle's: there is a process for every core
    return Step(name, group, command, 150, env, _no_pytest(), needs, partial(_outcomes, outcomes))


def _tests(name: str, files: list[str], work: Path, needs: str = "", processes: int = 1) -> Step:
    command, outcomes = _pytest(name, work, "cuda", files, processes)
    return Step(
        name,
        "prove",
        command,
        120,
        _env(**QUIET_JAX),
        _no_pytest(),
        needs,
        partial(_outcomes, outcomes),
    )


def _no_pytest() -> str:
    return "" if importlib.util.find_spec("pytest") else "pytest is not installed"


def _pytest(
    name: str, work: Path, device: str, words: list[str], processes: int
) -> tuple[list[str], Path]:
    """A pytest run and the file of its outcomes; on several processes where xdist is there."""
    outcomes = work / f"{name}.jsonl"
    spread = processes > 1 and importlib.util.find_spec("xdist") is not None
    command = [sys.executable, "-m", "pytest", *words, "--rootdir", str(ROOT)]
    command += ["-c", f"{ROOT}/pyproject.toml", "-q", "--maxfail=40", "--tb=short", "-W", "default"]
    command += ["-p", "no:cacheprovider", "--device", device, "--outcomes", str(outcomes)]
    return [*command, *(["-n", str(processes)] if spread else [])], outcomes


def _sanitized(tool: str, backend: str) -> Step:
    """Small shapes under one tool of compute-sanitizer; torch's cache of allocations is off."""
    beside = Path(nvcc() or "nvcc").with_name("compute-sanitizer")
    found = shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)
    # Libraries ask the driver for what it may lack, and do without it: no error of ours.
    command = [found or "compute-sanitizer", "--tool", tool, "--report-api-errors", "no"]
    command += ["--error-exitcode", "9", "--print-limit", "20"]
    command += _small(backend, SPARSE if backend == "triton" else "1")
    env = _env(PYTORCH_NO_CUDA_MEMORY_CACHING="1", CUDA_MODULE_LOADING="LAZY")
    missing = "" if found else "compute-sanitizer is not installed"
    needs = "build-cuda" if backend == "cuda" else ""
    return Step(f"{tool}-{backend}", "prove", command, 120, env, missing, needs)


def _small(backend: str, every: str, device: str = "cuda") -> list[str]:
    return [sys.executable, str(HERE / "small.py"), backend, device, every]


def _bench(name: str, limit: float, work: Path, *words: str, device: str = "cuda") -> Step:
    command = [sys.executable, "-m", "hvpfast.bench", *words, "--device", device]
    return _timed(name, limit, work, [*command, "--budget", "8"])


def _models(limit: float, work: Path, *words: str) -> Step:
    command = [sys.executable, "-m", "hvpfast.bench", "models", *words, "--budget", "10"]
    return _timed("models", limit, work, command)


def _timed(name: str, limit: float, work: Path, command: list[str]) -> Step:
    out = work / name
    command = [*command, "--out", str(out)]
    env = _env(**QUIET_JAX)
    read = partial(_rows, out / "bench.json")
    name = f"bench-{name}"
    return Step(name, name, command, limit, env, read=read, least=WORTH * limit, reserve=RESERVE)


def _figure(work: Path) -> Step:
    command = [sys.executable, str(HERE / "figure.py"), str(work), str(work / "gpu_check.png")]
    return Step("figure", "figure", command, 30, _env())


# ---- what the steps leave behind ----


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _outcomes(path: Path) -> dict[str, Any]:
    """Counts of passed, failed and skipped tests, the names of those that failed, and the total.

    Written while the tests run, so that a run out of time still says how far it came.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    total = next((e["collected"] for e in entries if "collected" in e), None)
    tests = [e for e in entries if "outcome" in e]
    counts = Counter(e["outcome"] for e in tests)
    return {
        "collected": total,
        **{name: counts[name] for name in ("passed", "failed", "skipped")},
        "failures": [e["test"] for e in tests if e["outcome"] == "failed"][:40],
        "reasons": sorted({e["reason"] for e in tests if e["outcome"] == "skipped"})[:10],
    }


def _rows(path: Path) -> dict[str, Any]:
    """A benchmark's record; of a run that was stopped, what it had written by then."""
    return _json(path) if path.exists() else {"rows": [], "marks": []}
