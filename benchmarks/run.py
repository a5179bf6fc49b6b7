"""A suite: providers side by side on each of its shapes. Right first, then timed.

Per shape: one draw of weights, inputs and cotangents, the truth by nn.GRU in float64 on the device. A provider makes
each pass once (`first_call_s`: its kernels are compiled, unless an earlier row's were the same), then has every tensor
held against the truth (work.verdict); what is wrong gets rows that say so, and is not timed. Entries that are not
checked (the grid's, whose kernels suite `right` holds against float64) are timed at once. Then, pass by pass, the
providers' calls are sampled in turn.

`p50_us` is per call, of `calls` calls in a row from an idle device to the end of the work, the host's share included:
of long calls one, as one waits for it; short ones overlap, as in a loop. `device_us` is the same call replayed from a
CUDA graph, where the host keeps nothing waiting. A call that waits for the device is in none, and `note` says so. Any
other capture that fails spoils its process: the run ends behind that entry, and one that is resumed goes on. The same
tensors are used over and over: what fits in L2 is found there. `note` names the host, and says so where the GPU was in
use.
"""

import gc
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritongru.planning import describe
from tritongru.planning.devices import of_cuda
from tritongru.products import rnn_precision

from . import START, tune, work
from .cases import BASELINE, Case, Entry
from .providers import Provider, find
from .results import ROWS, Environment, ResultsFile, Row, folder_of, read
from .suites import chosen, shrunk
from .timing import Call, CudaMeter, HostMeter, Timed, WaitsError, interleave, quantiles

SAMPLE_US = 1000.0  # calls that are shorter are sampled several in a row ...
LAUNCHES = 256  # ... as long as the launch queue does not fill
REPLAYS = 5
H200 = describe("h200")  # whose tiles a suite is made of where there is no GPU
FAILED = ("wrong", "error")
INTERRUPTED, DEVICE_LOST, SPENT = 130, 3, 4  # exit codes; SPENT: the budget was, before all was measured

Rows = Callable[..., Iterator[Row]]


class CaptureError(RuntimeError):
    """A call could not be captured in a CUDA graph: the process is no place for another measurement."""


LOST = (torch.AcceleratorError, CaptureError)


def no_gpu() -> str | None:
    """Why nothing can be timed on a GPU here."""
    if not torch.cuda.is_available():
        return (
            "no CUDA device here, nothing to time on one; `python -m benchmarks cpu` measures what needs none, "
            "`python -m benchmarks compiled` what the compiler makes of the kernels"
        )
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, kernels would be interpreted: unset it"
    return None


def main(
    suite: str, out: Path | None = None, only: Sequence[str] = (), extra: Sequence[str] = (), since: str | None = None,
    budget_minutes: float | None = None,
) -> int:  # fmt: skip
    """Run a suite on the current CUDA device; 0 if nothing was wrong and nothing failed.

    since: a date: leave out what the file has from then on. budget_minutes: nothing begins after them.
    """
    why_not = no_gpu()
    if why_not:
        print(f"python -m benchmarks --suite {suite}: {why_not}", file=sys.stderr)
        return 1
    ends = math.inf if budget_minutes is None else START + 60 * budget_minutes
    os.environ.setdefault("TRITONGRU_WAIT_SECONDS", "1")  # a wait that runs out is waited for again and again
    warnings.filterwarnings("once", "RNN module weights")  # nn.GRU's, in bfloat16, where nobody can flatten them
    meter = CudaMeter()
    environment = Environment.here(meter.device)
    if suite == "tune":
        tune.forget(environment.device)
    entries = chosen(suite, only, extra, of_cuda(meter.device.index or 0))
    out = folder_of(environment.device) if out is None else out
    with tempfile.TemporaryDirectory() as fresh, ResultsFile(out / ROWS, environment) as results:
        if suite == "first" or "TRITON_CACHE_DIR" not in os.environ:
            os.environ["TRITON_CACHE_DIR"] = fresh  # so that a first call is one that compiles
        if since:
            entries = unmeasured(entries, results.path, since)
        code = run(entries, meter, results, ends)
    if suite == "tune":
        print(tune.write(out))
    return code


