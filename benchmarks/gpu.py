"""Suite `gpu`: providers against nn.GRU on the CUDA device. Right first, then timed.

Per case: one draw of weights, inputs and cotangents, the truth by nn.GRU in float64 on the device. A provider makes
each pass once (`first_call_s`, with an empty Triton cache), then has every tensor held against the truth
(work.verdict); what is wrong is a row that says so, and is not timed. Then, pass by pass, the providers' calls are
sampled in turn.

`p50_us` counts from an idle device to the end of the work, the host's share included, as in a call one waits for;
`device_us` has all launches queued beforehand, which a launch queue of 1024 allows at these sizes. The same tensors
are used over and over: what fits in L2 is found there.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritongru.launch.products import rnn_precision

from . import work
from .cases import GPU_CASES, Case
from .providers import BASELINE, GPU_PROVIDERS, Provider, find
from .results import Environment, ResultsFile, Row
from .timing import Call, CudaMeter, HostMeter, Timed, interleave, quantiles

ROUNDS = 40
SECONDS = 1.5  # per case and pass, over all providers
SAMPLE_US = 1000.0  # calls that are shorter are sampled several in a row ...
LAUNCHES = 256  # ... as long as the launch queue does not fill


def no_gpu() -> str | None:
    """Why nothing can be timed on a GPU here."""
    if not torch.cuda.is_available():
        return "no CUDA device here, nothing to time on one; `python -m benchmarks cpu` measures what needs none"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, kernels would be interpreted: unset it"
    return None


def main(out: Path, only: str | None, extra: Sequence[str], budget_minutes: float | None) -> int:
    """Run the suite; 0 if nothing was wrong and nothing failed."""
    why_not = no_gpu()
    if why_not:
        print(f"python -m benchmarks gpu: {why_not}", file=sys.stderr)
        return 1
    cases = [case for case in GPU_CASES if not only or only in case.name]
    if not cases:
        names = ", ".join(case.name for case in GPU_CASES)
        print(f"python -m benchmarks gpu: no case has {only!r} in its name; there are {names}", file=sys.stderr)
        return 2
    providers = [find(name) for name in (*GPU_PROVIDERS, *extra)]
    meter = CudaMeter()
    with (
        tempfile.TemporaryDirectory() as cache,
        ResultsFile(out / "gpu.csv", Environment.here(meter.device)) as results,
    ):
        os.environ["TRITON_CACHE_DIR"] = cache  # so that a first call is one that compiles
        return run(cases, providers, meter, results, budget_minutes)


def run(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    meter: HostMeter,
    results: ResultsFile,
    budget_minutes: float | None = None,
) -> int:
    """Measure the cases, each row appended and printed as it comes; 130 where it was interrupted."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(highlight=False, markup=False)
    fixed = results.fixed
    versions = f"torch {fixed['torch']}, triton {fixed['triton']}, cuDNN {fixed['cudnn']}, driver {fixed['driver']}"
    console.print(f"{fixed['device']}; {versions}; commit {fixed['commit']} (dirty: {fixed['dirty']})", soft_wrap=True)
    console.print("us per call: p50 [p20, p80]; ratio to nn.GRU in the same rounds, below 1 is faster", soft_wrap=True)
    ends = math.inf if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    failed = 0
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=len(cases))
            for done, case in enumerate(cases):
                if time.monotonic() > ends:
                    console.print(f"the budget is spent; not measured: {', '.join(c.name for c in cases[done:])}")
                    break
                progress.update(task, completed=done, description=case.name)
                rows = measure(case, providers, meter)
                while True:
                    row, failure = _attempt(lambda: next(rows, None))  # noqa: B023
                    if failure:
                        row = Row(case, "all", "timing", failure["status"], failure["note"])
                    if row is None:
                        break
                    results.append(row)
                    console.print(line(row), soft_wrap=True)
                    failed += row.status in ("wrong", "error")
                meter.release()
    except KeyboardInterrupt:
        console.print(f"interrupted; the {results.count} rows so far are in {results.path}", soft_wrap=True)
        return 130
    except torch.AcceleratorError as error:  # the device's context is lost: nothing more can run in this process
        console.print(f"the device failed: {_brief(error)}; the {results.count} rows so far are in {results.path}")
        return 1
    console.print(f"{results.count} rows in {results.path}" + (f", {failed} wrong or failed" if failed else ""))
    return 1 if failed or not results.count else 0


def line(row: Row) -> str:
    """A row for the terminal."""
    head = f"{row.case.name:<36} {row.provider:<16} {row.pass_:<16}"
    if row.status != "ok":
        return f"{head} {row.status}: {row.note}"
    text = f"{head} {row.p50_us:9.1f} [{row.p20_us:.1f}, {row.p80_us:.1f}]"
    if row.ratio is not None:
        text += f"  ratio {row.ratio:.3f}"
    if row.device_us is not None:
        text += f"  host {row.host_us:.1f}, device {row.device_us:.1f}"
    if row.errors:
        text += f"  error {max(row.errors.values()):.1e}"
    return text


