"""How much memory there is, and words for it."""

from __future__ import annotations

import math
import os
import time

import torch

KEPT_SHARE = 0.5  # of the available memory: what operators keep between products by default
WORK_SHARE = 0.25  # of the available memory: what one chunk of tangents may take by default
LARGE_BYTES = 2**30  # scratch memory above this is compared with the free memory first
_UNKNOWN = 2 * 2**30  # assumed where the system does not tell

_latest: dict[torch.device, tuple[float, int]] = {}  # when read, and what


def available_bytes(device: torch.device, max_age: float = 0.0) -> int:
    """Free bytes on a device, as read at most ``max_age`` seconds ago."""
    now = time.monotonic()
    when, free = _latest.get(device, (-math.inf, 0))
    if now - when > max_age:
        on_cuda = device.type == "cuda"
        free = int(torch.cuda.mem_get_info(device)[0]) if on_cuda else _system_available()
        _latest[device] = now, free
    return free


def _system_available() -> int:
    """What the system and its control group leave."""
    free = [_UNKNOWN]
    if (info := _read("/proc/meminfo")) is not None:
        rows = map(str.split, info.splitlines())
        free = [int(row[1]) * 1024 for row in rows if "MemAvailable:" in row]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit, used in _GROUP_LIMITS:
        texts = _read(limit), _read(used)
        if all(text is not None and text.strip().isdigit() for text in texts):  # not "max"
            free.append(int(texts[0] or 0) - int(texts[1] or 0))
    return max(0, min(free))


_GROUPS = "/sys/fs/cgroup"
_GROUP_LIMITS = (  # (limit, use) of Linux control groups, version 2 and version 1
    (f"{_GROUPS}/memory.max", f"{_GROUPS}/memory.current"),
    (f"{_GROUPS}/memory/memory.limit_in_bytes", f"{_GROUPS}/memory/memory.usage_in_bytes"),
)


def _read(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return None


def budget_of(memory_budget: object, available: int) -> int:
    """Bytes that an operator may keep: ``"auto"`` is a share of the available ones.

    Raises:
        ValueError: neither ``"auto"`` nor a number of bytes >= 0.
    """
    if memory_budget == "auto":
        return int(KEPT_SHARE * available)
    number = isinstance(memory_budget, (int, float)) and not isinstance(memory_budget, bool)
    if not number or not float(memory_budget) >= 0:  # type: ignore[arg-type]
        raise ValueError(
            f'memory_budget must be "auto" or a number of bytes >= 0; got {memory_budget!r}'
        )
    return int(min(float(memory_budget), 2.0**62))  # type: ignore[arg-type]


def bytes_text(count: float) -> str:
    """``count`` bytes for people: ``"1.5 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def check_scratch(size: int, what: str, device: torch.device) -> None:
    """Raise MemoryError where ``size`` bytes of scratch memory for ``what`` are not available."""
    if size > LARGE_BYTES and size > (free := available_bytes(device, max_age=1.0)):
        raise MemoryError(
            f"{what} takes {bytes_text(size)} of scratch memory at once, however small the batch, "
            f"and {bytes_text(free)} are available; estimate it instead, with "
            "estimator='hutchinson' or a method with random probes"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or a backend means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
