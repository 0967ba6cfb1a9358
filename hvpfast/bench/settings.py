"""What a run is asked to do."""

from __future__ import annotations

import fnmatch
import time
from dataclasses import dataclass, field
from pathlib import Path

from hvpfast.bench.cases import CASES, DEVICES, DTYPES, KNOWN_CASES, OPERATIONS, QUICK_CASES, Case
from hvpfast.bench.providers import PROVIDERS
from hvpfast.lab.environment import usable_cores

MIN_ROUNDS = 7


@dataclass(frozen=True)
class Settings:
    """What to run.

    Args:
        cases, operations, providers: names; empty means all.
        rounds: rounds per cell, fewer where ``budget`` seconds do not allow them (never below
            ``MIN_ROUNDS``).
        threads: threads for torch and hvpfast, and cores for XLA.
        memory: also measure peak memory, one process per form.
        quick: the tiny cases, few rounds, no torch.compile: a check that everything works.
        out: folder for record and figure, or None.
        resume: continue the record in ``out``, where there is one, after its last whole cell.
        forms: patterns as of file names for "provider: form"; empty means all. What they leave out
            has a row that says so.
        deadline: seconds after which no further form is started, or None; such forms have a row.
    """

    cases: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    rounds: int = 25
    threads: int = field(default_factory=usable_cores)
    dtype: str = "float32"
    memory: bool = False
    quick: bool = False
    budget: float = 60.0
    out: Path | None = None
    resume: bool = False
    device: str = "cpu"
    forms: tuple[str, ...] = ()
    deadline: float | None = None

    def __post_init__(self) -> None:
        for what, names, allowed in (
            ("case", self.cases, tuple(KNOWN_CASES)),
            ("operation", self.operations, OPERATIONS),
            ("provider", self.providers, tuple(PROVIDERS)),
            ("dtype", (self.dtype,), DTYPES),
            ("device", (self.device,), DEVICES),
        ):
            for name in names:
                if name not in allowed:
                    raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(allowed)}")
        if self.rounds < 1 or self.threads < 1:
            raise ValueError(f"rounds and threads must be >= 1; got {self.rounds}, {self.threads}")
        if self.resume and self.out is None:
            raise ValueError("resume goes on with the record of a folder; name it by out")
        if self.memory and self.device != "cpu":
            raise ValueError("peak memory is that of a process on the CPU; drop it on a GPU")

    def left_out(self, key: str, started: float) -> str | None:
        """Why the form "provider: form" is not run, or None."""
        if self.forms and not any(fnmatch.fnmatchcase(key, pattern) for pattern in self.forms):
            return "not among the forms asked for"
        if self.deadline is not None and time.perf_counter() - started > self.deadline:
            return f"the run's {self.deadline:g} s were spent"
        return None

    def cells(self) -> list[tuple[Case, int, str]]:
        """(case, K, operation), operations in the order in which they are named.

        An operation without tangents is run for the first K only.
        """
        names = self.cases or tuple(QUICK_CASES if self.quick else CASES)
        return [
            (case, K, operation)
            for case in map(KNOWN_CASES.__getitem__, names)
            for K in case.num_tangents
            for operation in self.operations or case.operations
            if operation in case.operations
            if operation != "gradient" or case.num_tangents.index(K) == 0
        ]
