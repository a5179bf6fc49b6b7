"""Command `cpu`: what can be timed without a GPU, into OUT/cpu.csv.

1. What tritongru.GRU adds to torch.nn.GRU where both run PyTorch's path on the CPU. Three modules of the same weights
   are called in a random order, round after round: nn.GRU, a second nn.GRU, tritongru.GRU. The second one says what two
   identical modules differ by in this run: nothing below that is a finding. One thread, and the CPU time of this
   process: on a shared machine, waiting for one's turn varies far more than what is looked for.
2. What a call of the kernels costs a GPU's host: hostcost.py says what is in it.
"""

import time
from pathlib import Path

import torch

from . import hostcost, run
from .cases import BASELINE, Case, Entry
from .compiled import no_compiler
from .providers import TWIN
from .results import Environment, ResultsFile, Row
from .timing import HostMeter

FILE = "cpu.csv"
TARGET = Case(50, 8, 128, 128)  # where tritongru.GRU is to stay within 2 % of nn.GRU
EMPTY = Case(1, 1, 1, 1)  # nothing to compute: what is left is the call itself
PASSES = ("forward", "forward+backward")


def main(out: Path, rounds: int = 4000, seconds: float = 12.0) -> int:
    """Measure, append and print; `seconds` is for each case and pass of the first part.

    Raises:
        OtherSchemaError: the file is of another schema.
    """
    torch.set_num_threads(1)
    how = dict(rounds=rounds, seconds=seconds, note="CPU time")
    entries = [Entry(case, PASSES, (BASELINE, TWIN, "default"), **how) for case in (TARGET, EMPTY)]
    with ResultsFile(out / FILE, Environment.here(torch.device("cpu"))) as results:
        code = run.run(entries, HostMeter(time.process_time), results)
        if why_not := no_compiler():
            print(f"what a call of the kernels costs a GPU's host was not measured: {why_not}")
        elif code != run.INTERRUPTED:
            for case, backend, pass_, (p20, p50, p80) in hostcost.measure(seconds / 12):
                row = Row(case, backend, f"host {pass_}", note="host only", p50_us=p50, p20_us=p20, p80_us=p80)
                results.append(row)
                print(run.line(row), flush=True)
    return code
