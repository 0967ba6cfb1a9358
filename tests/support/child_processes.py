"""Processes to be struck down: jobs started again without importing torch, commands for Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_SERVER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
{definitions}
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        job(*line.split())
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


# Tests that run in the background of a shell ignore interrupts, and so would what they start.
_INTERRUPTIBLE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def interruptible(*words: str) -> list[str]:
    """The command of Python with these arguments, ended by Ctrl-C however the tests were begun."""
    return [sys.executable, "-c", _INTERRUPTIBLE, *words]


class Jobs:
    """Runs ``job(*words)`` in a process of its own, one at a time."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def start(self, *words: object) -> int:
        """Start a job; its process id."""
        assert self._server.stdin is not None
        self._server.stdin.write(" ".join(map(str, words)) + "\n")
        self._server.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """The exit status of the job, 0 if it came to its end."""
        return int(self._line())

    def kill(self, pid: int) -> None:
        """Kill the job with signal 9."""
        os.kill(pid, signal.SIGKILL)
        assert self.wait() == signal.SIGKILL

    def _line(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the server of jobs has ended: its error is above"
        return line


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until the condition holds; fail when it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def jobs(definitions: str) -> Iterator[Jobs]:
    """Jobs of the function ``job`` in ``definitions``, source code that may import anything."""
    command = [sys.executable, "-c", _SERVER.format(definitions=definitions)]
    command.append(str(Path(__file__).parent))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
        yield Jobs(server)
        assert server.stdin is not None
        server.stdin.close()
