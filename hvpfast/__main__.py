"""The command line: ``hvpfast {study,bench,info}``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = "Curvature of neural networks at the price of a gradient."
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 done, 1 could not, 2 wrong arguments, 130 interrupted."""
    from hvpfast.lab.runs.folder import StudyError

    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(arguments).parse_args(arguments)
    if args.run is None:
        args.parser.print_help()
        return 2
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except StudyError as error:
        print(f"hvpfast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt or 'Interrupted.'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser; only the subcommand that `arguments` begin with is filled in."""
    from hvpfast.lab.environment import version

    parser = argparse.ArgumentParser(prog="hvpfast", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"hvpfast {version('hvpfast')}")
    parser.set_defaults(run=None, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="{" + ",".join(COMMANDS) + "}")
    for name, (add, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in arguments[:1]:
            add(command)
    return parser


def add_info(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hvpfast info``."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    """Print what this installation can do."""
    from hvpfast.lab import environment

    facts = environment.collect()
    print(json.dumps(facts, indent=2) if args.json else environment.text(facts))
    return 0


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's own options."""
    bench: Any = importlib.import_module("hvpfast.bench")
    bench.add_arguments(parser)
    parser.set_defaults(run=bench.run)


def add_study(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per study, its options made from its configuration."""
    from hvpfast.lab.environment import usable_cores
    from hvpfast.lab.runs.config import add_config_arguments
    from hvpfast.studies import studies

    parser.set_defaults(run=None, parser=parser)
    commands = parser.add_subparsers(title="studies", metavar="STUDY")
    for study in studies().values():
        one = commands.add_parser(study.name, help=study.question, description=study.question)
        group = one.add_argument_group("the run")
        text = "named set of options (default: default)"
        group.add_argument("--preset", choices=sorted(study.presets), help=text)
        text = f"run folder (default: a new runs/{study.name}-PRESET)"
        group.add_argument("--out", type=Path, metavar="DIR", help=text)
        text = "continue the run in the folder, or redraw it where it is finished"
        group.add_argument("--resume", action="store_true", help=text)
        text = "no progress bar and no line per finished cell"
        group.add_argument("--quiet", action="store_true", help=text)
        text = "processes that share a long run (default: the cores); no result depends on them"
        group.add_argument("--workers", type=int, default=usable_cores(), metavar="N", help=text)
        group = one.add_argument_group("what the study does (defaults of the preset default)")
        add_config_arguments(group, study.presets["default"])
        one.set_defaults(run=run_study, study=study)


def run_study(args: argparse.Namespace) -> int:
    """Run or resume a study in its folder, and print the answer and where the report is."""
    from hvpfast.lab.runs.folder import StudyError
    from hvpfast.lab.runs.run import run
    from hvpfast.lab.runs.sharing import team

    if args.workers < 1:
        raise StudyError(f"--workers must be at least 1; got {args.workers}")
    if team().size > 1 and args.out is None:
        raise StudyError("under torchrun every rank must work in one folder: name it by --out")
    study = args.study
    preset, config, out = chosen_run(args)
    options = {"preset": preset, "resume": args.resume, "quiet": args.quiet}
    report = run(study, config, out, workers=args.workers, **options)
    if not team().leads:
        return 0
    found = json.loads((report.parent / "findings.json").read_text(encoding="utf-8"))
    print(f"{study.headline(found)}\nReport: {report}")
    return 0


def chosen_run(args: argparse.Namespace) -> tuple[str, Any, Path]:
    """Return preset, configuration and folder, from the command line and the folder to resume.

    Without --out a new run gets a folder of its own, and --resume means the last one. A resumed run
    keeps its configuration; options given again are laid over it, so that `run` sees a difference.
    """
    from hvpfast.lab.runs.config import from_json, given_arguments
    from hvpfast.lab.runs.folder import RunFolder, StudyError, next_folder

    study, preset = args.study, args.preset or "default"
    out = args.out or next_folder(Path("runs"), f"{study.name}-{preset}", args.resume)
    config, config_type = study.presets[preset], type(study.presets[preset])
    stored = RunFolder(out).config() if args.resume else None
    try:
        if stored and stored["study"] == study.name and args.preset in (None, stored["preset"]):
            preset, config = stored["preset"], from_json(config_type, stored["config"])
        given = given_arguments(args, config_type)
        return preset, config_type(**{**vars(config), **given}), out
    except (ValueError, TypeError) as error:
        raise StudyError(str(error)) from error


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "study": (add_study, "run a study end to end: data, tuning, training, figures, report"),
    "bench": (add_bench, "time curvature products of every provider, checked against float64"),
    "info": (add_info, "show version, backends, kernels, threads and GPU"),
}


if __name__ == "__main__":
    sys.exit(main())