def rehearse(suite: str, out: Path) -> int:
    """A suite's first entries, small, on the CPU, with the kernels emulated: the same code, and times that mean
    nothing; 0 if nothing was wrong and nothing failed."""
    with ResultsFile(out / ROWS, Environment.here(torch.device("cpu"))) as results:
        return run(shrunk(suite), HostMeter(), results)


def unmeasured(entries: Sequence[Entry], path: Path, since: str) -> list[Entry]:
    """The entries of which the file lacks a row since a date."""
    there = {(row["case"], row["provider"], row["pass"]) for row in read(path) if row["date"] >= since}
    return [
        entry
        for entry in entries
        if any(
            (entry.case.name, provider, pass_) not in there for provider in entry.providers for pass_ in entry.passes
        )
    ]


def run(entries: Sequence[Entry], meter: HostMeter, results: ResultsFile, ends: float = math.inf) -> int:
    """Measure the entries, each row appended and printed as it comes; SPENT where the budget was, INTERRUPTED where it
    was, DEVICE_LOST where a CUDA error ended it: after one of a capture, too, the process is no place for another
    measurement.

    ends: of time.monotonic(); no entry begins after it.
    """
    print(results.environment)
    print(f"us per call: p50 [p20, p80]; ratios to {BASELINE}, below 1 is faster: as called, and both in a CUDA graph")
    failed, spent = 0, False
    gc.collect()
    gc.freeze()  # what was imported is there to stay: the collections between cases need not look at it
    try:
        for done, entry in enumerate(entries):
            if time.monotonic() > ends:
                print(f"the budget is spent; {len(entries) - done} cases not measured, {entry.case.name} the first")
                spent = True
                break
            left_over = [(provider, pass_) for provider in entry.providers for pass_ in entry.passes]
            graphs: dict[str, float] = {}  # of nn.GRU, by pass
            try:
                for row in measure(entry, meter):
                    results.append(row)
                    if row.provider == BASELINE and row.device_us:
                        graphs[row.pass_] = row.device_us
                    print(line(row, graphs.get(row.pass_)), flush=True)
                    failed += row.status in FAILED
                    left_over.remove((row.provider, row.pass_))
            except LOST as error:
                for provider, pass_ in left_over:  # so that a run that is resumed begins with the next entry
                    results.append(Row(entry.case, provider, pass_, "error", _brief(error), l2=meter.l2))
                raise
            meter.release()
    except KeyboardInterrupt:
        print(f"interrupted; the {results.count} rows so far are in {results.path}")
        return INTERRUPTED
    except LOST as error:
        print(f"the device failed: {_brief(error)}; the {results.count} rows so far are in {results.path}")
        return DEVICE_LOST
    finally:
        gc.unfreeze()
    print(f"{results.count} rows in {results.path}" + (f", {failed} wrong or failed" if failed else ""))
    return 1 if failed or (entries and not results.count) else SPENT if spent else 0


def line(row: Row, graph_us: float | None = None) -> str:
    """A row for the terminal; graph_us: of nn.GRU in a CUDA graph."""
    head = f"{row.case.name:<36} {row.provider:<16} {row.pass_:<16}"
    error = f"  error {max(row.errors.values()):.1e}" if row.errors else ""
    if row.status != "ok" or row.p50_us is None:
        return f"{head} {row.status}: {row.note}{error}"
    parts = [f"{head} {row.p50_us:9.1f} [{row.p20_us:.1f}, {row.p80_us:.1f}]"]
    parts += [f"p99 {row.p99_us:.1f}"] if row.p99_us else []
    parts += [f"ratio {row.ratio:.3f}"] if row.ratio else []
    if row.device_us is not None:
        ratio = f" ratio {row.device_us / graph_us:.3f}" if graph_us else ""
        parts.append(f"host {row.host_us:.1f}, in a graph {row.device_us:.1f}{ratio}")
    return "  ".join(parts) + error


@dataclass(frozen=True)
class _Ready:
    """A provider that is right: the seconds of its first calls by pass, and its errors."""

    module: nn.Module
    first: dict[str, float]
    errors: dict[str, float] | None


