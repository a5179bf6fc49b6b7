"""Suite `cpu`: what can be timed without a GPU. It ends in one statement: what tritongru.GRU adds to nn.GRU there.

1. PyTorch's GRU, the reference, a loop over cells, an LSTM and an RNN side by side, by the wall clock: run.py.
2. The cost of tritongru.GRU over torch.nn.GRU where both run PyTorch's path on the CPU. Three modules of the same
   weights are called one by one in a random order, round after round: nn.GRU, a second nn.GRU, tritongru.GRU. The
   second one says what two identical modules differ by in this run: nothing below that is a finding. One thread, and
   the CPU time of this process: on a shared machine, waiting for one's turn varies far more than what is looked for.
3. The host's cost per timestep of backend `step`: hostcost.py says what is in it.

1 goes to OUT/gru.csv, 2 and 3 to OUT/cpu.csv.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tritongru.registry import has_triton, interpreting

from . import run, work
from .cases import BASELINE, CPU_CASES, EMPTY, TARGET, Case
from .providers import PROVIDERS
from .results import ROWS, Environment, ResultsFile, Row, read
from .timing import HostMeter, Sample, Timed, interleave, quantiles

TWIN = f"{BASELINE}, twin"
OURS = "tritongru.GRU"
LIMIT = 1.02
PASSES = ("forward", "forward+backward")
CONCLUSION = "What tritongru.GRU costs beside nn.GRU, as far as a CPU can tell:"


def main(
    out: Path, only: Sequence[str] = (), extra: Sequence[str] = (), rounds: int = 4000, seconds: float = 12.0
) -> int:
    """Run the suite and print it; `seconds` is for each case and pass of the overhead. `only` and `extra`: of part 1
    alone, with `only` nothing else runs."""
    console = Console(highlight=False)
    console.width = max(console.width, 140)
    torch.set_num_threads(1)
    environment = Environment.here(torch.device("cpu"))
    read(out / "cpu.csv")  # of another schema: said before anything is measured
    with ResultsFile(out / ROWS, environment) as results:
        code = run.run(run.chosen("cpu", only, extra), HostMeter(), results)
    if only or code == run.INTERRUPTED:
        return code
    with ResultsFile(out / "cpu.csv", environment) as results:
        try:
            said = [*_overhead(console, results, rounds, seconds), _host_cost(console, results)]
        except KeyboardInterrupt:
            console.print(f"interrupted; the {results.count} rows so far are in {results.path}", soft_wrap=True)
            return run.INTERRUPTED
        console.print(f"{results.count} rows in {results.path}", soft_wrap=True)
        console.print(f"\n{CONCLUSION}", *said, sep="\n  ", soft_wrap=True)
    return code


def _overhead(console: Console, results: ResultsFile, rounds: int, seconds: float) -> list[str]:
    """Measure and print it; what the conclusion says of it."""
    title = "tritongru.GRU beside two nn.GRU on the CPU, us of CPU time per call, one thread"
    table = Table(title=title, title_justify="left")
    for column in ("case", "pass", "module", "p50", "p20", "p80", "ratio", "95 % interval", "rounds"):
        table.add_column(column, justify="left" if column in ("case", "pass", "module") else "right", no_wrap=True)
    found: dict[Case, dict[str, Found]] = {case: {} for case in CPU_CASES}
    for case in CPU_CASES:
        for pass_ in PASSES:
            samples = overhead(case, pass_, HostMeter(time.process_time), rounds, seconds)
            found[case][pass_] = Found.of(case, pass_, samples)
            for name, row in found[case][pass_].rows.items():
                results.append(row)
                figures = (f"{row.p50_us:.1f}", f"{row.p20_us:.1f}", f"{row.p80_us:.1f}", f"{row.ratio:.4f}")
                low, high = found[case][pass_].intervals[name]
                table.add_row(case.name, pass_, name, *figures, f"{low:.4f} to {high:.4f}", str(row.rounds))
    console.print(table)
    return conclusion(found)


@dataclass(frozen=True)
class Found:
    """Of one case and pass, by module: its row, and where the ratio of medians lies in 95 of 100 resamplings."""

    rows: dict[str, Row]
    intervals: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, case: Case, pass_: str, samples: dict[str, list[Sample]]) -> Found:
        return cls(dict(rows(case, pass_, samples)), {name: interval(samples, name) for name in samples})

    @property
    def within(self) -> bool | None:
        """Whether tritongru.GRU keeps to the limit; None where the run is too noisy to tell."""
        (low, high), (_, twin) = self.intervals[OURS], self.intervals[TWIN]
        return True if high <= LIMIT else False if low > max(LIMIT, twin) else None


def conclusion(found: Mapping[Case, Mapping[str, Found]]) -> list[str]:
    """What the run says of tritongru.GRU: what it adds to a call, and whether TARGET keeps to the limit."""
    added = {pass_: _added(of.rows[OURS]) for pass_, of in found[EMPTY].items()}
    a_call = ", ".join(f"{us:.1f} us a {pass_}" for pass_, us in added.items())
    whole = {pass_: of.rows[BASELINE].p50_us for pass_, of in found[TARGET].items()}
    shares = " and ".join(f"{100 * added[pass_] / us:.1f} %" for pass_, us in whole.items() if us)
    kept = [of.within for of in found[TARGET].values()]
    answer = "no" if False in kept else "yes, as far as this run can tell" if None in kept else "yes"
    return [
        f"on the CPU it runs PyTorch's own path, and adds {a_call} (measured with nothing to compute)",
        f"at {TARGET.name} that is {shares} of nn.GRU's time; measured there directly, within 2 %: {answer}",
    ]


def _added(ours: Row) -> float:
    """Microseconds between the medians of tritongru.GRU and nn.GRU."""
    assert ours.ratio is not None and ours.p50_us is not None
    return ours.p50_us * (1 - 1 / ours.ratio)


def overhead(case: Case, pass_: str, meter: HostMeter, rounds: int, seconds: float) -> dict[str, list[Sample]]:
    """Samples of nn.GRU, its twin and tritongru.GRU, call by call in a random order."""
    state, inputs = work.weights(case, meter.device), work.Inputs.draw(case, meter.device)
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


def _host_cost(console: Console, results: ResultsFile) -> str:
    """Measure and print it; what the conclusion says of it."""
    why_not = "Triton is not installed" if not has_triton() else "TRITON_INTERPRET is set" if interpreting() else None
    if why_not:
        return f"what backend step costs a GPU's host was not measured: {why_not}"
    from . import hostcost

    title = "backend step, the host's us up to the driver, the launch itself replaced by nothing"
    table = Table(title=title, title_justify="left")
    for column in ("of", "pass", "addresses", "p50", "p20", "p80", "first launch of a call", "timed"):
        table.add_column(column, justify="left" if column in ("of", "pass", "addresses") else "right")
    medians: dict[tuple[bool, str], float] = {}
    for cost in hostcost.measure():
        of = cost.cell, cost.kind
        medians[of] = max(cost.p50_us, medians.get(of, 0))
        case = Case(
            1 if cost.cell else hostcost.T, hostcost.BATCH, hostcost.HIDDEN, hostcost.HIDDEN,
            packed=cost.name == "packed", cell=cost.cell,
        )  # fmt: skip
        note = f"host only, {'a call' if cost.cell else 'per timestep'}, addresses {cost.kind}"
        first = "" if cost.cell else f"{cost.first_us:.1f}"
        results.append(
            Row(case, "step", f"host {cost.pass_} {cost.kind}", rounds=cost.steps, calls=1,
                note=note + (first and f"; first launch of a call {first} us"),
                p50_us=cost.p50_us, p20_us=cost.p20_us, p80_us=cost.p80_us)
        )  # fmt: skip
        name = cost.name if cost.cell else f"{cost.name}, a timestep"
        figures = (f"{us:.2f}" for us in (cost.p50_us, cost.p20_us, cost.p80_us))
        table.add_row(name, cost.pass_, cost.kind, *figures, first, str(cost.steps))
    caption = "the launcher's loop, runtime.Launch, what of Triton's launcher is Python, and "
    table.caption = f"In it: {caption}{hostcost.stand_in_us():.2f} us of the stand-in."
    console.print(table)
    new, again, cell = (f"{medians[of]:.1f}" for of in ((False, "new"), (False, "again"), (True, "again")))
    return (
        f"on a GPU's host, without the launches, backend step takes {new} us a timestep, {again} where addresses are "
        f"those of a call before, and GRUCell in inference {cell} us a call"
    )
