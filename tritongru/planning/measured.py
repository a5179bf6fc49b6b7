"""Which backend was measured to take the least: rows in planning/tables/, a file per GPU. No model of a machine.

A row is a whole call of one layer. The cell nearest to a call, of its pass and dtype, is the one whose H and B are the
least octaves away; one of H counts as two of B, for a step multiplies B x H by H x 3H. A call is taken to cost what
calls cost however short they are, plus T times a step of that cell. A kernel takes the place of PyTorch's own path
where that is less and no figure says otherwise: in a CUDA graph, where the host's share is gone, its step must not take
more either, as far as it was timed there.

`python -m benchmarks.table` writes the files from committed results. A file of more cells needs no change here.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

from .devices import DEVICES, Device, _described

TABLES = Path(__file__).with_name("tables")  # a file's name is the device's key in DEVICES
# us_per_call: of T steps. graph_us_per_step: replayed from a CUDA graph; empty: not timed. source: a file of results.
# Without dtype: short calls; those of T up to SHORT take little but what any call costs.
COLUMNS = ("pass", "dtype", "H", "B", "T", "backend", "us_per_call", "graph_us_per_step", "source")
SHORT = 8
FORM = "sequence as first built"  # which was timed; its kernels are others since
TILE = 16  # rows, and hidden units, that a program of a kernel works on at once
# float16 from this H on has bfloat16's rows too: the same kernels, and cuDNN takes as long for both there. At H 128 it
# does not (a persistent kernel, for float16 alone).
LIKE = {"fp16": ("bf16", 512)}


@dataclass(frozen=True)
class Timed:
    """One backend in a cell."""

    call_us: float
    graph_us: float | None  # of a step


@dataclass(frozen=True)
class Cell:
    """What calls of one size took."""

    dtype: str
    hidden_size: int
    batch: int
    time: int
    timed: Mapping[str, Timed]  # by backend


@dataclass(frozen=True)
class Table:
    """What one device was measured to take."""

    device: Device
    cells: Mapping[str, tuple[Cell, ...]]  # by pass
    short: Mapping[tuple[str, str, bool], float]  # us of a call, however short, by pass, backend and whether T is 1

    def nearest(self, kind: str, dtype: str, batch: int, hidden_size: int, able: Collection[str]) -> Cell | None:
        """Of the cells in which at least two of the backends were timed; at equal distance the smaller one."""
        like, least = LIKE.get(dtype, (dtype, 1))
        found = [
            cell
            for cell in self.cells[kind]
            if (cell.dtype == dtype or (cell.dtype == like and min(hidden_size, cell.hidden_size) >= least))
            and len(set(able) & set(cell.timed)) >= 2
        ]

        def octaves(cell: Cell) -> float:
            return math.hypot(2 * math.log2(hidden_size / cell.hidden_size), math.log2(batch / cell.batch))

        def order(cell: Cell) -> tuple[float, bool, int, int]:
            return octaves(cell), cell.dtype != dtype, cell.hidden_size, cell.batch

        return min(found, key=order, default=None)

    def call_us(self, kind: str, cell: Cell, backend: str, time: int, growth: float) -> float:
        """What a call of T steps takes, each `growth` times the cell's."""
        once = self.short.get((kind, backend, False), 0.0)
        step = max(cell.timed[backend].call_us - once, 0.0) / cell.time
        return self.short.get((kind, backend, time == 1), once) + time * growth * step


@lru_cache(maxsize=64)
def nearest_table(device: Device) -> Table:
    """That of the device itself, or of the one nearest in compute capability, then in SMs."""

    def distance(key: str) -> tuple[int, int]:
        measured = DEVICES[key]
        return abs((measured.capability or 0) - (device.capability or 0)), abs(measured.sms - device.sms)

    return _read(min(sorted(path.stem for path in TABLES.glob("*.csv")), key=distance))


