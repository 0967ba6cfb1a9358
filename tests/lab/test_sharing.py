"""Several processes on one run: claims on cells, helpers, ranks of torchrun, and the same bytes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hvpfast import __main__ as cli
from hvpfast.lab.environment import usable_cores
from hvpfast.lab.runs import progress, sharing
from hvpfast.lab.runs.folder import LOCK, RunFolder, StudyError
from hvpfast.lab.runs.progress import Orphaned, Progress
from hvpfast.lab.runs.run import Study, found_elsewhere, run
from hvpfast.lab.runs.sharing import Claims, Helpers, Team, team
from hvpfast.studies.hessian_norm import experiment as hessian_norm

for package in ("mnist1d", "matplotlib"):
    pytest.importorskip(package)

SMOKE = hessian_norm.PRESETS["smoke"]
PLAIN = replace(hessian_norm.STUDY, figures=lambda records: {}, report=lambda found: "# none\n")


def content(folder: Path) -> dict[str, bytes]:
    files = [folder / "config.json", folder / "records.jsonl", *sorted(folder.glob("cells/*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the smoke run."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run(PLAIN, SMOKE, out, preset="smoke", quiet=True)
    return content(out)


def environment() -> dict[str, str]:
    paths = [str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


# claims


TRY = """
import fcntl, sys
file = open(sys.argv[1], "ab")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sys.argv[2]))
except OSError:
    sys.exit(7)