def measure(entry: Entry, meter: HostMeter) -> Iterator[Row]:
    """The rows of one entry: one for each of its providers and passes, whatever becomes of it.

    Raises:
        torch.AcceleratorError, CaptureError: the device is lost, or the process spoiled.
    """
    case = entry.case
    with _precision(case):
        precision = rnn_precision(meter.device.type == "cuda" and torch.version.hip is None)
        common = dict(products=precision if case.dtype == "fp32" else "", l2=meter.l2)
        common["note"] = "; ".join(filter(None, (meter.note(), entry.note)))

        def rows(provider: str, passes: Sequence[str] = entry.passes, **figures: Any) -> Iterator[Row]:
            for pass_ in passes:
                yield Row(case, provider, pass_, **{**common, **figures})

        inputs, no_inputs = _attempt(work.Inputs.draw, case, meter.device)
        ready: dict[Provider, _Ready] = {}
        if inputs is None:
            for name in entry.providers:
                yield from rows(name, **no_inputs)
            return
        yield from _hold_against_truth(entry, inputs, meter, precision == "tf32", rows, ready)
        if entry.rounds == 0:
            for provider, made in ready.items():
                yield from rows(provider.name, errors=made.errors)
            return
        for name in entry.passes:
            yield from _timed(entry, name, ready, inputs, meter, rows, common["note"])


def _hold_against_truth(
    entry: Entry, inputs: work.Inputs, meter: HostMeter, tf32: bool, rows: Rows, ready: dict[Provider, _Ready]
) -> Iterator[Row]:
    """The providers that are right, into `ready`; the rows of all others. What it holds is gone when it ends."""
    known, no_truth = _attempt(_truth, entry, inputs)
    theirs: dict[str, float] = {}  # nn.GRU's errors, in the case's dtype
    for provider in map(find, entry.providers):
        if why_not := provider.unserved(entry.case):
            yield from rows(provider.name, status="unserved", note=why_not)
            continue
        if known is None:
            yield from rows(provider.name, **{**no_truth, "note": f"float64: {no_truth['note']}"})
            continue
        made, why_wrong = _attempt(_prepare, provider, entry, *known, inputs, meter)
        if made is None:
            yield from rows(provider.name, **why_wrong)
            continue
        if provider.name == BASELINE:
            theirs = made.errors or {}
        wrong = made.errors and work.verdict(entry.case, made.errors, theirs if provider.ours else None, tf32)
        if wrong:
            yield from rows(provider.name, status="wrong", note=wrong, errors=made.errors)
        else:
            ready[provider] = made


def _timed(
    entry: Entry, name: str, ready: dict[Provider, _Ready], inputs: work.Inputs, meter: HostMeter, rows: Rows,
    note: str,
) -> Iterator[Row]:  # fmt: skip
    """The rows of one pass."""
    pass_ = work.PASSES[name]
    timed: dict[str, Timed] = {}
    for provider, made in ready.items():
        timing, failure = _attempt(_warm, entry, pass_, made.module, inputs, meter)
        if timing is None:
            yield from rows(provider.name, [name], **failure)
        else:
            timed[provider.name] = timing
    samples, failures = interleave(timed, meter, rounds=max(entry.rounds, pass_.rounds), seconds=entry.seconds)
    for provider_name, error in failures.items():
        yield from rows(provider_name, [name], **_failure(error))
    baseline = quantiles([s.time_us for s in samples[BASELINE]])[1] if BASELINE in samples else None
    for provider, made in ready.items():
        if provider.name not in samples:
            continue
        taken = samples[provider.name]
        times = [s.time_us for s in taken]
        p20, p50, p80, p99 = quantiles(times, (0.2, 0.5, 0.8, 0.99))
        in_no_graph, device_us, memory = None, None, None
        if not entry.replayed:
            try:
                device_us = _replayed_us(timed[provider.name].call, meter)
            except (CaptureError, WaitsError) as error:
                in_no_graph = error
        spoiled = isinstance(in_no_graph, CaptureError)
        if pass_.trains and entry.checked and not spoiled:
            memory, _ = _attempt(_memory, made.module, inputs, meter)
        peak, saved = memory or (None, None)
        yield from rows(
            provider.name, [name], first_call_s=made.first[name], rounds=len(taken),
            calls=timed[provider.name].calls, p50_us=p50, p20_us=p20, p80_us=p80,
            p99_us=p99 if pass_.one_by_one else None, ratio=p50 / baseline if baseline else None,
            host_us=quantiles([s.host_us for s in taken])[1], device_us=device_us, peak_mib=peak, saved_mib=saved,
            errors=made.errors, note=f"{note}; {in_no_graph}" if in_no_graph else note,
        )  # fmt: skip
        if in_no_graph and spoiled:
            raise in_no_graph


