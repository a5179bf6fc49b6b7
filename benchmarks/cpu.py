"""Command `cpu`: what can be timed without a GPU, into OUT/cpu.csv.

1. What tritongru.GRU adds to torch.nn.GRU where both run PyTorch's path on the CPU. Three modules of the same weights
   are called one by one in a random order, round after round: nn.GRU, a second nn.GRU, tritongru.GRU. The second one
   says what two identical modules differ by in this run: nothing below that is a finding. One thread, and the CPU time
   of this process: on a shared machine, waiting for one's turn varies far more than what is looked for.
2. What a call of the kernels costs a GPU's host: hostcost.py says what is in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from . import hostcost, work
from .cases import BASELINE, Case
from .compiled import no_compiler
from .providers import find
from .results import Environment, ResultsFile, Row
from .run import INTERRUPTED
from .timing import HostMeter, Timed, interleave, quantiles

FILE = "cpu.csv"
TWIN, OURS = f"{BASELINE}, twin", "tritongru.GRU"
MODULES = {BASELINE: BASELINE, TWIN: BASELINE, OURS: "default"}  # and the provider that makes each
TARGET = Case(50, 8, 128, 128)  # where tritongru.GRU is to stay within 2 % of nn.GRU
EMPTY = Case(1, 1, 1, 1)  # nothing to compute: what is left is the call itself
PASSES = ("forward", "forward+backward")


def main(out: Path, rounds: int = 4000, seconds: float = 12.0) -> int:
    """Measure, append and print; `seconds` is for each case and pass of the first part.

    Raises:
        OtherSchemaError: the file is of another schema.
    """
    torch.set_num_threads(1)
    with ResultsFile(out / FILE, Environment.here(torch.device("cpu"))) as results:
        print(results.environment, "us per call: p50 [p20, p80]", sep="\n")
        try:
            for row in chain(beside_nn_gru(rounds, seconds), of_a_host(seconds / 12)):
                results.append(row)
                ratio = "" if row.ratio is None else f"  ratio {row.ratio:.4f}"
                times = f"{row.p50_us:9.1f} [{row.p20_us:.1f}, {row.p80_us:.1f}]{ratio}"
                print(f"{row.case.name:<28} {row.provider:<14} {row.pass_:<22} {times}", flush=True)
        except KeyboardInterrupt:
            print(f"interrupted; the {results.count} rows so far are in {results.path}")
            return INTERRUPTED
        print(f"{results.count} rows in {results.path}")
    return 0


def beside_nn_gru(rounds: int, seconds: float) -> Iterator[Row]:
    """A row for each module; the ratio is that of the medians of the whole run."""
    meter = HostMeter(time.process_time)
    for case in (TARGET, EMPTY):
        state, inputs = work.weights(case, meter.device), work.Inputs.draw(case, meter.device)
        for pass_ in PASSES:
            timed = {}
            for name, provider in MODULES.items():
                module = find(provider).make(case, device=meter.device, dtype=torch.float32)
                module.load_state_dict(state)
                timed[name] = Timed(work.PASSES[pass_].make(module, inputs))
                for _ in range(5):
                    timed[name].call()
            samples, failures = interleave(timed, meter, rounds=rounds, seconds=seconds)
            for error in failures.values():
                raise error
            baseline = quantiles([s.time_us for s in samples[BASELINE]])[1]
            for name, taken in samples.items():
                p20, p50, p80 = quantiles([s.time_us for s in taken])
                yield Row(
                    case, name, pass_, note=f"{torch.get_num_threads()} thread(s), CPU time", rounds=len(taken),
                    calls=1, p50_us=p50, p20_us=p20, p80_us=p80, ratio=p50 / baseline,
                )  # fmt: skip


def of_a_host(seconds: float) -> Iterator[Row]:
    """A row for each call; none, and a word why, where Triton's JIT cannot be asked."""
    if why_not := no_compiler():
        print(f"what a call of the kernels costs a GPU's host was not measured: {why_not}")
        return
    for case, backend, pass_, (p20, p50, p80) in hostcost.measure(seconds):
        yield Row(case, backend, f"host {pass_}", note="host only", p50_us=p50, p20_us=p20, p80_us=p80)
