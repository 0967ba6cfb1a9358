"""The folder of one run: whole files only.

    config.json        what was asked for; a folder holds one configuration for ever
    env.json           versions and hardware
    cells/KEY.jsonl    the rows of one finished cell, never changed again
    timings.jsonl      seconds per cell: the only record in which two equal runs differ; rows of
                       the table "timing" that a cell gives go here and not into the cell
    records.jsonl      every row, in the order of the plan
    report.md/.html    with the figures beside them; findings.json holds their numbers

A file appears under its name only when it is complete (written beside it, flushed to disk, then
renamed), so a run killed at any moment leaves finished cells and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hvpfast.utils import files
from hvpfast.utils.files import SCRATCH

Row = dict[str, str | int | float | bool | None]
"""One flat record. A number that is not finite is null: JSON has no other word for it."""

LOCK = ".lock"
"""Name of an empty file. By locks on its bytes, processes agree who works on what."""


class StudyError(RuntimeError):
    """A fault that the user can correct; the command line shows it without a traceback."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `path` as :func:`hvpfast.utils.files.write_whole` does.

    Raises:
        StudyError: it cannot be written.
    """
    try:
        files.write_whole(path, content, mark=f"{os.getpid()}-")
    except OSError as error:
        raise StudyError(
            f"cannot write {path}: {error.strerror or error}. "
            "Make room or choose a folder that can be written to with --out"
        ) from error


def row_line(row: Mapping[str, Any]) -> str:
    """Return the row as one line of JSON; finite floats keep every bit, others become null."""
    known = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(known, allow_nan=False) + "\n"


def read_rows(path: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}). Delete it and resume") from error


class RunFolder:
    """The files of one run under `path`; see the head of this file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def config(self) -> dict[str, Any] | None:
        """Return config.json ({study, preset, config}), or None where there is no run yet."""
        path = self.path / "config.json"
        try:
            if not path.exists():
                return None
            stored = json.loads(path.read_text(encoding="utf-8"))
            return {k: stored[k] for k in ("study", "preset", "config")}
        except OSError as error:
            raise StudyError(
                f"cannot read {path}: {error.strerror}. Choose another --out"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{path} is not the config.json of a study ({error}). Choose another --out"
            ) from error

    def check(self, wanted: Mapping[str, Any], resume: bool) -> None:
        """Raise where the folder cannot hold the run `wanted`; write nothing."""
        stored = self.config()
        if stored is None:
            ours = (SCRATCH, LOCK)
            strangers = sorted(e.name for e in self.entries() if not e.name.startswith(ours))
            if strangers:
                raise StudyError(
                    f"{self.path} is not empty and holds no study (it has {strangers[0]}). "
                    "Choose another --out"
                )
            return
        differences = describe_difference(stored, wanted)
        if differences:
            raise StudyError(
                f"{self.path} holds another run: {differences}. Choose another --out, "
                "or give --resume without these options to go on with that run"
            )
        if not resume:
            raise StudyError(
                f"{self.path} already holds this run. Continue or redraw it with --resume, "
                "or choose another --out"
            )

    def claim(self, wanted: Mapping[str, Any]) -> None:
        """Write config.json into the checked folder; delete what a killed run left half written.

        Only the process that has locked the run may call it.
        """
        for scratch in [*self.path.glob(f"{SCRATCH}*"), *self.path.glob(f"cells/{SCRATCH}*")]:
            scratch.unlink(missing_ok=True)
        if self.config() is None:
            write_whole(self.path / "config.json", json.dumps(wanted, indent=2) + "\n")

    def entries(self) -> Iterable[Path]:
        """Return the paths in the folder; none where it does not exist."""
        try:
            return list(self.path.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StudyError(
                f"{self.path} cannot be a run folder: {error.strerror}. Choose another --out"
            ) from error

    def cell_path(self, key: str) -> Path:
        """Return the path of a cell's rows, where they are once it is finished."""
        return self.path / "cells" / f"{key}.jsonl"

    def cell(self, key: str) -> list[Row] | None:
        """Return the rows of a finished cell, or None."""
        path = self.cell_path(key)
        return read_rows(path) if path.exists() else None

    def keep_cell(self, key: str, rows: Iterable[Mapping[str, Any]], seconds: float) -> list[Row]:
        """Store a finished cell and return its rows as a later run will read them."""
        text, times = "", {key: seconds}
        for row in rows:
            if row["table"] == "timing":
                times[f"{key}/{row['what']}"] = row["seconds"]
            else:
                text += row_line({"cell": key, **row})
        lines = [{"cell": name, "seconds": round(time, 6)} for name, time in times.items()]
        with open(self.path / "timings.jsonl", "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        write_whole(self.cell_path(key), text)
        return read_rows(self.cell_path(key))

    def timings(self) -> dict[str, float]:
        """Return the seconds of each cell, and of ``CELL/WHAT`` for a cell's rows of timings."""
        path = self.path / "timings.jsonl"
        found: dict[str, float] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            # a line that a kill cut short is skipped: a timing lost changes no result
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                found[row["cell"]] = row["seconds"]
        return found


def next_folder(parent: Path, name: str, resume: bool) -> Path:
    """Return the first free of ``name``, ``name-2``, ...; when resuming, the last in use."""
    last = free = parent / name
    numbers = itertools.count(2)
    while free.exists():
        last, free = free, parent / f"{name}-{next(numbers)}"
    return last if resume else free


def describe_difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say in which fields two {study, preset, config} differ; the preset is only a name."""
    if stored["study"] != wanted["study"]:
        return f"study is {stored['study']}, asked for {wanted['study']}"
    old, new = stored["config"], wanted["config"]
    return ", ".join(
        f"{name} is {json.dumps(old.get(name))}, asked for {json.dumps(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )
