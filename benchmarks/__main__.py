"""`python -m benchmarks [COMMAND]`: what there is says `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .cases import SUITES
from .results import RESULTS, OtherSchemaError


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
    parser.add_argument("--suite", choices=SUITES, help="default: quick where there is a CUDA device, else cpu")
    parser.add_argument("--out", type=Path, help="folder the rows go to, or (summary) come from")
    parser.add_argument(
        "--only", metavar="TEXT", action="append", default=[],
        help="cases with TEXT in their name; repeatable: with all of them",
    )  # fmt: skip
    parser.add_argument(
        "--with", dest="extra", action="append", default=[], metavar="PROVIDER",
        help="this one too (providers.py); step:block_b=16,num_warps=8 is step with other tiles; repeatable",
    )  # fmt: skip
    parser.add_argument("--device", metavar="cuda:N", help="which GPU; default: the first")
    parser.add_argument("--cold", action="store_true", help="overwrite L2 before every call")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has from this commit")
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="nothing begins after M (day: 25)")
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
    if command != "run" and (
        arguments.suite or arguments.only or arguments.extra or arguments.cold or arguments.resume
    ):
        raise ValueError(f"--suite, --only, --with, --cold and --resume are not of {command}")
    if command == "summary":
        from .summary import main as summary

        return summary(out or RESULTS)
    if command == "compiled":
        from .compiled import main as compiled

        return compiled(out or RESULTS)
    if command in ("study", "speed", "table") and out:
        raise ValueError(f"--out is not of {command}, which writes files of this repository")
    if command == "table":
        from .table import main as table

        return table()
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
        from .day import main as day

        return day(out, arguments.budget_minutes or 25.0)
    from . import cpu, run

    suite = arguments.suite or ("cpu" if run.no_gpu() else "quick")
    if not arguments.suite and suite == "cpu":
        print("suite cpu: without a GPU, what the layer adds to PyTorch's own path on the CPU", file=sys.stderr)
    run.chosen(suite, arguments.only, arguments.extra)  # what names nothing is said before anything is measured
    if suite == "cpu":
        return cpu.main(out or Path("out"), arguments.only, arguments.extra)
    return run.main(
        suite, out, arguments.only, arguments.extra, device, arguments.cold, arguments.resume, arguments.budget_minutes
    )


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
