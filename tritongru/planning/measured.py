"""Which backend was measured to take the least: rows in planning/tables/, a file per GPU. No model of a machine.

A call is taken to cost T times us per step plus us per call of the nearest measured cell: the one of its pass and dtype
(of T = 1, of a GRUCell, or of more steps) whose H and B are the least octaves away. Nothing is scaled. PyTorch's own
path is a candidate like the others, and none takes its place that takes longer on the device alone, where the host's
share is gone, as it is in a CUDA graph (of T = 1 by more than a tenth: a replay itself is most of it, and varies). What
a pass does once counts there too: at two steps it is most of it.

`python -m benchmarks table` writes the files from committed results. A file of more cells needs no change here.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .devices import DEVICES, described_as, nearest_file
from .problem import Recurrence

CELL = "cell"
TABLES = Path(__file__).with_name("tables")  # a file's name is the device's key in DEVICES
# T: 1, CELL for a GRUCell, or empty for calls of more steps. us_per_step and us_per_call are those of calls as one
# makes them, the other two of the device alone (empty: not timed). source: a file of results.
COLUMNS = (
    "pass", "dtype", "H", "B", "T", "backend", "us_per_step", "us_per_call", "device_us_per_step",
    "device_us_per_call", "source",
)  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """What one backend was measured to take in a cell, in microseconds."""

    backend: str
    us_per_step: float
    us_per_call: float
    device_us_per_step: float | None
    device_us_per_call: float | None
    source: str

    def call_us(self, time: int) -> float:
        """What a call of T steps takes."""
        return time * self.us_per_step + self.us_per_call

    def device_us(self, time: int) -> float | None:
        """What it takes on the device alone."""
        if self.device_us_per_step is None or self.device_us_per_call is None:
            return None
        return time * self.device_us_per_step + self.device_us_per_call

    def __str__(self) -> str:
        step, call = (
            "" if alone is None else f" ({alone:.3g} on the device alone)"
            for alone in (self.device_us_per_step, self.device_us_per_call)
        )  # fmt: skip
        steps = f"{self.us_per_step:.3g} us per step{step} + " if self.us_per_step else ""
        return f"{steps}{self.us_per_call:.0f} us per call{call}; {self.source}"


Cells = dict[tuple[int, int], list[Timed]]  # by H and B


@dataclass(frozen=True)
class Choice:
    """What takes the least, and of what: the candidates are those of the cell, the fastest first."""

    backend: str
    reason: str
    candidates: tuple[Timed, ...] = ()


@lru_cache
def table(path: Path) -> Mapping[tuple[str, str, str], Cells]:
    """What a device was measured to take, by pass, dtype and T as the file has them."""
    found: dict[tuple[str, str, str], Cells] = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        step, call = (float(row[name]) if row[name] else None for name in ("device_us_per_step", "device_us_per_call"))
        timed = Timed(row["backend"], float(row["us_per_step"]), float(row["us_per_call"]), step, call, row["source"])
        found[row["pass"], row["dtype"], row["T"]][int(row["H"]), int(row["B"])].append(timed)
    return found


def distance(cell: tuple[int, int], H: int, B: int) -> tuple[float, tuple[int, int]]:
    """In octaves; at equal distance the smaller cell is nearer."""
    return math.hypot(math.log2(H / cell[0]), math.log2(B / cell[1])), cell


def nearest(cells: Cells, H: int, B: int, able: Sequence[str]) -> tuple[tuple[int, int], Sequence[Timed]] | None:
    """The nearest cell in which at least two of the backends were timed, and these."""
    among = {cell: [one for one in timed if one.backend in able] for cell, timed in cells.items()}
    several = [cell for cell, timed in among.items() if len(timed) >= 2]
    return min(((cell, among[cell]) for cell in several), key=lambda found: distance(found[0], H, B), default=None)


@lru_cache(maxsize=4096)  # T is no part of it: where T varies from call to call, nothing is looked for again
def measured(able: tuple[str, ...], of: Recurrence, kind: str, time: str) -> tuple[str, Sequence[Timed]] | None:
    """The nearest cell of the nearest device: what it is, in words, and what was timed there of the backends."""
    path = nearest_file(TABLES, of.device)
    cells = table(path).get((kind, of.dtype, time), {}) if path else {}
    if path is None or (found := nearest(cells, of.hidden_size, of.batch, able)) is None:
        return None
    (H, B), timed = found
    own = described_as(of.device) == path.stem
    where = DEVICES[path.stem].name + ("" if own else f", nearest to {of.device.name},")
    size = f"{of.dtype}, {kind}, H {H}, B {B}" + (", a GRUCell" if time == CELL else f", T {time}" * bool(time))
    return f"{where} at {size}", timed


def fastest(able: tuple[str, ...], of: Recurrence, time: int, training: bool, cell: bool) -> Choice | None:
    """Which of the backends that are able to run a call takes the least, and by which figures; None: no row says."""
    at, kind = CELL if cell else "1" if time == 1 else "", "training" if training else "inference"
    if (found := measured(able, of, kind, at)) is None:
        return None
    where, timed = found
    candidates = {one.backend: one for one in sorted(timed, key=lambda one: one.call_us(time))}
    first, *_ = candidates
    aten = candidates["aten"].device_us(time) if "aten" in candidates else None
    most = (aten or math.inf) * (1.1 if time == 1 else 1)
    chosen = next(name for name, one in candidates.items() if name == "aten" or (one.device_us(time) or 0) <= most)
    reason = f"fastest by what was measured on NVIDIA {where}"
    if missing := [backend for backend in able if backend not in candidates]:
        reason += f", where {' and '.join(missing)} was not timed"
    if chosen != first:
        reason += f", but for {first}, which takes longer than aten in a CUDA graph"
    return Choice(chosen, reason, tuple(candidates.values()))
