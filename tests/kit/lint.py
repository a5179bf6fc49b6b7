"""The lint that reads the binary of an exchanging kernel: what the interpreter cannot see, and a GPU shows rarely.

kernels/exchange.py is right only if the machine code keeps what its source says: loads that are volatile and stay in
the wait, stores that are strong, nothing moved ahead by a pipeline. The exact number of each is known from the tiles:
one that is weak, narrow, gone or doubled shows as a count that is off. On sm_80 to sm_120 the source becomes:

    tl.load(volatile=True)             LDG.E.128.STRONG.SYS    ld.volatile.global.v4.b32 in PTX
    tl.store(cache_modifier=".cg")     STG.E.U16.STRONG.GPU    st.global.cg.b16
    a plain load or store              LDG.E.U16, STG.E        weak: the memory model promises other programs nothing

With num_stages = 2, Triton 3.6.0 and 3.7.1 make the very binary of num_stages = 1: there is nothing in these loops that
they would pipeline. Nothing promises that it stays so: what was asked for is therefore a fault by itself, besides what
the binary shows.
"""

from __future__ import annotations

import re
from collections import Counter

from tritongru.inspection.compile_report import CompileReport, bytes_moved, loop_opcodes
from tritongru.planning.problem import BYTES
from tritongru.planning.sequence import SequenceTiles

# Copies that a later instruction waits for: cp.async, and the bulk copies of sm_90 and later
ASYNCHRONOUS = r"\b(?:LDGSTS|LDGDEPBAR|UTMALDG|UBLKCP)\b"
VOLATILE = "LDG.E.128.STRONG.SYS"
# Barriers in a wait, of two votes (is anything missing, is it given up): three each, from Triton 3.9 on two
VOTES = 4
MATRIX = r"[A-Z]*MMA\."  # HMMA, HGMMA, UTCHMMA


def exchange_faults(report: CompileReport, tiles: SequenceTiles, kind: str, dtype: str) -> list[str]:
    """What is wrong with the machine code of a kernel that exchanges; [] if nothing.

    Args:
        report: of kernels/sequence.py's kernel of that kind with those tiles, for an NVIDIA device.
        kind: "forward" or "backward".
    """
    if not tiles.exchange:
        raise ValueError("one program owns all units here: it exchanges nothing")
    loops = loop_opcodes(report)
    if not loops:
        return ["no loop over the time steps"]
    faults = []
    in_time, inside = loops[0], loops[1:]  # the time loop is by far the largest
    needed = _Needed(tiles, kind, dtype)

    if report.num_stages != 1:
        faults.append(f"num_stages is {report.num_stages}: a pipeline may load what is not written yet")
    for opcode in sorted(set(re.findall(ASYNCHRONOUS, report.sass))):
        faults.append(f"{opcode}: an asynchronous copy, which software pipelining makes")

    # every tile is loaded once before its wait and again in it; each wait also looks at the status word
    wide, wanted = in_time[VOLATILE], 2 * needed.waits * needed.vectors
    if wide != wanted:
        faults.append(
            f"{wide} strong loads of 16 bytes in the time loop, where the exchange needs {wanted}: some are weak, "
            "narrow or gone"
        )
    status = _bytes(in_time, "LDG", strong="SYS") - 16 * wide
    if status != 4 * needed.waits:
        faults.append(
            f"strong loads of {status} bytes besides those of 16 bytes, where looking at the status word in each wait "
            f"takes {4 * needed.waits}"
        )
    waiting = [loop for loop in inside if loop[VOLATILE] == needed.vectors]
    if len(waiting) != needed.waits:
        faults.append(
            f"{len(waiting)} loops load the {needed.vectors} vectors of a wait again and again, not {needed.waits}"
        )

    parting = [loop for loop in waiting if sum(n for opcode, n in loop.items() if opcode.startswith("BAR")) < VOTES]
    if parting:
        faults.append(
            f"{len(parting)} waits with fewer than {VOTES} barriers: each warp looks at the clock and the status word "
            "for itself, and without a vote warps may part"
        )

    strong_stores = _bytes(in_time, "STG", strong="GPU")
    if strong_stores != needed.published:
        faults.append(
            f"strong stores of {strong_stores} bytes per thread and step, {needed.published} are published: "
            "some are weak or gone"
        )
    weak_stores = _bytes(in_time, "STG", strong=None)
    if weak_stores > needed.stored:
        faults.append(
            f"weak stores of {weak_stores} bytes per thread and step, {needed.stored} are its own: a weak store to the "
            "exchange buffer"
        )
    weak_loads = _bytes(in_time, "LDG", strong=None)
    if weak_loads > needed.loaded:
        faults.append(
            f"weak loads of {weak_loads} bytes per thread and step, where it needs {needed.loaded}: weights (in all "
            f"{needed.weights} bytes per thread) or the exchange are loaded in the time loop"
        )
    if not any(re.match(MATRIX, opcode) for opcode in in_time):
        faults.append("no matrix instruction in the time loop")
    return faults


class _Needed:
    """What kernels/sequence.py moves between a thread and global memory in a time step: bytes, but where told."""

    def __init__(self, tiles: SequenceTiles, kind: str, dtype: str):
        size, threads = BYTES[dtype], 32 * tiles.num_warps
        own = max(1, tiles.block_b * tiles.block_h // threads)  # elements of the program's own tile
        K = tiles.block_k * tiles.num_k
        chunks = tiles.num_k if kind == "forward" else 3 * tiles.num_k
        self.waits = chunks // tiles.per_wait  # how many
        self.vectors = tiles.per_wait * tiles.block_b * tiles.block_k * size // (16 * threads)  # of 16 bytes, of a wait
        self.weights = 3 * tiles.block_h * K * size // threads
        tables = 2 * 4  # the first row of a time step, and how many run
        status = 2 * 4 * self.waits  # when a wait is given up: the word on the device, and the one that the host reads
        state = 4 * own
        if kind == "forward":
            h_0 = 16 * self.vectors * self.waits  # the rows that start, in place of the exchange
            self.published = own * size
            self.loaded = 3 * own * size + state + h_0 + tables  # x_proj
            self.stored = 5 * own * size + state + status  # y, r, z, n, q
        else:
            self.published = 4 * own * size
            self.loaded = (7 * size + 4) * own + state + tables  # dy, r, z, n, q, h_prev or h_0; dh_n, in float32
            self.stored = 4 * own + state + status  # dh_0, in float32 at most


def _bytes(opcodes: Counter[str], kind: str, strong: str | None) -> int:
    """Bytes per thread of the loads ("LDG") or stores ("STG") of one strength: "SYS", "GPU", or None, the weak ones."""
    total = 0
    for opcode, n in opcodes.items():
        name, *modifiers = opcode.split(".")
        scope = modifiers[modifiers.index("STRONG") + 1] if "STRONG" in modifiers else None
        if name == kind and scope == strong:
            total += n * bytes_moved(opcode)
    return total