print("held", flush=True)
sys.stdin.read()
"""


def other_gets(folder: Path, byte: int) -> bool:
    """Whether another process can lock the byte now."""
    command = [sys.executable, "-S", "-c", TRY, str(folder / LOCK), str(byte)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def test_a_claim_keeps_other_processes_out_and_ends(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    with claims.hold(3) as mine:
        assert mine
        assert not other_gets(tmp_path, 3)
        assert other_gets(tmp_path, 4)
    assert other_gets(tmp_path, 3)
    claims.take_run()
    assert not other_gets(tmp_path, sharing.WHOLE_RUN)
    claims.close()
    assert other_gets(tmp_path, sharing.WHOLE_RUN)


def test_a_folder_that_another_process_works_in_is_refused_until_it_dies(
    tmp_path: Path, alone: dict[str, bytes]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    command = [sys.executable, "-S", "-c", TRY, str(out / LOCK), str(sharing.WHOLE_RUN)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(StudyError, match="another process is working in"):
            run(PLAIN, SMOKE, out, preset="smoke", quiet=True)
        assert not (out / "config.json").exists()
        process.send_signal(signal.SIGKILL)
    run(PLAIN, SMOKE, out, preset="smoke", quiet=True)
    assert content(out) == alone


# helpers


def test_two_processes_make_the_same_bytes(
    tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "WORTH_HELP", -1.0)  # start at the first cell
    made = list[str]()
    keep = RunFolder.keep_cell

    def slow(self: RunFolder, key: str, rows: Any, seconds: float) -> Any:
        made.append(key)
        if len(made) == 2:  # the helper takes some time to come
            deadline = time.monotonic() + 60
            while len(list(self.path.glob("cells/[!.]*"))) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
        return keep(self, key, rows, seconds)

    monkeypatch.setattr(RunFolder, "keep_cell", slow)
    out = tmp_path / "run"
    run(PLAIN, SMOKE, out, preset="smoke", quiet=True, workers=2)
    assert len(made) < len(hessian_norm.plan(SMOKE))  # the helper did work
    assert content(out) == alone


def test_helpers_stop_where_their_run_has_gone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with contextlib.closing(Claims(tmp_path)) as claims:
        lost = Progress(folder, ["a"], True, claims, parent=1)
        with pytest.raises(Orphaned):
            lost("a", lambda: [{"table": "t"}], str)
    assert not folder.cell_path("a").exists()


def test_a_helper_runs_the_package_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "hvpfast"  # a checkout in the working directory, which is not ours
    other.mkdir()
    (other / "__init__.py").write_text("raise SystemExit('another copy')\n")
    monkeypatch.chdir(tmp_path)
    helpers = Helpers(tmp_path / "none", PLAIN.module, 1)
    helpers.start()
    helpers.processes[0].wait(timeout=60)
    assert "holds no run to help with" in capfd.readouterr().err


def test_helpers_are_ended_with_the_run(tmp_path: Path) -> None:
    helpers = Helpers(tmp_path, PLAIN.module, 1)
    helpers.start()
    helpers.start()
    assert len(helpers.processes) == 1
    helpers.stop()
    assert helpers.processes[0].returncode is not None


# together


@dataclass(frozen=True)
class Numbers:
    """A configuration."""

    num: int = 3
    """how many cells"""


def test_rows_come_in_the_order_asked_and_finished_cells_are_not_made_again(tmp_path: Path) -> None:
    made = list[str]()

    def work(key: str) -> Iterator[dict[str, Any]]:
        made.append(key)
        yield {"table": "t", "value": key}
        yield {"table": "timing", "what": "part", "seconds": 2.5}

    def experiment(config: Numbers, loaded: None, cell: Any) -> None:
        assert cell.path == tmp_path / "run"
        keys = [f"c-{i}" for i in range(config.num)]
        rows = cell.together([(key, lambda key=key: work(key), str) for key in reversed(keys)])
        assert [found[0]["value"] for found in rows] == keys[::-1]
        assert cell("c-0", lambda: work("c-0"), str) == rows[-1]
        with pytest.raises(ValueError, match="cell 'd' is not in the study's plan"):
            cell("d", lambda: work("d"), str)

    timings: dict[str, float] = {}

    def findings(records: Sequence[Any], seconds: Any) -> dict[str, Any]:
        timings.update(seconds)
        return {}

    study: Study[Numbers, None] = Study(
        name="numbers",
        question="?",
        presets={"default": Numbers()},
        packages=(),
        engine=lambda config: {},
        load=lambda config: None,
        plan=lambda config: [f"c-{i}" for i in range(config.num)],
        experiment=experiment,
        figures=lambda records: {},
        findings=findings,
        report=lambda found: "# Numbers\n\n![one](one.png)\n",
        headline=lambda found: "",
        artefacts=lambda path, records: (path / "one.png").write_bytes(b"\x89PNG") and None,
    )
    assert not found_elsewhere(study)
    assert found_elsewhere(PLAIN)
    for resume in (False, True):
        report = run(study, Numbers(), tmp_path / "run", resume=resume, quiet=True, workers=2)
    assert made == ["c-2", "c-1", "c-0"]
    assert "data:image/png;base64,iVBORw==" in report.with_suffix(".html").read_text()
    assert timings["c-1/part"] == 2.5
    assert timings["c-1"] >= 0
    records = (tmp_path / "run" / "records.jsonl").read_text()
    assert "timing" not in records


# torchrun


def test_a_team_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert team() == Team(0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert team() == Team(1, 2)
    assert not team().leads
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(StudyError, match="RANK must be below WORLD_SIZE"):
        team()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(StudyError, match="must be integers; got x and 2"):
        team()
    assert usable_cores() >= 1


def test_ranks_of_torchrun_share_a_run(tmp_path: Path, alone: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    words = ["study", "hessian-norm", "--preset", "smoke", "--out", str(out)]
    command = [*launch, "-m", "hvpfast", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert content(out) == alone
    assert (out / "report.html").exists()
    assert done.stdout.count("Report: ") == 1


def test_ranks_need_one_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["study", "hessian-norm", "--preset", "smoke"]) == 1
    assert "name it by --out" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["study", "hessian-norm", "--preset", "smoke", "--workers", "0"]) == 1
    assert "--workers must be at least 1; got 0" in capsys.readouterr().err
