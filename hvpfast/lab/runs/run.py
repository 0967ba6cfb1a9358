"""The skeleton of every study: Config -> data -> train -> measure -> records -> report.

A study is a record of functions (`Study`). `run` owns everything that is not science: the run
folder, versions and hardware, progress, resuming, writing. A study's ``experiment`` is plain code
that asks for each unit of work by

    rows = cell(key, work, describe)

which returns the stored rows where that cell is finished, and otherwise calls ``work()``, stores
the rows it yields and shows ``describe(rows)``. To resume a run is therefore to run it again.
``cell.together([(key, work, describe), ...])`` does the same for cells that do not need each other:
processes share them, each of which runs the whole experiment and takes the cells that are free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from hvpfast.lab import environment
from hvpfast.lab.report.html import page
from hvpfast.lab.report.plots import png
from hvpfast.lab.runs.folder import Row, RunFolder, StudyError, row_line, write_whole
from hvpfast.lab.runs.packages import require
from hvpfast.lab.runs.progress import Cell, Progress
from hvpfast.lab.runs.sharing import Claims, Helpers, team

if TYPE_CHECKING:
    from matplotlib.figure import Figure

C = TypeVar("C")
D = TypeVar("D")
NUMERIC_PACKAGES = (
    "python", "hvpfast", "torch", "numpy", "scipy", "optuna", "mnist1d", "scikit-learn"
)  # fmt: skip
"""Packages whose version can change a number."""


@dataclass(frozen=True)
class Study(Generic[C, D]):
    """The functions of one study, each testable by itself."""

    name: str
    question: str
    presets: Mapping[str, C]
    """Frozen dataclasses with a docstring under each field; one is named "default"."""
    packages: tuple[str, ...]
    """Optional packages it needs, imported before anything is written."""
    engine: Callable[[C], dict[str, str]]
    """Chooses the backend; returns it and what else decides the numbers, or raises."""
    load: Callable[[C], D]
    plan: Callable[[C], list[str]]
    """The key of every cell, in the order of the records."""
    experiment: Callable[[C, D, Cell], None]
    figures: Callable[[list[Row]], dict[str, Figure]]
    findings: Callable[[list[Row], Mapping[str, float]], dict[str, Any]]
    """Named numbers, from the records and the seconds per cell."""
    report: Callable[[Mapping[str, Any]], str]
    """Markdown, from the findings and nothing else."""
    headline: Callable[[Mapping[str, Any]], str]
    """The answer in a line or two."""
    artefacts: Callable[[Path, list[Row]], None] = lambda path, records: None
    """Writes into the run folder what follows from its cells beside figures and report."""
    module: str = ""
    """Module in which another process finds the study as ``STUDY``; empty where none can."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; the message says how to go on."""


def run(
    study: Study[C, D],
    config: C,
    out: str | Path,
    *,
    preset: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    workers: int = 1,
) -> Path:
    """Run a study in the folder `out` and return the path of its report.

    Args:
        study: the record of functions.
        config: its configuration, an instance of the study's dataclass.
        out: the run folder: new, empty, or (with `resume`) one with a run of this configuration.
        preset: the name to record for the configuration; by default that of the preset equal to
            it, else "custom".
        resume: continue the run in `out`, or redraw a finished one; where there is none, start.
        quiet: no progress bar and no lines.
        workers: processes that share the cells, this one included; they start when the time left
            is worth it. Under torchrun its ranks share them instead. A study with functions of
            the user's own has one process. No row depends on the number.

    Raises:
        StudyError: the folder, the environment or a missing package does not allow the run.
        Interrupted: Ctrl-C; what is finished is kept.
    """
    if preset is None:
        preset = next((name for name, known in study.presets.items() if known == config), "custom")
    asked = json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[call-overload]
    wanted = {"study": study.name, "preset": preset, "config": asked}
    for package in study.packages:
        require(package, f"the study {study.name}")
    folder, ranks = RunFolder(Path(out)), team()
    if ranks.leads:
        folder.check(wanted, resume)
    engine, plan = study.engine(config), study.plan(config)
    data = study.load(config)
    claims = Claims(folder.path)
    shared = workers > 1 and ranks.size == 1 and found_elsewhere(study)
    helpers = Helpers(folder.path, study.module, workers - 1 if shared else 0)
    try:
        if ranks.leads:
            claims.take_run()
            folder.claim(wanted)
        ranks.wait()
        quiet = quiet or not ranks.leads
        if not quiet:
            print("; ".join(f"{k}: {v}" for k, v in engine.items()), file=sys.stderr)
        progress = Progress(
            folder, plan, quiet, claims, helpers=helpers, workers=max(workers, ranks.size)
        )
        with progress.bar:
            env = keep_environment(folder, engine, pending=bool(progress.pending))
            with one_torch_thread():
                study.experiment(config, data, progress)
        if not ranks.leads:
            return folder.path / "report.md"
        records = keep_records(folder, wanted, plan)
        return draw(study, folder, records, env)
    except KeyboardInterrupt:
        kept = sum(folder.cell_path(key).exists() for key in plan)
        raise Interrupted(
            f"Interrupted: {kept} of {len(plan)} cells are kept.\n"
            f"Continue with: hvpfast study {study.name} --out {out} --resume"
        ) from None
    finally:
        helpers.stop()
        claims.close()