def _captured(call: Call, meter: HostMeter) -> Call | None:
    """The call in a CUDA graph; None where there are none.

    Raises:
        WaitsError: there can be none of it. CaptureError: it failed.
    """
    try:
        return meter.captured(call)
    except WaitsError:
        raise
    except Exception as error:
        raise CaptureError(f"not captured in a CUDA graph: {_brief(error)}") from error


def _replayed_us(call: Call, meter: HostMeter) -> float | None:
    replay = _captured(call, meter)
    if replay is None:
        return None
    meter.sample(Timed(replay))  # the first one uploads the graph
    return quantiles([meter.sample(Timed(replay)).time_us for _ in range(REPLAYS)])[1]


@contextmanager
def _precision(case: Case) -> Iterator[None]:
    """Inside: float32 products of RNNs as the case says."""
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    rnn.fp32_precision = case.precision
    try:
        yield
    finally:
        rnn.fp32_precision = before


def _trains(entry: Entry) -> bool:
    return any(work.PASSES[name].trains for name in entry.passes)


def _truth(entry: Entry, inputs: work.Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Weights in the case's dtype, and, where the entry is checked, the outcome in float64."""
    state = work.weights(entry.case, inputs.x.device)
    if not entry.checked:
        return state, None
    module = find(BASELINE).make(entry.case, device=inputs.x.device, dtype=torch.float64)
    module.load_state_dict(state)
    return state, work.outcome(module, inputs.double(), _trains(entry))


def _prepare(
    provider: Provider, entry: Entry, state: dict[str, Tensor], truth: dict[str, Tensor] | None, inputs: work.Inputs,
    meter: HostMeter,
) -> _Ready:  # fmt: skip
    module = provider.make(entry.case, device=meter.device, dtype=work.TORCH_DTYPES[entry.case.dtype])
    module.load_state_dict(state)
    first = {name: _seconds(work.PASSES[name].make(module, inputs), meter) for name in entry.passes}
    if truth is None and entry.rounds:
        return _Ready(module, first, None)
    found = work.outcome(module, inputs, _trains(entry))
    meter.synchronize()
    return _Ready(module, first, work.errors(found, truth) if truth else None)


def _attempt(do: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, str]]:
    """What `do` returns, or None and what a row says of its failure."""
    try:
        return do(*arguments), {}
    except LOST:
        raise
    except Exception as error:
        return None, _failure(error)


def _failure(error: Exception) -> dict[str, str]:
    """What a row says of it."""
    refused = str(error).startswith("backend ") and "cannot run here" in str(error)  # registry.refuse
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    status = "out of memory" if out_of_memory else "unserved" if refused else "error"
    return {"status": status, "note": _brief(error)}


def _brief(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _seconds(call: Call, meter: HostMeter) -> float:
    meter.synchronize()
    start = meter.clock()
    call()
    meter.synchronize()
    return meter.clock() - start


def _warm(entry: Entry, pass_: work.Pass, module: nn.Module, inputs: work.Inputs, meter: HostMeter) -> Timed:
    """What is sampled of a pass: warmed up, and as many calls in a row as make a sample long enough, or one alone."""
    case, call, alone = entry.case, pass_.make(module, inputs), pass_.one_by_one or entry.replayed
    if entry.replayed:
        call = _captured(call, meter) or call
    estimate = min(meter.sample(Timed(call)).time_us for _ in range(5))
    wanted = 1 if alone else math.ceil(SAMPLE_US / max(estimate, 1.0))
    return Timed(call, max(1, min(wanted, LAUNCHES // (case.T * case.layers))))


def _memory(module: nn.Module, inputs: work.Inputs, meter: HostMeter) -> tuple[float, float] | None:
    """MiB: peak of forward and backward above what lay there before; kept between them, without the results."""
    if meter.device.type != "cuda":
        return None
    meter.release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = work.forward(module, inputs)()
    saved = torch.cuda.memory_allocated() - before - sum(r.numel() * r.element_size() for r in results)
    gradients = torch.autograd.grad(results, [inputs.x, *module.parameters()], inputs.cotangents)
    meter.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del results, gradients
    return peak / 2**20, saved / 2**20
