"""Small layers (kernels/small.py): who has which element, and the banks of shared memory, which no emulator sees."""

from itertools import product

import numpy as np
from triton.experimental.gluon import language as gl

from tests.kit.layouts import places
from tests.kit.modules import table
from tritongru.kernels import small as kernels
from tritongru.planning import describe
from tritongru.planning.problem import BYTES, Recurrence
from tritongru.planning.sequence import sequence_tiles
from tritongru.planning.small import ROWS, SmallTiles
from tritongru.tools.emulator import Tensor
from tritongru.tools.emulator.language import bound

H200 = describe("h200")
EVERY = {
    f"{kind}-{dtype}-{rows}-{H}": sequence_tiles(kind, Recurrence(8, H, 1, dtype, "tf32", H200, (("rows", rows),)))
    for kind in ("forward", "backward")
    for dtype, choices in (("fp32", (1, 2)), ("bf16", (4, 8, 16)))
    for rows in choices
    for size, H in ROWS
    if size == BYTES[dtype]
}
on_every = table("t", EVERY)


def form(t: SmallTiles) -> tuple[int, ...]:
    return t.rows, t.units, t.num_warps, t.lanes


@on_every
def test_every_element_is_owned_and_by_the_lanes_of_one_warp(t: SmallTiles) -> None:
    """r, z, n overwrite x_proj: whoever else has an element has loaded it by the same instruction."""
    owned = places(kernels.own_layout(form(t)), [t.rows, t.units])
    warps = [{tuple(at) for at in warp.reshape(-1, 2)} for warp in owned]
    assert set.union(*warps) == set(product(range(t.rows), range(t.units)))
    assert sum(map(len, warps)) == t.rows * t.units
    assert owned.shape[2] == max(1, t.rows * t.units // (32 * t.num_warps))
    for register in np.moveaxis(owned, 2, 0):  # one instruction each; in half precision two units of it
        assert t.lanes or (register[:, :, 1] % 2 == register[0, 0, 1] % 2).all()


def banks(addresses: np.ndarray, width: int) -> int:
    """The most turns of a shared memory of 32 banks of 4 bytes for accesses at once; those of one address are one."""
    words = {int(at) // 4 + i for at in addresses for i in range(width // 4)}
    return max(sum(word % 32 == bank for word in words) for bank in range(32))


@on_every
def test_no_bank_conflicts(t: SmallTiles) -> None:
    """A load of 16 bytes a lane takes a turn for each 8 lanes; a store of 4 bytes one, in float32 one for each row."""
    shared = kernels.shared_layout(form(t))
    assert list(shared.order) == [1, 0]

    def address(row: np.ndarray, column: np.ndarray, columns: int, size: int) -> np.ndarray:
        """Bytes to an element, by the definition of a swizzled layout: pieces of `vec`, whose number is xor a phase."""
        phase = row // shared.per_phase % shared.max_phase
        return size * (row * columns + ((column // shared.vec) ^ phase) * shared.vec + column % shared.vec)

    if t.lanes:
        for warp in places(kernels.own_layout(form(t)), [t.rows, t.units]):
            for register in range(warp.shape[1]):
                assert banks(address(*warp[:, register].T, t.units, 4), 4) <= t.rows
        for warp in places(kernels.factor_layout(form(t)), [t.rows, 4 * t.lanes]):  # of a piece of K
            for register in range(0, warp.shape[1], 4):  # of a vector
                first = warp[:, register]
                assert (warp[:, register + 3] - first == [0, 3]).all() and (first[:, 1] % 4 == 0).all()
                for lane in range(0, 32, 8):
                    assert banks(address(*first[lane : lane + 8].T, t.units, 4), 16) == 1
        return
    columns, lane = max(t.rows, 8), np.arange(32)
    assert shared.vec == 8  # of which the tensor core's load takes the 16 bytes
    for half in range(0, columns, 8):
        for block in range(0, t.units, 8):  # 8 places by 8 rows, for one of the tensor core's 8 x 8
            assert banks(address(block + np.arange(8), np.full(8, half), columns, 2), 16) == 1
        for i in range(2):  # the thread's two units; two rows are 4 bytes
            assert banks(address(lane // 4 + 8 * i, 2 * (lane % 4) + half, columns, 2), 4) == 1


def test_units_that_lie_side_by_side_in_memory_are_pairs_of_a_thread() -> None:
    """unit_at names what `hand_over` and `own_sums` do by reshaping."""
    place = np.arange(64, dtype=np.int32)
    unit = bound(kernels.unit_at.fn)(Tensor(place, gl.int32), 0).v
    expected = place.reshape(4, 2, 8).transpose(0, 2, 1).reshape(-1)
    assert (expected[unit] == place).all() and sorted(unit) == list(place)
