"""Small layers, which one program holds: kernels/small.py in the emulator, against float64 and nn.GRU.

What a GPU would run of backend `sequence` up to H 128 is asked for by name here: on the CPU its programs exchange.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._semantic import GluonSemantic

import tritongru
from tests.kit.cases import MORE_CASES, quiet, shapes
from tests.kit.counting import counted
from tests.kit.drawn import DTYPES
from tests.kit.fences import call_between_fences, poisoned, with_gaps
from tests.kit.rule import assert_finite_where_nn_gru_is, assert_not_wrong, assert_right
from tritongru import layer as layers
from tritongru.kernels import small as kernels
from tritongru.launch import runtime
from tritongru.planning import describe
from tritongru.planning.problem import BYTES
from tritongru.planning.sequence import sequence_tiles
from tritongru.planning.small import CLASSES, SmallTiles
from tritongru.tools.check import CASES, Case

interpreted, LONG = pytest.mark.interpreted, pytest.mark.long
SMALL = "sequence:exchange=0"


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rule(dtype: torch.dtype) -> None:
    assert_right(Case(T=3, B=3, I=7, H=20), SMALL, dtype)


@interpreted
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=LONG) for case in MORE_CASES)], ids=lambda case: case.name
)
def test_every_case(case: Case) -> None:
    assert_not_wrong(case, SMALL)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [CASES[4], MORE_CASES[1], Case(T=4, B=5, I=3, H=127)], ids=lambda case: case.name)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    assert_not_wrong(case, SMALL, dtype)


@interpreted
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 3, 1), (2, 3, 1, 2)], ids=str)
def test_smallest_sizes(sizes: tuple[int, int, int, int]) -> None:
    assert_not_wrong(Case(*sizes, bidirectional=True), SMALL)


TILES = {
    torch.float32: ("rows=2", "rows=2,lanes=8", "rows=1,lanes=2,num_warps=1", "rows=2,ahead=1", "rows=1,units=64"),
    torch.float16: ("rows=4", "rows=8", "rows=16", "rows=8,ahead=1", "rows=4,units=32"),
}


@interpreted
@pytest.mark.parametrize(
    "case", [pytest.param(Case(T=4, B=18, I=3, H=30), marks=LONG), CASES[4]], ids=lambda case: case.name
)
@pytest.mark.parametrize(
    ("dtype", "tiles"), [(dtype, tiles) for dtype, every in TILES.items() for tiles in every], ids=str
)
def test_other_tiles(dtype: torch.dtype, tiles: str, case: Case) -> None:
    """Every field that a measurement may set: programs of more rows, several of them, of a wider class."""
    assert_not_wrong(case, f"sequence:{tiles}", dtype)


@interpreted
@LONG
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=shapes, tiles=st.sampled_from(range(4)))
@settings(quiet, max_examples=60)
def test_many_shapes(dtype: torch.dtype, tiles: int, case: Case) -> None:
    assume(case.draws <= 32)  # as in test_sequence.py
    assert_not_wrong(case, f"sequence:{TILES[dtype if dtype == torch.float32 else torch.float16][tiles]}", dtype)


@interpreted
def test_float32_is_not_rounded_to_tf32_where_the_switch_allows_it(h200_tiles: None) -> None:
    """The rule holds it to 1.5 times nn.GRU's error on the CPU, which is that of FMA."""
    layer = tritongru.GRU(5, 20, backend="sequence")
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        forward = layers.forward_pass
        patch.setattr(layers, "forward_pass", lambda layer, *rest: seen.append(layer) or forward(layer, *rest))
        layer(torch.randn(2, 3, 5))
    assert (seen[0].call.precision, seen[0].products) == ("tf32", "ieee")
    assert_right(Case(T=5, B=3, I=7, H=20), "sequence")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_call_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = tritongru.GRU(5, 12, bidirectional=True, backend=SMALL, dtype=dtype)
    x = torch.randn(3, 4, 5, dtype=dtype)

    def once() -> list[torch.Tensor]:
        layer.zero_grad()
        output, h_n = layer(x)
        (output.square().sum() + h_n.sum()).backward()
        return [output, h_n, *(p.grad.clone() for p in layer.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@interpreted
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_one_launch_each_way_and_no_copy_around_it(dtype: torch.dtype, packed: bool, monkeypatch) -> None:
    """Of both directions, with the gradient of h_0: and as many as `plan` says."""
    layer = tritongru.GRU(5, 6, bidirectional=True, backend=SMALL, dtype=dtype)
    x = torch.randn(4, 3, 5, dtype=dtype)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([4, 2, 1]))
    h_0 = torch.zeros(2, 3, 6, dtype=dtype, requires_grad=True)
    plan = tritongru.plan(layer, x)
    grids: list[Any] = []
    with counted(monkeypatch) as forward, runtime.observe(lambda name, grid: grids.append(grid)):
        output, h_n = layer(x, h_0)
    output = output.data if packed else output
    with counted(monkeypatch) as backward:
        torch.autograd.backward([output, h_n], [torch.randn_like(output), torch.randn_like(h_n)])
    assert grids == [(3 if dtype == torch.float32 else 1, 1, 2)]
    assert forward == dict(plan.launches.forward) and "padded copy" not in forward
    found = {name: n for name, n in backward.items() if name.startswith("small")}
    assert found == {"small_backward": 1} == {n: c for n, c in plan.launches.backward if n.startswith("small")}


def poisoned_layer(dtype: torch.dtype, H: int) -> tritongru.GRU:
    layer = tritongru.GRU(7, H, backend=SMALL, bidirectional=True, dtype=dtype)
    for p in layer.parameters():
        p.data = poisoned(p.data)
    return layer


@interpreted
@pytest.mark.parametrize(("dtype", "H"), [(torch.float32, 19), (torch.float16, 20), (torch.bfloat16, 19)], ids=str)
def test_nothing_beyond_a_tensor(dtype: torch.dtype, H: int, monkeypatch) -> None:
    """Fences around every buffer and poison beyond every argument, with gaps in it or not: neither is reached."""
    torch.manual_seed(0)
    layer = poisoned_layer(dtype, H)
    x, h_0 = torch.randn(3, 9, 7, dtype=dtype), torch.randn(2, 9, H, dtype=dtype)
    found = call_between_fences(layer, poisoned(x), poisoned(h_0), monkeypatch)
    assert all(t.isfinite().all() for t in found)
    gaps = call_between_fences(layer, with_gaps(x), with_gaps(h_0), monkeypatch)
    u = torch.finfo(dtype).eps / 2  # only the library products may sum in another order
    assert all((a - b).norm() <= 8 * u * b.norm() for a, b in zip(found, gaps, strict=True))


@interpreted
def test_nothing_beyond_a_packed_tensor(monkeypatch) -> None:
    torch.manual_seed(0)
    layer = poisoned_layer(torch.float16, 20)
    lengths = torch.tensor([5] + [1, 2, 3] * 5 + [4, 4])
    x = pack_padded_sequence(torch.randn(5, 18, 7).half(), lengths, enforce_sorted=False)
    h_0 = poisoned(torch.randn(2, 18, 20).half())
    found = call_between_fences(layer, x._replace(data=poisoned(x.data)), h_0, monkeypatch)
    assert all(t.isfinite().all() for t in found)


@interpreted
@pytest.mark.parametrize("backward", ["expanded", "every other", "shifted"])
def test_a_gradient_of_the_output_laid_out_in_any_way(backward: str) -> None:
    """In half precision units are read in pairs, where they lie so."""
    torch.manual_seed(0)
    layer = tritongru.GRU(5, 12, backend=SMALL, dtype=torch.float16)
    x = torch.randn(3, 4, 5, dtype=torch.float16)
    dense = torch.randn(3, 4, 12, dtype=torch.float16)
    if backward == "expanded":
        dense = dense[:1, :1, :1].expand(3, 4, 12).contiguous()
        dy = dense[:1, :1, :1].expand(3, 4, 12)
    elif backward == "every other":
        dy = torch.zeros(3, 4, 24, dtype=torch.float16)[..., ::2].copy_(dense)
    else:
        dy = torch.zeros(3 * 4 * 12 + 1, dtype=torch.float16)[1:].view(3, 4, 12).copy_(dense)
    grads = [torch.autograd.grad(layer(x)[0], layer.weight_hh_l0, each)[0] for each in (dense, dy)]
    assert torch.equal(*grads)


@interpreted
def test_saved_tensors_that_a_hook_has_laid_out_anew() -> None:
    layer = tritongru.GRU(5, 12, backend=SMALL, dtype=torch.float16)
    x = torch.randn(3, 4, 5, dtype=torch.float16)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    plain = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(moved, lambda tensor: tensor):
        output = layer(x)[0]
    again = torch.autograd.grad(output.sum(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_is_where_nn_gru_has_it() -> None:
    assert_finite_where_nn_gru_is(SMALL)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ("rows=3", "rows must be"), ("lanes=3", "lanes must be"), ("units=16", "units must be"), ("ahead=3", "ahead"),
        ("exchange=0,block_h=8", "without exchange the fields"), ("exchange=1,rows=1", "with exchange the fields"),
        ("num_warps=3,rows=1", "num_warps must be"), ("line=3", "takes the fields"),
    ],
)  # fmt: skip
def test_fields_that_no_kernel_has(fields: str, why: str) -> None:
    layer = tritongru.GRU(5, 20)
    with pytest.raises(ValueError, match=why), tritongru.use_backend(f"sequence:{fields}"):
        tritongru.plan(layer, torch.randn(2, 3, 5), device="h200")


# What the emulator does not see: who has which element, and the banks of shared memory.

EVERY = [
    (kind, dtype, rows, H)
    for kind in ("forward", "backward")
    for dtype, choices in (("fp32", (1, 2)), ("bf16", (4, 8, 16)))
    for rows in choices
    for H in CLASSES[BYTES[dtype]]
]
on_every = pytest.mark.parametrize(("kind", "dtype", "rows", "H"), EVERY)


def tiles_of(kind: str, dtype: str, rows: int, H: int) -> SmallTiles:
    tiles = sequence_tiles(kind, 8, H, 1, dtype, "tf32", describe("h200"), (("rows", rows),))
    assert isinstance(tiles, SmallTiles)
    return tiles


def form(t: SmallTiles) -> tuple[int, ...]:
    return t.rows, t.units, t.num_warps, t.lanes


def places(layout: Any, shape: list[int]) -> np.ndarray:
    """By the compiler: the element of each register of each lane of each warp, [warps, 32, registers, dimensions]."""
    context = ir.context()
    ir.load_dialects(context)
    linear = GluonSemantic(gluon_ir.GluonOpBuilder(context)).to_linear_layout(layout, shape).value
    found = np.zeros((1, 1, 1, len(shape)), int)
    for bases, axis in ((linear.reg_bases, 2), (linear.lane_bases, 1), (linear.warp_bases, 0)):
        for base in bases:
            found = np.concatenate([found, found ^ np.array(base)], axis)
    return found


@on_every
def test_every_element_is_owned_and_by_the_lanes_of_one_warp(kind: str, dtype: str, rows: int, H: int) -> None:
    """r, z, n overwrite x_proj: whoever else has an element has loaded it by the same instruction."""
    t = tiles_of(kind, dtype, rows, H)
    owned = places(kernels.own_layout(form(t)), [t.rows, t.units])
    warps = [{tuple(at) for at in warp.reshape(-1, 2)} for warp in owned]
    assert set.union(*warps) == {(row, unit) for row in range(t.rows) for unit in range(t.units)}
    assert sum(map(len, warps)) == t.rows * t.units
    assert owned.shape[2] == max(1, t.rows * t.units // (32 * t.num_warps))
    for register in np.moveaxis(owned, 2, 0):  # one instruction each; in half precision two units of it
        assert dtype == "fp32" or (register[:, :, 1] % 2 == register[0, 0, 1] % 2).all()


def banks(addresses: np.ndarray, width: int) -> int:
    """The most turns that a shared memory of 32 banks of 4 bytes takes for the accesses of some lanes at once, of which
    those of one address are one."""
    words = {int(at) // 4 + i for at in addresses for i in range(width // 4)}
    return max(sum(word % 32 == bank for word in words) for bank in range(32))


@on_every
def test_no_bank_conflicts(kind: str, dtype: str, rows: int, H: int) -> None:
    """A load of 16 bytes a lane takes one turn for each 8 lanes, as the tensor core's loads of 8 rows of 16 bytes; a
    store of 4 bytes a lane one, in float32 one for each row."""
    t = tiles_of(kind, dtype, rows, H)
    shared = kernels.shared_layout(form(t))
    assert list(shared.order) == [1, 0]

    def address(row: np.ndarray, column: np.ndarray, columns: int, size: int) -> np.ndarray:
        """Bytes to an element, by the definition of a swizzled layout: pieces of `vec`, whose number is xor a phase."""
        phase = row // shared.per_phase % shared.max_phase
        return size * (row * columns + ((column // shared.vec) ^ phase) * shared.vec + column % shared.vec)

    if t.lanes:
        owned = places(kernels.own_layout(form(t)), [t.rows, t.units])
        for warp in owned:
            for register in range(warp.shape[1]):
                assert banks(address(*warp[:, register].T, t.units, 4), 4) <= t.rows
        read = places(kernels.factor_layout(form(t)), [t.rows, 4 * t.lanes])  # of a piece of K
        for warp in read:
            for register in range(0, warp.shape[1], 4):  # of a vector
                first = warp[:, register]
                assert (warp[:, register + 3] - first == [0, 3]).all() and (first[:, 1] % 4 == 0).all()
                for lane in range(0, 32, 8):
                    assert banks(address(*first[lane : lane + 8].T, t.units, 4), 16) == 1
        return
    columns = max(t.rows, 8)
    assert shared.vec == 8  # of which the tensor core's load takes the 16 bytes
    for block in range(0, t.units, 8):  # 8 places by 8 rows, for one of the tensor core's 8 x 8
        for half in range(columns // 8):
            assert banks(address(block + np.arange(8), np.full(8, 8 * half), columns, 2), 16) == 1
    lane = np.arange(32)
    for i in range(2):  # the thread's two units; two rows are 4 bytes
        for half in range(columns // 8):
            assert banks(address(lane // 4 + 8 * i, 2 * (lane % 4) + 8 * half, columns, 2), 4) == 1


def test_units_that_lie_side_by_side_in_memory_are_pairs_of_a_thread() -> None:
    """unit_at names what `hand_over` and `own_sums` do by reshaping."""
    from tritongru.tools.emulator import Tensor
    from tritongru.tools.emulator.binding import Binder

    place = np.arange(64, dtype=np.int32)
    unit = Binder().function(kernels.unit_at)(Tensor(place, gl.int32), 0).v
    expected = place.reshape(4, 2, 8).transpose(0, 2, 1).reshape(-1)
    assert (expected[unit] == place).all() and sorted(unit) == list(place)
