"""What the inline PTX of kernels/ does, in Python: for the emulator."""

from functools import cache, partial
from typing import Any

import numpy as np
import triton.language as tl

from ...kernels.exchange import CLOCK_SHIFT, LOOKS, MULTIPLY, ROUND_TO_TF32, Wait, units_of_block
from .language import TWINS
from .values import Tensor


@cache
def _bytes(wait: Wait, rows: int, k: int, tensors: int) -> Any:
    """From a thread's first vector to each element of the factors [warps, rows, k], or for 8 rows [warps, k, rows].

    The order of a lane's registers in m16n8k16 (float32: m16n8k8) by the PTX manual: k within a register; of the left
    factor rows 8 apart; then the upper half of the instruction's k; then blocks of k, and of 16 rows.
    """
    if right := k == 8:  # no warp has so few
        rows, k = k, rows
    row, unit, units = np.arange(rows)[:, None], np.arange(k)[None, :], units_of_block(wait.width, rows)
    vector = row // 16 * (k // units) + unit // units
    registers = unit % units // (128 // wait.width) * (1 if right else 2) + row // 8 % 2
    byte = 2 * (unit % 2) * (wait.width == 16) + 4 * registers
    found = np.asarray(wait.displacements).reshape(tensors, -1)[:, vector] + byte
    return (found.swapaxes(1, 2) if right else found)[:, None]


def look(wait: Wait, turn: Any, address: Tensor, dtype: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The loads of a wait, for all threads of a program at once."""
    found = turn.load(address.v[None] + _bytes(wait, *address.v.shape[1:], len(dtype)), dtype[0]).v
    return tuple(Tensor(x, dtype[0]) for x in found)


def twin(
    wait: Wait, turn: Any, address: Tensor, status: Tensor, report: Tensor, bound: Tensor, dtype: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """What the text of a wait does, for all threads of a program at once."""
    found = look(wait, turn, address, dtype)
    looks = end = 0
    while any((x.v == -1).any() for x in found):
        looks += 1
        if looks % LOOKS == 0:
            now = turn.clock() >> CLOCK_SHIFT
            if looks == LOOKS:
                end = now + int(bound)
            if turn.load(status.v, tl.int32):
                break
            if now >= end:
                for word in (status, report):
                    turn.store(word.v, Tensor(np.int32(1), tl.int32))
                break
        else:
            turn.wait()
        found = look(wait, turn, address, dtype)
    return found


def times(turn: Any, a: Tensor, b: Tensor, dtype: Any) -> Tensor:
    """Of two int32 the product in 64 bits."""
    return Tensor(a.v.astype(np.int64) * b.v.astype(np.int64), dtype)


def rounded_to_tf32(turn: Any, x: Tensor, dtype: Any) -> Tensor:
    """The bits of float32 values rounded to nearest, ties away from zero."""
    bits = np.asarray(x.v, np.float32).view(np.int32)
    found = np.where(np.isnan(x.v), np.int32(0x7FFFFFFF), (bits + 0x1000) & -0x2000)
    return Tensor(found.astype(np.int32).reshape(x.v.shape), dtype)


TWINS |= {MULTIPLY.value: times, ROUND_TO_TF32.value: rounded_to_tf32}


def register(wait: Wait) -> None:
    """Let the emulator run the text of a wait."""
    TWINS[wait.text] = partial(twin, wait)
