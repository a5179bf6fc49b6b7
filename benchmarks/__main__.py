"""`python -m benchmarks [cpu | gpu | day]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite; returns the exit code."""
    from . import __doc__ as about

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", default="cpu", choices=("cpu", "gpu", "day"))
    parser.add_argument("--out", type=Path, help="folder the rows go to (./out; day: benchmarks/results/<gpu>)")
    parser.add_argument("--only", metavar="TEXT", help="gpu: cases with TEXT in their name")
    parser.add_argument(
        "--with", dest="extra", action="append", default=[], metavar="PROVIDER",
        help="gpu: this one too (providers.py); step:block_b=16,num_warps=8 is step with other tiles; repeatable",
    )  # fmt: skip
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="gpu, day: nothing begins after M (day: 25)")
    arguments = parser.parse_args(argv)
    if arguments.suite != "gpu" and (arguments.only or arguments.extra):
        parser.error("--only and --with are of suite gpu")

    from .providers import find
    from .results import OtherSchemaError

    try:
        for name in arguments.extra:
            find(name)
    except ValueError as error:
        parser.error(str(error))
    out = arguments.out or Path("out")
    try:
        if arguments.suite == "cpu":
            from .cpu import main as cpu

            return cpu(out)
        if arguments.suite == "gpu":
            from .gpu import main as gpu

            return gpu(out, arguments.only, arguments.extra, arguments.budget_minutes)
        from .day import main as day

        return day(arguments.out, arguments.budget_minutes or 25.0)
    except OtherSchemaError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
