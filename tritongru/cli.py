"""`python -m tritongru demo | check | plan | profile`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


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
    from . import __version__
    from .demo import add_arguments as add_demo_arguments
    from .planning.devices import GPUS

    parser = _Parser(prog="python -m tritongru", description="A GRU whose step is one fused Triton kernel.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    add_demo_arguments(
        commands.add_parser("demo", help="train an autocomplete, and learn what a GRU remembers: two minutes on a CPU")
    )
    commands.add_parser("check", help="compare every backend and dtype with float64 and nn.GRU: three minutes on a CPU")

    plan = commands.add_parser("plan", help="what would run on a device, and why; needs no GPU")
    plan.add_argument("--device", required=True, type=str.lower, choices=sorted(GPUS), help="a described device")
    _add_shape(plan, required=True)
    plan.add_argument("--recompute", action="store_true", help="the layer's recompute=True")
    plan.add_argument("--compile", action="store_true", help="compile its kernels for the device and report on them")

    profile = commands.add_parser("profile", help="where the time of a layer or a model goes, and a Chrome trace")
    profile.add_argument(
        "--module", metavar="FILE.py:FUNCTION",
        help="a model: the function returns a module and its inputs, or a GRU alone",
    )  # fmt: skip
    _add_shape(profile, required=False)
    profile.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    profile.add_argument(
        "--out", type=Path, default=Path("out/profile"), metavar="DIR", help="of trace.json (default: ./out/profile)"
    )

    arguments = parser.parse_args(argv)
    if arguments.command == "plan":
        return _plan(arguments)
    if arguments.command == "profile":
        return _profile(arguments, profile)
    _interpret_without_gpu()
    import torch

    with torch.device("cpu"):  # whatever default device the process has: what goes elsewhere says so
        if arguments.command == "check":
            from .tools.check import main as check

            return check()
        from .demo import main as demo

        return demo(arguments)


def _add_shape(parser: argparse.ArgumentParser, required: bool) -> None:
    """What `plan` and `profile` share: a layer and a call of it."""
    from .planning.choose import BACKENDS

    for name, letter in (("batch", "B"), ("hidden", "H"), ("time", "T")):
        parser.add_argument(f"--{name}", type=_size, required=required, help=letter)
    parser.add_argument("--input", type=_size, help="I (default: H)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16", "fp64"), help="default: fp32")
    parser.add_argument("--layers", type=_size)
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--inference", action="store_true", help="no gradient")
    parser.add_argument("--backend", choices=BACKENDS, help="this one, instead of the choice")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _size(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")


def _interpret_without_gpu(on_cpu: bool = False) -> None:
    """Where there is no GPU, or none is to be used, kernels run in Triton's interpreter, which must be said before
    Triton is imported."""
    import torch

    if (on_cpu or not torch.cuda.is_available()) and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _profile(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    shape = ("hidden", "input", "dtype", "layers", "bidirectional")
    if arguments.module is None:
        missing = [f"--{name}" for name in ("batch", "hidden", "time") if getattr(arguments, name) is None]
        if missing:
            parser.error(f"expected --module, or a shape: {', '.join(missing)} is missing")
    elif of_model := [f"--{name}" for name in shape if getattr(arguments, name)]:
        parser.error(f"{', '.join(of_model)}: the module has its own")
    arguments.layers = arguments.layers or 1
    _interpret_without_gpu(arguments.device == "cpu")
    from .tools.profile import main as profile

    return profile(arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from .planning import Problem, choose, describe
    from .tools.counted import with_counts

    device = describe(arguments.device)
    try:
        problem = Problem(
            arguments.batch, arguments.time, arguments.input or arguments.hidden, arguments.hidden,
            arguments.layers or 1, 2 if arguments.bidirectional else 1, arguments.dtype or "fp32",
            training=not arguments.inference, recompute=arguments.recompute,
            precision="tf32" if device.vendor == "nvidia" else "ieee",
        )  # fmt: skip
        plan = with_counts(choose(problem, device, arguments.backend), device, arguments.backend)
        if arguments.compile and plan.tiles and importlib.util.find_spec("triton") is None:
            raise ValueError("--compile needs Triton (pip install 'tritongru[triton]')")
    except ValueError as error:
        print(f"python -m tritongru plan: {error}", file=sys.stderr)
        return 2
    reports = []
    if arguments.compile and plan.tiles:
        os.environ.pop("TRITON_INTERPRET", None)  # compiling needs real kernels
        from .registry import find
        from .tools.compile_report import compile_report, table

        reports = [compile_report(specimen, device) for specimen in find(plan.backend).specimens(problem, device)]
    if arguments.json:
        print(json.dumps({**plan.as_dict(), "compiled": [report.as_dict() for report in reports]}, indent=2))
        return 0
    print(plan)
    if arguments.compile and not reports:
        print("compiled  nothing: no Triton kernel in this plan")
    if reports:
        from rich.console import Console

        Console().print(table(reports, [kind for kind, _ in plan.tiles]))
    return 0
