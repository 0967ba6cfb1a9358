"""Build, prove and measure the GPU backends in one command, in under nine minutes:

    python3 benchmarks/gpu_check --out DIR

Needs one NVIDIA GPU, torch with CUDA, nvcc, CMake and a C++ compiler; no network. Every step runs
in a process of its own with a limit of its own; the record says which failed, ran out of time or
were dropped for lack of it. ``--dry-run`` runs such steps on the CPU with tiny cases, to test the
script itself.

Writes into DIR: gpu_check.json (everything), gpu_check.txt (what is printed), gpu_check.log (the
output of all steps), gpu_check.png (times of the fastest forms).
"""  # noqa: D415

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from processes import Check
from steps import plan
from summary import render

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    """Run the check.

    Returns:
        0 when every step succeeded and every bar is met, else 1.
    """
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu_check"), metavar="DIR", help="default: %(default)s")
    add("--budget", type=float, default=525.0, metavar="SECONDS",
        help="for everything; what does not fit is dropped (default: %(default)s)")  # fmt: skip
    add("--only", nargs="+", default=[], metavar="STEP", help="run these steps alone")
    add("--dry-run", action="store_true", help="tiny cases on the CPU: does the script work?")
    add("--list", action="store_true", help="print the steps and their limits")
    arguments = parser.parse_args(argv)
    work = ROOT / "build" / "gpu_check"
    if not arguments.list:
        shutil.rmtree(work, ignore_errors=True)  # records of an earlier run
    steps = plan(work, dry=arguments.dry_run)
    unknown = set(arguments.only) - {step.name for step in steps}
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    if arguments.list:
        for step in steps:
            print(f"{step.name:18} {step.limit:4.0f} s  {step.group:8} {' '.join(step.command)}")
        return 0
    if arguments.only:
        steps = [step for step in steps if step.name in arguments.only]
    check = Check(steps, arguments.out, work, arguments.budget, dry=arguments.dry_run)
    result = check.run()
    text = render(result)
    if (work / "gpu_check.png").exists():
        shutil.copy(work / "gpu_check.png", arguments.out / "gpu_check.png")
    (arguments.out / "gpu_check.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
