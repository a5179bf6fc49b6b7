"""A suite: providers side by side on each of its shapes. Right first, then timed.

Per shape: one draw of weights, inputs and cotangents, the truth by nn.GRU (of an LSTM or RNN: by itself) in float64 on
the device. A provider makes each pass once (`first_call_s`: its kernels are compiled, unless an earlier row's were the
same), then has every tensor held against the truth (work.verdict); what is wrong gets rows that say so, and is not
timed. Entries that are not checked (the grid's, whose kernels suite `right` holds against float64) are timed at once.
Then, pass by pass, the providers' calls are sampled in turn.

`p50_us` is per call, of `calls` calls in a row from an idle device to the end of the work, the host's share included:
of long calls one, as one waits for it; short ones overlap, as in a loop. `device_us` is the same call replayed from a
CUDA graph, where the host keeps nothing waiting; where it cannot be captured, `note` says why. A capture that fails
spoils its process: the run ends behind that entry, and one that is resumed goes on. The same tensors are used over and
over: with `l2` warm, what fits in L2 is found there. `limit_us` is the least time of the call for tritongru's kernels
(limit.py) by ceilings that ceilings.py measured before. `note` names the host, and says so where the GPU was in use.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritongru.planning import Device, describe
from tritongru.planning.devices import of_cuda
from tritongru.products import rnn_precision

from . import START, tune, work
from .cases import BASELINE, Case, Entry
from .limit import Ceilings, call_limit_us
from .providers import Provider, find
from .results import ROWS, UNKNOWN, Environment, ResultsFile, Row, folder_of, read
from .suites import SUITES, shrunk
from .timing import Call, CudaMeter, HostMeter, Timed, interleave, p99, quantiles

SECONDS = 1.0  # per case and pass, over all providers
SAMPLE_US = 1000.0  # calls that are shorter are sampled several in a row ...
LAUNCHES = 256  # ... as long as the launch queue does not fill
REPLAYS = 5
H200 = describe("h200")  # whose tiles a suite is made of where there is no GPU
FAILED = ("wrong", "error")
INTERRUPTED, DEVICE_LOST, SPENT = 130, 3, 4  # exit codes; SPENT: the budget was, before all was measured


class CaptureError(RuntimeError):
    """A call could not be captured in a CUDA graph: the process is no place for another measurement."""


LOST = (torch.AcceleratorError, CaptureError)


def no_gpu() -> str | None:
    """Why nothing can be timed on a GPU here."""
    if not torch.cuda.is_available():
        return (
            "no CUDA device here, nothing to time on one; `python -m benchmarks --suite cpu` measures what needs none, "
            "`python -m benchmarks compiled` what the compiler makes of the kernels"
        )
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, kernels would be interpreted: unset it"
    return None


def main(
    suite: str,
    out: Path | None = None,
    only: Sequence[str] = (),
    extra: Sequence[str] = (),
    device: int = 0,
    cold: bool = False,
    resume: bool = False,
    budget_minutes: float | None = None,
    since: str | None = None,
) -> int:
    """Run a suite on a CUDA device; 0 if nothing was wrong and nothing failed."""
    why_not = no_gpu()
    if why_not:
        print(f"python -m benchmarks --suite {suite}: {why_not}", file=sys.stderr)
        return 1
    ends = math.inf if budget_minutes is None else START + 60 * budget_minutes
    torch.cuda.set_device(device)
    os.environ.setdefault("TRITONGRU_WAIT_SECONDS", "1")  # a wait that runs out is waited for again and again
    meter = CudaMeter(cold)
    environment = Environment.here(meter.device)
    if suite == "tune":
        tune.forget(environment.device)
    entries = chosen(suite, only, extra, of_cuda(device))
    out = folder_of(environment.device) if out is None else out
    with tempfile.TemporaryDirectory() as fresh, ResultsFile(out / ROWS, environment) as results:
        if suite == "first" or "TRITON_CACHE_DIR" not in os.environ:
            os.environ["TRITON_CACHE_DIR"] = fresh  # so that a first call is one that compiles
        ceilings = None
        if suite == "workloads":
            from .ceilings import of_card

            ceilings = of_card(device, out, environment, reuse=resume)
        if resume:
            entries = unmeasured(entries, results, meter.l2, since)
        code = run(entries, meter, results, ends, ceilings)
    if suite == "tune":
        print(tune.write(out))
    return code


def rehearse(suite: str, out: Path) -> int:
    """A suite's first entries, small, on the CPU, with the kernels emulated: the same code, and times that mean
    nothing; 0 if nothing was wrong and nothing failed."""
    with ResultsFile(out / ROWS, Environment.here(torch.device("cpu"))) as results:
        return run(shrunk(suite), HostMeter(), results)


def chosen(suite: str, only: Sequence[str] = (), extra: Sequence[str] = (), device: Device = H200) -> list[Entry]:
    """The suite's entries with every text of `only` in their name, the providers `extra` added to each.

    Raises:
        ValueError: there is none; or no such provider.
    """
    for name in extra:
        find(name)
    suite_entries = SUITES[suite](device)
    found = [
        dataclasses.replace(entry, providers=tuple(dict.fromkeys((*entry.providers, *extra))))
        for entry in suite_entries
        if all(text in entry.case.name for text in only)
    ]
    if not found:
        names = ", ".join(entry.case.name for entry in suite_entries[:20])
        more = f" and {len(suite_entries) - 20} more" if len(suite_entries) > 20 else ""
        raise ValueError(
            f"no case of suite {suite} has {' and '.join(map(repr, only))} in its name; there are {names}{more}"
        )
    return found


def unmeasured(entries: Sequence[Entry], results: ResultsFile, l2: str, since: str | None = None) -> list[Entry]:
    """The entries of which the file lacks a row that was taken by the same code, versions and device.

    Of a changed tree, or one whose commit is not known, nothing counts as the same code, but for rows of `since`, a
    date: those of the run that goes on.
    """
    known = results.fixed["dirty"] != "yes" and results.fixed["commit"] != UNKNOWN
    same = [name for name in results.fixed if name != "date"]
    there = {
        (row["case"], row["provider"], row["pass"], row["l2"])
        for row in read(results.path)
        if (known or (since and row["date"] >= since)) and all(row[name] == str(results.fixed[name]) for name in same)
    }
    return [
        entry
        for entry in entries
        if any((entry.case.name, p, pass_, l2) not in there for p in entry.providers for pass_ in entry.passes)
    ]


def run(
    entries: Sequence[Entry],
    meter: HostMeter,
    results: ResultsFile,
    ends: float = math.inf,
    ceilings: Ceilings | None = None,
) -> int:
    """Measure the entries, each row appended and printed as it comes; SPENT where the budget was, INTERRUPTED where it
    was, DEVICE_LOST where a CUDA error ended it: after one of a capture, too, the process is no place for another
    measurement.

    ends: of time.monotonic(); no entry begins after it.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    fixed = results.fixed
    software = {"torch": "torch", "triton": "triton", "cudnn": "cuDNN", "driver": "driver"}
    versions = ", ".join(f"{said} {fixed[name]}" for name, said in software.items() if fixed[name] not in ("", "none"))
    changed = {"no": "", "yes": ", with changes"}.get(fixed["dirty"], f" (changed: {fixed['dirty']})")
    console.print(f"{fixed['device']}; {versions}; commit {fixed['commit']}{changed}", soft_wrap=True)
    l2 = f", L2 {meter.l2}" if meter.l2 else ""
    console.print(
        f"us per call: p50 [p20, p80]{l2}; ratios to {BASELINE} in the same rounds, below 1 is faster: as they are "
        "called, and both in a CUDA graph",
        soft_wrap=True,
    )
    failed, spent = 0, False
    gc.collect()
    gc.freeze()  # what was imported is there to stay: the collections between cases need not look at it
    try:
        for done, entry in enumerate(entries):
            if time.monotonic() > ends:
                left = len(entries) - done
                console.print(f"the budget is spent; {left} cases not measured, {entry.case.name} the first of them")
                spent = True
                break
            left_over = [(provider, pass_) for provider in entry.providers for pass_ in entry.passes]
            graphs: dict[str, float] = {}  # of nn.GRU, by pass
            try:
                for row in measure(entry, meter, ceilings):
                    results.append(row)
                    if row.provider == BASELINE and row.device_us:
                        graphs[row.pass_] = row.device_us
                    console.print(line(row, graphs.get(row.pass_)), soft_wrap=True)
                    failed += row.status in FAILED
                    left_over.remove((row.provider, row.pass_))
            except LOST as error:
                for provider, pass_ in left_over:  # so that a run that is resumed begins with the next entry
                    results.append(Row(entry.case, provider, pass_, "error", _brief(error), l2=meter.l2))
                raise
            meter.release()
    except KeyboardInterrupt:
        console.print(f"interrupted; the {results.count} rows so far are in {results.path}", soft_wrap=True)
        return INTERRUPTED
    except LOST as error:
        console.print(f"the device failed: {_brief(error)}; the {results.count} rows so far are in {results.path}")
        return DEVICE_LOST
    finally:
        gc.unfreeze()
    said = f"{results.count} rows in {results.path}" + (f", {failed} wrong or failed" if failed else "")
    console.print(said, soft_wrap=True)
    return 1 if failed or (entries and not results.count) else SPENT if spent else 0


