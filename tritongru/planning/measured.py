"""Which backend was measured to take the least: rows in planning/tables/, a file per GPU. No model of a machine.

A call is taken to cost T times us per step plus us per call of the nearest measured cell: the one of its pass and dtype
(and of T = 1, or of more) whose H and B are the least octaves away. Nothing is scaled. PyTorch's own path is a
candidate like the others, and none takes its place that takes longer on the device alone, where the host's share is
gone, as it is in a CUDA graph.

`python -m benchmarks table` writes the files from committed results. A file of more cells needs no change here.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .devices import DEVICES, Device, _described

TABLES = Path(__file__).with_name("tables")  # a file's name is the device's key in DEVICES
# dtype: empty where it makes no difference. T: 1, or empty for calls of more steps. us_per_step and us_per_call are
# those of calls as one makes them, device_us_per_step of the device alone (empty: not timed). source: a file of
# results; "study" before it where the kernels were timed that ours were made from.
COLUMNS = (
    "pass", "dtype", "H", "B", "T", "backend", "us_per_step", "us_per_call", "device_us_per_step", "source"
)  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """What one backend was measured to take in a cell, in microseconds."""

    backend: str
    us_per_step: float
    us_per_call: float
    device_us_per_step: float | None
    source: str

    def call_us(self, time: int) -> float:
        """What a call of T steps takes."""
        return time * self.us_per_step + self.us_per_call

    def slower_on_the_device(self, other: Timed) -> bool:
        """Whether a step is known to take longer there than one of the other."""
        mine, theirs = self.device_us_per_step, other.device_us_per_step
        return mine is not None and theirs is not None and mine > theirs

    def __str__(self) -> str:
        device = "" if self.device_us_per_step is None else f" ({self.device_us_per_step:.3g} on the device alone)"
        step = f"{self.us_per_step:.3g} us per step{device} + " if self.us_per_step else ""
        return f"{step}{self.us_per_call:.0f} us per call; {self.source}"


@dataclass(frozen=True)
class Cell:
    """What calls of one size took. time: 1, or 0 for calls of more steps; dtype: empty where it made no difference."""

    kind: str  # "inference" or "training"
    dtype: str
    hidden_size: int
    batch: int
    time: int
    timed: tuple[Timed, ...]

    def among(self, able: tuple[str, ...]) -> tuple[Timed, ...]:
        return tuple(timed for timed in self.timed if timed.backend in able)


@dataclass(frozen=True)
class Table:
    """What one device was measured to take."""

    device: Device
    cells: tuple[Cell, ...]

    def nearest(
        self, kind: str, dtype: str, batch: int, time: int, hidden_size: int, able: tuple[str, ...]
    ) -> Cell | None:
        """Of the cells in which at least two of the backends were timed; at equal distance the smaller one."""
        found = [
            cell
            for cell in self.cells
            if (cell.kind, cell.time) == (kind, int(time == 1))
            and cell.dtype in (dtype, "")
            and len(cell.among(able)) >= 2
        ]

        def order(cell: Cell) -> tuple[float, int, int]:
            octaves = math.hypot(math.log2(hidden_size / cell.hidden_size), math.log2(batch / cell.batch))
            return octaves, cell.hidden_size, cell.batch

        return min(found, key=order, default=None)


@dataclass(frozen=True)
class Choice:
    """What takes the least, and of what: the candidates are those of the cell, the fastest first."""

    backend: str
    reason: str
    candidates: tuple[Timed, ...]


@lru_cache(maxsize=64)
def nearest_table(device: Device) -> Table | None:
    """That of the device itself, or of the one nearest in compute capability, then in SMs; None: no such device was."""

    def distance(key: str) -> tuple[int, int]:
        measured = DEVICES[key]
        return abs((measured.capability or 0) - (device.capability or 0)), abs(measured.sms - device.sms)

    keys = [path.stem for path in sorted(TABLES.glob("*.csv")) if DEVICES[path.stem].vendor == device.vendor]
    return _read(min(keys, key=distance)) if keys else None


@lru_cache
def _read(key: str) -> Table:
    cells: dict[tuple[str, str, int, int, int], list[Timed]] = {}
    with (TABLES / f"{key}.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            at = row["pass"], row["dtype"], int(row["H"]), int(row["B"]), int(row["T"] or 0)
            device_us = float(row["device_us_per_step"]) if row["device_us_per_step"] else None
            timed = Timed(
                row["backend"], float(row["us_per_step"]), float(row["us_per_call"]), device_us, row["source"]
            )
            cells.setdefault(at, []).append(timed)
    return Table(DEVICES[key], tuple(Cell(*at, tuple(timed)) for at, timed in cells.items()))


@lru_cache(maxsize=4096)
def fastest(
    able: tuple[str, ...], batch: int, time: int, hidden_size: int, dtype: str, training: bool, device: Device
) -> Choice | None:
    """Which of the backends that are able to run a call takes the least, and by which figures; None: no row says."""
    table, kind = nearest_table(device), "training" if training else "inference"
    cell = None if table is None else table.nearest(kind, dtype, batch, time, hidden_size, able)
    if table is None or cell is None:
        return None
    candidates = tuple(sorted(cell.among(able), key=lambda timed: timed.call_us(time)))
    aten = next((timed for timed in candidates if timed.backend == "aten"), None)
    chosen = next(timed for timed in candidates if aten is None or not timed.slower_on_the_device(aten))
    known = table.device
    same = device.sms == known.sms and _described(device.name) is known
    where = f"NVIDIA {known.name}" + ("" if same else f", nearest to {device.name},")
    size = f"{cell.dtype + ', ' if cell.dtype else ''}{kind}, H {cell.hidden_size}, B {cell.batch}"
    reason = f"fastest by what was measured on {where} at {size}{', T 1' if time == 1 else ''}"
    if missing := [backend for backend in able if backend not in {timed.backend for timed in candidates}]:
        reason += f", where {' and '.join(missing)} was not timed"
    if chosen is not candidates[0]:
        reason += f", but for {candidates[0].backend}, which takes longer than aten in a CUDA graph"
    return Choice(chosen.backend, reason, candidates)
