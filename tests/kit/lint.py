"""The lint that reads the binary of backend `sequence`'s kernels: what the emulator cannot see, and a GPU shows rarely.

kernels/exchange.py is right, and kernels/sequence.py fast, only if the machine code keeps what the source says. How
many of each instruction there are is known from the tiles: one that is weak, narrow, gone or doubled shows as a count
that is off. On sm_80 to sm_120 the source becomes:

    ld.relaxed.gpu.global.v4.b32       LDG.E.128.STRONG.GPU
    gl.store(cache_modifier=".cg")     STG.E.U16.STRONG.GPU
    a plain load or store              LDG.E.U16, STG.E       weak: the memory model promises other programs nothing
    the product's begin after a wait   WARPSYNC               the lanes of a warp end their waits one by one
"""

from collections import Counter
from collections.abc import Iterable

from tritongru.planning.problem import BYTES
from tritongru.planning.sequence import SequenceTiles
from tritongru.planning.small import SmallTiles
from tritongru.planning.step import StepTiles
from tritongru.tools.compile_report import CompileReport, bytes_moved, control_flow

# Copies that a later instruction waits for: cp.async, and the bulk copies of sm_90 and later
ASYNCHRONOUS = ("LDGSTS", "LDGDEPBAR", "UTMALDG", "UBLKCP")
MATRIX = ("HMMA", "HGMMA", "UTCMMA")
RECEIVED = "LDG.E.128.STRONG.GPU"
WAIT, LET = "ACQBULK", "PREEXIT"  # `gdc_wait` and `gdc_launch_dependents` on sm_90 to sm_120


def spilled_in_loop(t: SequenceTiles, kind: str) -> int:
    """Bytes that tiles may spill in the time loop: those that an H200 measured to be faster all the same."""
    if t.block_b == 32:
        return 224 if t.tiles == 2 else 16
    return 8 if (kind, t.units, t.tiles, t.waits) == ("backward", 1024, 2, 1) else 0


class Binary:
    def __init__(self, report: CompileReport):
        self.opcodes, self.before, bodies = control_flow(report.sass)
        self.body, *self.inner = bodies or [set()]  # the time loop is by far the largest
        self.after: list[list[int]] = [[] for _ in self.opcodes]
        for i, previous in enumerate(self.before):
            for j in previous:
                self.after[j].append(i)
        self.loop = Counter(self.opcodes[i] for i in self.body)
        copies = sorted({opcode.split(".")[0] for opcode in self.opcodes} & set(ASYNCHRONOUS))
        self.faults = [f"{opcode}: an asynchronous copy, which a pipeline makes" for opcode in copies]
        if not bodies:
            self.faults.append("no loop over the visits")

    def count(self, *names: str) -> int:
        return sum(n for opcode, n in self.loop.items() if opcode.split(".")[0] in names)

    def bytes(self, kind: str, strong: str | None = None, among: Iterable[int] | None = None) -> int:
        """Of a thread's loads ("LDG") or stores ("STG") of one strength: "SYS", "GPU", or None, the weak ones."""
        total = 0
        for opcode in (self.opcodes[i] for i in (self.body if among is None else among)):
            name, *modifiers = opcode.split(".")
            scope = modifiers[modifiers.index("STRONG") + 1] if "STRONG" in modifiers else None
            if name == kind and scope == strong:
                total += 4 * int(modifiers[-1]) if name == "LDSM" else bytes_moved(opcode)
        return total

    def from_shared(self) -> int:
        return self.bytes("LDS") + self.bytes("LDSM")

    def reached(self, start: Iterable[int], ways: list[list[int]], *stops: str) -> set[int]:
        """What control may reach from `start` by `after`, or came from by `before`, and not through a stop."""
        seen, pending = set(start), list(start)
        while pending:
            i = pending.pop()
            if not self.opcodes[i].startswith(stops):
                new = [j for j in ways[i] if j not in seen]
                seen.update(new)
                pending += new
        return seen

    def expect(self, found: int, wanted: int, what: str) -> None:
        if found != wanted:
            self.faults.append(f"{found} {what} in the time loop, the tiles need {wanted}")