def line(row: Row, graph_us: float | None = None) -> str:
    """A row for the terminal; graph_us: of nn.GRU in a CUDA graph."""
    head = f"{row.case.name:<36} {row.provider:<16} {row.pass_:<16}"
    error = f"  error {max(row.errors.values()):.1e}" if row.errors else ""
    if row.status != "ok" or row.p50_us is None:
        return f"{head} {row.status}: {row.note}{error}"
    text = f"{head} {row.p50_us:9.1f} [{row.p20_us:.1f}, {row.p80_us:.1f}]"
    if row.p99_us is not None:
        text += f"  p99 {row.p99_us:.1f}"
    if row.ratio is not None:
        text += f"  ratio {row.ratio:.3f}"
    if row.device_us is not None:
        text += f"  host {row.host_us:.1f}, in a graph {row.device_us:.1f}"
        if graph_us:
            text += f" ratio {row.device_us / graph_us:.3f}"
        if row.limit_us is not None:
            text += f" ({100 * row.limit_us / row.device_us:.0f} % of the limit)"
    return text + error


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A provider that is right: the seconds of its first calls by pass, and its errors."""

    module: nn.Module
    first: dict[str, float]
    errors: dict[str, float] | None


def measure(entry: Entry, meter: HostMeter, ceilings: Ceilings | None = None) -> Iterator[Row]:
    """The rows of one entry: one for each of its providers and passes, whatever becomes of it.

    Raises:
        torch.AcceleratorError, CaptureError: the device is lost, or the process spoiled.
    """
    case, cuda = entry.case, meter.device.type == "cuda"
    with _precision(case):
        precision = rnn_precision(cuda and torch.version.hip is None)
        products = precision if case.dtype == "fp32" else ""
        note = "; ".join(filter(None, (meter.note(), entry.note)))

        def rows(provider: str, passes: Sequence[str] = entry.passes, **figures: Any) -> Iterator[Row]:
            for pass_ in passes:
                yield Row(case, provider, pass_, products=products, l2=meter.l2, **{"note": note, **figures})

        inputs, no_inputs = _attempt(work.Inputs.draw, case, meter.device)
        trains = any(work.PASSES[name].trains for name in entry.passes)
        truths: dict[str, Any] = {}  # of each kind of network: weights, and the outcome in float64
        yardsticks: dict[str, dict[str, float]] = {}  # errors of the networks themselves, in the case's dtype
        ready: dict[Provider, _Ready] = {}
        for provider in map(find, entry.providers):
            why_not = provider.unserved(case)
            if why_not:
                yield from rows(provider.name, status="unserved", note=why_not)
                continue
            if inputs is None:
                yield from rows(provider.name, **no_inputs)
                continue
            if provider.truth not in truths:
                truths[provider.truth] = _attempt(_truth, entry, provider.truth, inputs, trains)
            known, no_truth = truths[provider.truth]
            if known is None:
                yield from rows(provider.name, **{**no_truth, "note": f"float64: {no_truth['note']}"})
                continue
            made, why_wrong = _attempt(_prepare, provider, entry, *known, inputs, meter)
            if made is None:
                yield from rows(provider.name, **why_wrong)
                continue
            if made.errors is None:
                ready[provider] = made
                continue
            if provider.name == provider.truth:
                yardsticks[provider.name] = made.errors
            yardstick = yardsticks.get(provider.truth, {}) if provider.ours else None
            wrong = work.verdict(case, made.errors, yardstick, precision == "tf32")
            if wrong:
                yield from rows(provider.name, status="wrong", note=wrong, errors=made.errors)
            else:
                ready[provider] = made
        truths.clear()
        known = made = None  # they held the last ones
        if entry.rounds == 0:
            for provider, of_it in ready.items():
                yield from rows(provider.name, errors=of_it.errors)
            return
        for name in entry.passes:
            yield from _timed(entry, name, ready, inputs, meter, ceilings, rows, note)


def _timed(
    entry: Entry,
    name: str,
    ready: dict[Provider, _Ready],
    inputs: work.Inputs,
    meter: HostMeter,
    ceilings: Ceilings | None,
    rows: Callable[..., Iterator[Row]],
    note: str,
) -> Iterator[Row]:
    """The rows of one pass."""
    case, pass_ = entry.case, work.PASSES[name]
    calls: dict[str, Call] = {}
    timed: dict[str, Timed] = {}
    for provider, made in ready.items():
        alone = pass_.one_by_one or entry.replayed or meter.l2 == "cold"
        call = pass_.make(made.module, inputs)
        if entry.replayed:
            call = _captured(call, meter) or call
        timing, failure = _attempt(_warm, Timed(call, 1), case, alone, meter)
        if timing is None:
            yield from rows(provider.name, [name], **failure)
        else:
            calls[provider.name], timed[provider.name] = call, timing
    failures: dict[str, Exception] = {}
    rounds = max(entry.rounds, pass_.rounds) if pass_.one_by_one else entry.rounds
    samples = interleave(timed, meter, rounds=rounds, seconds=SECONDS, failures=failures)
    for provider_name, error in failures.items():
        yield from rows(provider_name, [name], **_failure(error))
    baseline = quantiles([s.time_us for s in samples[BASELINE]])[1] if BASELINE in samples else None
    for provider, made in ready.items():
        if provider.name not in samples:
            continue
        taken = samples[provider.name]
        times = [s.time_us for s in taken]
        p20, p50, p80 = quantiles(times)
        spoiled, device_us = None, None
        if not entry.replayed:
            try:
                device_us = _replayed_us(calls[provider.name], meter)
            except CaptureError as error:
                spoiled = error
        memory = None
        if pass_.trains and entry.checked and spoiled is None:
            memory, _ = _attempt(_memory, made.module, inputs, meter)
        peak, saved = memory or (None, None)
        yield from rows(
            provider.name, [name], first_call_s=made.first[name], rounds=len(taken),
            calls=timed[provider.name].calls, p50_us=p50, p20_us=p20, p80_us=p80,
            p99_us=p99(times) if pass_.one_by_one else None, ratio=p50 / baseline if baseline else None,
            host_us=quantiles([s.host_us for s in taken])[1], device_us=device_us,
            limit_us=_limit_us(case, pass_, provider, meter, ceilings), peak_mib=peak, saved_mib=saved,
            errors=made.errors, note=f"{note}; {spoiled}" if spoiled else note,
        )  # fmt: skip
        if spoiled:
            raise spoiled


def _captured(call: Call, meter: HostMeter) -> Call | None:
    """The call in a CUDA graph; None where there are none."""
    try:
        return meter.captured(call)
    except torch.AcceleratorError:
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


def _truth(
    entry: Entry, name: str, inputs: work.Inputs, trains: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Weights in the case's dtype, and, where the entry is checked, the outcome in float64."""
    state = work.weights(entry.case, inputs.x.device, name)
    if not entry.checked:
        return state, None
    module = find(name).make(entry.case, device=inputs.x.device, dtype=torch.float64)
    module.load_state_dict(state)
    return state, work.outcome(module, inputs.double(), trains)


