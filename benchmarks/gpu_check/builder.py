"""Build one extension module in place, with what the machine has: python3 builder.py cpu|cuda WORK.

pybind11 comes from its package, or from the headers that torch carries; Ninja is used where it is
found. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What find_package(pybind11) needs to find, for headers without a package of their own.
SHIM = """find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
if(NOT TARGET pybind11::headers)
  add_library(pybind11::headers INTERFACE IMPORTED)
  target_include_directories(pybind11::headers INTERFACE "{include}")
  add_library(pybind11::module INTERFACE IMPORTED)
  target_link_libraries(pybind11::module INTERFACE pybind11::headers Python::Module)
endif()
function(pybind11_add_module name)
  set(sources ${{ARGN}})
  list(REMOVE_ITEM sources MODULE)
  python_add_library(${{name}} MODULE WITH_SOABI ${{sources}})
  target_link_libraries(${{name}} PRIVATE pybind11::headers)
endfunction()
"""


def pybind11_dir(work: Path, *, bundled: bool = False) -> Path:
    """The folder of pybind11Config.cmake: the package's, else one made for torch's headers.

    Raises:
        SystemExit: there is neither.
    """
    if not bundled and importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return Path(pybind11.get_cmake_dir())
    torch = importlib.util.find_spec("torch")
    include = Path(torch.origin).parent / "include" if torch and torch.origin else None
    if include is None or not (include / "pybind11" / "pybind11.h").exists():
        raise SystemExit("pybind11 is not installed, and torch does not carry its headers")
    folder = work / "pybind11"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "pybind11Config.cmake"
    config.write_text(SHIM.format(include=include.as_posix()), encoding="utf-8")
    return folder


def nvcc() -> str | None:
    """Path of the CUDA compiler, or None."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(beside) if beside.exists() else None)


def capability() -> str | None:
    """The GPU's compute capability as CMake writes it, "90", or None where none is told."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", "0", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().replace(".", "") or None


def configure(target: str, work: Path) -> list[str]:
    """CMake's configuring command of one target, "cpu" or "cuda"."""
    command = ["cmake", "-S", str(ROOT), "-B", str(work / target)]
    command += ["-G", "Ninja" if shutil.which("ninja") else "Unix Makefiles"]
    command += [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'hvpfast' / 'backends'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11_dir(work)}",
        f"-DHVPFAST_CUDA={'on' if target == 'cuda' else 'off'}",
    ]
    if target == "cuda":
        compiler, architecture = nvcc(), capability()
        command += [f"-DCMAKE_CUDA_COMPILER={compiler}"] if compiler else []
        command += [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"] if architecture else []
    return command


def main(target: str, work: Path) -> int:
    """Configure and build; the exit status is CMake's."""
    jobs = str(max(1, (os.cpu_count() or 2) // 2))  # the other module is built at the same time
    build = ["cmake", "--build", str(work / target), "--target", f"_{target}", "-j", jobs]
    for command in (configure(target, work), build):
        print("+", " ".join(command), flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    found = sorted(path.name for path in (ROOT / "hvpfast" / "backends").glob(f"_{target}.*.so"))
    print("built", found, flush=True)
    return int(not found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
