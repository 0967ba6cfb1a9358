"""Several processes on one run: each runs the whole experiment and takes cells that are free.

A process takes a cell by a lock on the cell's byte of the file ``.lock``. The system releases the
lock when its holder dies, so that no cell stays taken. The processes are ranks of torchrun, or
helpers that a run starts by itself (see ``helper.py``). A cell's rows do not depend on the process:
every random stream is named, and torch runs on one thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvpfast.lab.environment import checkout
from hvpfast.lab.runs.folder import LOCK, StudyError

WHOLE_RUN = 0
"""Byte that the process which draws the report holds during the run; cell i has byte i + 1."""


class Claims:
    """Exclusive claims of this process on cells of a run folder, which must exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / LOCK, "ab")  # noqa: SIM115  # until close(): locks go with it
        except OSError as error:
            raise StudyError(
                f"cannot write in {folder}: {error.strerror or error}. Choose another --out"
            ) from error

    def lock(self, byte: int) -> bool:
        """Lock a byte until `close` if no other process holds it; return whether that is so."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # one or the other, by operating system
            return False
        return True

    @contextlib.contextmanager
    def hold(self, byte: int) -> Iterator[bool]:
        """Lock a byte if it is free, and yield whether it was; the lock is released at the end."""
        mine = self.lock(byte)
        try:
            yield mine
        finally:
            if mine:
                fcntl.lockf(self.file, fcntl.LOCK_UN, 1, byte)

    def take_run(self) -> None:
        """Lock the whole run until `close`; raise where another process has locked it."""
        if not self.lock(WHOLE_RUN):
            raise StudyError(
                f"another process is working in {self.folder}. Wait for it, or choose another --out"
            )

    def close(self) -> None:
        """Release all locks."""
        self.file.close()


@dataclass(frozen=True)
class Team:
    """The processes that torchrun started, by its environment variables."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process checks the folder, shows progress and draws the report."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process of the team calls this."""
        if self.size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo")
            dist.barrier()
            dist.destroy_process_group()


def team() -> Team:
    """Return the team of this process, of size 1 where torchrun did not start it."""
    words = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")]
    try:
        found = Team(*map(int, words))
    except ValueError as error:
        raise StudyError(
            f"RANK and WORLD_SIZE must be integers; got {' and '.join(words)}"
        ) from error
    if not 0 <= found.rank < found.size:
        raise StudyError(f"RANK must be below WORLD_SIZE; got {' and '.join(words)}")
    return found


# A helper runs the package of its parent: ``python -m`` would first look in the working directory,
# where a checkout may lie beside an installation.
HELPER = """
import runpy, sys
sys.path[0] = sys.argv.pop(1)
runpy.run_module("hvpfast.lab.runs.helper", run_name="__main__")
"""


class Helpers:
    """Further processes for the run in a folder, started where enough work is left."""

    def __init__(self, folder: Path, module: str, number: int) -> None:
        self.folder, self.module, self.number = folder, module, number
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the processes; a second call does nothing."""
        arguments = [str(checkout()), str(self.folder), self.module, str(os.getpid())]
        command = [sys.executable, "-c", HELPER, *arguments]
        while len(self.processes) < self.number:
            # in sessions of their own: Ctrl-C reaches the run alone, which then stops them
            process = subprocess.Popen(command, start_new_session=True)
            self.processes.append(process)

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()
