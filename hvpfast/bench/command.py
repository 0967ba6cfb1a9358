"""The subcommand ``hvpfast bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from hvpfast.bench import record, report, suites
from hvpfast.bench.cases import CASES, DEVICES, DTYPES, KNOWN_CASES, OPERATIONS
from hvpfast.bench.providers import PROVIDERS
from hvpfast.bench.runner import run_bench
from hvpfast.bench.settings import Settings
from hvpfast.utils.files import write_whole

DESCRIPTION = "Time gradients, curvature products and penalties against other ways to compute them."
BUDGET_HELP = "of timing per cell; rounds are cut to fit (default: %(default)s)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    for name, known, all_of in (
        ("cases", list(KNOWN_CASES), CASES),
        ("operations", OPERATIONS, OPERATIONS),
        ("providers", list(PROVIDERS), PROVIDERS),
    ):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            choices=known,
            default=[],
            metavar=name[:-1].upper(),
            help=f"default: all of {', '.join(all_of)}",
        )
    add = parser.add_argument
    add("--rounds", type=int, default=default.rounds, help="default: %(default)s")
    add("--threads", type=int, default=default.threads, help="default: the usable cores")
    add("--dtype", choices=DTYPES, default=default.dtype, help="default: %(default)s")
    add("--device", choices=DEVICES, default=default.device, help="default: %(default)s")
    add("--forms", nargs="+", default=[], metavar="PATTERN",
        help="run only 'provider: form' that match, as file names do")  # fmt: skip
    add("--deadline", type=float, metavar="SECONDS", help="start no further form after this long")
    add("--budget", type=float, default=default.budget, metavar="SECONDS", help=BUDGET_HELP)
    add("--memory", action="store_true", help="also peak memory, one process per form")
    add("--quick", action="store_true", help="tiny cases in seconds: does everything work?")
    record.add_out(parser, figure=True)
    add("--resume", action="store_true", help="go on with the record in the folder of --out")
    add("--show", type=Path, metavar="FILE", help="print and draw an existing bench.json")
    parser.set_defaults(run_suite=None)
    others = parser.add_subparsers(title="other suites, each with options of its own")
    for name in suites.names():
        suite = suites.load(name)
        other = others.add_parser(name, help=suite.DESCRIPTION, description=suite.DESCRIPTION)
        suite.add_arguments(other)
        other.set_defaults(run_suite=suite.run)


def run(arguments: argparse.Namespace) -> int:
    """The exit status is 1 when a form of ours failed or was wrong, 130 after Ctrl-C, else 0."""
    if arguments.run_suite is not None:
        status: int = arguments.run_suite(arguments)
        return status
    if arguments.show is not None:
        result = record.read_json(arguments.show)
    else:
        given = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
        lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        result = run_bench(Settings(**given | lists))
    text = report.render(result)
    print(text)
    if arguments.out is not None:
        write_whole(arguments.out / "bench.txt", text + "\n")
        try:
            report.draw(result, arguments.out / "bench.png")
        except RuntimeError as error:
            print(f"no figure: {error}", file=sys.stderr)
    if result["interrupted"]:
        return 130
    return int(record.broken(row for row in result["rows"] if row["kind"] == "ours"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hvpfast bench", description=DESCRIPTION)
    add_arguments(parser)
    return run(parser.parse_args(argv))