def _prepare(
    provider: Provider,
    entry: Entry,
    state: dict[str, Tensor],
    truth: dict[str, Tensor] | None,
    inputs: work.Inputs,
    meter: HostMeter,
) -> _Ready:
    case = entry.case
    module = provider.make(case, device=meter.device, dtype=work.TORCH_DTYPES[case.dtype])
    module.load_state_dict(state)
    first = {name: _seconds(work.PASSES[name].make(module, inputs), meter) for name in entry.passes}
    if truth is None:
        return _Ready(module, first, None)
    found = work.outcome(module, inputs, any(work.PASSES[name].trains for name in entry.passes))
    meter.synchronize()
    return _Ready(module, first, work.errors(found, truth))


def _limit_us(
    case: Case, pass_: work.Pass, provider: Provider, meter: HostMeter, ceilings: Ceilings | None
) -> float | None:
    """The least time of the call by measured ceilings, for tritongru's kernels: a limit of their tilings."""
    if ceilings is None or meter.device.type != "cuda" or not provider.ours:
        return None
    rows = sum(case.lengths) or None
    return call_limit_us(case.problem(pass_.trains), of_cuda(meter.device.index), ceilings, rows).us


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


def _warm(timed: Timed, case: Case, alone: bool, meter: HostMeter) -> Timed:
    """Warmed up, and with as many calls per sample as make it long enough; `alone`: with one."""
    estimate = min(meter.sample(timed).time_us for _ in range(5))
    wanted = 1 if alone else math.ceil(SAMPLE_US / max(estimate, 1.0))
    launches = case.T * case.layers
    return Timed(timed.call, max(1, min(wanted, LAUNCHES // launches)))


def _memory(module: nn.Module, inputs: work.Inputs, meter: HostMeter) -> tuple[float | None, float | None]:
    """MiB: peak of forward and backward above what lay there before; kept between them, without the results."""
    meter.release()
    before = meter.allocated()
    if not before:
        return None, None
    meter.peak()
    results = work.forward(module, inputs)()
    saved = meter.allocated() - before - sum(r.numel() * r.element_size() for r in results)
    gradients = torch.autograd.grad(results, [inputs.x, *module.parameters()], inputs.cotangents)
    peak = meter.peak() - before
    del results, gradients
    return peak / 2**20, saved / 2**20
