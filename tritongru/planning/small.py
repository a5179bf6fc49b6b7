"""Tiles of the kernels in which one program holds all of W_h (kernels/small.py): data, as in planning/sequence.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from .problem import BYTES, Recurrence
from .tuned import check

LARGEST = 128  # H: registers hold no more of float32
# By bytes of an element and units, H padded: rows of a program, the fewest with which no SM has more than WARPS to run.
# 16 rows of 128 units spill. Of an odd H, whose units are read one by one, 8 do: it takes ODD.
ROWS = {(2, 64): (4, 8, 16), (2, 128): (4, 8), (4, 32): (1, 2), (4, 64): (1, 2), (4, 128): (1, 2)}
ODD = 4
WARPS = 8
# float32: lanes of a warp that share a unit. More of them read less of shared memory, which backward reads three times
# as much of; fewer take less shuffles, of which forward has three times as many.
LANES = {"forward": 4, "backward": 8}
# Where two rows spill, but on compute capability 8.0 and 9.0, and 8 lanes on 10.x: there it takes 4.
TIGHT = ("backward", 4, 128)
COUNT = range(1, 1 << 31)
FIELDS = ("rows", "units", "num_warps", "lanes", "ahead")  # that can be set


@dataclass(frozen=True, kw_only=True)
class OnChip:
    """What a launch does whose programs keep W_h. The fields of a subclass are constants of its compiled kernel."""

    programs: int  # of a group, over which one copy of W_h is spread
    groups: Annotated[int, COUNT] = 1
    directions: Annotated[int, (1, 2)]  # of one launch

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.programs, self.groups, self.directions


@dataclass(frozen=True, kw_only=True)
class SmallTiles(OnChip):
    """Every program holds all of W_h, for rows of its own; a launch has all directions of the layer."""

    rows: int  # of a program
    units: int  # of a program, at least H
    num_warps: int
    lanes: int  # of a warp, that share a unit; 0: matrix instructions
    vector: int  # units that a thread reads and writes at once; they divide H
    ahead: int  # visits, that x_proj (backward: dy, gates, h_prev) is asked for

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


def small_tiles(kind: str, of: Recurrence, given: Mapping[str, int]) -> SmallTiles:
    """Tiles of `forward` or `backward` of a layer of at most LARGEST units. `given`: fields set by hand.

    Raises:
        ValueError: given fields that no kernel can have.
    """
    size, H, capability = of.size, of.hidden_size, of.device.capability or 0
    units = given.get("units", next(units for of_size, units in ROWS if of_size == size and units >= H))
    num_warps = given.get("num_warps", max(1, units // 16))
    tight = (kind, size, units) == TIGHT and capability not in (80, 90)
    half, pairs = size == 2, size == 2 and H % 2 == 0
    lanes = 0 if half else 4 if tight and capability // 10 == 10 else LANES[kind]
    choices = ROWS.get((size, units), (ODD if half else 1,))
    if tight or half != pairs:
        choices = (1,) if tight else (ODD,)
    alone = (rows for rows in choices if -(-of.batch // rows) * of.directions * num_warps <= WARPS * of.device.sms)
    rows = given.get("rows", next(alone, choices[-1]))
    planned = dict(rows=rows, units=units, num_warps=num_warps, lanes=lanes, ahead=1 if rows == 16 else 2)
    fields = {**planned, "vector": 1 + pairs, **given}
    warps = [n for n in (1, 2, 4, 8) if 32 * n <= units * max(fields["lanes"], 1)]
    possible = {
        "units": [n for n in (16, 32, 64, 128) if n >= H],
        "rows": (4, 8, 16) if half else (1, 2),
        "lanes": (0,) if half else [n for n in (2, 4, 8) if 4 * n <= units],
        "num_warps": (units // 16,) if half else warps,
        "ahead": (1, 2),
    }
    check("sequence", fields, possible)
    return SmallTiles(**fields, programs=-(-of.batch // fields["rows"]), directions=of.directions)
