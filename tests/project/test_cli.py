"""The command line, and what a run owes its user: whole files, resuming, plain errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from child_processes import interruptible

from hvpfast import __main__ as cli
from hvpfast.lab.runs import config as arguments
from hvpfast.lab.runs.folder import RunFolder, StudyError, next_folder, write_whole
from hvpfast.lab.runs.progress import clock
from hvpfast.lab.runs.run import Interrupted, run
from hvpfast.studies import studies
from hvpfast.studies.hessian_norm import experiment as hessian_norm

SMOKE = hessian_norm.PRESETS["smoke"]
NUM_CELLS = len(hessian_norm.plan(SMOKE))
# drawing takes longest
PLAIN = replace(hessian_norm.STUDY, figures=lambda records: {}, report=lambda found: "# none\n")
WORDS = ["study", "hessian-norm", "--preset", "smoke", "--workers", "1"]


@pytest.fixture(autouse=True)
def extras() -> None:
    for package in ("mnist1d", "matplotlib"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke run; tests only read it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(hessian_norm.STUDY, SMOKE, out, preset="smoke", quiet=True)
    return out


def content(folder: Path) -> dict[str, bytes]:
    """Everything that must be equal between two runs of one configuration."""
    files = [folder / "config.json", folder / "records.jsonl", *sorted(folder.glob("cells/*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def num_finished(folder: Path) -> int:
    return len([path for path in folder.glob("cells/*") if not path.name.startswith(".")])


# a run from end to end


def test_a_run_leaves_records_figures_findings_and_a_report(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "records.jsonl").read_text().splitlines()]
    tables = {row["table"] for row in rows}
    assert tables == {
        "config", "data", "trivial", "trial", "epoch", "final", "torch", "torch measure"
    }  # fmt: skip
    assert all(isinstance(v, (str, int, float, bool, type(None))) for r in rows for v in r.values())
    plan = hessian_norm.plan(SMOKE)
    assert list(dict.fromkeys(row["cell"] for row in rows[1:])) == plan
    (told,) = (row for row in rows if row["table"] == "data")
    assert told["backend"] in ("cpu", "reference")
    for figure in ("validation_curves.png", "arms.png", "tuning.png"):
        assert (finished / figure).read_bytes().startswith(b"\x89PNG")
    report = (finished / "report.md").read_text()
    assert "{" not in report.replace("{}", "")
    assert all(f"]({p.name})" in report for p in finished.glob("*.png"))
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(finished.glob("*.png")))
    env = json.loads((finished / "env.json").read_text())
    assert env["numerics"]["backend"] == told["backend"]
    assert env["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert not list(finished.rglob(".part-*"))


def test_records_are_the_same_bytes_again(finished: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # global generators play no part
    run(PLAIN, SMOKE, tmp_path / "again", preset="smoke", quiet=True)
    assert content(tmp_path / "again") == content(finished)


# interrupted and resumed


@pytest.mark.parametrize("num_cells", [0, 3, 20])
def test_a_run_interrupted_anywhere_resumes_to_the_same_bytes(
    num_cells: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, kept = RunFolder.keep_cell, list[str]()

    def interrupted(self: RunFolder, key: str, *rest: Any) -> Any:
        if len(kept) == num_cells:
            raise KeyboardInterrupt
        kept.append(key)
        return keep(self, key, *rest)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "keep_cell", interrupted)
        with pytest.raises(
            Interrupted, match=f"{num_cells} of {NUM_CELLS} cells are kept.\n.*--resume"
        ):
            run(PLAIN, SMOKE, out, preset="smoke", quiet=True)
    assert not (out / "records.jsonl").exists()
    (out / ".part-1-records.jsonl").write_text("half")
    with (out / "timings.jsonl").open("a") as file:
        file.write('{"cell": "tu')
    run(PLAIN, SMOKE, out, preset="smoke", resume=True, quiet=True)
    assert content(out) == content(finished)
    assert not list(out.rglob(".part-*"))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a smoke run with twelve seeds leaves."""
    out = tmp_path_factory.mktemp("long") / "run"
    run(PLAIN, replace(SMOKE, seeds=tuple(range(12))), out, preset="smoke", quiet=True)
    return content(out)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_process_struck_down_resumes_to_the_same_bytes(
    blow: signal.Signals, long: dict[str, bytes], tmp_path: Path
) -> None:
    words = [*WORDS, "--seeds", "0-11", "--out", str(tmp_path / "run")]
    environ = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = interruptible("-m", "hvpfast", *words)
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while num_finished(tmp_path / "run") < 8 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        process.send_signal(blow)
        error = process.communicate(timeout=60)[1]
    num_cells = num_finished(tmp_path / "run")
    assert 8 <= num_cells < NUM_CELLS + 90
    assert not (tmp_path / "run" / "records.jsonl").exists()
    if blow == signal.SIGINT:
        assert process.returncode == cli.INTERRUPTED
        assert f"Interrupted: {num_cells} of {NUM_CELLS + 90} cells are kept." in error
        assert "Traceback" not in error
    assert cli.main([*words, "--resume", "--quiet"]) == 0
    assert content(tmp_path / "run") == long


