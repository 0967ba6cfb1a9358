"""docs/migration.md: its snippets run, in their order, and the names in its tables exist."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packages import real
from ranks import torchrun

import hvpfast as hf

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)
BLOCKS = [(needs, code) for needs, code in BLOCK.findall(TEXT)]


def run(*codes: str) -> None:
    names: dict[str, Any] = {}
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        for code in codes:
            exec(compile(code, "migration.md", "exec"), names)


@pytest.mark.usefixtures("single_threaded")
def test_snippets_run_in_their_order() -> None:
    assert len(BLOCKS) >= 8
    run(*(code for needs, code in BLOCKS if not needs))


@pytest.mark.usefixtures("single_threaded")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_snippet_of_laplace() -> None:
    real("laplace")
    run(BLOCKS[0][1], *(code for needs, code in BLOCKS if needs == "laplace"))


def test_snippet_for_several_processes(tmp_path: Path) -> None:
    (code,) = (code for needs, code in BLOCKS if needs == "torchrun")
    program = tmp_path / "program.py"
    same = "import torch\ntorch.manual_seed(0)\nimport hvpfast as hf\n"
    end = "print(f'sum {float(top.eigenvalues.sum()):.6f}')\ndist.destroy_process_group()\n"
    program.write_text(same + BLOCKS[0][1] + code + end)
    done = torchrun(2, program)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = subprocess.run(
        [sys.executable, "-c", same + BLOCKS[0][1] + "H = hf.HessianOperator(model, criterion, None"
         ", (x, y)); print(f'sum {float(hf.eigsh(H, 5, seed=0).eigenvalues.sum()):.6f}')"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = re.findall(r"sum \d+\.\d{6}", done.stdout)  # lines of two processes may run together
    assert len(found) == 2 and set(found) == set(re.findall(r"sum \S+", alone.stdout))


def test_native_names_exist() -> None:
    for name in set(re.findall(r"\bhf\.(\w+)", TEXT)):
        assert hasattr(hf, name), f"docs/migration.md names hf.{name}"
