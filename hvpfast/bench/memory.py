"""Peak memory of one form, in a process of its own: ``python -m hvpfast.bench.memory CASE ...``.

Two numbers, both bytes of resident memory above that of the process with everything imported and
the inputs in place: ``first`` over the first call, compilation and kept workspaces included, and
``steady`` over later calls.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CALLS = 3
TIMEOUT_SECONDS = 900


def measure(case: str, num_tangents: int, dtype: str, operation: str, provider: str, form: str,
            threads: int) -> dict[str, Any]:  # fmt: skip
    """Peak memory of one form in a subprocess.

    Returns:
        {"first": bytes, "steady": bytes}, or {"reason": why there is no number}.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {"reason": "peak memory is read from Linux's /proc"}
    words = [case, str(num_tangents), dtype, operation, provider, form, str(threads)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hvpfast.bench.memory", *words],
            capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"reason": f"took more than {TIMEOUT_SECONDS} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"reason": f"exit status {done.returncode}: {last[0]}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _status(field: str) -> int:
    """Bytes of one field of /proc/self/status, given there in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _settle() -> None:
    """Give freed memory back to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _child(words: list[str]) -> None:
    import torch

    from hvpfast.bench.cases import KNOWN_CASES, QUICK_CASES, build
    from hvpfast.bench.providers import PROVIDERS

    case, num_tangents, dtype, operation, provider, form, threads = words
    torch.set_num_threads(int(threads))
    chosen = PROVIDERS[provider]
    # The tiny case first: thread pools, kernels and lazily imported parts are not the operation's.
    tiny = QUICK_CASES["train-quick" if operation == "train_step" else "quick"]
    chosen.prepare(form, operation, build(tiny, int(num_tangents), dtype)).call()
    prepared = chosen.prepare(form, operation, build(KNOWN_CASES[case], int(num_tangents), dtype))
    _settle()
    before = _status("VmRSS")
    _reset_peak()
    prepared.call()
    first = _status("VmHWM") - before
    _settle()
    _reset_peak()
    for _ in range(CALLS):
        prepared.call()
    print(json.dumps({"first": max(first, 0), "steady": max(_status("VmHWM") - before, 0)}))


if __name__ == "__main__":
    _child(sys.argv[1:])
