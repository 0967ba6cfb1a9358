"""Steps as processes: started by groups, each with a limit, all within one budget, all recorded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from summary import bars

LEAST = 10.0  # a step that would have less time than this is dropped
TAIL = 3000  # characters of a failed step's output that the record holds
POLL = 0.1


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: as in the record.
        group: steps of one group, one after the other in the plan, run at the same time.
        command: argument list.
        limit: seconds after which it is killed with all its children.
        env: variables on top of the caller's.
        missing: why it cannot run on this machine, or "".
        needs: the step that must have succeeded before, or "".
        least: it is dropped where fewer seconds are left.
        reserve: how many seconds before its limit it must begin nothing more, told to it by
            ``--deadline``; 0: it has no such option.
        read: returns what its record holds of it; called after failures and time-outs too.
    """

    name: str
    group: str
    command: Sequence[str]
    limit: float
    env: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    needs: str = ""
    read: Callable[[], dict[str, Any]] = dict
    least: float = LEAST
    reserve: float = 0.0

    def words(self, seconds: float) -> list[str]:
        """The command, where the step has so many seconds."""
        if not self.reserve:
            return list(self.command)
        return [*self.command, "--deadline", f"{max(1.0, seconds - self.reserve):.0f}"]


class Check:
    """Runs the steps in order and keeps one record, written anew after every group."""

    def __init__(
        self, steps: Sequence[Step], out: Path, work: Path, budget: float, *, dry: bool = False
    ) -> None:
        self.steps, self.out, self.work, self.budget = steps, out, work, budget
        self.started = time.monotonic()
        self.result: dict[str, Any] = {
            "dry_run": dry,
            "budget_s": budget,
            "steps": {},
            "bars": [],
            "ok": False,
            "seconds": 0.0,
        }

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started)

    def run(self) -> dict[str, Any]:
        """Run all steps; returns the record.

        An interrupt ends the running steps, and the record says so.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        for _, group in groupby(self.steps, key=lambda step: step.group):
            self._group(list(group))
            self._save()
        return self.result

    def _group(self, steps: list[Step]) -> None:
        running: list[tuple[Step, subprocess.Popen[bytes], float, float]] = []
        for step in steps:
            reason = self._reason_not_to_run(step)
            if reason is not None:
                self._record(step, reason[0], 0.0, None, reason[1])
                continue
            limit = min(step.limit, self.left())
            print(f"[{self.budget - self.left():5.0f} s] {step.name}", file=sys.stderr, flush=True)
            try:
                process = self._start(step, limit)
            except OSError as error:
                self._record(step, "failed", 0.0, None, f"could not be started: {error}")
                continue
            running.append((step, process, time.monotonic(), limit))
        try:
            while running:
                running = [entry for entry in running if not self._finished(*entry)]
                time.sleep(POLL if running else 0.0)
        except BaseException:
            for step, process, since, _ in running:
                _kill(process)
                self._record(step, "interrupted", time.monotonic() - since, None, "interrupted")
            self._save()
            raise

    def _reason_not_to_run(self, step: Step) -> tuple[str, str] | None:
        if step.missing:
            return "unavailable", step.missing
        needed = self.result["steps"].get(step.needs) if step.needs else None
        if needed is not None and needed["status"] != "ok":
            return "skipped", f"it needs {step.needs}, which is {needed['status']}"
        if self.left() < min(step.least, step.limit):
            return "dropped", f"{max(self.left(), 0):.0f} s of {self.budget:.0f} s were left"
        return None

    def _log(self, step: Step) -> Path:
        return self.work / f"{step.name}.log"

    def _start(self, step: Step, seconds: float) -> subprocess.Popen[bytes]:
        with self._log(step).open("wb") as log:
            return subprocess.Popen(
                step.words(seconds),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **step.env},
                start_new_session=True,  # a group of its own, to be killed as a whole
            )

    def _finished(
        self, step: Step, process: subprocess.Popen[bytes], since: float, limit: float
    ) -> bool:
        took, code = time.monotonic() - since, process.poll()
        if code is None and took < limit:
            return False
        if code is None:
            _kill(process)
            self._record(step, "timeout", took, None, f"stopped after {limit:.0f} s")
        elif code == 0:
            self._record(step, "ok", took, code, "")
        else:
            self._record(step, "failed", took, code, f"exit status {code}")
        return True

    def _record(
        self, step: Step, status: str, seconds: float, code: int | None, reason: str
    ) -> None:
        entry: dict[str, Any] = {
            "status": status,
            "seconds": round(seconds, 1),
            "limit_s": step.limit,
            "exit": code,
            "reason": reason,
            "command": " ".join([Path(step.command[0]).name, *step.words(step.limit)[1:]]),
            "facts": {},
            "tail": "",
        }
        if status in ("ok", "failed", "timeout", "interrupted"):
            try:
                entry["facts"] = step.read()
            except Exception as error:  # a record that cannot be read is a finding of its own
                entry["reason"] += f"; its record cannot be read: {type(error).__name__}: {error}"
                entry["status"] = "failed" if status == "ok" else status
        if entry["status"] != "ok" and self._log(step).exists():
            text = self._log(step).read_text(encoding="utf-8", errors="replace")
            entry["tail"] = text[-TAIL:]
        self.result["steps"][step.name] = entry

    def _save(self) -> None:
        recorded = self.result["steps"]
        names = [step.name for step in self.steps if step.name in recorded]
        self.result["steps"] = {name: recorded[name] for name in names}  # in the plan's order
        steps = self.result["steps"].values()
        self.result["bars"] = bars(self.result["steps"])
        self.result["ok"] = bool(steps) and all(
            [entry["status"] == "ok" for entry in steps]
            + [bar["met"] is True for bar in self.result["bars"]]
        )
        self.result["seconds"] = round(time.monotonic() - self.started, 1)
        part = self.out / ".gpu_check.json.part"
        part.write_text(json.dumps(self.result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(self.out / "gpu_check.json")
        with (self.out / "gpu_check.log").open("wb") as log:
            for name in self.result["steps"]:
                path = self.work / f"{name}.log"
                if path.exists():
                    log.write(f"======== {name}\n".encode())
                    log.write(path.read_bytes()[-(2**20) :])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything that it started."""
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is None:
        process.wait()
