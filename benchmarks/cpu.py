"""Suite `cpu`: what can be timed without a GPU.

1. The cost of tritongru.GRU over torch.nn.GRU where both run PyTorch's path on the CPU. Three modules of the same
   weights are called one by one in a random order, round after round: nn.GRU, a second nn.GRU, tritongru.GRU. The
   second one says what two identical modules differ by in this run: nothing below that is a finding. One thread, and
   the CPU time of this process: on a shared machine, waiting for one's turn varies far more than what is looked for.
2. The host's cost per timestep of backend `step`: hostcost.py says what is in it.
3. PyTorch's GRU, the reference, a loop over cells, an LSTM and an RNN side by side, by the wall clock: run.py.

1 and 2 go to OUT/cpu.csv, 3 to OUT/gru.csv.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tritongru.registry import has_triton, interpreting

from . import run, work
from .cases import CPU_CASES, EMPTY, TARGET, Case
from .providers import BASELINE, PROVIDERS
from .results import ROWS, Environment, ResultsFile, Row
from .timing import HostMeter, Sample, Timed, interleave, quantiles

TWIN = f"{BASELINE}, twin"
OURS = "tritongru.GRU"
LIMIT = 1.02
PASSES = ("forward", "forward+backward")


def main(
    out: Path, only: Sequence[str] = (), extra: Sequence[str] = (), rounds: int = 4000, seconds: float = 12.0
) -> int:
    """Run the suite and print it; `seconds` is for each case and pass of the overhead. `only` and `extra`: of part 3
    alone, with `only` nothing else runs."""
    console = Console(highlight=False)
    console.width = max(console.width, 140)
    torch.set_num_threads(1)
    environment = Environment.here(torch.device("cpu"))
    if not only:
        with ResultsFile(out / "cpu.csv", environment) as results:
            fixed = results.fixed
            console.print(
                f"{fixed['device']}, {torch.get_num_threads()} thread; torch {fixed['torch']}, triton "
                f"{fixed['triton']}; commit {fixed['commit']} (dirty: {fixed['dirty']})", soft_wrap=True,
            )  # fmt: skip
            try:
                verdicts = _overhead(console, results, rounds, seconds)
                _host_cost(console, results)
            except KeyboardInterrupt:
                console.print(f"interrupted; the {results.count} rows so far are in {results.path}", soft_wrap=True)
                return 130
            for verdict in verdicts:
                console.print(verdict, soft_wrap=True)
            console.print(f"{results.count} rows in {results.path}", soft_wrap=True)
    with ResultsFile(out / ROWS, environment) as results:
        return run.run(run.chosen("cpu", only, extra), HostMeter(), results)


def _overhead(console: Console, results: ResultsFile, rounds: int, seconds: float) -> list[str]:
    table = Table(title="tritongru.GRU over nn.GRU on the CPU, us of CPU time per call", title_justify="left")
    for column in ("case", "pass", "module", "p50", "p20", "p80", "ratio", "95 % interval", "rounds"):
        table.add_column(column, justify="left" if column in ("case", "pass", "module") else "right", no_wrap=True)
    verdicts = []
    found: dict[tuple[Case, str], dict[str, Row]] = {}
    for case in CPU_CASES:
        for pass_ in PASSES:
            samples = overhead(case, pass_, HostMeter(time.process_time), rounds, seconds)
            found[case, pass_] = dict(rows(case, pass_, samples))
            for name, row in found[case, pass_].items():
                results.append(row)
                figures = (f"{row.p50_us:.1f}", f"{row.p20_us:.1f}", f"{row.p80_us:.1f}", f"{row.ratio:.4f}")
                low, high = interval(samples, name)
                spread = f"{low:.4f} to {high:.4f}"
                table.add_row(case.name, pass_, name, *figures, spread, str(row.rounds))
            verdicts.append(verdict(case, pass_, found[case, pass_][OURS], samples))
    console.print(table)
    for pass_ in PASSES:
        added, whole = _added(found[EMPTY, pass_][OURS]), found[TARGET, pass_][BASELINE].p50_us
        assert whole is not None
        share = f"{100 * added / whole:+.2f} % of nn.GRU's at {TARGET.name}"
        verdicts.append(f"estimate: {added:+.1f} us added to an empty {pass_} are {share}")
    return verdicts


def verdict(case: Case, pass_: str, ours: Row, samples: dict[str, list[Sample]]) -> str:
    """What the run says of tritongru.GRU; for TARGET, whether it keeps to the limit."""
    assert ours.ratio is not None
    text = f"{case.name} {pass_}: {_added(ours):+.1f} us per call, {_percent(ours.ratio)}"
    if case != TARGET:
        return text
    (low, high), twin = interval(samples, OURS), interval(samples, TWIN)
    doubt = " by the medians, not beyond doubt" if low <= LIMIT < high else ""
    yes_or_no = ("yes" if ours.ratio <= LIMIT else "no") + doubt
    return (
        f"within 2 %: {yes_or_no}   {text}, 95 % interval {_percent(low)} to {_percent(high)}; "
        f"a second nn.GRU beside the first: {_percent(twin[0])} to {_percent(twin[1])}"
    )


def _added(ours: Row) -> float:
    """Microseconds between the medians of tritongru.GRU and nn.GRU."""
    assert ours.ratio is not None and ours.p50_us is not None
    return ours.p50_us * (1 - 1 / ours.ratio)


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


def overhead(case: Case, pass_: str, meter: HostMeter, rounds: int, seconds: float) -> dict[str, list[Sample]]:
    """Samples of nn.GRU, its twin and tritongru.GRU, call by call in a random order."""
    state, inputs = work.weights(case), work.Inputs.draw(case, meter.device)
    timed = {}
    for name, provider in ((BASELINE, BASELINE), (TWIN, BASELINE), (OURS, "default")):
        module = PROVIDERS[provider].make(case, device=meter.device, dtype=work.TORCH_DTYPES[case.dtype])
        module.load_state_dict(state)
        timed[name] = Timed(work.PASSES[pass_].make(module, inputs))
        for _ in range(5):
            timed[name].call()
    return interleave(timed, meter, rounds=rounds, seconds=seconds)


def rows(case: Case, pass_: str, samples: dict[str, list[Sample]]) -> Iterator[tuple[str, Row]]:
    """A row for each module; the ratio is that of the medians of the whole run."""
    baseline = quantiles([s.time_us for s in samples[BASELINE]])[1]
    for name, taken in samples.items():
        p20, p50, p80 = quantiles([s.time_us for s in taken])
        yield name, Row(
            case, name, pass_, note=f"{torch.get_num_threads()} thread(s), CPU time", rounds=len(taken), calls=1,
            p50_us=p50, p20_us=p20, p80_us=p80, ratio=p50 / baseline,
        )  # fmt: skip


def interval(samples: dict[str, list[Sample]], name: str, draws: int = 1000) -> tuple[float, float]:
    """Where the ratio of medians lies in 95 of 100 resamplings of the rounds."""
    ours, base = (np.array([s.time_us for s in samples[which]]) for which in (name, BASELINE))
    rounds = np.random.default_rng(0).integers(len(base), size=(draws, len(base)))
    low, high = np.quantile(np.median(ours[rounds], 1) / np.median(base[rounds], 1), (0.025, 0.975)).tolist()
    return low, high


def _host_cost(console: Console, results: ResultsFile) -> None:
    why_not = "Triton is not installed" if not has_triton() else "TRITON_INTERPRET is set" if interpreting() else None
    if why_not:
        print(f"host cost of step: not measured, {why_not}", file=sys.stderr)
        return
    from . import hostcost

    title = "backend step, the host's us per timestep, the launch itself replaced by nothing"
    table = Table(title=title, title_justify="left")
    for column in ("batch", "pass", "p50", "p20", "p80", "first launch of a call", "steps timed"):
        table.add_column(column, justify="left" if column in ("batch", "pass") else "right")
    for cost in hostcost.measure():
        case = Case(hostcost.T, hostcost.BATCH, hostcost.HIDDEN, hostcost.HIDDEN, packed=cost.name == "packed")
        note = f"host only, per timestep, nothing launched; first launch of a call {cost.first_us:.1f} us"
        results.append(
            Row(case, "step", f"host {cost.pass_}", note=note, rounds=cost.steps, calls=1,
                p50_us=cost.p50_us, p20_us=cost.p20_us, p80_us=cost.p80_us)
        )  # fmt: skip
        figures = (f"{us:.2f}" for us in (cost.p50_us, cost.p20_us, cost.p80_us))
        table.add_row(cost.name, cost.pass_, *figures, f"{cost.first_us:.1f}", str(cost.steps))
    console.print(table)
    console.print(
        "in it: the launcher's loop, runtime.Launch, Triton's launch metadata and hooks, and "
        f"{hostcost.stand_in_us():.2f} us of the stand-in; not in it: Triton's reading of the arguments, the CUDA "
        "driver, any GPU", soft_wrap=True,
    )  # fmt: skip
