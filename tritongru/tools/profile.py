"""`python -m tritongru profile`: where the time of a model's call goes, by parts and by launches, and a Chrome trace.

A few calls are profiled by torch.profiler after some that compile and warm up. What is printed is read from the trace:
ranges `tritongru: <part>` (parts.py) tell the parts. Bytes and flops of the Triton launches are those of
kernels/metadata.py, counted at the first call.
"""

import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from logging.handlers import BufferingHandler
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.profiler import record_function
from torch.utils._pytree import tree_leaves, tree_map

from .. import registry
from ..module import GRU
from ..parts import PREFIX
from .files import show

WARM_UP, CALLS = 3, 5
ROWS = 40  # of ops that are printed
MEANING = {
    "cuda": "times are those of the kernels on the GPU",
    "cpu": "times are the CPU's own: of a part, without the parts inside it",
    "emulator": "kernels were emulated: the times are the emulator's, and mean nothing of a GPU",
}
PASS = "tritongru profile: "  # and the pass: ranges around the calls
ATEN, ELSEWHERE = "PyTorch's own GRU", "elsewhere"
HOST = ("user_annotation", "cpu_op", "cuda_runtime", "cuda_driver")  # categories of a trace's events
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Figures(NamedTuple):
    """Of one call, the mean over those of a trace."""

    us: float
    n: float  # of launches, on the CPU of ops and ranges


class Split(NamedTuple):
    parts: dict[str, dict[str, Figures]]  # of each pass by part, the longest first
    rows: dict[str, Figures]  # by the name of a launch, on the CPU of an op; the longest first
    wall_us: dict[str, float]  # of each pass, on the host's clock


class Found(NamedTuple):
    """What profiling a call found."""

    kind: str  # of MEANING
    split: Split
    calls: int
    counted: Mapping[str, Counter[str]]  # of a call, by kernel
    said: list[str]  # what the layers logged: which backend, and why


def _part(name: str, around: str) -> str:
    """The part that an event of the host begins, or lies in."""
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    return ATEN if name in ("aten::gru", "aten::gru_cell") or name.endswith("RnnBackward0") else around


def read(events: Iterable[Mapping[str, Any]], calls: int, on_gpu: bool) -> Split:
    """The split of a Chrome trace's events, of `calls` calls. on_gpu: times are those of kernels, each in the part that
    launched it; otherwise of ranges and ops, each without what it encloses."""
    timed = [e for e in events if e.get("cat") in (*HOST, *DEVICE) and "dur" in e]
    timed.sort(key=lambda e: (e["ts"], -e["dur"]))  # what encloses another begins no later
    found: list[list[Any]] = []  # of what has a time: when the host came to it, part, name, us
    launched: dict[Any, tuple[float, str]] = {}  # when and in which part, by the number of a launch and of its kernel
    open_: dict[Any, list[Any]] = defaultdict(list)  # on each thread, the outermost first: end, entry of `found`
    numbers = [e.get("args", {}).get("correlation") for e in timed]
    for number, e in zip(numbers, timed, strict=True):
        if e["cat"] in HOST:
            stack = open_[e["pid"], e["tid"]]
            while stack and stack[-1][0] <= e["ts"]:
                stack.pop()
            part = _part(e["name"], stack[-1][1][1] if stack else ELSEWHERE)
            if stack:
                stack[-1][1][3] -= e["dur"]
            found.append([e["ts"], part, e["name"], e["dur"]])
            stack.append((e["ts"] + e["dur"], found[-1]))
            launched[number] = e["ts"], part
    if on_gpu:
        launched.pop(None, None)
        of_device = [(launched.get(number), e) for number, e in zip(numbers, timed, strict=True) if e["cat"] in DEVICE]
        found = [[*(by or (e["ts"], ELSEWHERE)), e["name"], e["dur"]] for by, e in of_device]
    wall, rows = Counter[str](), defaultdict[str, list[float]](list)
    parts: dict[str, defaultdict[str, list[float]]] = {}
    for e in timed:
        if e["name"].startswith(PASS):
            in_pass = e["name"].removeprefix(PASS)
            wall[in_pass] += e["dur"]
            of_pass = parts.setdefault(in_pass, defaultdict(list))
            for at, part, name, us in found:  # passes wait for the device: a kernel runs in the one that launched it
                if e["ts"] <= at <= e["ts"] + e["dur"]:
                    of_pass[part].append(us)
                    rows[name].append(us)
    of_passes = {in_pass: _figures(of_parts, calls) for in_pass, of_parts in parts.items()}
    return Split(of_passes, _figures(rows, calls), {name: us / calls for name, us in wall.items()})


def _figures(times: Mapping[str, list[float]], calls: int) -> dict[str, Figures]:
    """The longest first, what is in no part last."""
    figures = {name: Figures(sum(us) / calls, len(us) / calls) for name, us in times.items()}
    return dict(sorted(figures.items(), key=lambda item: (item[0] == ELSEWHERE, -item[1].us)))


