"""`python -m benchmarks [COMMAND]`: what there is says `--help`."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from . import __doc__ as about
from .results import RESULTS, OtherSchemaError
from .suites import SUITES

# The commands whose one option, if any, is the folder of their rows; and its default.
WITH_FOLDER = {"summary": RESULTS, "compiled": RESULTS, "table": None, "story": RESULTS, "cpu": Path("out")}
WITHOUT = ("study", "speed")  # they write files of this repository


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=about, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    run, day = commands.add_parser("run"), commands.add_parser("day")
    run.add_argument("--suite", choices=(*SUITES, "cpu"), help="default: workloads on a CUDA device, else command cpu")
    run.add_argument("--only", metavar="TEXT", action="append", default=[],
                     help="cases with TEXT in their name; repeatable: with all of them")  # fmt: skip
    run.add_argument("--with", dest="extra", action="append", default=[], metavar="PROVIDER",
                     help="this one too (providers.py); sequence:block_h=8,num_warps=4 is sequence with other tiles; "
                     "repeatable")  # fmt: skip
    run.add_argument("--since", metavar="DATE", help="leave out what the file has from then on")
    day.add_argument("--only", metavar="PARTS", action="append", default=[], help="these alone, separated by commas")
    day.add_argument("--resume", action="store_true", help="leave out what passed, and rows that are there")
    for some in (run, day):
        some.add_argument("--budget-minutes", type=float, metavar="M", help="nothing begins after M (day: 9)")
        some.add_argument("--dry-run", action="store_true", help="small, on the CPU, kernels emulated")
        some.add_argument("--out", type=Path, help="folder the rows go to")
    for name, folder in WITH_FOLDER.items():
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=folder, help="folder the rows are in, or go to")
    for name in WITHOUT:
        commands.add_parser(name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words.insert(0, "run")
    parser = _parser()
    arguments = parser.parse_args(words)
    try:
        return _run(arguments)
    except (OtherSchemaError, FileExistsError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        parser.error(str(error))


def _run(arguments: argparse.Namespace) -> int:
    """Raises ValueError for arguments that name nothing."""
    command, given = arguments.command, arguments
    if command in (*WITH_FOLDER, *WITHOUT):
        main = import_module(f".{command}", __package__).main
        return int(main(given.out) if command in WITH_FOLDER else main())
    if command == "day":
        from . import day

        return day.main(given.out, given.budget_minutes or day.MINUTES, given.only, given.resume, given.dry_run)
    if given.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # which Triton reads when it is imported
    from . import cpu, run

    if given.dry_run:
        return run.rehearse(given.suite or "workloads", given.out or Path("out"))
    if given.suite == "cpu" or (given.suite is None and run.no_gpu() and not (given.only or given.extra)):
        print("command cpu: without a GPU, what the layer adds to PyTorch's own path on the CPU", file=sys.stderr)
        return cpu.main(given.out or Path("out"))
    suite = given.suite or "workloads"
    run.chosen(suite, given.only, given.extra, run.H200)  # what names nothing is said before anything is measured
    return run.main(suite, given.out, given.only, given.extra, given.since, given.budget_minutes)


if __name__ == "__main__":
    sys.exit(main())
