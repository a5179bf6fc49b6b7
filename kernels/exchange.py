"""How programs of one launch hand tiles to each other: the data is its own flag.

The buffer is filled beforehand with a SENTINEL, the bit pattern of all ones, which is a NaN in every format. A program
publishes its tile once; a consumer re-loads until no sentinel is left. There is no counter and no read-modify-write.

Fragment order. A tile lies in memory as the tensor core takes it: in blocks of 16 rows x 16 units in half precision,
16 rows x 8 units in float32. A block is 512 bytes, 16 for each lane of a warp: the four registers of the left factor of
m16n8k16 (float32: m16n8k8). So a load of a warp is one contiguous block, and what arrives is multiplied as it is.
A tile of 8 rows is the right factor instead, and a block of it has 8 rows x 32 units (float32: x 16): the two registers
of two right factors.

The wait (`wait_text`). One PTX text loads all of a thread's 16-byte vectors, looks for the sentinel in each element and
loops. Each thread waits for itself: no reduction over the program, no barrier. Its outputs are the registers of the
product, which begins once all lanes of a warp are through.

Why this is right
1. Every element is written once after the fill, and a store of 2 or 4 aligned bytes is not torn. So an element that is
   not the sentinel is the published one: each validates itself, and no order between elements or programs is needed.
2. What is published is never the sentinel: a NaN with these bits becomes the format's quiet NaN (`publish`).
3. The fill is an earlier launch on the same stream, so it happens before every load here.
4. Publishing stores go to L2 (`.cg`) and are strong at GPU scope in the machine code; receiving loads are
   `ld.relaxed.gpu` in a volatile text, so the compiler neither merges nor moves them, and they pass L1 by.
5. A wait loads 16 bytes where others store 2 or 4. PTX leaves races of mixed sizes undefined; the machine code does
   not: one LDG, one STG, L2 as the point of coherence, in sectors of 32 bytes. Nothing but 1. is needed of it: bytes
   of one element never come from different stores. The litmus test (tests/test_litmus.py) watches it on a device.
6. Every element that somebody waits for is published: programs publish all rows of a tile at every visit, whether they
   run or not, and all of their units, zeros past H; blocks that no program owns are filled with zeros beforehand.
7. All programs that wait for each other are on the device at once (a cooperative launch), and each publishes visit v
   before it waits for v + 1: the least visit that anyone waits for is always on its way.

No wait is without bound. After a number of looks a thread reads the clock and the status word. Past the bound it sets
the word, and the one that the host reads, and goes on with what it has: what is missing is a sentinel, a NaN, which
spoils the rows that wait for it. Once the word is set nobody waits for more than that number of looks. The host raises
an error at its next call.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOOKS = 64  # looks at the data between two looks at the clock and the status word; a power of two
CLOCK_SHIFT = 20  # the clock is looked at in units of 2^20 ns, about a millisecond: 32 bits of it last for weeks
MULTIPLY = gl.constexpr("mul.wide.s32 $0, $1, $2;")
ROUND_TO_TF32 = gl.constexpr("cvt.rna.tf32.f32 $0, $1;")
BLOCK_BYTES = 512


def bound_of(seconds: float) -> int:
    """The bound of a wait as the kernels take it: at least one unit."""
    return max(1, round(1e9 * seconds) >> CLOCK_SHIFT)


def rows_of_block(rows: int) -> int:
    """Rows of a block in tiles of so many rows."""
    return min(rows, 16)


def units_of_block(width: int, rows: int) -> int:
    """Units of a block in tiles of so many rows; width: bits of an element, 16 or 32."""
    return BLOCK_BYTES * 8 // width // rows_of_block(rows)


class Wait(NamedTuple):
    """The wait of one thread for all its vectors, as the kernels take it."""

    text: str
    constraints: str
    displacements: tuple[int, ...]  # of each vector in turn, in bytes from the thread's address
    pack: int  # elements of a thread in each of the tensors
    width: int  # bits of an element


def displacements(rows: int, part: int, parts: int, gates: int, warps: int, width: int) -> tuple[int, ...]:
    """Where the vectors of a thread lie, in bytes from the first, in the order of its registers.

    A gate is a grid of blocks, [rows of blocks, parts * part / units of a block]: K is made of `parts` tensors of
    `part` units, each divided among the warps. A tensor's registers are ordered by blocks of K, then by rows of blocks.
    """
    units, tall = units_of_block(width, rows), rows // rows_of_block(rows)
    blocks, of_row = part // warps // units, parts * part // units
    found = []
    for gate in range(gates):
        for number in range(parts):
            for row in range(tall):
                at = (gate * tall + row) * of_row + number * (part // units)
                found += [(at + k) * BLOCK_BYTES for k in range(blocks)]
    return tuple(found)


def wait_text(rows: int, part: int, parts: int, gates: int, warps: int, width: int, delay: int) -> Wait:
    """The wait for `gates` gates of `parts` tensors [warps, rows, part / warps] each.

    Operands, each the same in all elements of a thread: int64 the address of the thread's first vector, of the device's
    status word and of the host's; and int32 the bound, in units of 2 ** CLOCK_SHIFT nanoseconds.

    Args:
        delay: nanoseconds of sleep before the first look, which comes in vain if it comes too early.
    """
    places = displacements(rows, part, parts, gates, warps, width)
    pack = rows * part // warps // 32
    outputs = 4 * len(places)
    address, status, report, bound = (f"${outputs + i * pack}" for i in range(4))
    lines = [
        "{", ".reg .pred p;", ".reg .b32 missing, bits, looks, now, end;", ".reg .b64 clock;", "mov.u32 looks, 0;",
    ]  # fmt: skip
    if delay:
        lines.append(f"nanosleep.u32 {delay};")
    lines.append("look:")
    for i, place in enumerate(places):
        registers = ", ".join(f"${4 * i + j}" for j in range(4))
        lines.append(f"ld.relaxed.gpu.global.v4.b32 {{{registers}}}, [{address}+{place}];")
    if width == 16:
        # The highest bit of a half of (0xFFFE - x) & x is set where the half is 0xFFFF. The lower half borrows from the
        # upper one only if it is the sentinel itself: whether there is any is told rightly, whatever that does above.
        lines.append("mov.u32 missing, 0;")
        for i in range(outputs):
            lines.append(f"sub.u32 bits, 0xFFFEFFFE, ${i}; and.b32 bits, bits, ${i}; or.b32 missing, missing, bits;")
        lines.append("and.b32 missing, missing, 0x80008000; setp.eq.u32 p, missing, 0;")
    else:
        lines.append("mov.u32 missing, $0;")
        lines += [f"max.u32 missing, missing, ${i};" for i in range(1, outputs)]
        lines.append("setp.ne.u32 p, missing, 0xFFFFFFFF;")
    lines += [
        "@p bra found;",
        f"add.u32 looks, looks, 1; and.b32 bits, looks, {LOOKS - 1}; setp.ne.u32 p, bits, 0; @p bra look;",
        f"mov.u64 clock, %globaltimer; shr.u64 clock, clock, {CLOCK_SHIFT}; cvt.u32.u64 now, clock;",
        f"setp.eq.u32 p, looks, {LOOKS}; @p add.u32 end, now, {bound};",
        f"ld.relaxed.gpu.global.u32 bits, [{status}]; setp.ne.u32 p, bits, 0; @p bra found;",
        "sub.u32 now, now, end; setp.lt.s32 p, now, 0; @p bra look;",
        f"mov.u32 bits, 1; st.relaxed.gpu.global.u32 [{status}], bits; st.relaxed.sys.global.u32 [{report}], bits;",
        "found:", "}",
    ]  # fmt: skip
    constraints = ",".join(["=&r"] * outputs + ["l"] * (3 * pack) + ["r"] * pack)
    return Wait(" ".join(lines), constraints, places, pack, width)


@gluon.jit
def place(row, unit, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Which element of its block a row and a unit of it are: lane, register, half. ROWS: of a tile."""
    lane = (row % 8) * 4 + unit % (128 // WIDTH) // (32 // WIDTH)
    register = unit // (128 // WIDTH) if ROWS == 8 else unit // (128 // WIDTH) * 2 + row // 8
    return (lane * 4 + register) * (32 // WIDTH) + unit % (32 // WIDTH)


@gluon.jit
def place_in_tile(row, unit, K: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Which element of a tile's rows of K units each."""
    HEIGHT: gl.constexpr = 8 if ROWS == 8 else 16
    UNITS: gl.constexpr = 4096 // WIDTH // HEIGHT
    block = (row // HEIGHT) * (HEIGHT * K) + (unit // UNITS) * (HEIGHT * UNITS)
    return block + place(row % HEIGHT, unit % UNITS, ROWS, WIDTH)


@gluon.jit
def first_vector(part, row, k, K_OF_WARP: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Bytes from a tile's begin to the first vector of the thread that holds these elements: row and k of its warp, the
    number of the warp `part`. Of all elements of a thread it is the same."""
    HEIGHT: gl.constexpr = 8 if ROWS == 8 else 16
    lane = (row % 8) * 4 + k % (128 // WIDTH) // (32 // WIDTH)
    return part * (HEIGHT * K_OF_WARP * WIDTH // 8) + lane * 16


@gluon.jit
def publish(ptrs, value):
    """Store a tile so that others see it. ptrs: integers of the value's width."""
    bits = value.to(ptrs.dtype.element_ty, bitcast=True)
    if value.dtype == gl.float16:
        quiet_nan: gl.constexpr = 0x7E00
    elif value.dtype == gl.bfloat16:
        quiet_nan: gl.constexpr = 0x7FC0
    else:
        quiet_nan: gl.constexpr = 0x7FC00000
    gl.store(ptrs, gl.where(bits == -1, quiet_nan, bits).to(ptrs.dtype.element_ty), cache_modifier=".cg")


@gluon.jit
def as_factor(x, PRECISION: gl.constexpr):
    """A factor of a product. Matrix instructions drop the last 13 bits of a float32 factor under TF32: round them off
    first, to nearest, ties away from zero."""
    if PRECISION == "tf32" and x.dtype == gl.float32:
        return gl.inline_asm_elementwise(ROUND_TO_TF32, "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1).to(
            gl.float32, bitcast=True
        )
    else:
        return x


class Texts(NamedTuple):
    """How a thread waits, as the host says it: `wait_text`."""

    WAIT: Any
    CONSTRAINTS: Any
    PACK: Any


class Words(NamedTuple):
    """What bounds a wait: addresses of the status word and of the host's, and the bound."""

    status: Any
    report: Any
    bound: Any


@gluon.constexpr_function
def bits_of(dtype, TENSORS):
    return (gl.int32 if dtype == gl.float32 else gl.int16,) * TENSORS


@gluon.jit
def received(address, words, TEXTS: gl.constexpr, TENSORS: gl.constexpr, dtype: gl.constexpr):
    """Wait for TENSORS factors."""
    kinds: gl.constexpr = bits_of(dtype, TENSORS)
    given = (address, words.status, words.report, words.bound)
    seen = gl.inline_asm_elementwise(TEXTS.WAIT, TEXTS.CONSTRAINTS, given, dtype=kinds, is_pure=False, pack=TEXTS.PACK)
    found = ()
    for i in gl.static_range(TENSORS):
        found += (seen[i].to(dtype, bitcast=True),)
    return found
