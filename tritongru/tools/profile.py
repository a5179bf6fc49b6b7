"""`python -m tritongru profile`: where the time of a model's call goes, by parts and by launches, and a Chrome trace.

A few calls are profiled by torch.profiler after others that compile and warm up. What is printed is read from the trace
that is written. Bytes and flops of the Triton launches are those of kernels/metadata.py, counted at the first call.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.profiler import record_function
from torch.utils._pytree import tree_leaves, tree_map

from .. import registry
from ..module import GRU
from ..parts import profiling
from .table import show
from .trace import PASS, Split, read

WARM_UP, CALLS = 3, 5
ROWS = 40  # of ops that are printed
MEANING = {
    "cuda": "times are those of the kernels on the GPU",
    "cpu": "times are the CPU's own: of a part, without the parts inside it",
    "interpreter": "kernels ran in Triton's interpreter: the times are its own, and mean nothing of a GPU",
}


@dataclass
class Found:
    """What profiling a call found."""

    kind: str  # "cuda", "cpu" or "interpreter"
    split: Split = field(default_factory=lambda: Split({}, {}, {}))
    calls: int = CALLS
    counted: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # of a call, by kernel
    said: list[str] = field(default_factory=list)  # what the layers logged: which backend, and why


def profile(module: nn.Module, inputs: tuple[Any, ...], training: bool, path: Path) -> Found:
    """Profile `module(*inputs)`, where it trains with backward of all outputs. The Chrome trace goes to `path`."""
    on_gpu = any(t.is_cuda for t in tree_leaves((inputs, *module.parameters())) if isinstance(t, Tensor))
    found = Found("cuda" if on_gpu else "cpu")

    def call(around: Callable[[str], AbstractContextManager[Any]]) -> None:
        module.zero_grad(set_to_none=True)
        with around(f"{PASS}forward"), torch.set_grad_enabled(training):
            result = module(*inputs)
            wait()
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
        cotangents = [torch.randn_like(t) for t in outputs]
        if outputs:
            with around(f"{PASS}backward"):
                torch.autograd.backward(outputs, cotangents)
                wait()

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    log = BufferingHandler(1000)
    with ExitStack() as stack:
        if registry.has_triton():
            from ..launch.runtime import Launch, observe

            def note(name: str, told: Mapping[str, Any]) -> None:
                found.counted[name].update(count=1, bytes=told["bytes"], flops=told["flops"])

            stack.enter_context(observe(note, Launch.counts))
        registry.log_once.cache_clear()
        registry.logger.addHandler(log)
        stack.callback(registry.logger.removeHandler, log)
        stack.callback(registry.logger.setLevel, registry.logger.level)
        registry.logger.setLevel(logging.INFO)
        call(nullcontext)
    found.said = [record.getMessage() for record in log.buffer]
    if found.counted and not on_gpu:
        found.kind, found.calls = "interpreter", 1
    for _ in range(WARM_UP - 1 if found.calls > 1 else 0):
        call(nullcontext)
    with profiling(), torch.profiler.profile() as profiler:
        for _ in range(found.calls):
            call(record_function)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    found.split = read(json.loads(path.read_text(encoding="utf-8")), found.calls, on_gpu)
    return found


def given(arguments: Any, device: torch.device, refuse: Callable[[str], NoReturn]) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module that the command line names, and its inputs."""
    a = arguments
    shape = (a.batch, a.hidden, a.time, a.input, a.dtype, a.layers, a.bidirectional)
    if any(shape) if a.module else not all(shape[:3]):
        refuse("expected --module alone, or --batch, --hidden and --time")
    if a.module is None:
        I, dtypes = a.input or a.hidden, {name: dtype for dtype, name in registry.DTYPES.items()}
        where: dict[str, Any] = {"device": device, "dtype": dtypes[a.dtype or "fp32"]}
        layer = GRU(I, a.hidden, a.layers or 1, bidirectional=a.bidirectional, **where)
        return layer, (torch.randn(a.time, a.batch, I, **where),)
    file, _, name = a.module.rpartition(":")
    spec = spec_from_file_location(Path(file).stem, file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        refuse(f"--module must be file.py:function, and there is no Python file {file!r}")
    loaded = module_from_spec(spec)
    sys.path.insert(0, str(Path(file).parent.resolve()))  # what it imports from beside it
    sys.modules.setdefault(spec.name, loaded)
    spec.loader.exec_module(loaded)
    if not hasattr(loaded, name):
        refuse(f"--module must be file.py:function, and there is no function {name!r} in {file}")
    match getattr(loaded, name)():
        case (nn.Module() as module, inputs):
            pass
        case other:
            refuse(f"{a.module} must return (module, inputs), got {type(other).__name__}")
    inputs = inputs if isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence) else (inputs,)
    return module.to(device), tree_map(
        lambda value: value.to(device) if hasattr(value, "to") else value,
        inputs,
        is_leaf=lambda value: isinstance(value, PackedSequence),
    )


