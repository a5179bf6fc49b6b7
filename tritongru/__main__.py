"""`python -m tritongru demo | check | plan | profile`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch

from . import __version__, demo, registry
from .planning import Problem, describe
from .planning.choose import BACKENDS
from .planning.devices import GPUS
from .tools import check, counted, profile
from .tools.compile_report import compile_report, show_reports


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    parser = _Parser(prog="python -m tritongru", description="A GRU whose step is one fused Triton kernel.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for_demo = "train an autocomplete, and learn what a GRU remembers: two minutes on a CPU"
    demo.add_arguments(commands.add_parser("demo", help=for_demo))
    commands.add_parser("check", help="compare every backend and dtype with float64 and nn.GRU: half a minute on a CPU")
    for_plan = commands.add_parser("plan", help="what would run on a device, and why; needs no GPU")
    for_profile = commands.add_parser("profile", help="where the time of a layer or a model goes, and a Chrome trace")
    for some, required in ((for_plan, True), (for_profile, False)):
        for name, letter in (("batch", "B"), ("hidden", "H"), ("time", "T")):
            some.add_argument(f"--{name}", type=_size, required=required, help=letter)
        some.add_argument("--input", type=_size, help="I (default: H)")
        some.add_argument("--dtype", choices=("fp32", "fp16", "bf16", "fp64"), help="default: fp32")
        some.add_argument("--layers", type=_size, help="default: 1")
        some.add_argument("--bidirectional", action="store_true")
        some.add_argument("--inference", action="store_true", help="no gradient")
        some.add_argument("--backend", choices=BACKENDS, help="this one, instead of the choice")
    add = for_plan.add_argument
    add("--device", required=True, type=str.lower, choices=sorted(GPUS), help="a described device")
    add("--recompute", action="store_true", help="the layer's recompute=True")
    add("--compile", action="store_true", help="compile its kernels for the device and report on them")
    add("--json", action="store_true", help="print JSON")
    add = for_profile.add_argument
    add("--module", metavar="FILE.py:FUNCTION", help="a model: the function returns (module, inputs)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--out", type=Path, default=Path("out/profile"), metavar="DIR", help="of trace.json (default: ./out/profile)")

    arguments = parser.parse_args(argv)
    if arguments.command == "plan":
        return _plan(arguments, for_plan)
    on_cpu = arguments.command == "profile" and arguments.device == "cpu"
    if (on_cpu or not torch.cuda.is_available()) and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Python; said before Triton is imported
    if arguments.command == "profile":
        return profile.main(arguments, for_profile.error)
    with torch.device("cpu"):  # whatever default device the process has: what goes elsewhere says so
        return check.main() if arguments.command == "check" else demo.main(arguments)


def _size(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")


def _plan(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if arguments.compile:
        os.environ.pop("TRITON_INTERPRET", None)  # to compile takes real kernels; said before Triton is imported
    device, backend = describe(arguments.device), arguments.backend
    try:
        problem = Problem(
            arguments.batch, arguments.time, arguments.input or arguments.hidden, arguments.hidden,
            arguments.layers or 1, 2 if arguments.bidirectional else 1, arguments.dtype or "fp32",
            training=not arguments.inference, recompute=arguments.recompute,
            precision="tf32" if device.vendor == "nvidia" else "ieee",
        )  # fmt: skip
        plan = counted.planned(problem, device, backend)
    except ValueError as error:
        parser.error(str(error))
    if arguments.compile and plan.tiles and not registry.has_triton():
        parser.error("--compile needs Triton (pip install 'tritongru[triton]')")
    specimens = registry.find(plan.backend).specimens(problem, device) if arguments.compile and plan.tiles else []
    reports = [compile_report(each, device) for each in specimens]
    if arguments.json:
        compiled = [{name: value for name, value in asdict(report).items() if name != "sass"} for report in reports]
        print(json.dumps({**plan.as_dict(), "compiled": compiled}, indent=2))
        return 0
    print(plan)
    if reports:
        show_reports(reports, [kind for kind, _ in plan.tiles])
    elif arguments.compile:
        print("compiled  nothing: no Triton kernel in this plan")
    return 0


if __name__ == "__main__":
    sys.exit(main())
