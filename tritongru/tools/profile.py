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

from .. import registry
from ..module import GRU, GRUCell
from ..parts import profiling
from .files import replacing
from .trace import ATEN, ELSEWHERE, PASS, PASSES, Counted, Row, Split, read

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
        device = next((t.device for t in _tensors((self.inputs, *self.module.parameters()))), torch.device("cpu"))
        with torch.set_grad_enabled(self.training):
            with around("forward"):
                result = self.module(*self.inputs)
                _wait(device)
            if not self.training:
                return
            outputs = [t for t in _tensors(result) if t.is_floating_point() and t.requires_grad]
            if not outputs:
                raise UsageError("no output of the model needs a gradient: profile it with --inference")
            if [t.shape for t in outputs] != [t.shape for t in self.cotangents]:
                generator = torch.Generator().manual_seed(0)
                self.cotangents = [torch.randn(t.shape, generator=generator, device="cpu").to(t) for t in outputs]
            with around("backward"):
                torch.autograd.backward(outputs, self.cotangents)
                _wait(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in tuples, lists and dictionaries, a PackedSequence's data alone."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _to(value: Any, device: torch.device) -> Any:
    if hasattr(value, "to"):  # a tensor, a PackedSequence
        return value.to(device)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_to(each, device) for each in value)
    if isinstance(value, list):
        return [_to(each, device) for each in value]
    if isinstance(value, dict):
        return {key: _to(each, device) for key, each in value.items()}
    return value


def given(arguments: Any, device: torch.device) -> Subject:
    """The subject that the command line names.

    Raises:
        UsageError: no such file or function, or it raises, or gives something else than a module and its inputs.
    """
    if arguments.module is None:
        sizes = arguments.input or arguments.hidden, arguments.hidden, arguments.layers
        dtype = {name: dtype for dtype, name in registry.DTYPES.items()}[arguments.dtype or "fp32"]
        module: Any = GRU(*sizes, bidirectional=arguments.bidirectional, device=device, dtype=dtype)
        found: Any = module
    else:
        found = _made_by(arguments.module)
        module = found[0] if isinstance(found, tuple) and len(found) == 2 else found
        if not isinstance(module, nn.Module):
            kind = type(module).__name__
            raise UsageError(f"{arguments.module} must return a module, or (module, inputs), got {kind}")
        module = module.to(device)
    if found is not module and isinstance(found, tuple):
        inputs = found[1] if isinstance(found[1], tuple) and not isinstance(found[1], PackedSequence) else (found[1],)
        inputs = _to(inputs, device)
    else:
        inputs = (_drawn(module, arguments),)
    module.train(not arguments.inference)
    return Subject(module, inputs, not arguments.inference)


def _drawn(module: nn.Module, arguments: Any) -> Tensor:
    if not isinstance(module, nn.GRU):
        raise UsageError(
            f"{arguments.module} returned a {type(module).__name__} without inputs: expected (module, inputs), "
            "or a GRU, whose input is drawn"
        )
    if arguments.batch is None or arguments.time is None:
        raise UsageError("the input of a GRU is drawn from --batch and --time: expected both")
    B, T = arguments.batch, arguments.time
    leading = (B, T) if module.batch_first else (T, B)
    weight = module.weight_ih_l0
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*leading, module.input_size, generator=generator, device="cpu").to(weight)


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
        profiler = profiled(subject, calls, device)
    trace = written(profiler, path)
    split = read(trace, calls, counted, kind)
    split = replace(split, notes=(*split.notes, *not_run(backends.values(), counted, split)))
    if arguments.json:
        print(json.dumps(_as_dict(split, device, kind, backends, calls, path), indent=2))
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
    plan = registry.plan(module, inputs[0])
    return plan.backend, plan.reason


def not_run(backends: Iterable[str], counted: Mapping[str, Sequence[Counted]], split: Split) -> Iterator[str]:
    """A note on each backend that should have run, of which nothing did."""
    launched = [name for p in PASSES for name, _ in counted.get(p, ())]
    ran = any(part.name == "recurrence" for part in split.parts)
    for backend in dict.fromkeys(backends):
        if backend == "aten" or (ran if backend == "reference" else any(name.startswith(backend) for name in launched)):
            continue
        if launched and backend == "sequence":
            yield "nothing of backend 'sequence' ran: 'step' did, as where a driver refuses a cooperative launch"
        else:
            yield f"nothing of backend {backend!r} ran: PyTorch's own path did, as under torch.func's derivatives"