def main(arguments: Any, refuse: Callable[[str], NoReturn]) -> int:
    """Profile, print, write the trace. refuse: of what the command line gives, in one line."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: there is no CUDA device here")
    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    module, inputs = given(arguments, device, refuse)
    path = arguments.out / "trace.json"
    with registry.use_backend(arguments.backend):
        found = profile(module.train(not arguments.inference), inputs, not arguments.inference, path)
    print(f"{torch.cuda.get_device_name(device) if on_gpu else 'CPU'}, torch {torch.__version__}")
    for line in found.said or ["aten: it was asked for, or there is no layer of tritongru"]:
        print(f"backend   {line}")
    print(f"calls     {found.calls}, the mean of them; {MEANING[found.kind]}")
    split = found.split
    parts: list[tuple[str, ...]] = []
    for pass_, wall_us in split.wall_us.items():
        of_pass = {part: f for (in_pass, part), f in split.parts.items() if in_pass == pass_}
        whole = sum(f.us for f in of_pass.values())
        parts += [(pass_, part, f"{f.us:.1f}", f"{f.us / whole:.1%}", f"{f.n:g}") for part, f in of_pass.items()]
        parts.append((pass_, "all, by the host's clock", f"{wall_us:.1f}", "", ""))
    what = "launches" if on_gpu else "ops"
    show("parts of a call", ("pass", "part", "us", "share", what), parts, names=2)
    if on_gpu and not split.rows:
        print("note      no kernel in the trace: the profiler saw nothing of the GPU (does CUPTI work here?)")
    if found.kind == "interpreter":
        launches = [(name, told["count"], *_counts(told)) for name, told in found.counted.items()]
        show("Triton launches of a call", ("launch", "count", "MB", "Mflop"), launches)
    else:
        header = ("launch", "count", "us", "MB", "Mflop", "GB/s", "TFLOP/s") if on_gpu else ("op", "count", "us")
        rows = [row[: len(header)] for row in _rows(found)]
        show(f"{what} of a call, the longest of {len(rows)} first", header, rows if on_gpu else rows[:ROWS])
    print(f"trace     {path} (chrome://tracing, ui.perfetto.dev)")
    return 0


def _counts(told: Mapping[str, int]) -> tuple[str, str]:
    return f"{told['bytes'] / 1e6:.3f}", f"{told['flops'] / 1e6:.3f}"


def _rows(found: Found) -> Iterator[tuple[object, ...]]:
    """Launches, or ops. One that was counted at the first call as often as it is in the trace has rates."""
    for name, f in found.split.rows.items():
        told = found.counted.get(name, {"count": 0})
        rates: tuple[str, ...] = ()
        if told["count"] == f.n:
            rates = *_counts(told), f"{told['bytes'] / f.us / 1e3:.3g}", f"{told['flops'] / f.us / 1e6:.3g}"
        yield name, f"{f.n:g}", f"{f.us:.1f}", *rates
