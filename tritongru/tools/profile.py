"""`python -m tritongru profile`: where the time of a model's call goes, by parts and by launches, and a Chrome trace.

A few calls are profiled by torch.profiler after others that compile and warm up. What is printed is read from the trace
that is written: on a GPU the times of the kernels, each in the part that launched it, on the CPU the times of the parts
themselves. Bytes and flops of the Triton launches are those of kernels/metadata.py, counted at one of the first calls.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.profiler import ProfilerActivity, record_function
from torch.utils._pytree import tree_leaves, tree_map

from .. import registry
from ..module import GRU, GRUCell
from ..parts import profiling
from .files import replacing
from .plan import plan
from .trace import ATEN, ELSEWHERE, PASS, PASSES, Counted, Part, Row, Split, read

WARM_UP, CALLS = 3, 5
OPS = 20  # of the CPU that are printed; the JSON has all


class UsageError(ValueError):
    """What the command was given cannot be profiled; said in one line."""


@dataclass
class Subject:
    """A module and what it is called with."""

    module: nn.Module
    inputs: tuple[Any, ...]
    training: bool
    cotangents: list[Tensor] = field(default_factory=list)

    def call(self, around: Callable[[str], AbstractContextManager[Any]]) -> None:
        """Forward and, if training, backward of the sum of all outputs times fixed random cotangents."""
        self.module.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(self.training):
            with around("forward"):
                result = self.module(*self.inputs)
                self._wait()
            if not self.training:
                return
            outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
            if not outputs:
                raise UsageError("no output of the model needs a gradient: profile it with --inference")
            if [t.shape for t in outputs] != [t.shape for t in self.cotangents]:
                self.cotangents = [_drawn(t.shape, t) for t in outputs]
            with around("backward"):
                torch.autograd.backward(outputs, self.cotangents)
                self._wait()

    def _wait(self) -> None:
        tensors = [t for t in tree_leaves((self.inputs, *self.module.parameters())) if isinstance(t, Tensor)]
        for device in {t.device for t in tensors if t.is_cuda}:
            torch.cuda.synchronize(device)


def _drawn(shape: Iterable[int], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, device="cpu").to(like)


def given(arguments: Any, device: torch.device) -> Subject:
    """The subject that the command line names.

    Raises:
        UsageError: no such file or function, or it raises, or gives something else than a module and its inputs.
    """
    inputs: Any = None
    if arguments.module is None:
        sizes = arguments.input or arguments.hidden, arguments.hidden, arguments.layers
        dtype = {name: dtype for dtype, name in registry.DTYPES.items()}[arguments.dtype or "fp32"]
        module: Any = GRU(*sizes, bidirectional=arguments.bidirectional, device=device, dtype=dtype)
    else:
        module = _made_by(arguments.module)
        if isinstance(module, tuple) and len(module) == 2:
            module, inputs = module
        if not isinstance(module, nn.Module):
            kind = type(module).__name__
            raise UsageError(f"{arguments.module} must return a module, or (module, inputs), got {kind}")
        module = module.to(device)
    if inputs is None:
        inputs = _input_of(module, arguments)
    inputs = inputs if isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence) else (inputs,)
    inputs = tree_map(
        lambda value: value.to(device) if hasattr(value, "to") else value,
        inputs,
        is_leaf=lambda value: isinstance(value, PackedSequence),
    )
    module.train(not arguments.inference)
    return Subject(module, inputs, not arguments.inference)


def _input_of(module: nn.Module, arguments: Any) -> Tensor:
    if not isinstance(module, nn.GRU):
        raise UsageError(
            f"{arguments.module} returned a {type(module).__name__} without inputs: expected (module, inputs), "
            "or a GRU, whose input is drawn"
        )
    if arguments.batch is None or arguments.time is None:
        raise UsageError("the input of a GRU is drawn from --batch and --time: expected both")
    leading = (arguments.time, arguments.batch)
    weight = module.weight_ih_l0
    assert isinstance(weight, Tensor)
    return _drawn((*leading[:: -1 if module.batch_first else 1], module.input_size), weight)


def _made_by(argument: str) -> Any:
    """What `file.py:function` returns."""
    file, colon, name = argument.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise UsageError(f"--module must be file.py:function, got {argument!r}")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--module: no file {file!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--module: {file!r} is no Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # what it imports from beside it
    sys.modules.setdefault(path.stem, loaded)
    with _said(f"importing {file}"):
        spec.loader.exec_module(loaded)
    make = getattr(loaded, name, None)
    if not callable(make):
        raise UsageError(f"--module: {file} has no function {name!r}")
    with _said(f"{argument}()"):
        return make()


@contextmanager
def _said(what: str) -> Iterator[None]:
    """An error of the user's own code, in one line."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        message = str(error).strip().splitlines()
        raise UsageError(f"{what} raised {type(error).__name__}" + (f": {message[0]}" if message else "")) from error


