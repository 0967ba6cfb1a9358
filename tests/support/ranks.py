"""Programs run by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hvpfast as hf


def torchrun(size: int, *program: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program in ``size`` processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*run, f"--nproc-per-node={size}", *map(str, program)]
    package = Path(hf.__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