def test_a_finished_run_is_redrawn_without_working(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(finished)
    monkeypatch.setattr(hessian_norm, "train", None)
    (finished / "report.md").unlink()
    (finished / "env.json").write_text(
        (finished / "env.json").read_text().replace("torch", "torcc")
    )
    assert cli.main(["study", "hessian-norm", "--out", str(finished), "--resume"]) == 0
    assert (finished / "report.md").exists()
    assert content(finished) == before


# errors


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main([*WORDS, "--quiet", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hvpfast: ")
    assert error.count("\n") == 1
    return error


def test_a_folder_in_use_is_never_written_to(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(finished)
    assert "already holds this run" in refused(capsys, "--out", str(finished))
    error = refused(capsys, "--out", str(finished), "--epochs", "7", "--resume")
    assert "epochs is 2, asked for 7" in error
    error = refused(capsys, "--out", str(finished), "--seeds", "0", "1", "2")
    assert "seeds is [0, 1], asked for [0, 1, 2]" in error
    assert content(finished) == before
    (tmp_path / "thesis.tex").write_text("mine")
    assert "not empty and holds no study (it has thesis.tex)" in refused(
        capsys, "--out", str(tmp_path)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "config.json").write_text("{}")
    assert "is not the config.json of a study" in refused(
        capsys, "--out", str(tmp_path), "--resume"
    )


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    error = refused(capsys, "--out", str(tmp_path / "file" / "run"))
    assert "Choose another --out" in error or "with --out" in error
    assert "cannot" in refused(capsys, "--out", str(tmp_path / "file"))


def test_a_disk_that_fills_up_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StudyError, match=r"cannot write .*file: No space left on device"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_environment_may_not_finish_a_run(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(PLAIN, SMOKE, out, preset="smoke", quiet=True)
    (out / "cells" / "final-baseline-001.jsonl").unlink()
    env = json.loads((out / "env.json").read_text())
    env["numerics"]["numpy"] = "1.0"
    (out / "env.json").write_text(json.dumps(env))
    error = refused(capsys, "--out", str(out), "--resume")
    assert "begun in another environment (numpy was 1.0, is" in error


def test_damaged_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    run(PLAIN, SMOKE, out, preset="smoke", quiet=True)
    (out / "records.jsonl").write_text("other\n")
    assert "is not what its cells say" in refused(capsys, "--out", str(out), "--resume")
    (out / "cells" / "data.jsonl").write_text("{half")
    assert "data.jsonl is damaged" in refused(capsys, "--out", str(out), "--resume")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "abacus"], "abacus"),
        (["--epochs", "0"], "epochs must be at least 1; got 0"),
        (["--num-samples", "123"], "num_samples must be a multiple of 10"),
        (["--val-fraction", "1"], "val_fraction"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "--out", str(tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["matplotlib", "mnist1d"])
def test_a_missing_package_is_said_before_anything_is_written(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(capsys, "--out", str(tmp_path / "run"))
    assert f"needs {package}" in error
    assert "pip install 'hvpfast[studies]'" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["study", "hessian-norm", "--preset", "tiny"],
        ["study", "alchemy"],
        ["study", "hessian-norm", "--seeds", "a-b"],
        ["study", "hessian-norm", "--dtype", "float16"],
        ["sing"],
    ],
)
def test_wrong_words_get_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert words[-1] in capsys.readouterr().err


# the command line itself


def test_help_where_nothing_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "{study,bench,info}" in capsys.readouterr().out
    assert cli.main(["study"]) == 2
    out = capsys.readouterr().out
    assert all(study.name in out for study in studies().values())
    with pytest.raises(SystemExit, match="0"):
        cli.main(["study", "hessian-norm", "--help"])
    assert "--tune-seeds" in capsys.readouterr().out


def test_options_become_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--seeds", "0-2", "7", "--learning-rates", "1e-3", "0.1", "--hidden", "8"]
    parsed = cli.build_parser(WORDS).parse_args([*WORDS, *words, "--dtype", "float64"])
    preset, config, out = cli.chosen_run(parsed)
    assert (preset, out) == ("smoke", Path("runs/hessian-norm-smoke"))
    expected = {"seeds": (0, 1, 2, 7), "learning_rates": (1e-3, 0.1), "hidden": (8,)}
    assert config == replace(SMOKE, dtype="float64", **expected)
    assert arguments.from_json(type(config), json.loads(json.dumps(vars(config)))) == config


def test_runs_without_a_folder_get_new_ones(tmp_path: Path) -> None:
    names: Callable[[bool], str] = lambda resume: next_folder(tmp_path, "a", resume).name  # noqa: E731
    assert [names(False), names(True)] == ["a", "a"]
    (tmp_path / "a").mkdir()
    assert [names(False), names(True)] == ["a-2", "a"]
    (tmp_path / "a-2").mkdir()
    assert [names(False), names(True)] == ["a-3", "a-2"]


def test_progress_tells_each_cell_and_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*WORDS, "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if f"/{NUM_CELLS} " in line]
    assert len(lines) == NUM_CELLS
    assert all("left" in line for line in lines[:-1])
    assert all(re.search(r"\(\d+\.\d s\)", line) for line in lines)
    assert lines[-1].endswith("done")
    assert f"Report: {tmp_path / 'run' / 'report.md'}" in captured.out
    assert [clock(s) for s in (0.4, 59, 185, 7800)] == ["0 s", "59 s", "3 min 05 s", "2 h 10 min"]


def test_bench_gets_its_options_and_gives_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    bench: Any = types.ModuleType("hvpfast.bench")
    bench.add_arguments = lambda parser: parser.add_argument("--quick", action="store_true")
    bench.run = lambda args: 3 if args.quick else 4
    monkeypatch.setitem(sys.modules, "hvpfast.bench", bench)
    assert cli.main(["bench", "--quick"]) == 3
