"""A further process for a run: ``python -m hvpfast.lab.runs.helper DIR MODULE PARENT``.

It works on the cells of the run in DIR, of the study that MODULE has as ``STUDY``, until all are
finished, or until the process PARENT, which started it, has ended. See ``sharing.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

from hvpfast.lab.runs.config import from_json
from hvpfast.lab.runs.folder import RunFolder, StudyError
from hvpfast.lab.runs.progress import Orphaned, Progress
from hvpfast.lab.runs.run import one_torch_thread
from hvpfast.lab.runs.sharing import Claims

STOPPED = 3
"""Exit status where the parent has ended."""


def help_run(path: Path, module: str, parent: int) -> int:
    folder = RunFolder(path)
    stored = folder.config()
    if stored is None:
        raise StudyError(f"{path} holds no run to help with")
    study = importlib.import_module(module).STUDY
    config = from_json(type(study.presets["default"]), stored["config"])
    with contextlib.closing(Claims(path)) as claims, one_torch_thread():
        progress = Progress(folder, study.plan(config), True, claims, parent=parent)
        try:
            study.experiment(config, study.load(config), progress)
        except Orphaned:
            return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(help_run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
