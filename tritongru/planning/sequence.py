"""Tiles of the kernels of one launch per sequence (kernels/sequence.py), and whether a device can hold them.

All programs that hand data to each other must be on the device at once, each with its slice of W_h in shared memory. So
a choice is bound by two numbers of the device: its SMs and the shared memory of a program.

Tiles come in few classes, so that few kernels are compiled whatever H and B are: K (H padded) is one of CLASSES, and
H, B and T themselves are arguments. tests/test_sequence_compiles.py counts the kernels, holds `shared_bytes` against
the compiler's figure and finds that nothing spills.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .devices import Device
from .problem import BYTES

# K of a program that owns all units; and of programs that exchange: (K, chunk). Chunks are powers of two.
ONE_PROGRAM = (64, 128)
CLASSES = ((128, 128), (256, 256), (512, 512), (768, 256), (1024, 1024), (1536, 512), (2048, 1024))
VECTOR = (
    8  # elements that rows in an exchange buffer are padded to, 16 bytes in half precision; the kernels have it too
)
BLOCK_B = 16  # rows of a tile: the least that a matrix instruction takes


def padded(hidden_size: int) -> int:
    """P: the units of a row in the buffers in which programs exchange, H in whole vectors."""
    return -(-hidden_size // VECTOR) * VECTOR


@dataclass(frozen=True)
class SequenceTiles:
    """What one launch of a sequence kernel does. Every field but the last four is a constant of the compiled kernel."""

    exchange: bool  # programs hand slices of h to each other; else one program owns all units of its rows
    block_b: int
    block_h: int  # units of a program
    block_k: int  # of a chunk
    num_k: int  # chunks
    split: int  # parts of a chunk's K, one per warp
    per_wait: int  # chunks that are awaited together
    num_warps: int
    programs: int  # of a group: slices of the hidden units
    groups: int  # each with all of W_h
    tiles: int  # row tiles of a group
    directions: int  # of one launch; a bidirectional layer with 1 takes two launches

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.programs, self.groups, self.directions

    @property
    def max_registers(self) -> int | None:
        """Registers that a thread of an exchanging kernel may have: all of an SM, where its program is alone.

        The assembler does not know that it is. It aims at two programs of 8 warps, so at 128 registers for each thread,
        and spilled a few for that, here and there from one edit of the kernel to the next. Told that more are to be
        had, it spills none, and the loop over time is up to 12 % shorter; in one form (backward, K 768, sm_90) it is
        10 % longer. Programs that exchange nothing may share an SM, and get no such word.
        """
        return min(255, 64 * 1024 // (32 * self.num_warps)) if self.exchange else None

    @property
    def form(self) -> tuple[object, ...]:
        """What tells its compiled kernel from another of the same pass, dtype and precision."""
        return (
            self.exchange, self.block_b, self.block_h, self.block_k, self.num_k, self.split, self.per_wait,
            self.num_warps,
        )  # fmt: skip


def shared_bytes(tiles: SequenceTiles, kind: str, dtype: str) -> int:
    """An upper bound of the shared memory of one program, on NVIDIA: the weights, and the larger of what is in work.

    kind: "forward" or "backward". Exchanging, in work are the chunks of one wait, as a factor of the product, and then
    the parts of the sums on their way from warp to warp: in float32, forward those of three gates and an empty slot.
    """
    size = BYTES[dtype]
    K = tiles.block_k * tiles.num_k
    weights = 3 * tiles.block_h * K * size
    if not tiles.exchange:
        return weights + tiles.block_b * K * (size + 4)
    left = tiles.per_wait * tiles.block_b * tiles.block_k * size
    parts = tiles.split * tiles.block_b * tiles.block_h * 4 * (4 if kind == "forward" else 1)
    return weights + max(left, parts)


@lru_cache(maxsize=4096)
def sequence_tiles(
    kind: str, batch: int, hidden_size: int, directions: int, dtype: str, precision: str, device: Device
) -> SequenceTiles | str:
    """Tiles of `forward` or `backward`, or why the device cannot hold them. Never depends on T."""
    if kind not in ("forward", "backward"):
        raise ValueError(f"kind must be forward or backward, got {kind!r}")
    row_tiles = -(-batch // BLOCK_B)
    if device.vendor == "interpreter" and device.sms == 1:
        K = max(16, 1 << (hidden_size - 1).bit_length())
        return _one_program(K, row_tiles, directions, 4)
    if device.vendor != "interpreter":
        for K in ONE_PROGRAM:
            if hidden_size <= K <= _largest_of_one_program(dtype):
                tiles = _one_program(K, row_tiles, directions, _warps_of_one_program(K, device))
                # AMD's compiler keeps the weights in registers: its LDS holds what is in work, and that fits
                if device.vendor == "amd" or shared_bytes(tiles, kind, dtype) <= device.shared_per_program:
                    return tiles
    if device.vendor == "amd":
        return (
            f"{device.name} holds W_h of H up to {_largest_of_one_program(dtype)} in one program, not of H "
            f"{hidden_size}; and programs cannot hand h to each other there (L2s of several dies are not coherent)"
        )
    if dtype == "fp32" and precision == "ieee" and device.vendor == "nvidia":
        return f"float32 without TF32 has no matrix instructions: only H up to 64 is kept on chip, not {hidden_size}"
    return _exchanging(kind, row_tiles, hidden_size, directions, dtype, device)


def _one_program(K: int, row_tiles: int, directions: int, num_warps: int) -> SequenceTiles:
    return SequenceTiles(
        exchange=False, block_b=BLOCK_B, block_h=K, block_k=K, num_k=1, split=1, per_wait=1, num_warps=num_warps,
        programs=1, groups=row_tiles, tiles=1, directions=directions,
    )  # fmt: skip


def _warps_of_one_program(K: int, device: Device) -> int:
    """8: with 16 a thread has 128 registers, which spills K 128 on sm_100. AMD's threads hold the weights too."""
    return K // 16 if device.vendor == "amd" else 8


