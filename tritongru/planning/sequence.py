"""Tiles of the kernels of one launch per sequence (kernels/sequence.py), and whether a device can hold them. Those of
layers that one program holds are planning/small.py's.

All programs that hand data to each other must be on the device at once, each with its slice of W_h in registers and
shared memory. So a choice is bound by two numbers of the device: its SMs and the shared memory of a program.

Tiles are data. K, H padded, comes in classes, each with forms of a kernel in order of preference (`FORMS`): the winners
of measurements, where there are any (benchmarks/results/nvidia-h200/prototypes.csv). H, B and T themselves are
arguments of a compiled kernel. tests/test_compiles.py counts the kernels, holds `shared_bytes` against the
compiler's figure and finds that nothing spills.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .devices import MIB, Device
from .problem import BYTES
from .small import FIELDS, LARGEST, SmallTiles, class_of, small_tiles
from .tuned import winner

BLOCK_B = 16  # rows of a tile, unless told
REGISTERS_PER_SM = 1 << 16
EXCHANGE_BYTES = 4 * MIB  # that the exchange buffer may take in any case

Overrides = tuple[tuple[str, int], ...]  # fields of SequenceTiles or SmallTiles by name


@dataclass(frozen=True)
class Turns:
    """How a program takes the rows of its group."""

    block_b: int = 16
    tiles: int = 1  # in turn
    waits: int = 0  # where more rows leave fewer registers; 0: as the form


@dataclass(frozen=True)
class Form:
    """A form of an exchanging kernel for one class of K: fields of SequenceTiles, told there."""

    block_h: int
    num_warps: int
    shared_gates: int = 0
    waits: int = 1
    turns: tuple[Turns, ...] = (Turns(), Turns(tiles=2))  # fewest rows first, for batches that more groups do not fit


# By pass and bytes of an element, then by (units of a tensor, tensors) of K: the first form that fits is taken. Fewer
# warps win up to H 256, in forward. Wide slices leave room for more groups; narrow ones need fewer registers, and
# forms with more gates in shared memory serve devices with fewer SMs. At H 512 one tile of 64 rows beats four of 16.
FORMS: Mapping[tuple[str, int], Mapping[tuple[int, int], tuple[Form, ...]]] = {
    ("forward", 2): {
        (128, 1): (Form(16, 4),),
        (256, 1): (Form(16, 4),),
        (512, 1): (Form(16, 8, turns=(Turns(), Turns(tiles=2), Turns(64))),),
        (256, 3): (Form(16, 8),),
        (1024, 1): (Form(16, 8),),
        (512, 3): (Form(16, 8, shared_gates=1),),
        (2048, 1): (Form(16, 8, shared_gates=2), Form(16, 8, shared_gates=1, turns=(Turns(),))),
    },
    ("backward", 2): {
        (128, 1): (Form(16, 4),),
        (256, 1): (Form(16, 8),),
        (512, 1): (Form(16, 8),),
        (256, 3): (Form(16, 8),),
        (1024, 1): (Form(16, 8, turns=(Turns(), Turns(tiles=2, waits=3))),),
        (512, 3): (Form(16, 8, shared_gates=1, waits=3),),
        (2048, 1): (Form(16, 8, shared_gates=2, waits=3),),
    },
    ("forward", 4): {
        (128, 1): (Form(16, 4),),
        (256, 1): (Form(16, 8),),
        (512, 1): (Form(16, 8),),
        (256, 3): (Form(8, 8), Form(16, 8, shared_gates=1)),
        (1024, 1): (Form(8, 8), Form(16, 8, shared_gates=1, turns=(Turns(),))),
    },
    ("backward", 4): {
        (128, 1): (Form(16, 4),),
        (256, 1): (Form(16, 8),),
        (512, 1): (Form(16, 8, waits=3),),
        (256, 3): (Form(8, 8, waits=3), Form(16, 8, shared_gates=1, waits=3)),
        (1024, 1): (
            Form(8, 8, shared_gates=1, waits=3),
            Form(16, 8, shared_gates=2, waits=3, turns=(Turns(),)),
            Form(16, 8, shared_gates=1, waits=3, turns=(Turns(),)),
        ),
    },
}
DELAY = 250  # nanoseconds; 100 and 0 were slower at every shape, more was not tried


@dataclass(frozen=True)
class SequenceTiles:
    """What a launch does whose programs exchange. The fields up to `tiles` are constants of the compiled kernel."""

    block_b: int  # rows of a tile
    block_h: int  # units of a program
    block_k: int  # units of each of the tensors that K is made of
    num_k: int  # tensors
    num_warps: int
    shared_gates: int  # whose weights are in shared memory, those of the others in registers
    waits: int  # of a visit: 3 where backward waits for one gate gradient after another
    delay: int  # nanoseconds of sleep before the first look, where the data was published just before
    early: int  # 1: what the next tile in turn awaits is asked for before this one's product
    programs_per_sm: int  # that registers are dealt out for
    tiles: int  # row tiles of a group, in turn
    programs: int  # of a group: slices of the hidden units
    groups: int  # each with all of W_h; where they do not take all rows, there are several launches
    directions: int  # of one launch; a bidirectional layer with 1 takes two launches

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.programs, self.groups, self.directions

    @property
    def rows(self) -> int:
        """Rows that one launch serves."""
        return self.groups * self.tiles * self.block_b

    @property
    def units(self) -> int:
        """K: the units that a row has in the exchange buffer."""
        return self.block_k * self.num_k

    @property
    def max_registers(self) -> int:
        """Registers that a thread may have: all that its SM has for it.

        The assembler does not know that a program has an SM to itself. It aims at two programs of 8 warps, so at 128
        registers for each thread, and would spill for that.
        """
        return min(255, REGISTERS_PER_SM // (32 * self.num_warps * self.programs_per_sm))

    @property
    def form(self) -> tuple[object, ...]:
        """What tells its compiled kernel from another of the same pass, dtype and precision."""
        return dataclasses.astuple(self)[: len(dataclasses.fields(self)) - 3]

    @property
    def words(self) -> str:
        shared = f", {self.shared_gates} of 3 gates' weights in shared memory" * (self.shared_gates > 0)
        groups = f"{self.groups * self.directions} group(s){' of both directions' * (self.directions == 2)}"
        each = f"{self.block_b} rows x {self.block_h} units a program, {self.num_warps} warps"
        each += f", K {self.num_k} x {self.block_k}{shared}"
        return f"{each}; {groups} of {self.programs} programs, {self.tiles} row tile(s) each"

    def shared_bytes(self, kind: str, dtype: str) -> int:
        """An upper bound of a program's shared memory: the weights that are there, the parts of the sums, and what the
        longest row of a tile is found with."""
        sums = (3 if kind == "forward" else 1) * self.num_warps * self.block_b * self.block_h * 4
        weights = self.shared_gates * self.block_h * self.units * BYTES[dtype]
        return weights + sums + 4 * self.num_warps * self.block_b

    def slot_bytes(self, kind: str, dtype: str) -> int:
        """Bytes of the exchange buffer for one visit."""
        gates = 1 if kind == "forward" else 3
        return self.directions * self.rows * self.units * gates * BYTES[dtype]

    def visits_per_launch(self, kind: str, dtype: str, time: int, rows: int, hidden_size: int, directions: int) -> int:
        """Visits of one launch: as many as the exchange buffer may have slots for, less one, dealt out evenly.

        The buffer takes at most the larger of EXCHANGE_BYTES and a quarter of what training keeps, which is r, z, n, q
        and the output. rows: of the batch over all time steps.
        """
        kept = 5 * directions * rows * hidden_size * BYTES[dtype]
        most = max(1, max(EXCHANGE_BYTES, kept // 4) // self.slot_bytes(kind, dtype) - 1)
        return -(-time // -(-time // most))


EXCHANGING = tuple(field.name for field in dataclasses.fields(SequenceTiles) if field.name != "programs")
OVERRIDABLE = ("exchange", *EXCHANGING, *(name for name in FIELDS if name not in EXCHANGING))


def parse_overrides(text: str, backend: str = "sequence", fields: Sequence[str] = OVERRIDABLE) -> Overrides:
    """Fields of a backend's tiles from "block_h=8,num_warps=4"; of `sequence` `exchange=0` asks for kernels/small.py, 1
    for sequence.py.

    Raises:
        ValueError: one that is none of `fields`, or no number.
    """
    found = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in fields:
            raise ValueError(f"backend {backend!r} takes the fields {', '.join(fields)}, got {name!r}")
        if not value.isdecimal():
            raise ValueError(f"field {name} of backend {backend!r} must be a number of digits, got {value!r}")
        found[name] = int(value)
    return tuple(found.items())


@lru_cache(maxsize=4096)
def exchanges(hidden_size: int, device: Device, overrides: Overrides = ()) -> bool:
    """Whether programs hand slices of h to each other: where a layer is not small, or overrides say so by what they
    set; in the interpreter unless told otherwise, for one program would show little."""
    given = dict(overrides)
    if "exchange" in given:
        return bool(given["exchange"])
    if by_name := given.keys() - {"num_warps"}:
        return not by_name & set(FIELDS)
    return hidden_size > LARGEST or device.vendor == "interpreter"


def kinds(T: int, training: bool) -> tuple[str, ...]:
    """Of the launches of a call."""
    return ("forward", "backward")[: 1 + training]


@lru_cache(maxsize=4096)
def sequence_tiles(
    kind: str, batch: int, hidden_size: int, directions: int, dtype: str, precision: str, device: Device,
    overrides: Overrides = (),
) -> SequenceTiles | SmallTiles | str:  # fmt: skip
    """Tiles of `forward` or `backward`, or why the device cannot hold them. Never depends on T.

    Raises:
        ValueError: an unknown kind, or overrides that no kernel can have.
    """
    if kind not in ("forward", "backward"):
        raise ValueError(f"kind must be forward or backward, got {kind!r}")
    if device.vendor == "amd":
        return f"on {device.name} programs cannot hand h to each other: L2s of several dies are not coherent"
    given = {name: value for name, value in overrides if name != "exchange"}
    exchanging = exchanges(hidden_size, device, overrides)
    fields = EXCHANGING if exchanging else FIELDS
    if unknown := given.keys() - set(fields):
        how = "with" if exchanging else "without"
        raise ValueError(f"{how} exchange the fields are {', '.join(fields)}, got {', '.join(unknown)}")
    if not exchanging:
        if hidden_size > LARGEST:
            return f"one program holds all of W_h of H up to {LARGEST}, not {hidden_size}"
        units = class_of(hidden_size, dtype)
        if not overrides and (won := winner("sequence", kind, dtype, batch, units, units, device)):
            with contextlib.suppress(ValueError):  # of another layer: an odd H
                return small_tiles(kind, batch, hidden_size, directions, dtype, device, dict(parse_overrides(won)))
        return small_tiles(kind, batch, hidden_size, directions, dtype, device, given)
    if dtype == "fp32" and precision == "ieee" and device.vendor == "nvidia":
        return f"float32 without TF32 has no matrix instructions: only H up to {LARGEST} is kept on chip"
    return _exchanging(kind, batch, hidden_size, directions, dtype, device, given)


def _exchanging(
    kind: str, batch: int, hidden_size: int, directions: int, dtype: str, device: Device, given: Mapping[str, int]
) -> SequenceTiles | str:
    classes = FORMS[kind, BYTES[dtype]]
    if device.vendor == "interpreter":  # takes small ones
        classes = {(max(32, 1 << (hidden_size - 1).bit_length()), 1): (Form(16, 2),)}
    parts = next((parts for parts in classes if hidden_size <= parts[0] * parts[1]), None)
    if parts is None:
        largest = max(part * parts for part, parts in classes)
        return f"H {hidden_size} is above {largest}, the largest whose weights in {dtype} any device holds"
    units = parts[0] * parts[1]
    if not given and (won := winner("sequence", kind, dtype, batch, units, units, device)):
        with contextlib.suppress(ValueError):  # of another layer: both directions, fewer units
            tuned = _exchanging(kind, batch, hidden_size, directions, dtype, device, dict(parse_overrides(won)))
            if isinstance(tuned, SequenceTiles):
                return tuned
    needed = []
    for form in classes[parts]:
        tiles = _dealt_out(kind, form, parts, batch, hidden_size, directions, dtype, device, given)
        if isinstance(tiles, SequenceTiles):
            return tiles
        needed.append(tiles)
    return f"{device.name} cannot hold W_h of H {hidden_size} in {dtype}: {'; '.join(dict.fromkeys(needed))}"


def _dealt_out(
    kind: str, form: Form, parts: tuple[int, int], batch: int, hidden_size: int, directions: int, dtype: str,
    device: Device, given: Mapping[str, int],
) -> SequenceTiles | str:  # fmt: skip
    """A form's tiles, its groups and rows dealt out to the device's SMs; or what it would need more of."""
    block_h = given.get("block_h", form.block_h)
    per_sm = given.get("programs_per_sm", 1)
    if block_h not in (8, 16, 32) or per_sm < 1:
        raise ValueError(f"block_h must be 8, 16 or 32 and programs_per_sm 1 or more, got {block_h} and {per_sm}")
    # a block of the exchange buffer belongs to whole programs
    units = max(block_h, _units_of_block(dtype, given.get("block_b", BLOCK_B)))
    programs = -(-hidden_size // units) * units // block_h
    places = max(device.sms * per_sm, programs if device.vendor == "interpreter" else 0)
    if programs > places:
        return f"{programs} programs of {block_h} units are more than its {places} places"
    together = given.get("directions", directions if directions * programs <= places else 1)
    most = max(1, places // (programs * together))
    for turns in form.turns:
        block_b, in_turn = given.get("block_b", turns.block_b), given.get("tiles", turns.tiles)
        if block_b not in (8, 16, 32, 64) or in_turn < 1:
            raise ValueError(f"block_b must be 8, 16, 32 or 64 and tiles 1 or more, got {block_b} and {in_turn}")
        row_tiles = -(-batch // block_b)
        if row_tiles <= most * in_turn:
            break
    planned = dict(
        block_b=block_b, block_h=block_h, block_k=parts[0], num_k=parts[1], num_warps=form.num_warps,
        shared_gates=form.shared_gates, waits=turns.waits or form.waits,
        delay=DELAY if in_turn == 1 and device.vendor != "interpreter" else 0, early=0, programs_per_sm=per_sm,
        tiles=in_turn, programs=programs, groups=min(most, -(-row_tiles // in_turn)), directions=together,
    )  # fmt: skip
    tiles = SequenceTiles(**{**planned, **given, **({} if kind == "backward" else {"waits": 1})})
    _check(tiles, hidden_size, directions, places)
    shared = tiles.shared_bytes(kind, dtype)
    if shared > device.shared_per_program or (shared + 1024) * per_sm > device.shared_per_sm:
        return (
            f"{per_sm} program(s) of {block_h} units an SM take {per_sm * shared // 1024} KiB of its "
            f"{device.shared_per_program // 1024} KiB of shared memory"
        )
    return tiles


def _units_of_block(dtype: str, rows: int) -> int:
    """Units of a block of the exchange buffer (kernels/exchange.py) in tiles of so many rows."""
    return 512 // BYTES[dtype] // min(rows, 16)


def _check(tiles: SequenceTiles, hidden_size: int, directions: int, places: int) -> None:
    """Raise ValueError where overrides ask for what no kernel can be."""
    t = tiles
    least = 16 if t.block_b > 8 else 32
    together = t.programs * t.groups * t.directions
    for what, holds in {
        f"block_k must be a power of 2, got {t.block_k}": t.block_k > 0 and t.block_k & (t.block_k - 1) == 0,
        f"num_k must be 1 or 3, got {t.num_k}": t.num_k in (1, 3),
        f"block_k * num_k must be H, {hidden_size}, or more, got {t.units}": t.units >= hidden_size,
        f"num_warps must be 1, 2, 4, 8 or 16, got {t.num_warps}": t.num_warps in (1, 2, 4, 8, 16),
        f"block_k must be {least} units a warp or more, got {t.block_k} / {t.num_warps}": (
            t.block_k >= least * t.num_warps
        ),
        "block_h must be 16 or 32 where block_b is 8, got 8": t.block_b > 8 or t.block_h > 8,
        f"early must be 0 or 1, got {t.early}": t.early in (0, 1),
        "early needs tiles above 1 and waits of 1": not t.early or (t.tiles > 1 and t.waits == 1),
        f"shared_gates must be 0 to 3, got {t.shared_gates}": t.shared_gates <= 3,
        f"waits must be 1 or 3, got {t.waits}": t.waits in (1, 3),
        f"delay must be 1000000 ns or less, got {t.delay}": t.delay <= 1_000_000,
        f"directions must be 1 or the layer's {directions}, got {t.directions}": t.directions in (1, directions),
        f"groups must be 1 or more, got {t.groups}": t.groups >= 1,
        f"{together} programs are more than the {places} that run at once": together <= places or t.groups == 1,
    }.items():
        if not holds:
            raise ValueError(f"tiles of backend 'sequence': {what}")