def main(arguments: Any) -> int:
    """Profile, print, write the trace; 0, or 2 where that cannot be done."""
    try:
        return _main(arguments)
    except (UsageError, OSError) as error:
        print(f"python -m tritongru profile: {error}", file=sys.stderr)
        return 2


def _main(arguments: Any) -> int:
    from rich.console import Console

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device here")
    device = torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")
    subject = given(arguments, device)
    console = Console()
    console.width = max(console.width, 120)  # the tables in one line a row, in a pipe too
    path = arguments.out / "trace.json"
    with ExitStack() as stack:
        stack.enter_context(registry.use_backend(arguments.backend))
        if not arguments.json:
            stack.enter_context(console.status("profiling"))
        stack.enter_context(_said("calling the model"))
        counted, backends = count(subject)
        interpreted = device.type == "cpu" and any(counted.values())
        kind = "interpreter" if interpreted else device.type
        calls = 1 if interpreted else CALLS
        for _ in range(0 if interpreted else WARM_UP - 1):
            subject.call(lambda pass_: nullcontext())
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profiling(), torch.profiler.profile(activities=activities) as profiler:
            for _ in range(calls):
                subject.call(lambda pass_: record_function(PASS + pass_))
    with replacing(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
        split = read(json.loads(temporary.read_text(encoding="utf-8")), calls, counted, kind)
    split = replace(split, notes=(*split.notes, *not_run(backends.values(), counted, split)))
    if arguments.json:
        about = {**_versions(device), "calls": calls, "times": MEANING[kind], "backends": list(backends)}
        print(json.dumps({**about, **asdict(split), "trace": str(path)}, indent=2))
    else:
        _print(console, split, device, kind, backends, calls, path)
    return 0


def count(subject: Subject) -> tuple[dict[str, list[Counted]], dict[str, str]]:
    """One call: the Triton launches of each pass; which backend each GRU should take and why, and its name."""
    counted: dict[str, list[Counted]] = {p: [] for p in PASSES}
    backends: dict[str, str] = {}

    def note(name: str) -> Callable[..., None]:
        label = name or "the model"

        def noted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            backend, reason = _backend(module, args or tuple(kwargs.values()))
            backends[f"{label} ({type(module).__name__}): {backend}, {reason}"] = backend

        return noted

    def around(pass_: str) -> AbstractContextManager[Any]:
        if not registry.has_triton():
            return nullcontext()
        from ..launch.runtime import observe_counts

        return observe_counts(lambda name, told: counted[pass_].append((name, told)))

    hooks = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in subject.module.named_modules()
        if isinstance(module, (nn.GRU, nn.GRUCell))
    ]
    try:
        subject.call(around)
    finally:
        for hook in hooks:
            hook.remove()
    return counted, backends


def _backend(module: nn.Module, inputs: Sequence[Any]) -> tuple[str, str]:
    """Which backend a GRU of the model takes on this input, and why."""
    if not isinstance(module, (GRU, GRUCell)):
        return "aten", "the layer is torch.nn's"
    asked_for = registry.asked_for(module.backend)
    if asked_for is None and not inputs[0].data.is_cuda:
        return "aten", "as tensors on the CPU do unless a backend is asked for"
    if isinstance(module, GRUCell):
        return (asked_for.name, "asked for") if asked_for else ("step", "one launch for the whole cell")
    found = plan(module, inputs[0])
    return found.backend, found.reason


def not_run(backends: Iterable[str], counted: Mapping[str, Sequence[Counted]], split: Split) -> Iterator[str]:
    """A note on each backend that should have run, of which nothing did."""
    launched = [name for p in PASSES for name, _ in counted.get(p, ())]
    ran = any(part.name == "recurrence" for part in split.parts)
    for backend in dict.fromkeys(backends):
        found = registry.find(backend)
        of_ours = any(name.startswith(found.kernels) for name in launched) if found.triton else ran
        if found.module is None or of_ours:
            continue
        kernels = [(b.name, b.kernels) for b in registry.BACKENDS.values() if b.triton]
        if other := [name for name, begins in kernels if launched and launched[0].startswith(begins)]:
            why = f"{other[0]!r} did, as where a driver refuses a cooperative launch"
            yield f"nothing of backend {backend!r} ran: {why}"
        else:
            yield f"nothing of backend {backend!r} ran: PyTorch's own path did, as under torch.func's derivatives"