@lru_cache
def _read(key: str) -> Table:
    timed: dict[tuple[str, str, int, int, int], dict[str, Timed]] = {}
    short: dict[tuple[str, str, bool], list[float]] = {}
    with (TABLES / f"{key}.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            us, graph = float(row["us_per_call"]), row["graph_us_per_step"]
            H, B, T = (int(row[name]) for name in ("H", "B", "T"))
            if row["dtype"]:
                backends = timed.setdefault((row["pass"], row["dtype"], H, B, T), {})
                backends[row["backend"]] = Timed(us, float(graph) if graph else None)
            elif T <= SHORT:
                short.setdefault((row["pass"], row["backend"], T == 1), []).append(us)
    cells: dict[str, list[Cell]] = {}
    for (kind, dtype, H, B, T), backends in timed.items():
        cells.setdefault(kind, []).append(Cell(dtype, H, B, T, backends))
    # These calls vary by half: PyTorch's path is given its least one, so that noise favours no kernel.
    costs = {key: min(us) if key[1] == "aten" else median(us) for key, us in short.items()}
    return Table(DEVICES[key], {kind: tuple(found) for kind, found in cells.items()}, costs)


@lru_cache(maxsize=4096)
def fastest(
    able: tuple[str, ...], batch: int, time: int, hidden_size: int, dtype: str, training: bool, device: Device
) -> tuple[str, str] | None:
    """Which of the backends that are able to run a call takes the least, and by which figures; None: no row says."""
    table, kind = nearest_table(device), "training" if training else "inference"
    cell = table.nearest(kind, dtype, batch, hidden_size, able)
    if cell is None:
        return None
    timed = {backend: cell.timed[backend] for backend in able if backend in cell.timed}
    # Beyond the cell a kernel's step is taken to grow with its tiles for each SM, and that of PyTorch's path not to: so
    # no kernel is taken for an advantage that nobody saw.
    growth = max(1.0, _turns(batch, hidden_size, device) / _turns(cell.batch, cell.hidden_size, table.device))

    def least(time: int, growth: float, graphs: bool = True) -> str:
        """`graphs`: heed what a step takes in a CUDA graph."""
        us = {b: table.call_us(kind, cell, b, time, 1.0 if b == "aten" else growth) for b in timed}
        kernels = [b for b in us if b != "aten"]
        if aten := timed.get("aten"):
            kernels = [b for b in kernels if us[b] < us["aten"]]
            if graphs and time > 1:
                kernels = [b for b in kernels if not _slower(timed[b].graph_us, aten.graph_us, growth)]
        return min(kernels, key=lambda b: us[b]) if kernels else "aten"

    chosen = least(time, growth)
    notes = [_figures(table, kind, cell, timed, device)]
    if chosen != least(time, growth, graphs=False):
        notes.append("no kernel is taken that is slower in a CUDA graph")
    elif chosen != least(time, 1.0):
        notes.append("the call is larger: a kernel's step is taken to grow with its tiles for each SM")
    elif chosen != least(cell.time, growth):
        costs = ((table.short.get((kind, b, time == 1), 0.0), b) for b in timed)
        any_call = ", ".join(f"{b} {us:.0f} us" for us, b in sorted(costs))
        notes.append(f"so short a call is mostly what any call costs: {any_call}")
    return chosen, "; ".join(notes)


def _turns(batch: int, hidden_size: int, device: Device) -> float:
    """Tiles for each SM; there is no less than one turn."""
    return max(1.0, -(-batch // TILE) * -(-hidden_size // TILE) / device.sms)


def _slower(mine: float | None, theirs: float | None, growth: float) -> bool:
    return mine is not None and theirs is not None and growth * mine > theirs


def _figures(table: Table, kind: str, cell: Cell, timed: Mapping[str, Timed], device: Device) -> str:
    known = table.device
    same = device.sms == known.sms and _described(device.name) is known
    where = f"measured on NVIDIA {known.name}" + ("" if same else f", nearest to {device.name},")
    shown: list[str] = []
    for backend, of_it in sorted(timed.items(), key=lambda item: item[1].call_us):
        graph = "" if of_it.graph_us is None else f" ({of_it.graph_us:.3g} in a CUDA graph)"
        shown.append(f"{backend} {of_it.call_us / cell.time:.3g}{'' if shown else ' us per step'}{graph}")
    size = f"{cell.dtype}, {kind}, H {cell.hidden_size}, B {cell.batch}, T {cell.time}"
    return f"{where} at {size}: {', '.join(shown)}{f'; {FORM}' if 'sequence' in timed else ''}"