def profile(module: nn.Module, inputs: tuple[Any, ...], training: bool, path: Path) -> Found:
    """Profile `module(*inputs)`, where it trains with backward of all outputs. The Chrome trace goes to `path`."""
    on_gpu = any(t.is_cuda for t in tree_leaves((inputs, *module.parameters())) if isinstance(t, Tensor))

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def call() -> None:
        module.zero_grad(set_to_none=True)
        with record_function(f"{PASS}forward"), torch.set_grad_enabled(training):
            result = module(*inputs)
            wait()
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
        cotangents = [torch.randn_like(t) for t in outputs]
        if outputs:
            with record_function(f"{PASS}backward"):
                torch.autograd.backward(outputs, cotangents)
                wait()

    counted: dict[str, Counter[str]] = defaultdict(Counter)

    def note(name: str, told: Mapping[str, Any]) -> None:
        counted[name].update(count=1, bytes=told["bytes"], flops=told["flops"])

    log, level = BufferingHandler(1000), registry.logger.level
    with ExitStack() as stack:
        if registry.has_triton():
            from ..launch.runtime import Launch, observe

            stack.enter_context(observe(note, Launch.counts))
        registry.log_once.cache_clear()
        registry.logger.addHandler(log)
        stack.callback(registry.logger.removeHandler, log)
        registry.logger.setLevel(logging.INFO)
        stack.callback(registry.logger.setLevel, level)
        call()
    emulated = bool(counted) and not on_gpu
    calls = 1 if emulated else CALLS
    for _ in range(0 if emulated else WARM_UP - 1):
        call()
    with torch.profiler.profile(acc_events=True) as profiler:
        for _ in range(calls):
            call()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    split = read(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], calls, on_gpu)
    kind = "emulator" if emulated else "cuda" if on_gpu else "cpu"
    return Found(kind, split, calls, counted, [record.getMessage() for record in log.buffer])


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
    if not Path(file).is_file():
        refuse(f"--module must be file.py:function, and there is no Python file {file!r}")
    sys.path.insert(0, str(Path(file).parent.resolve()))  # what it imports from beside it
    loaded = run_path(file)
    if name not in loaded:
        refuse(f"--module must be file.py:function, and there is no function {name!r} in {file}")
    match loaded[name]():
        case (nn.Module() as module, inputs):
            pass
        case other:
            refuse(f"{a.module} must return (module, inputs), got {type(other).__name__}")
    inputs = inputs if isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence) else (inputs,)

    def there(value: Any) -> Any:
        return value.to(device) if hasattr(value, "to") else value

    return module.to(device), tree_map(there, inputs, is_leaf=lambda value: isinstance(value, PackedSequence))


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
    split = found.split
    print(f"{torch.cuda.get_device_name(device) if on_gpu else 'CPU'}, torch {torch.__version__}")
    for line in found.said or ["aten: it was asked for, or there is no layer of tritongru"]:
        print(f"backend   {line}")
    print(f"calls     {found.calls}, the mean of them; {MEANING[found.kind]}")
    parts: list[tuple[str, ...]] = []
    for pass_, of_pass in split.parts.items():
        whole = sum(f.us for f in of_pass.values())
        parts += [(pass_, part, f"{f.us:.1f}", f"{f.us / whole:.1%}", f"{f.n:g}") for part, f in of_pass.items()]
        parts.append((pass_, "all, by the host's clock", f"{split.wall_us[pass_]:.1f}", "", ""))
    what = "launches" if on_gpu else "ops"
    show("parts of a call", ("pass", "part", "us", "share", what), parts, names=2)
    if on_gpu and not split.rows:
        print("note      no kernel in the trace: the profiler saw nothing of the GPU (does CUPTI work here?)")
    if found.kind == "emulator":
        launches = [(name, told["count"], *_counts(told)) for name, told in found.counted.items()]
        show("Triton launches of a call", ("launch", "count", "MB", "Mflop"), launches)
    else:
        header = ("launch", "count", "us", "MB", "Mflop", "GB/s", "TFLOP/s") if on_gpu else ("op", "count", "us")
        rows = _rows(found)
        show(f"{what} of a call, the longest of {len(rows)} first", header, rows if on_gpu else rows[:ROWS])
    print(f"trace     {path} (chrome://tracing, ui.perfetto.dev)")
    return 0


def _counts(told: Mapping[str, int]) -> tuple[str, str]:
    return f"{told['bytes'] / 1e6:.3f}", f"{told['flops'] / 1e6:.3f}"


def _rows(found: Found) -> list[tuple[object, ...]]:
    """Launches, or ops. One that was counted at the first call as often as it is in the trace has rates."""
    rows: list[tuple[object, ...]] = []
    for name, f in found.split.rows.items():
        told, rates = found.counted.get(name, {"count": 0}), tuple[str, ...]()
        if told["count"] == f.n:
            rates = *_counts(told), f"{told['bytes'] / f.us / 1e3:.3g}", f"{told['flops'] / f.us / 1e6:.3g}"
        rows.append((name, f"{f.n:g}", f"{f.us:.1f}", *rates))
    return rows
