"""README.md: its example prints what it says, and the files it names exist."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import torch

import hvpfast as hf

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_example_prints_what_the_readme_says() -> None:
    code, printed = re.search(r"```python\n(.*?)```\s+```\n(.*?)```", README, re.DOTALL).groups()
    out = io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue() == printed


def test_example_of_many_models_runs() -> None:
    section = README.partition("## Many models at once")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    namespace = {"torch": torch, "hf": hf}
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        exec(compile(code, "README.md", "exec"), namespace)
    P = namespace["spec"].num_params
    shapes = [tuple(namespace[name].shape) for name in ("loss", "penalty", "grad")]
    assert shapes == [(451,), (451,), (451, P)]
    assert namespace["result"].samples.shape == (451, 100)


def test_named_files_exist() -> None:
    table = README.partition("## Files")[2].partition("##")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert rows
    for row in rows:
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            folder = folder if "/" not in name else name.rpartition("/")[0] + "/"
            path = ROOT / (name if "/" in name else folder + name)
            assert path.exists(), f"README.md names {path.relative_to(ROOT)}"