def _versions(device: torch.device) -> dict[str, str]:
    on_gpu = device.type == "cuda"
    found = {"device": torch.cuda.get_device_name(device)} if on_gpu else {"device": "CPU"}
    found |= {} if on_gpu else {"threads": str(torch.get_num_threads())}
    found["torch"] = torch.__version__
    if registry.has_triton():
        import triton

        found["triton"] = triton.__version__
    return found


MEANING = {
    "cuda": "times are those of the kernels on the GPU",
    "cpu": "times are the CPU's own: of a part, without the parts inside it",
    "interpreter": "kernels ran in Triton's interpreter: the times are its own, and mean nothing of a GPU",
}


def _print(
    console: Any, split: Split, device: torch.device, kind: str, backends: Iterable[str], calls: int, path: Path
) -> None:
    from rich.table import Table

    console.print(", ".join(f"{what} {value}" for what, value in _versions(device).items()), markup=False)
    for line in list(backends) or ["no GRU module ran"]:
        console.print(f"backend   {line}", markup=False)
    console.print(f"calls     {calls} after {1 if calls == 1 else WARM_UP} to warm up; medians; {MEANING[kind]}")
    table = Table("part", title="parts of a call", title_justify="left")
    for p in split.wall_us:
        for column in (f"{p}, us", "share", "launches"):
            table.add_column(column, justify="right")
    of_pass = {p: [part for part in split.parts if part.pass_ == p] for p in split.wall_us}
    sums = {p: sum(part.us for part in parts) for p, parts in of_pass.items()}

    def add(name: str, found: Mapping[str, Part], shares: bool = True) -> None:
        cells = []
        for p in split.wall_us:
            part = found.get(p)
            share = part.us / sums[p] if part and shares and sums[p] else None
            us, launches = (part.us, part.launches) if part else (None, None)
            cells += [_cell(us, ".1f"), _cell(share, ".1%"), _cell(launches, "g")]
        table.add_row(name, *cells)

    for name in [*dict.fromkeys(part.name for part in split.parts if part.name != ELSEWHERE), ELSEWHERE]:
        add(name, {part.pass_: part for part in split.parts if part.name == name})
    table.add_section()
    counts = {p: [part.launches for part in parts if part.launches is not None] for p, parts in of_pass.items()}
    add("sum", {p: Part(p, "sum", sums[p], sum(n) if n else None) for p, n in counts.items()}, shares=False)
    if kind == "cuda":
        clock = {p: Part(p, "clock", us, None) for p, us in split.wall_us.items()}
        add("host's clock, profiled", clock, shares=False)
    console.print(table)
    if any(part.name == ATEN for part in split.parts):
        console.print(f"{ATEN} is one part; what it runs is in the table below")
    console.print(_table_of_rows(split.rows, kind))
    for line in split.notes:
        console.print(f"note      {line}", markup=False)
    console.print(f"trace     {path} (chrome://tracing, ui.perfetto.dev)", markup=False, soft_wrap=True)


# Columns of a launch or an op: what is printed, the unit it is divided by, and how
Columns = dict[str, tuple[Callable[[Row], float | None], float, str]]
TIMES: Columns = {"us each": (lambda row: row.each_us, 1, ".1f"), "us": (lambda row: row.us, 1, ".1f")}
COUNTS: Columns = {"MB": (lambda row: row.bytes, 1e6, ".3f"), "Mflop": (lambda row: row.flops, 1e6, ".3f")}
RATES: Columns = {
    "GB/s": (lambda row: row.bytes / row.us if row.us and row.bytes is not None else None, 1e3, ".3g"),
    "TFLOP/s": (lambda row: row.flops / row.us if row.us and row.flops is not None else None, 1e6, ".3g"),
}
COLUMNS = {"cuda": TIMES | COUNTS | RATES, "cpu": TIMES, "interpreter": COUNTS}


def _table_of_rows(rows: Sequence[Row], kind: str) -> Any:
    from rich.table import Table

    shown = rows[:OPS] if kind == "cpu" else rows
    titles = {
        "cuda": "launches of a call",
        "cpu": f"ops of a call, the {len(shown)} longest of {len(rows)}",
        "interpreter": "Triton launches of a call",
    }
    table = Table(title=titles[kind], title_justify="left")
    for i, column in enumerate(["op" if kind == "cpu" else "launch", "count", *COLUMNS[kind]]):
        table.add_column(column, justify="right" if i else "left", overflow="ellipsis", no_wrap=True)
    for row in shown:
        found = [_cell(of(row), form, unit) for of, unit, form in COLUMNS[kind].values()]
        table.add_row(row.name, _cell(row.count, "g"), *found)
    return table


def _cell(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else format(value / unit, form)
