"""Tiles of the kernels of one launch per sequence (kernels/sequence.py), and whether a device can hold them. Those of
layers that one program holds are planning/small.py's.

All programs that hand data to each other must be on the device at once, each with its slice of W_h in registers and
shared memory: two numbers of the device bind, its SMs and the shared memory of a program. Tiles are data: `FORMS`, from
measurements where there are any (benchmarks/results/nvidia-h200/prototypes.csv). tests/test_compiles.py counts the
kernels, holds `shared_bytes` against the compiler's figure and finds that nothing spills.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, get_args, get_type_hints

from . import small
from .devices import MIB, registers
from .problem import BYTES, Recurrence
from .small import COUNT, LARGEST, OnChip, SmallTiles, small_tiles
from .tuned import check, or_winner

EXCHANGE_BYTES = 4 * MIB  # that the exchange buffer may take in any case
DELAY = 250  # nanoseconds; 100 and 0 were slower at every shape, more was not tried


class Turns(NamedTuple):
    """How a program takes the rows of its group."""

    block_b: int = 16
    tiles: int = 1  # in turn
    waits: int = 0  # where more rows leave fewer registers; 0: as the form


ONE, TWO = Turns(), Turns(tiles=2)


class Form(NamedTuple):
    """A form of an exchanging kernel for one class of K: fields of SequenceTiles, told there."""

    block_h: int
    num_warps: int
    shared_gates: int = 0
    waits: int = 1
    turns: Sequence[Turns] = (ONE, TWO)  # fewest rows first, for batches that more groups do not fit


# By bytes of an element and K, forms of forward and of backward: the first that fits is taken. Fewer warps win up to
# H 256, in forward. Wide slices leave room for more groups; narrow ones need fewer registers, and forms with more gates
# in shared memory serve devices with fewer SMs. At H 512 one tile of 64 rows beats four of 16.
FORMS = {
    (2, 128): ([Form(16, 4)], [Form(16, 4)]),
    (2, 256): ([Form(16, 4)], [Form(16, 8)]),
    (2, 512): ([Form(16, 8, turns=[ONE, TWO, Turns(64)])], [Form(16, 8)]),
    (2, 768): ([Form(16, 8)], [Form(16, 8)]),
    (2, 1024): ([Form(16, 8)], [Form(16, 8, turns=[ONE, Turns(tiles=2, waits=3)])]),
    (2, 1536): ([Form(16, 8, 1)], [Form(16, 8, 1, waits=3)]),
    (2, 2048): ([Form(16, 8, 2), Form(16, 8, 1, turns=[ONE])], [Form(16, 8, 2, waits=3)]),
    (4, 128): ([Form(16, 4)], [Form(16, 4)]),
    (4, 256): ([Form(16, 8)], [Form(16, 8)]),
    (4, 512): ([Form(16, 8)], [Form(16, 8, waits=3)]),
    (4, 768): ([Form(8, 8), Form(16, 8, 1)], [Form(8, 8, waits=3), Form(16, 8, 1, waits=3)]),
    (4, 1024): (
        [Form(8, 8), Form(16, 8, 1, turns=[ONE])],
        [Form(8, 8, 1, waits=3), Form(16, 8, 2, waits=3, turns=[ONE]), Form(16, 8, 1, waits=3, turns=[ONE])],
    ),
}


@dataclass(frozen=True, kw_only=True)
class SequenceTiles(OnChip):
    """The programs of a group exchange. Where groups do not take all rows, there are several launches; a bidirectional
    layer with 1 direction a launch takes two. Annotated: what may be set, and what to."""

    block_b: Annotated[int, (8, 16, 32, 64)]  # rows of a tile
    block_h: Annotated[int, (8, 16, 32)]  # units of a program
    block_k: Annotated[int, [1 << n for n in range(4, 20)]]  # units of each of the tensors that K is made of
    num_k: Annotated[int, (1, 3)]  # tensors
    num_warps: Annotated[int, (1, 2, 4, 8, 16)]
    shared_gates: Annotated[int, range(4)]  # whose weights are in shared memory, those of the others in registers
    waits: Annotated[int, (1, 3)]  # of a visit: 3 where backward waits for one gate gradient after another
    delay: Annotated[int, range(1_000_001)]  # ns of sleep before the first look, where data was published just before
    programs_per_sm: Annotated[int, COUNT]  # that registers are dealt out for
    tiles: Annotated[int, COUNT]  # row tiles of a group, in turn

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
        """Of a thread: the assembler does not know that a program has an SM to itself, aims at two programs of 8 warps,
        so at 128 registers, and would spill for that."""
        return registers(self.num_warps, self.programs_per_sm)

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

    def visits_per_launch(self, kind: str, of: Recurrence, time: int, rows: int) -> int:
        """Visits of one launch: as many as the exchange buffer may have slots for, less one, dealt out evenly. It takes
        at most the larger of EXCHANGE_BYTES and a quarter of what training keeps, which is r, z, n, q and the output.
        rows: of the batch over all time steps."""
        slot = self.directions * self.rows * self.units * (1 if kind == "forward" else 3) * of.size
        kept = 5 * of.directions * rows * of.hidden_size * of.size
        most = max(1, max(EXCHANGE_BYTES, kept // 4) // slot - 1)
        return -(-time // -(-time // most))


HINTS = get_type_hints(SequenceTiles, include_extras=True)
FIELDS: Mapping[str, Sequence[int]] = {name: get_args(of)[1] for name, of in HINTS.items() if get_args(of)}
OVERRIDABLE = tuple(dict.fromkeys(("exchange", *FIELDS, *small.FIELDS)))


def exchanges(of: Recurrence) -> bool:
    """Whether programs hand slices of h to each other: where a layer is not small, or overrides say so by what they
    set; in the interpreter unless told otherwise, for one program would show little."""
    given = dict(of.overrides)
    if "exchange" in given:
        return bool(given["exchange"])
    if by_name := given.keys() - {"num_warps"}:
        return not by_name & set(small.FIELDS)
    return of.hidden_size > LARGEST or of.device.vendor == "interpreter"


def kinds(T: int, training: bool) -> tuple[str, ...]:
    """Of the launches of a call."""
    return ("forward", "backward")[: 1 + training]


def sequence_tiles(kind: str, of: Recurrence) -> SequenceTiles | SmallTiles | str:
    """Tiles of `forward` or `backward`, or why the device cannot hold them. Of the fields that can be set `exchange=0`
    asks for kernels/small.py, 1 for sequence.py.

    Raises:
        ValueError: overrides that no kernel can have.
    """
    tiles: SequenceTiles | SmallTiles | str = or_winner(_planned, "sequence", kind, of)
    return tiles


def _planned(kind: str, of: Recurrence) -> SequenceTiles | SmallTiles | str:
    device, H, exchanging = of.device, of.hidden_size, exchanges(of)
    if device.vendor == "amd":
        return f"on {device.name} programs cannot hand h to each other: L2s of several dies are not coherent"
    given = {name: value for name, value in of.overrides if name != "exchange"}
    fields = tuple(FIELDS) if exchanging else small.FIELDS
    if unknown := given.keys() - set(fields):
        how = "with" if exchanging else "without"
        raise ValueError(f"{how} exchange the fields are {', '.join(fields)}, got {', '.join(unknown)}")
    if 4 * of.directions * of.batch * H >= 1 << 31:
        return "a time step has more elements than its kernels count in 32 bits"
    if not exchanging and H > LARGEST:
        return f"one program holds all of W_h of H up to {LARGEST}, not {H}"
    if not exchanging:
        return small_tiles(kind, of, given)
    if of.dtype == "fp32" and of.precision == "ieee" and device.vendor == "nvidia":
        return f"float32 without TF32 has no matrix instructions: only H up to {LARGEST} is kept on chip"
    check("sequence", given, FIELDS)
    classes = {K: forms[kind == "backward"] for (size, K), forms in FORMS.items() if size == of.size}
    if device.vendor == "interpreter":  # takes small ones
        classes = {max(32, 1 << (H - 1).bit_length()): [Form(16, 2)]}
    if max(classes) < H:
        return f"H {H} is above {max(classes)}, the largest whose weights in {of.dtype} any device holds"
    K, refused = next(K for K in classes if H <= K), []
    for form in classes[K]:
        if not isinstance(tiles := _dealt_out(kind, of, K, form, given), str):
            return tiles
        refused.append(tiles)
    return f"{device.name} cannot hold W_h of H {H} in {of.dtype}: {'; '.join(dict.fromkeys(refused))}"


def _dealt_out(kind: str, of: Recurrence, K: int, form: Form, given: Mapping[str, int]) -> SequenceTiles | str:
    """A form's tiles, its groups and rows dealt out to the device's SMs; or what it would need more of."""
    device, emulated = of.device, of.device.vendor == "interpreter"
    block_h, per_sm = given.get("block_h", form.block_h), given.get("programs_per_sm", 1)
    # a block of the exchange buffer belongs to whole programs
    units = max(block_h, _units_of_block(of.dtype, given.get("block_b", 16)))
    programs = -(-of.hidden_size // units) * units // block_h
    places = max(device.sms * per_sm, programs * emulated)
    if programs > places:
        return f"{programs} programs of {block_h} units are more than its {places} places"
    directions = given.get("directions", of.directions if of.directions * programs <= places else 1)
    most = max(1, places // (programs * directions))
    for turns in form.turns:
        block_b, in_turn = given.get("block_b", turns.block_b), given.get("tiles", turns.tiles)
        row_tiles = -(-of.batch // block_b)
        if row_tiles <= most * in_turn:
            break
    planned = dict(
        block_b=block_b, block_h=block_h, block_k=K // 3 if K % 3 == 0 else K, num_k=3 if K % 3 == 0 else 1,
        num_warps=form.num_warps, shared_gates=form.shared_gates, waits=turns.waits or form.waits,
        delay=DELAY if in_turn == 1 and not emulated else 0, programs_per_sm=per_sm,
        tiles=in_turn, programs=programs, groups=min(most, -(-row_tiles // in_turn)), directions=directions,
    )  # fmt: skip
    t = SequenceTiles(**{**planned, **given, **({} if kind == "backward" else {"waits": 1})})
    if given:
        least = (16 if t.block_b > 8 else 32) * t.num_warps
        possible = {
            "block_k": [n for n in FIELDS["block_k"] if n >= least and n * t.num_k >= of.hidden_size],
            "block_h": FIELDS["block_h"][t.block_b == 8 :],
            "directions": (1, of.directions),
            "groups": range(1, max(1, places // (t.programs * t.directions)) + 1),
        }
        check("sequence", vars(t), possible)
    shared, has = t.shared_bytes(kind, of.dtype), device.shared_per_program
    if shared <= has and (shared + 1024) * per_sm <= device.shared_per_sm:
        return t
    taken = f"{per_sm} program(s) of {block_h} units an SM take {per_sm * shared // 1024} KiB"
    return f"{taken} of its {has // 1024} KiB of shared memory"


def _units_of_block(dtype: str, rows: int) -> int:
    """Units of a block of the exchange buffer (kernels/exchange.py) in tiles of so many rows."""
    return 512 // BYTES[dtype] // min(rows, 16)
