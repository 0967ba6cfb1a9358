"""Builds the C++ extension by calling CMake; flags and sources are CMakeLists.txt's business.

HVPFAST_NO_EXT=1 leaves the extension out: the package is then pure Python and runs on the
reference backend alone. HVPFAST_CUDA=on|off|auto chooses whether the CUDA engine is built, a module
of its own beside the CPU engine's; auto, the default, builds it where nvcc is found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

BUILD_FAILED = """
hvpfast: the C++ extension was not built; the command that failed is
    {command}
and its output is above. A C++20 compiler is needed (CXX=/path/to/compiler chooses one).
To install without the extension, on the reference backend alone and much slower:
    HVPFAST_NO_EXT=1 pip install ...
"""


class CMakeBuild(build_ext):
    """Configures and builds with CMake into the folder where setuptools expects the module."""

    def build_extension(self, ext: Extension) -> None:
        """Build every target of CMakeLists.txt; its module lands beside the package's files."""
        import pybind11  # a build requirement, absent when setup.py is read with HVPFAST_NO_EXT

        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        # --fresh: a cache of an earlier build names the tools of a build environment that is gone.
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHVPFAST_CUDA={os.environ.get('HVPFAST_CUDA', 'auto')}",
        ]
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(BUILD_FAILED.format(command=" ".join(command)))


def extensions() -> list[Extension]:
    """The modules to build: none when HVPFAST_NO_EXT=1."""
    choice = os.environ.get("HVPFAST_NO_EXT", "0")
    if choice not in ("0", "1"):
        raise SystemExit(f"HVPFAST_NO_EXT must be 0 or 1; got {choice!r}. Unset it to build.")
    return [] if choice == "1" else [Extension("hvpfast.backends._cpu", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
