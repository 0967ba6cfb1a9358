"""What the CUDA compiler says of each kernel: registers, shared memory, stack and spills.

No GPU is needed, but a checkout with ``csrc``, nvcc, CMake and Ninja.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvpfast.lab.environment import checkout

ARCHITECTURES = ("sm_80", "sm_90")
_ROOT = checkout()


@dataclass(frozen=True)
class KernelFigures:
    """One kernel, or one function that kernels call, as compiled for one architecture.

    Args:
        name: of the function, with its template arguments, without namespaces and parameters.
        architecture: ``"sm_80"`` or ``"sm_90"``.
        entry: whether it is a kernel; registers and shared memory are given for kernels only.
        registers: per thread; of a kernel, those of the functions that it calls included.
        shared_bytes: static shared memory of a block.
        stack_bytes: local memory of a thread, spills included.
        spill_bytes: stored and loaded again for want of registers.
    """

    name: str
    architecture: str
    entry: bool
    registers: int | None
    shared_bytes: int | None
    stack_bytes: int
    spill_bytes: int


def build(folder: Path) -> tuple[Path, list[KernelFigures]]:
    """Build the module ``_cuda`` in an empty folder, with warnings as errors.

    Returns:
        The module's path, and the figures of every kernel for every architecture.

    Raises:
        FileNotFoundError: this is no checkout.
        RuntimeError: the build fails; the message has its output.
    """
    import pybind11

    if not (_ROOT / "csrc" / "cuda").is_dir():
        raise FileNotFoundError(f"{_ROOT / 'csrc' / 'cuda'} is not there: run from a checkout")
    configure = ["cmake", "-G", "Ninja", "-S", str(_ROOT), "-B", str(folder)]
    configure += ["-DHVPFAST_CUDA=on", "-DHVPFAST_WERROR=ON", "-DHVPFAST_PTXAS_INFO=ON"]
    configure += [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
    ]
    log = ""
    for command in (configure, ["cmake", "--build", str(folder), "--target", "_cuda"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{log}")
    (module,) = folder.glob("_cuda.*")
    return module, list(figures(_demangled(log)))


def figures(log: str) -> Iterator[KernelFigures]:
    """What the output of ``ptxas -v`` says."""
    architecture, entry = "", ""
    lines = iter(log.splitlines())
    for line in lines:
        if found := re.search(r"Compiling entry function '(.*)' for '(\w+)'", line):
            entry, architecture = found.groups()
        elif found := re.search(r"Function properties for (.*)", line):
            name = found[1]
            stack, stores, loads = map(int, re.findall(r"(\d+) bytes", next(lines)))
            used = next(lines) if name == entry else ""
            registers = re.search(r"Used (\d+) registers", used)
            shared = re.search(r"(\d+) bytes smem", used)
            yield KernelFigures(
                _short(name),
                architecture,
                name == entry,
                int(registers[1]) if registers else None,
                int(shared[1]) if shared else 0 if registers else None,
                stack,
                stores + loads,
            )


def _short(name: str) -> str:
    """``void hvpfast::cuda::f<(hvpfast::cuda::Form)0>(int)`` as ``f<(Form)0>``."""
    for part in ("void ", "hvpfast::cuda::", "(anonymous namespace)::"):
        name = name.replace(part, "")
    if not name.endswith(")"):
        return name
    start, open_brackets = len(name), 0
    while open_brackets or start == len(name):
        start -= 1
        open_brackets += {")": 1, "(": -1}.get(name[start], 0)
    return name[:start]


def _demangled(log: str) -> str:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return log  # the names stay as the linker sees them
    return subprocess.run([tool], input=log, capture_output=True, text=True, check=True).stdout
