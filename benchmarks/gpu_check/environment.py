"""What the machine has, as JSON: python3 environment.py FILE."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hvpfast.lab import environment

TOOLS = {
    "nvcc": ["nvcc", "--version"],
    "cmake": ["cmake", "--version"],
    "ninja": ["ninja", "--version"],
    "compute-sanitizer": ["compute-sanitizer", "--version"],
    "c++": ["c++", "--version"],
    "nvidia-smi": ["nvidia-smi", "-L"],
}


def told(command: list[str]) -> str | None:
    """What a tool says of itself; None where it is not found."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()[-400:]


def collect() -> dict[str, Any]:
    """What times depend on, as in the record of a benchmark, and the versions of the tools."""
    packages = (*environment.PACKAGES, "pybind11", "pytest")
    return {
        **environment.timing_conditions(),
        "tools": {name: told(command) for name, command in TOOLS.items()},
        "versions": {name: environment.version(name) for name in packages},
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(collect(), indent=1), encoding="utf-8")
