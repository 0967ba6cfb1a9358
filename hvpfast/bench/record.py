"""Records of benchmarks: how they begin, what rows say of failures, and their files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hvpfast.bench.tables import Row
from hvpfast.lab.environment import timing_conditions
from hvpfast.utils.files import write_whole

BROKEN = ("wrong", "failed")  # the status of a row whose form is not as it should be


def add_out(parser: argparse.ArgumentParser, *, figure: bool = False) -> None:
    files = "bench.json, bench.txt and bench.png" if figure else "bench.json and bench.txt"
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for {files}")


def head(suite: str) -> dict[str, Any]:
    return {"suite": suite, "command": command_line(), "environment": timing_conditions()}


def broken(rows: Iterable[Row]) -> bool:
    return any(row["status"] in BROKEN for row in rows)


def cells_of(rows: Iterable[Row]) -> dict[tuple[str, int, str], list[Row]]:
    """Rows by (case, K, operation), in order of appearance."""
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["case"], row["num_tangents"], row["operation"]), []).append(row)
    return found


def timed(rows: Iterable[Row]) -> list[Row]:
    """Those that were timed, fastest first."""
    found = (row for row in rows if row["status"] == "timed")
    return sorted(found, key=lambda row: float(row["median_s"]))


def fastest_forms(rows: Iterable[Row]) -> list[Row]:
    """The fastest timed form of each provider, fastest first."""
    best: dict[str, Row] = {}
    for row in timed(rows):
        best.setdefault(row["provider"], row)
    return list(best.values())


def failure(error: Exception) -> dict[str, Any]:
    reason = f"{type(error).__name__}: {error}"[:500]
    return {"status": "failed", "reason": reason, "median_s": None}


def finite(value: float) -> float | None:
    """A number as JSON can hold it: None for infinity and NaN."""
    return value if math.isfinite(value) else None


def write_json(path: Path, content: Any) -> None:
    """By :func:`write_whole`; NaN and infinity are refused."""
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def keep(folder: Path, content: Any, text: str) -> None:
    """Write a record as bench.json, and its tables as bench.txt."""
    write_json(folder / "bench.json", content)
    write_whole(folder / "bench.txt", text + "\n")


def publish(content: Any, text: str, folder: Path | None) -> None:
    """Print the tables, and :func:`keep` the record where a folder is given."""
    print(text)
    if folder is not None:
        keep(folder, content, text)


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def check_same(path: Path, what: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError where a part of the record at ``path`` is not as now, its date aside."""
    for name in sorted({*stored, *now} - {"date"}):
        if stored.get(name) != now.get(name):
            raise ValueError(
                f"{path} was begun with other {what}: {name} was {stored.get(name)!r}, is "
                f"{now.get(name)!r}. Go on there, or choose another folder"
            )


def command_line() -> str:
    """The command as typed, without folders of this machine."""
    program = Path(sys.argv[0]).name
    return " ".join(["hvpfast" if program == "__main__.py" else program, *sys.argv[1:]])