def profiled(subject: Subject, calls: int, device: torch.device) -> torch.profiler.profile:
    """What torch.profiler sees of the calls."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profiling(), torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            subject.call(lambda pass_: record_function(PASS + pass_))
    return profiler


def written(profiler: torch.profiler.profile, path: Path) -> dict[str, Any]:
    """The Chrome trace, which is written to `path` too."""
    with replacing(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
        trace: dict[str, Any] = json.loads(temporary.read_text(encoding="utf-8"))
    return trace


def _versions(device: torch.device) -> dict[str, str]:
    found = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}
    if device.type == "cpu":
        found["threads"] = str(torch.get_num_threads())
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


def _as_dict(
    split: Split, device: torch.device, kind: str, backends: Iterable[str], calls: int, path: Path
) -> dict[str, Any]:
    return {
        **_versions(device), "calls": calls, "times": MEANING[kind], "backends": list(backends), **asdict(split),
        "trace": str(path),
    }  # fmt: skip


def _print(
    console: Any, split: Split, device: torch.device, kind: str, backends: Iterable[str], calls: int, path: Path
) -> None:
    from rich.table import Table

    console.print(", ".join(f"{what} {value}" for what, value in _versions(device).items()), markup=False)
    for line in list(backends) or ["no GRU module ran"]:
        console.print(f"backend   {line}", markup=False)
    console.print(f"calls     {calls} after {1 if calls == 1 else WARM_UP} to warm up; medians; {MEANING[kind]}")
    passes = list(split.wall_us)
    table = Table(title="parts of a call", title_justify="left")
    table.add_column("part")
    for pass_ in passes:
        table.add_column(f"{pass_}, us", justify="right")
        table.add_column("share", justify="right")
        table.add_column("launches", justify="right")
    by = {(part.pass_, part.name): part for part in split.parts}
    sums = {p: sum(part.us for part in split.parts if part.pass_ == p) for p in passes}
    names = list(dict.fromkeys(part.name for part in split.parts if part.name != ELSEWHERE))
    for name in [*names, ELSEWHERE]:
        cells: list[str] = []
        for p in passes:
            part = by.get((p, name))
            if part is None:
                cells += [""] * 3
            else:
                cells += [f"{part.us:.1f}", f"{part.us / sums[p]:.1%}" if sums[p] else "", _number(part.launches)]
        table.add_row(name, *cells)
    table.add_section()
    cells = []
    for p in passes:
        all_launches = [part.launches for part in split.parts if part.pass_ == p and part.launches is not None]
        cells += [f"{sums[p]:.1f}", "", _number(sum(all_launches) if all_launches else None)]
    table.add_row("sum", *cells)
    if kind == "cuda":
        table.add_row("host's clock, profiled", *(cell for p in passes for cell in (f"{split.wall_us[p]:.1f}", "", "")))
    console.print(table)
    if any(part.name == ATEN for part in split.parts):
        console.print(f"{ATEN} is one part; what it runs is in the table below")
    _print_rows(console, split.rows, kind)
    for line in split.notes:
        console.print(f"note      {line}", markup=False)
    console.print(f"trace     {path} (chrome://tracing, ui.perfetto.dev)", markup=False, soft_wrap=True)


def _print_rows(console: Any, rows: Sequence[Row], kind: str) -> None:
    from rich.table import Table

    shown = rows[:OPS] if kind == "cpu" else rows
    titles = {
        "cuda": "launches of a call",
        "cpu": f"ops of a call, the {len(shown)} longest of {len(rows)}",
        "interpreter": "Triton launches of a call",
    }
    table = Table(title=titles[kind], title_justify="left")
    timed, counts = kind != "interpreter", kind != "cpu"
    columns = ["op" if kind == "cpu" else "launch", "count"]
    columns += ["us each", "us"] * timed + ["MB", "Mflop"] * counts + ["GB/s", "TFLOP/s"] * (timed and counts)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="ellipsis", no_wrap=True)
    for row in shown:
        cells = [row.name, _number(row.count)]
        if timed:
            cells += [f"{row.each_us:.1f}", f"{row.us:.1f}"]
        if counts:
            cells += _counts(row, timed)
        table.add_row(*cells)
    console.print(table)


def _counts(row: Row, timed: bool) -> list[str]:
    if row.bytes is None or row.flops is None:
        return []
    cells = [f"{row.bytes / 1e6:.3f}", f"{row.flops / 1e6:.3f}"]
    if timed and row.us:
        cells += [f"{row.bytes / row.us / 1e3:.3g}", f"{row.flops / row.us / 1e6:.3g}"]
    return cells


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
