"""`python -m benchmarks [COMMAND]`: what there is says `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .results import RESULTS, OtherSchemaError
from .suites import SUITES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    from . import __doc__ as about

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=("run", "summary", "compiled", "study", "speed", "table", "story", "day"),
    )  # fmt: skip
    parser.add_argument("--suite", choices=SUITES, help="default: workloads where there is a CUDA device, else cpu")
    parser.add_argument("--out", type=Path, help="folder the rows go to, or (summary) come from")
    parser.add_argument(
        "--only", metavar="TEXT", action="append", default=[],
        help="cases with TEXT in their name; repeatable: with all of them. day: parts, separated by commas",
    )  # fmt: skip
    parser.add_argument(
        "--with", dest="extra", action="append", default=[], metavar="PROVIDER",
        help="this one too (providers.py); sequence:block_h=8,num_warps=4 is sequence with other tiles; repeatable",
    )  # fmt: skip
    parser.add_argument("--device", metavar="cuda:N", help="which GPU; default: the first")
    parser.add_argument("--cold", action="store_true", help="overwrite L2 before every call")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has from this commit")
    parser.add_argument("--since", metavar="DATE", help="with --resume: and what it has from then on")
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="nothing begins after M (day: 9)")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU, kernels emulated: does it all run?")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except (OtherSchemaError, FileExistsError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        parser.error(str(error))


def _run(arguments: argparse.Namespace) -> int:
    """Raises ValueError for arguments that name nothing."""
    command, out = arguments.command, arguments.out
    if command != "run" and (arguments.suite or arguments.extra or arguments.cold or arguments.since):
        raise ValueError(f"--suite, --with, --cold and --since are not of {command}")
    if command not in ("run", "day") and (arguments.only or arguments.resume or arguments.dry_run):
        raise ValueError(f"--only, --resume and --dry-run are not of {command}")
    if command == "summary":
        from .summary import main as summary

        return summary(out or RESULTS)
    if command == "compiled":
        from .compiled import main as compiled

        return compiled(out or RESULTS)
    if command in ("study", "speed") and out:
        raise ValueError(f"--out is not of {command}, which writes files of this repository")
    if command == "table":
        from .table import main as table

        return table(out)
    if command == "speed":
        from .speed import main as speed

        return speed()
    if command == "study":
        from .study import main as study

        return study(RESULTS)
    if command == "story":
        from .story import main as story

        return story(out)
    device = _device(arguments.device)
    if command == "day":
        from .day import MINUTES
        from .day import main as day

        return day(out, arguments.budget_minutes or MINUTES, arguments.only, arguments.resume, arguments.dry_run)
    from . import cpu, run

    if arguments.dry_run:
        return run.rehearse(arguments.suite or "workloads", out or Path("out"))
    suite = arguments.suite or ("cpu" if run.no_gpu() else "workloads")
    if not arguments.suite and suite == "cpu":
        print("suite cpu: without a GPU, what the layer adds to PyTorch's own path on the CPU", file=sys.stderr)
    run.chosen(suite, arguments.only, arguments.extra)  # what names nothing is said before anything is measured
    if suite == "cpu":
        return cpu.main(out or Path("out"), arguments.only, arguments.extra)
    return run.main(
        suite, out, arguments.only, arguments.extra, device, arguments.cold, arguments.resume, arguments.budget_minutes,
        arguments.since,
    )  # fmt: skip


def _device(name: str | None) -> int:
    """The index of a CUDA device."""
    import torch

    if name is None:
        return 0
    there = {f"cuda:{n}": torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
    if name not in there:
        listed = ", ".join(f"{key} ({product})" for key, product in there.items()) or "none"
        raise ValueError(f"device must be one of the CUDA devices here: {listed}; got {name!r}")
    return int(name.removeprefix("cuda:"))


if __name__ == "__main__":
    sys.exit(main())