def _largest_of_one_program(dtype: str) -> int:
    """Not K 128 in float32: forward spills on sm_90 and sm_100, with 4, 8 or 16 warps. Its loop takes 1300 instructions
    besides, where that of 8 programs which exchange takes 500."""
    return 64 if dtype == "fp32" else 128


def _exchanging(
    kind: str, row_tiles: int, hidden_size: int, directions: int, dtype: str, device: Device
) -> SequenceTiles | str:
    fitting = [(K, chunk) for K, chunk in CLASSES if hidden_size <= K]
    if not fitting:
        return f"H {hidden_size} is above {CLASSES[-1][0]}, the largest whose weights any device holds"
    K, chunk = fitting[0]
    # Wide slices, for more groups; narrow ones where few rows leave nothing else to spread over the SMs. Not in
    # backward, where twice the programs read twice the gate gradients, three times h: there wide ones have the lower
    # limit.
    narrow = kind == "forward" and K == 1024 and row_tiles == 1 and dtype != "fp32"
    widths = (8, 16) if narrow else (16, 8)
    needed = []
    for block_h in widths:
        programs = -(-hidden_size // block_h)
        if programs > device.sms:
            needed.append(f"{programs} programs of {block_h} units are more than its {device.sms} SMs")
            continue
        for split in (8, 4):
            tiles = _with_longest_wait(kind, K, chunk, block_h, split, dtype, device)
            if tiles is None:
                continue
            together = directions if directions * programs <= device.sms else 1
            most = device.sms // (programs * together)
            per_group = -(-row_tiles // min(most, row_tiles))
            return SequenceTiles(
                exchange=True, block_b=BLOCK_B, block_h=block_h, block_k=chunk, num_k=K // chunk, split=split,
                per_wait=tiles, num_warps=split, programs=programs, groups=-(-row_tiles // per_group), tiles=per_group,
                directions=together,
            )  # fmt: skip
        kib = 3 * block_h * K * BYTES[dtype] // 1024
        needed.append(f"slices of {block_h} units take {kib} KiB of its {device.shared_per_program // 1024} KiB")
    return f"{device.name} cannot hold W_h of H {hidden_size} in {dtype}: {'; '.join(needed)}"


def _with_longest_wait(
    kind: str, K: int, chunk: int, block_h: int, split: int, dtype: str, device: Device
) -> int | None:
    """How many chunks are awaited together: what registers (a third of them) and shared memory hold; None: not one."""
    num_k = K // chunk
    total = num_k if kind == "forward" else 3 * num_k
    for per_wait in range(total, 0, -1):
        if total % per_wait:
            continue
        tiles = SequenceTiles(True, BLOCK_B, block_h, chunk, num_k, split, per_wait, split, 1, 1, 1, 1)
        awaited = per_wait * BLOCK_B * chunk * BYTES[dtype]
        registers = split * 32 * 4 * 96  # 96 of 255 for each thread
        if awaited <= registers and shared_bytes(tiles, kind, dtype) <= device.shared_per_program:
            return per_wait
    return None
