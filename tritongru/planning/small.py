"""Tiles of the kernels in which one program holds all of W_h (kernels/small.py).

Tiles are data, as in planning/sequence.py. None was timed yet: `python -m benchmarks day` sweeps them. Every program
runs by itself, so none of them has to find a place at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from .devices import Device
from .problem import BYTES

LARGEST = 128  # H: registers hold no more of float32
CLASSES: Mapping[int, tuple[int, ...]] = {2: (64, 128), 4: (32, 64, 128)}  # H padded, by bytes of an element
# Rows of a program, by bytes of an element and units: the fewest with which no SM has more than WARPS to run. 16 rows
# of 128 units spill. Of an odd H, whose units are read one by one, 8 do: it takes ODD.
ROWS: Mapping[tuple[int, int], tuple[int, ...]] = {
    (2, 64): (4, 8, 16), (2, 128): (4, 8), (4, 32): (1, 2), (4, 64): (1, 2), (4, 128): (1, 2)
}  # fmt: skip
ODD = 4
WARPS = 8
# float32: lanes of a warp that share a unit. More of them read less of shared memory, which backward reads three times
# as much of; fewer take less shuffles, of which forward has three times as many.
LANES: Mapping[str, int] = {"forward": 4, "backward": 8}
# Where two rows spill, but on compute capability 8.0 and 9.0, and 8 lanes on 10.x: there it takes 4.
TIGHT = ("backward", 4, 128)


@dataclass(frozen=True)
class SmallTiles:
    """What a launch does in which every program holds all of W_h. The fields up to `ahead` are constants of the
    compiled kernel."""

    rows: int  # of a program
    units: int  # of a program, at least H
    num_warps: int
    lanes: int  # of a warp, that share a unit; 0: matrix instructions
    vector: int  # units that a thread reads and writes at once; they divide H
    ahead: int  # visits, that x_proj (backward: dy, gates, h_prev) is asked for
    programs: int  # of a direction
    directions: int  # of the launch: all that the layer has

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.programs, 1, self.directions

    @property
    def form(self) -> tuple[object, ...]:
        """What tells its compiled kernel from another of the same pass and dtype."""
        return dataclasses.astuple(self)[:6]

    @property
    def words(self) -> str:
        how = f"by FMA, {self.lanes} lanes a unit" if self.lanes else "by matrix instructions"
        programs = f"{self.programs * self.directions} programs{' of both directions' * (self.directions == 2)}"
        each = f"{self.rows} rows x {self.units} units a program, {self.num_warps} warps"
        return f"{each}, {how}; {programs} with all of W_h each, nothing exchanged"

    def shared_bytes(self, kind: str, dtype: str) -> int:
        """An upper bound of a program's shared memory: h, or three gate gradients, and what the longest row is found
        with; in half precision a gate's weights on their way, before."""
        factors, size = 1 if kind == "forward" else 3, BYTES[dtype]
        if self.lanes:
            return factors * self.units * self.rows * size + 4 * self.num_warps
        return max(factors * max(self.rows, 8) * size, self.units * size) * self.units + 4 * self.num_warps


FIELDS = ("rows", "units", "num_warps", "lanes", "ahead")  # that can be set


def class_of(hidden_size: int, dtype: str) -> int:
    """H padded."""
    return next(units for units in CLASSES[BYTES[dtype]] if hidden_size <= units)


def small_tiles(
    kind: str, batch: int, hidden_size: int, directions: int, dtype: str, device: Device, given: Mapping[str, int]
) -> SmallTiles:
    """Tiles of `forward` or `backward` of a layer of at most LARGEST units. `given`: fields set by hand.

    Raises:
        ValueError: given fields that no kernel can have.
    """
    size = BYTES[dtype]
    units = given.get("units", class_of(hidden_size, dtype))
    capability = device.capability or 0
    tight = (kind, size, units) == TIGHT and capability not in (80, 90)
    num_warps = given.get("num_warps", max(1, units // 16))
    odd = size == 2 and hidden_size % 2 > 0
    possible = (ODD,) if odd else (1,) if tight else ROWS.get((size, units), (ODD if size == 2 else 1,))
    alone = (rows for rows in possible if -(-batch // rows) * directions * num_warps <= WARPS * device.sms)
    rows = given.get("rows", next(alone, possible[-1]))
    planned = dict(
        rows=rows, units=units, num_warps=num_warps, vector=1 if size == 4 or odd else 2, ahead=1 if rows == 16 else 2,
        lanes=0 if size == 2 else 4 if tight and capability // 10 == 10 else LANES[kind], programs=-(-batch // rows),
        directions=directions,
    )  # fmt: skip
    tiles = SmallTiles(**{**planned, **given})
    possible_rows: tuple[int, ...] = (4, 8, 16)
    possible_lanes: tuple[int, ...] = (0,)
    possible_warps: tuple[int, ...] = (units // 16,)
    if size == 4:
        possible_rows, possible_lanes = (1, 2), tuple(n for n in (2, 4, 8) if 4 * n <= units)
        possible_warps = tuple(n for n in (1, 2, 4, 8) if 32 * n <= units * max(tiles.lanes, 1))
    for name, can_be in {
        "units": tuple(n for n in (16, 32, 64, 128) if n >= hidden_size),
        "rows": possible_rows,
        "lanes": possible_lanes,
        "num_warps": possible_warps,
        "ahead": (1, 2),
    }.items():
        if (value := getattr(tiles, name)) not in can_be:
            expected = ", ".join(map(str, can_be))
            raise ValueError(f"tiles of backend 'sequence': {name} must be one of {expected} here, got {value}")
    return tiles