def measure(case: Case, providers: Sequence[Provider], meter: HostMeter) -> Iterator[Row]:
    """The rows of one case; the baseline, if any, is the first of the providers."""
    precision = rnn_precision(meter.device.type == "cuda" and torch.version.hip is None)
    products = precision if case.dtype == "fp32" else ""

    def row(provider: str, pass_: str, **figures: Any) -> Row:
        return Row(case, provider, pass_, products=products, **figures)

    state = work.weights(case)
    inputs = work.Inputs.draw(case, meter.device)
    truth, failure = _attempt(lambda: _truth(case, state, meter))
    if truth is None:
        yield row("float64", "check", **failure)
        return

    modules: dict[Provider, nn.Module] = {}
    first: dict[Provider, dict[str, float]] = {}
    errors: dict[Provider, dict[str, float]] = {}
    for provider in providers:
        ready, failure = _attempt(lambda: _prepare(provider, case, state, inputs, truth, meter))  # noqa: B023
        if ready is None:
            yield row(provider.name, "check", **failure)
            continue
        module, seconds, found = ready
        of_baseline = next((errors[p] for p in errors if p.name == BASELINE), {})
        wrong = work.verdict(case, found, None if provider.name == BASELINE else of_baseline, precision == "tf32")
        if wrong:
            yield row(provider.name, "check", status="wrong", note=wrong, errors=found)
        else:
            modules[provider], first[provider], errors[provider] = module, seconds, found
    truth.clear()

    for name, pass_ in work.PASSES.items():
        timed: dict[str, Timed] = {}
        for provider, module in modules.items():
            timing, failure = _attempt(lambda: _warm(Timed(pass_(module, inputs), 1, provider.around), case, meter))  # noqa: B023
            if timing is None:
                yield row(provider.name, name, **failure)
            else:
                timed[provider.name] = timing
        samples = interleave(timed, meter, rounds=ROUNDS, seconds=SECONDS)
        baseline = quantiles([s.time_us for s in samples[BASELINE]])[1] if BASELINE in samples else None
        for provider, module in modules.items():
            if provider.name not in samples:
                continue
            taken = samples[provider.name]
            p20, p50, p80 = quantiles([s.time_us for s in taken])
            host = quantiles([s.host_us for s in taken])[1]
            peak, saved = _memory(module, inputs, provider, meter) if name == "forward+backward" else (None, None)
            yield row(
                provider.name, name, first_call_s=first[provider][name], rounds=len(taken),
                calls=timed[provider.name].calls, p50_us=p50, p20_us=p20, p80_us=p80,
                ratio=p50 / baseline if baseline else None, host_us=host,
                device_us=_device_us(timed[provider.name], host, meter), peak_mib=peak, saved_mib=saved,
                errors=errors[provider],
            )  # fmt: skip


def _truth(case: Case, state: dict[str, Tensor], meter: HostMeter) -> dict[str, Tensor]:
    module = find(BASELINE).make(case, device=meter.device, dtype=torch.float64)
    module.load_state_dict(state)
    return work.outcome(module, work.Inputs.draw(case, meter.device, torch.float64))


def _prepare(
    provider: Provider,
    case: Case,
    state: dict[str, Tensor],
    inputs: work.Inputs,
    truth: dict[str, Tensor],
    meter: HostMeter,
) -> tuple[nn.Module, dict[str, float], dict[str, float]]:
    """A provider's module, the seconds of its first call by pass, and its errors."""
    with provider.around():
        module = provider.make(case, device=meter.device, dtype=work.TORCH_DTYPES[case.dtype])
        module.load_state_dict(state)
        first = {name: _seconds(pass_(module, inputs), meter) for name, pass_ in work.PASSES.items()}
        return module, first, work.errors(work.outcome(module, inputs), truth)


def _attempt(do: Callable[[], Any]) -> tuple[Any, dict[str, str]]:
    """What `do` returns, or None and what a row says of its failure."""
    try:
        return do(), {}
    except torch.AcceleratorError:
        raise
    except torch.OutOfMemoryError as error:
        return None, {"status": "out of memory", "note": _brief(error)}
    except Exception as error:
        return None, {"status": "error", "note": _brief(error)}


def _brief(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _seconds(call: Call, meter: HostMeter) -> float:
    meter.synchronize()
    start = meter.clock()
    call()
    meter.synchronize()
    return meter.clock() - start


def _warm(timed: Timed, case: Case, meter: HostMeter) -> Timed:
    """Warmed up, and with as many calls per sample as make it long enough."""
    estimate = min(meter.sample(timed).time_us for _ in range(5))
    wanted = math.ceil(SAMPLE_US / max(estimate, 1.0))
    launches = case.T * case.layers
    return Timed(timed.call, max(1, min(wanted, LAUNCHES // launches)), timed.around)


def _device_us(timed: Timed, host_us: float, meter: HostMeter) -> float | None:
    found = [meter.on_device_alone(timed, host_us) for _ in range(10)]
    known = [us for us in found if us is not None]
    return quantiles(known)[1] if known else None


def _memory(
    module: nn.Module, inputs: work.Inputs, provider: Provider, meter: HostMeter
) -> tuple[float | None, float | None]:
    """MiB: peak of forward and backward above what lay there before; kept between them, without the results."""
    meter.release()
    before = meter.allocated()
    if not before:
        return None, None
    with provider.around():
        meter.peak()
        results = work.forward(module, inputs)()
        saved = meter.allocated() - before - sum(r.numel() * r.element_size() for r in results)
        gradients = torch.autograd.grad(results, [inputs.x, *module.parameters()], inputs.cotangents)
        peak = meter.peak() - before
    del results, gradients
    return peak / 2**20, saved / 2**20
