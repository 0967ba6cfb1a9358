"""Records of benchmarks: how they begin, what rows say of failures, and their files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hvpfast.lab.environment import timing_conditions
from hvpfast.utils.files import write_whole

BROKEN = ("wrong", "failed")  # the status of a row whose form is not as it should be


def add_out(parser: argparse.ArgumentParser, *, figure: bool = False) -> None:
    """Add the option ``--out``, the folder of the record."""
    files = "bench.json, bench.txt and bench.png" if figure else "bench.json and bench.txt"
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for {files}")


def head(suite: str) -> dict[str, Any]:
    """The first entries of a suite's record."""
    return {"suite": suite, "command": command_line(), "environment": timing_conditions()}


def broken(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a form failed or was wrong."""
    return any(row["status"] in BROKEN for row in rows)


def failure(error: Exception) -> dict[str, Any]:
    """What a row says of a form that broke."""
    reason = f"{type(error).__name__}: {error}"[:500]
    return {"status": "failed", "reason": reason, "median_s": None}


def finite(value: float) -> float | None:
    """A number as JSON can hold it: None for infinity and NaN."""
    return value if math.isfinite(value) else None


def write_json(path: Path, content: Any) -> None:
    """``content`` as JSON by :func:`write_whole`; NaN and infinity are refused."""
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
    """The content of a record."""
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