def faults_of(report: CompileReport, t: SequenceTiles | SmallTiles, kind: str, dtype: str, resets=False) -> list[str]:
    """Of a kernel of backend `sequence` with tiles t, for an NVIDIA device; [] if nothing is wrong. What a visit takes
    is known by its source; bytes are those of one thread. kind: "forward" or "backward"."""
    if isinstance(t, SmallTiles):
        return small_faults(Binary(report), t, kind, dtype)
    b, size, threads = Binary(report), BYTES[dtype], 32 * t.num_warps
    opcodes, loop = b.opcodes, b.loop
    if not b.body:
        return b.faults
    own = max(1, t.block_b * t.block_h // threads)  # elements of a tile
    forward = kind == "forward"
    gates, sums = (1, 3) if forward else (3, 1)
    # vectors of a warp and gate: each a left factor of 16 rows, or two right factors of 8 rows
    of_gate = t.block_b * (t.units // t.num_warps) * size // 512
    of_vector = t.block_h // 8 if t.block_b > 8 else 2 * (t.block_h // 16)
    waits, vectors = t.tiles * t.waits, gates * of_gate // t.waits

    if report.num_stages != 1:
        b.faults.append(f"num_stages is {report.num_stages}: a pipeline may load what is not written yet")
    spilled = sum(bytes_moved(opcode) * n for opcode, n in loop.items() if opcode.startswith(("LDL", "STL")))
    if spilled > spilled_in_loop(t, kind):
        b.faults.append(f"{spilled} bytes spilled in the time loop, with {report.registers} registers")
    b.expect(b.count(*MATRIX), t.tiles * 3 * of_gate * of_vector, "matrix instructions")
    b.expect(b.count("BAR"), 2 * t.tiles, "barriers")  # the parts of the sums take two for each row tile
    b.expect(loop[RECEIVED], waits * vectors, "strong loads of 16 bytes")
    again = [n for inner in b.inner if inner < b.body and (n := sum(opcodes[i] == RECEIVED for i in inner))]
    if again != [vectors] * waits:
        b.faults.append(f"loops that load {again} vectors again, the tiles need {waits} of {vectors} each")
    status = b.bytes("LDG", "GPU") - 16 * loop[RECEIVED]
    b.expect(status, 4 * waits, "bytes of other strong loads")  # each wait looks at the status word
    b.expect(b.count("NANOSLEEP"), t.tiles * bool(t.delay), "sleeps")  # before the first look of a visit
    told = 4 * waits  # the status word, and the one that the host reads
    b.expect(b.bytes("STG", "GPU"), t.tiles * gates * own * size + told, "bytes of strong stores")
    b.expect(b.bytes("STG", "SYS"), told, "bytes of stores for the host")
    stored = t.tiles * (5 if forward else 4) * own * size  # y, r, z, n, q, or dgates
    b.expect(b.bytes("STG"), stored, "bytes of weak stores")
    # x_proj, or dy, gates, h_prev; resets; and where a timestep begins
    loaded = t.tiles * ((3 if forward else 6) * size + resets) * own + 4
    b.expect(b.bytes("LDG"), loaded, "bytes of weak loads")
    # the parts of the sums, and the weights of the gates that are there
    shared = t.tiles * (4 * sums * t.num_warps * own + t.shared_gates * t.block_h * t.units * size // threads)
    b.expect(b.from_shared(), shared, "bytes from shared memory")
    waiting = {i for inner in b.inner for i in inner if opcodes[i] == RECEIVED}
    products = [i for i, opcode in enumerate(opcodes) if opcode.split(".")[0] in MATRIX]
    if parted := sum(bool(b.reached([i], b.before, "WARPSYNC") & waiting) for i in products):
        b.faults.append(f"{parted} matrix instructions that a lane may reach before its warp: no WARPSYNC after a wait")
    return b.faults


def dependence_faults(report: CompileReport, tiles: StepTiles, kind: str, dtype: str) -> list[str]:
    """Of a kernel of kernels/step.py that begins while the launch before it runs, of a dense layer with biases and
    saved gates, H divisible by its tiles' units and depth. How many bytes a thread loads before the wait is known from
    the tiles: a dependent load that comes too early, or a weight that comes late, shows there."""
    b = Binary(report)
    opcodes = b.opcodes
    waits, lets = ([i for i, opcode in enumerate(opcodes) if opcode.startswith(name)] for name in (WAIT, LET))
    if len(waits) != 1 or len(lets) != 1:
        return [f"{len(waits)} {WAIT} and {len(lets)} {LET}, one of each is needed"]
    early, between = b.reached([0], b.after, WAIT), b.reached(b.after[lets[0]], b.after, WAIT)
    faults = []
    if any(opcodes[i].startswith("EXIT") for i in early):
        faults.append("a program may end without a wait: the launch after it would not wait for the one before")
    if any(opcodes[i].split(".")[0] in ("STG", "RED", "REDG", "ATOM", "ATOMG") for i in early):
        faults.append("a store before the wait")
    if waits[0] not in between or any(opcodes[i].startswith(("LDG", "UTMALDG")) for i in between):
        faults.append(f"a load between {LET} and {WAIT}: the next launch begins before it is asked for")
    size, threads = BYTES[dtype], 32 * tiles.num_warps
    own = tiles.block_b * tiles.block_h // threads  # elements of a tile
    # x_proj; z of src, r, z, n, q, of dst, dy and dh_n, y and h_0
    tensors, biases = (3, 3) if kind == "forward" else (1 + 4 + 2 + 2, 0)
    wanted = tiles.ahead * 3 * tiles.block_h * tiles.block_k * size // threads + tensors * own * size
    # of a bias a thread loads as many as it has of the tile side by side
    allowed = {wanted + biases * (own >> by) * size for by in range(own.bit_length())}
    found = b.bytes("LDG", among=early)
    if found not in allowed:
        faults.append(f"{found} bytes loaded before the wait, the tiles have {wanted} that no step makes, and biases")
    return faults


GATE_MATH = 40  # multiplications and multiply-adds of one element's gates, or their gradients, at the most


def small_faults(b: Binary, t: SmallTiles, kind: str, dtype: str) -> list[str]:
    size, threads = BYTES[dtype], 32 * t.num_warps
    own = max(1, t.rows * t.units // threads)  # elements of a thread
    forward = kind == "forward"
    # x_proj, or dy, gates and h_prev; and where a timestep begins: no weights
    factors, loads, stores = (1, 3, 5) if forward else (3, 6, 4)
    b.expect(b.count("LDL", "STL"), 0, "spills")
    b.expect(b.count("BAR"), 2, "barriers")
    b.expect(b.count("LDG"), loads * own // t.vector + 1, "loads")
    b.expect(b.bytes("LDG"), loads * own * size + 4, "bytes loaded")
    b.expect(b.count("STG"), stores * own // t.vector, "stores")
    b.expect(b.bytes("STG"), stores * own * size, "bytes stored")
    if t.lanes == 0:
        rows = max(t.rows, 8)
        b.expect(b.count(*MATRIX), 3 * t.units // 16 * (rows // 8), "matrix instructions")
        b.expect(b.from_shared(), factors * t.units * rows * size // 32, "bytes from shared memory")
        return b.faults
    b.expect(b.count(*MATRIX), 0, "matrix instructions")
    shared, wanted = b.from_shared(), factors * t.rows * t.units * size // t.lanes
    if not wanted <= shared <= wanted + 8:  # Triton 3.9 for sm_100 reads a pair of them again
        b.expect(shared, wanted, "bytes from shared memory")
    products = 3 * t.rows * t.units * t.units // threads
    found = b.count("FFMA", "FMUL", "FFMA2", "FMUL2") + b.count("FFMA2", "FMUL2")
    if not products <= found <= products + GATE_MATH * own:
        b.expect(found, products, "multiply-adds")
    sums = t.rows * t.units * t.lanes // threads  # of a thread and product
    # two lanes swap half of them, or add the one that is left
    shuffles = sum(max(1, sums >> i) for i in range(1, t.lanes.bit_length()))
    b.expect(b.count("SHFL"), (3 if forward else 1) * shuffles, "shuffles")
    return b.faults
