"""The lint that reads the binary of backend `sequence`'s kernels: what the emulator cannot see, and a GPU shows rarely.

kernels/exchange.py is right, and kernels/sequence.py fast, only if the machine code keeps what the source says. How
many of each instruction there are is known from the tiles: one that is weak, narrow, gone or doubled shows as a count
that is off. On sm_80 to sm_120 the source becomes:

    ld.relaxed.gpu.global.v4.b32       LDG.E.128.STRONG.GPU
    gl.store(cache_modifier=".cg")     STG.E.U16.STRONG.GPU
    a plain load or store              LDG.E.U16, STG.E       weak: the memory model promises other programs nothing
    the product's begin after a wait   WARPSYNC               the lanes of a warp end their waits one by one
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from tritongru.planning.problem import BYTES
from tritongru.planning.sequence import SequenceTiles
from tritongru.planning.small import SmallTiles
from tritongru.planning.step import StepTiles
from tritongru.tools.compile_report import CompileReport, bytes_moved, control_flow

# Copies that a later instruction waits for: cp.async, and the bulk copies of sm_90 and later
ASYNCHRONOUS = ("LDGSTS", "LDGDEPBAR", "UTMALDG", "UBLKCP")
MATRIX = ("HMMA", "HGMMA", "UTCMMA")
RECEIVED = "LDG.E.128.STRONG.GPU"
CLOCK = "SR_GLOBALTIMER"
WAIT, LET = "ACQBULK", "PREEXIT"  # griddepcontrol.wait and .launch_dependents


class Needed(NamedTuple):
    """What a visit of all row tiles of a program takes, by its source. Bytes are those of one thread."""

    waits: int  # in the time loop
    vectors: int  # of 16 bytes, of a wait
    first_looks: int  # taken before a wait
    matrix: int  # matrix instructions of a warp
    barriers: int
    published: int  # bytes
    stored: int  # bytes of y, r, z, n, q, or of dgates
    loaded: (
        int  # bytes of what is not exchanged: x_proj, or dy, r, z, n, q, h_prev; resets; and where a timestep begins
    )
    from_shared: int  # bytes: the parts of the sums, and the weights of the gates that are there


def needed(tiles: SequenceTiles, kind: str, dtype: str, resets: bool) -> Needed:
    """By kernels/sequence.py, for its kernel of that kind."""
    t, size, threads = tiles, BYTES[dtype], 32 * tiles.num_warps
    own = max(1, t.block_b * t.block_h // threads)  # elements of a tile
    gates, sums = (1, 3) if kind == "forward" else (3, 1)
    # vectors of a warp and gate: each a left factor of 16 rows, or two right factors of 8 rows
    vectors = t.block_b * (t.units // t.num_warps) * size // 512
    of_vector = t.block_h // 8 if t.block_b > 8 else 2 * (t.block_h // 16)
    return Needed(
        waits=t.tiles * t.waits,
        vectors=gates * vectors // t.waits,
        first_looks=t.tiles * t.early,
        matrix=t.tiles * 3 * vectors * of_vector,
        barriers=2 * t.tiles,
        published=t.tiles * gates * own * size,
        stored=t.tiles * (5 if kind == "forward" else 4) * own * size,
        loaded=t.tiles * ((3 if kind == "forward" else 6) * size + resets) * own + 4,
        from_shared=t.tiles * (4 * sums * t.num_warps * own + t.shared_gates * t.block_h * t.units * size // threads),
    )


def exchange_faults(
    report: CompileReport, tiles: SequenceTiles, kind: str, dtype: str, spills: int = 0, resets: bool = False
) -> list[str]:
    """What is wrong with the machine code of a kernel that exchanges; [] if nothing.

    Args:
        report: of kernels/sequence.py's kernel of that kind with those tiles, for an NVIDIA device.
        kind: "forward" or "backward".
        spills: bytes that the time loop may spill.
        resets: whether the kernel takes them.
    """
    opcodes, before, bodies = control_flow(report)
    if not bodies:
        return ["no loop over the visits"]
    body = bodies[0]  # the time loop is by far the largest
    loop, want = Counter(opcodes[i] for i in body), needed(tiles, kind, dtype, resets)
    faults = []

    def count(names: Iterable[str]) -> int:
        return sum(n for opcode, n in loop.items() if opcode.split(".")[0] in names)

    def expect(found: int, wanted: int, what: str, why: str) -> None:
        if found != wanted:
            faults.append(f"{found} {what} in the time loop, the tiles need {wanted}: {why}")

    if report.num_stages != 1:
        faults.append(f"num_stages is {report.num_stages}: a pipeline may load what is not written yet")
    for opcode in sorted({opcode.split(".")[0] for opcode in opcodes} & set(ASYNCHRONOUS)):
        faults.append(f"{opcode}: an asynchronous copy, which a pipeline makes")
    spilled = sum(bytes_moved(opcode) * n for opcode, n in loop.items() if opcode.startswith(("LDL", "STL")))
    if spilled > spills:
        faults.append(f"{spilled} bytes spilled in the time loop, with {report.registers} registers")
    expect(count(MATRIX), want.matrix, "matrix instructions", "a product is gone, or repeated by warps")
    expect(count(("BAR",)), want.barriers, "barriers", "the parts of the sums take two for each row tile")

    looks = want.waits + want.first_looks
    expect(loop[RECEIVED], looks * want.vectors, "strong loads of 16 bytes", "some are weak, narrow or gone")
    waiting = [inner for inner in bodies[1:] if inner < body and sum(opcodes[i] == RECEIVED for i in inner)]
    again = [sum(opcodes[i] == RECEIVED for i in inner) for inner in waiting]
    if again != [want.vectors] * want.waits:
        faults.append(f"loops that load {again} vectors again, the tiles need {want.waits} of {want.vectors} each")
    status = _bytes(loop, "LDG", "GPU") - 16 * loop[RECEIVED]
    expect(status, 4 * want.waits, "bytes of other strong loads", "each wait looks at the status word")
    expect(count(("NANOSLEEP",)), tiles.tiles * bool(tiles.delay), "sleeps", "a visit has one, before its first look")

    told = 4 * want.waits  # the status word, and the one that the host reads
    expect(_bytes(loop, "STG", "GPU"), want.published + told, "bytes of strong stores", "some are weak or gone")
    expect(_bytes(loop, "STG", "SYS"), told, "bytes of stores for the host", "a wait that runs out says so once")
    expect(_bytes(loop, "STG", None), want.stored, "bytes of weak stores", "a weak store to the exchange buffer")
    expect(_bytes(loop, "LDG", None), want.loaded, "bytes of weak loads", "weights or the exchange are among them")
    shared = _bytes(loop, "LDS", None) + _bytes(loop, "LDSM", None)
    expect(shared, want.from_shared, "bytes from shared memory", "weights that should be in registers, or parts twice")

    parted = _unordered(opcodes, before, {i for inner in bodies[1:] for i in inner if opcodes[i] == RECEIVED})
    if parted:
        faults.append(f"{parted} matrix instructions that a lane may reach before its warp: no WARPSYNC after a wait")
    return faults


def dependence_faults(report: CompileReport, tiles: StepTiles, kind: str, dtype: str) -> list[str]:
    """What is wrong with the machine code of a kernel of kernels/step.py that begins while the launch before it runs;
    [] if nothing.

    On sm_90 to sm_120 `gdc_wait` is ACQBULK and `gdc_launch_dependents` PREEXIT. How many bytes a thread loads before
    the wait is known from the tiles: a dependent load that comes too early, or a weight that comes late, shows there.

    Args:
        report: of that kernel of a dense layer with biases and saved gates, H divisible by its tiles' units and depth.
        kind: "forward" or "backward".
    """
    opcodes, before, _ = control_flow(report)
    after: list[list[int]] = [[] for _ in opcodes]
    for i, previous in enumerate(before):
        for j in previous:
            after[j].append(i)

    def reached(start: list[int], stop: str) -> set[int]:
        """The instructions that control may reach from some, those included, and not through one that is `stop`."""
        seen, pending = set(start), list(start)
        while pending:
            i = pending.pop()
            if not opcodes[i].startswith(stop):
                new = [j for j in after[i] if j not in seen]
                seen.update(new)
                pending += new
        return seen

    waits = [i for i, opcode in enumerate(opcodes) if opcode.startswith(WAIT)]
    lets = [i for i, opcode in enumerate(opcodes) if opcode.startswith(LET)]
    if len(waits) != 1 or len(lets) != 1:
        return [f"{len(waits)} {WAIT} and {len(lets)} {LET}, one of each is needed"]
    early = reached([0], WAIT)
    faults = []
    if any(opcodes[i].startswith("EXIT") for i in early):
        faults.append("a program may end without a wait: the launch after it would not wait for the one before")
    if any(opcodes[i].split(".")[0] in ("STG", "RED", "REDG", "ATOM", "ATOMG") for i in early):
        faults.append("a store before the wait")
    between = reached(after[lets[0]], WAIT)
    if waits[0] not in between or any(opcodes[i].startswith(("LDG", "UTMALDG")) for i in between):
        faults.append(f"a load between {LET} and {WAIT}: the next launch begins before it is asked for")
    size, threads = BYTES[dtype], 32 * tiles.num_warps
    own = tiles.block_b * tiles.block_h // threads  # elements of a tile
    # x_proj; z of src, r, z, n, q, of dst, dy and dh_n, y and h_0
    tensors, biases = (3, 3) if kind == "forward" else (1 + 4 + 2 + 2, 0)
    wanted = tiles.ahead * 3 * tiles.block_h * tiles.block_k * size // threads + tensors * own * size
    # of a bias a thread loads as many as it has of the tile side by side
    allowed = {wanted + biases * (own >> by) * size for by in range(own.bit_length())}
    found = _bytes(Counter(opcodes[i] for i in early), "LDG", None)
    if found not in allowed:
        faults.append(f"{found} bytes loaded before the wait, the tiles have {wanted} that no step makes, and biases")
    return faults


GATE_MATH = 40  # multiplications and multiply-adds of one element's gates, or their gradients, at the most


def small_faults(report: CompileReport, tiles: SmallTiles, kind: str, dtype: str) -> list[str]:
    """What is wrong with the machine code of kernels/small.py's kernel of that kind; [] if nothing."""
    opcodes, _, bodies = control_flow(report)
    if not bodies:
        return ["no loop over the visits"]
    loop = Counter(opcodes[i] for i in bodies[0])
    t, size, threads = tiles, BYTES[dtype], 32 * tiles.num_warps
    own = max(1, t.rows * t.units // threads)  # elements of a thread
    forward = kind == "forward"
    factors = 1 if forward else 3
    faults = []

    def count(names: Iterable[str]) -> int:
        return sum(n for opcode, n in loop.items() if opcode.split(".")[0] in names)

    def expect(found: int, wanted: int, what: str) -> None:
        if found != wanted:
            faults.append(f"{found} {what} in the time loop, the tiles need {wanted}")

    for opcode in sorted({opcode.split(".")[0] for opcode in opcodes} & set(ASYNCHRONOUS)):
        faults.append(f"{opcode}: an asynchronous copy, which a pipeline makes")
    expect(count(("LDL", "STL")), 0, "spills")
    expect(count(("BAR",)), 2, "barriers")
    # x_proj, or dy, gates and h_prev; and where a timestep begins: no weights
    loads, stores = (3, 5) if forward else (6, 4)
    expect(count(("LDG",)), loads * own // t.vector + 1, "loads")
    expect(_bytes(loop, "LDG", None), loads * own * size + 4, "bytes loaded")
    expect(count(("STG",)), stores * own // t.vector, "stores")
    expect(_bytes(loop, "STG", None), stores * own * size, "bytes stored")
    shared = _bytes(loop, "LDS", None) + _bytes(loop, "LDSM", None)
    if t.lanes == 0:
        rows = max(t.rows, 8)
        expect(count(MATRIX), 3 * t.units // 16 * (rows // 8), "matrix instructions")
        expect(shared, factors * t.units * rows * size // 32, "bytes from shared memory")
        return faults
    expect(count(MATRIX), 0, "matrix instructions")
    wanted = factors * t.rows * t.units * size // t.lanes
    if not wanted <= shared <= wanted + 8:  # Triton 3.9 for sm_100 reads a pair of them again
        faults.append(f"{shared} bytes from shared memory in the time loop, the tiles need {wanted}")
    products = 3 * t.rows * t.units * t.units // threads
    found = count(("FFMA", "FMUL", "FFMA2", "FMUL2")) + count(("FFMA2", "FMUL2"))
    if not products <= found <= products + GATE_MATH * own:
        faults.append(f"{found} multiply-adds in the time loop, the tiles need {products} and those of the gates")
    sums = t.rows * t.units * t.lanes // threads  # of a thread and product
    lanes, shuffles = t.lanes, 0
    while lanes > 1:
        sums = max(1, sums // 2)  # two lanes swap half of them, or add the one that is left
        lanes, shuffles = lanes // 2, shuffles + sums
    expect(count(("SHFL",)), (3 if forward else 1) * shuffles, "shuffles")
    return faults


def time_loop(report: CompileReport) -> int:
    """Instructions of the time loop, without those that run only once a wait looks at the clock."""
    _, before, bodies = control_flow(report)
    body = bodies[0]
    clocks = {i for i, line in enumerate(_lines(report)) if CLOCK in line}
    after: dict[int, list[int]] = {i: [] for i in body}
    for i in body:
        for previous in before[i]:
            if previous in body:
                after[previous].append(i)
    head = next(i for i in body if any(previous not in body for previous in before[i]))
    seen, pending = {head}, [head]
    while pending:
        new = [i for i in after[pending.pop()] if i not in seen and i not in clocks]
        seen.update(new)
        pending += new
    return len(seen)


def _lines(report: CompileReport) -> list[str]:
    """The lines of the disassembly, an instruction each."""
    from tritongru.tools.compile_report import _SASS_LINE

    return [line for line in report.sass.splitlines() if _SASS_LINE.match(line)]


def _unordered(opcodes: list[str], before: list[list[int]], again: set[int]) -> int:
    """Matrix instructions that control may reach from the loads `again` of a wait's loop with no WARPSYNC between."""
    found = 0
    for i, opcode in enumerate(opcodes):
        if opcode.split(".")[0] not in MATRIX:
            continue
        seen, pending = {i}, [i]
        while pending:
            new = [j for j in before[pending.pop()] if j not in seen and not opcodes[j].startswith("WARPSYNC")]
            seen.update(new)
            pending += new
        found += bool(seen & again)
    return found


def _bytes(opcodes: Counter[str], kind: str, strong: str | None) -> int:
    """Bytes of a thread's loads ("LDG") or stores ("STG") of one strength: "SYS", "GPU", or None, the weak ones."""
    total = 0
    for opcode, n in opcodes.items():
        name, *modifiers = opcode.split(".")
        scope = modifiers[modifiers.index("STRONG") + 1] if "STRONG" in modifiers else None
        if name == kind and scope == strong:
            total += n * (4 * int(modifiers[-1]) if name == "LDSM" else bytes_moved(opcode))
    return total