def found_elsewhere(study: Study[C, D]) -> bool:
    """Return whether another process finds the same work in the study's module."""
    if not study.module:
        return False
    found = importlib.import_module(study.module).STUDY
    return bool((found.load, found.experiment) == (study.load, study.experiment))


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch on one thread, so that no sum depends on the number of cores; then restore it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment_of(engine: Mapping[str, str]) -> dict[str, Any]:
    """Return versions and hardware; ``numerics`` is the part that can change a number."""
    facts = environment.collect()
    numerics = {
        **engine,
        **{name: facts["machine"][name] for name in ("architecture", "processor")},
        "instruction set": facts["cpu kernels"].get("instruction set"),
        **{name: facts["versions"][name] for name in NUMERIC_PACKAGES},
    }
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"started": now, "numerics": numerics, **facts}


def keep_environment(folder: RunFolder, engine: Mapping[str, str], pending: bool) -> dict[str, Any]:
    """Write env.json, or read that of the run being resumed; refuse to mix two environments."""
    path, now = folder.path / "env.json", environment_of(engine)
    if not path.exists():
        write_whole(path, json.dumps(now, indent=2) + "\n")
        return now
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    old, new = stored["numerics"], now["numerics"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names and pending:
        changes = "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)
        raise StudyError(
            f"{folder.path} was begun in another environment ({changes}), so its remaining cells "
            "would not be comparable. Resume it there, or start anew with another --out"
        )
    return stored


def keep_records(folder: RunFolder, wanted: Mapping[str, Any], plan: Iterable[str]) -> list[Row]:
    """Write records.jsonl: the configuration, then every cell in order. Return its rows."""
    flat = {
        k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in wanted["config"].items()
    }
    header = {"table": "config", "study": wanted["study"], **flat}
    cells = [folder.cell_path(key).read_text(encoding="utf-8") for key in plan]
    text = "".join([row_line(header), *cells])
    path = folder.path / "records.jsonl"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise StudyError(f"{path} is not what its cells say. Move it away and resume")
    write_whole(path, text)
    return [json.loads(line) for line in text.splitlines()]


def draw(study: Study[C, D], folder: RunFolder, records: list[Row], env: Mapping[str, Any]) -> Path:
    """Write artefacts, figures, findings and the report; return the path of report.md."""
    study.artefacts(folder.path, records)
    for name, figure in study.figures(records).items():
        write_whole(folder.path / name, png(figure))
    findings = study.findings(records, folder.timings())
    write_whole(folder.path / "findings.json", json.dumps(findings, indent=2) + "\n")
    path = folder.path / "report.md"
    text = study.report(findings) + environment_section(env)
    write_whole(path, text)
    write_whole(path.with_suffix(".html"), page(text, lambda name: picture(folder, name)))
    return path


def picture(folder: RunFolder, name: str) -> bytes:
    try:
        return (folder.path / name).read_bytes()
    except OSError as error:
        raise StudyError(f"the report shows {name}, which cannot be read ({error})") from error


def environment_section(env: Mapping[str, Any]) -> str:
    """Return the last section of every report, from env.json."""
    facts = {**env["machine"], **env["numerics"]}
    if env["source"]:
        facts["commit"] = env["source"]["commit"] + " with changes" * env["source"]["dirty"]
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    return "\n".join(["", "## Environment", "", "| | |", "| --- | --- |", *rows, ""])
