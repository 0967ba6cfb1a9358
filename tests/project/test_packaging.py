"""What is installed: the wheel without the extension, the sdist, and a build without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Runs against a wheel built without the extension: the reference backend works and says so.
PURE_PYTHON = """
import sys
import torch
import hvpfast as hf

assert hf.__file__.startswith(sys.argv[1]), hf.__file__
reasons = hf.available()
assert reasons["reference"] is None, reasons
assert reasons["cpu"], reasons

spec = hf.MLPSpec((3, 4, 2))
params, x, y = torch.ones(spec.num_params), torch.ones(5, 3), torch.zeros(5, dtype=torch.int64)
lin = hf.linearize(spec, params, x, y)
assert lin.backend == "reference"
assert reasons["cpu"] in lin.explain(), lin.explain()
assert torch.isfinite(hf.hvp(lin, params)).all()
try:
    hf.linearize(spec, params, x, y, backend="cpu")
except RuntimeError as error:
    assert reasons["cpu"] in str(error), error
else:
    raise AssertionError("an explicit backend that cannot run must raise")
print(reasons["cpu"])
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a checkout holds, so that builds leave nothing in the working tree."""
    copy = tmp_path_factory.mktemp("sources")
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "hvpfast", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_wheel_without_extension_runs_on_the_reference_backend(
    sources: Path, tmp_path: Path
) -> None:
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ".")
    result = run(*build, cwd=sources, HVPFAST_NO_EXT="1")
    assert result.returncode == 0, result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "hvpfast/py.typed" in archive.namelist()
        archive.extractall(tmp_path / "site")
    # Without site (-S) an editable install beside torch takes no part.
    site, packages = str(tmp_path / "site"), sysconfig.get_path("purelib")
    path = os.pathsep.join([site, packages])
    result = run("-S", "-c", PURE_PYTHON, site, cwd=tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stdout


def test_sdist_holds_what_a_build_needs(sources: Path, tmp_path: Path) -> None:
    build = ("-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ".")
    result = run(*build, cwd=sources)
    assert result.returncode == 0, result.stdout
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    needed |= {"CMakeLists.txt", "setup.py", "LICENSE", "README.md", "hvpfast/py.typed"}
    assert needed <= names, needed - names


def test_build_without_a_compiler_says_what_to_do(sources: Path) -> None:
    missing = str(sources / "no-such-compiler")
    result = run("setup.py", "build_ext", cwd=sources, CXX=missing, HVPFAST_NO_EXT="0")
    assert result.returncode == 1, result.stdout
    assert "A C++20 compiler is needed" in result.stdout
    assert "HVPFAST_NO_EXT=1" in result.stdout


def test_no_ext_takes_zero_or_one(sources: Path) -> None:
    result = run("setup.py", "--version", cwd=sources, HVPFAST_NO_EXT="yes")
    assert result.returncode == 1
    assert "HVPFAST_NO_EXT must be 0 or 1; got 'yes'" in result.stdout
