"""The wait of kernels/exchange.py: its PTX as a thread executes it (tests/kit/ptx.py) and its twin in Python under the
emulator, held against the same cases; and the fragment order, against the compiler's own layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._semantic import GluonSemantic

from tests.kit.ptx import Access, PtxError, execute
from tritongru.kernels import exchange
from tritongru.kernels.exchange import CLOCK_SHIFT, LOOKS, Wait, ask_text, displacements, wait_text
from tritongru.tools.emulator import Tensor
from tritongru.tools.emulator.binding import Binder
from tritongru.tools.emulator.twins import twin, twin_of_first_look

KINDS = {16: tl.int16, 32: tl.int32}
UNSIGNED = {16: np.uint16, 32: np.uint32}


# ---- the order of a fragment -----------------------------------------------------------------------------------------


def elements_of(rows: int, k: int, warps: int, width: int) -> np.ndarray:
    """By the compiler's layout of the left factor [warps, rows, k], of 8 rows the right one [warps, k, rows]: (warp,
    row, k) of each register of each lane, as [warps, 32, registers, 3]."""
    mma = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])
    context = ir.context()
    ir.load_dialects(context)
    semantic = GluonSemantic(gluon_ir.GluonOpBuilder(context))
    side, shape = (1, [warps, k, rows]) if rows == 8 else (0, [warps, rows, k])
    layout = semantic.to_linear_layout(gl.DotOperandLayout(side, mma, 32 // width), shape).value

    def places(bases: list[list[int]]) -> np.ndarray:
        found = np.zeros((1, 3), int)
        for base in bases:
            found = np.concatenate([found, found ^ np.array(base)])
        return found

    warp, lane, register = map(places, (layout.warp_bases, layout.lane_bases, layout.reg_bases))
    found: np.ndarray = warp[:, None, None] ^ lane[None, :, None] ^ register[None, None]
    return found[..., [0, 2, 1]] if rows == 8 else found


def in_kernel(function: Any, *given: Any) -> np.ndarray:
    """What a function of kernels/exchange.py says of arrays."""
    arrays = [Tensor(x.astype(np.int32), tl.int32) if isinstance(x, np.ndarray) else x for x in given]
    found: np.ndarray = Binder().function(function)(*arrays).v
    return found


SHAPES = {  # rows, units of a tensor, tensors, gates, warps
    "one tensor": (16, 128, 1, 1, 4), "three gates": (16, 64, 1, 3, 2), "three tensors": (16, 64, 3, 1, 2),
    "three of each": (16, 32, 3, 3, 1), "64 rows": (64, 64, 1, 1, 2), "H 1024": (16, 1024, 1, 1, 8),
    "8 rows": (8, 128, 1, 1, 4), "8 rows, three of each": (8, 64, 3, 3, 2),
}  # fmt: skip


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_thread_loads_what_its_registers_of_the_product_hold(shape: str, width: int) -> None:
    """Of `place_in_tile`, by which programs publish, `first_vector` and `displacements`, by which they load."""
    rows, part, parts, gates, warps = SHAPES[shape]
    size, K = width // 8, part * parts
    warp, row, k = np.moveaxis(elements_of(rows, part // warps, warps, width), -1, 0)
    first = in_kernel(exchange.first_vector, warp, row, k, part // warps, rows, width)
    assert (first == first[..., :1]).all(), "a thread's elements disagree on its first vector"
    vectors = np.array(displacements(rows, part, parts, gates, warps, width)).reshape(gates, parts, -1)
    in_vector = 16 // size
    assert row.shape[-1] == vectors.shape[-1] * in_vector
    for gate, number in product(range(gates), range(parts)):
        unit = number * part + warp * (part // warps) + k
        published = (gate * rows * K + in_kernel(exchange.place_in_tile, row, unit, K, rows, width)) * size
        register = np.arange(row.shape[-1])
        loaded = first + vectors[gate, number, register // in_vector] + register % in_vector * size
        assert (published == loaded).all()


@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize("width", [16, 32])
def test_a_tiles_elements_have_a_place_each(width: int, rows: int) -> None:
    row, unit = np.arange(rows)[:, None], np.arange(64)[None, :]
    assert sorted(in_kernel(exchange.place_in_tile, row, unit, 64, rows, width).ravel()) == list(range(rows * 64))


# ---- the wait --------------------------------------------------------------------------------------------------------

BASE, STATUS, REPORT = 0x7F00_0000_1000, 0x7E00_0000_0000, 0x7E00_0000_0040
NS_PER_LOOK = (1 << CLOCK_SHIFT) // LOOKS  # so that a unit of the bound is LOOKS looks
BOUND = 2


@dataclass
class World:
    """A tile of one warp, elements by their places, of which some arrive only before a certain look; and a clock."""

    memory: np.ndarray  # as they are in the end
    late: dict[int, int] = field(default_factory=dict)  # by place: the look before which it arrives; -1: never
    given_up: int = 0  # the status word
    began: int = 0  # nanoseconds on the clock
    looks: int = 0
    stores: list[tuple[int, int]] = field(default_factory=list)

    def now(self) -> int:
        return self.began + self.looks * NS_PER_LOOK

    def seen(self) -> np.ndarray:
        """The memory at this look."""
        found = self.memory.copy()
        missing = [place for place, look in self.late.items() if look < 0 or look >= self.looks]
        found[missing] = ~found.dtype.type(0)
        return found


@dataclass(frozen=True)
class Fragment:
    """The wait of one warp, and where its elements are."""

    wait: Wait
    tensors: int
    K: int
    rows: int

    @property
    def width(self) -> int:
        return self.wait.width

    @property
    def places(self) -> np.ndarray:
        """Of each register of each lane the place of its element: [32, tensors * registers of one]."""
        base = elements_of(self.rows, self.K, 1, self.width)[0]
        first = in_kernel(exchange.first_vector, *np.moveaxis(base, -1, 0), self.K, self.rows, self.width)[:, :1]
        size = self.width // 8
        registers = np.arange(len(self.wait.displacements) * 16 // size)
        vectors = np.array(self.wait.displacements)[registers * size // 16]
        found: np.ndarray = (first + vectors + registers * size % 16) // size
        return found

    def memory(self, values: Callable[[np.random.Generator, int], np.ndarray]) -> np.ndarray:
        elements = self.tensors * self.rows * self.K
        return values(np.random.default_rng(elements), elements).astype(UNSIGNED[self.width])

    def run_text(self, world: World, lane: int) -> tuple[np.ndarray, int]:
        """The elements that a lane ends with, and its clock's last nanosecond."""
        pack, vectors = self.wait.pack, len(self.wait.displacements)
        words = world.seen().view(np.uint32)
        first = BASE + int(self.places[lane, 0]) * self.width // 8

        def load(access: Access) -> list[int]:
            nonlocal words
            assert access.modifiers[:2] == ("relaxed", "gpu")
            if access.address == STATUS:
                return [world.given_up]
            assert access.count == 4
            if access.address == first + self.wait.displacements[0]:
                world.looks += 1
                words = world.seen().view(np.uint32)
            at = (access.address - BASE) // 4
            return words[at : at + 4].tolist()

        def store(access: Access, values: list[int]) -> None:
            assert access.modifiers[:2] == ("relaxed", "gpu" if access.address == STATUS else "sys")
            world.stores.append((access.address, *values))

        asked: list[int] = []
        if self.wait.asked:
            asked, _ = execute(*ask_text(self.wait), [first] * pack, load, store, clock=world.now)
        inputs = asked + [first] * pack + [STATUS] * pack + [REPORT] * pack + [BOUND] * pack
        found, now = execute(self.wait.text, self.wait.constraints, inputs, load, store, clock=world.now)
        assert len(found) == 4 * vectors
        return np.array(found, np.uint32).view(UNSIGNED[self.width]), now

    def run_twin(self, world: World) -> np.ndarray:
        """The elements [tensors, rows, k] that the warp ends with."""

        class Turn:
            def load(self, addresses: Any, dtype: tl.dtype) -> Tensor:
                where = np.asarray(addresses)
                if where.ndim == 0:
                    assert int(where) == STATUS
                    return Tensor(np.int32(world.given_up), tl.int32)
                world.looks += 1
                size = dtype.primitive_bitwidth // 8
                return Tensor(world.seen().view(f"i{size}")[(where - BASE) // size], dtype)

            def store(self, address: Any, value: Tensor) -> None:
                world.stores.append((int(address), int(value.v)))

            def wait(self) -> None:
                pass

            def clock(self) -> int:
                return world.now()

        row, k = np.arange(self.rows)[None, :, None], np.arange(self.K)[None, None, :]
        first = in_kernel(exchange.first_vector, np.zeros_like(row), row, k, self.K, self.rows, self.width)
        first = np.broadcast_to(first, (1, self.rows, self.K)).astype(np.int64)
        address = Tensor(BASE + (first.swapaxes(1, 2) if self.rows == 8 else first), tl.int64)
        status, report = (Tensor(np.int64(word), tl.int64) for word in (STATUS, REPORT))
        kinds = (KINDS[self.width],) * self.tensors
        given = twin_of_first_look(self.wait)(Turn(), address, dtype=kinds) if self.wait.asked else ()
        bound = Tensor(np.int32(BOUND), tl.int32)
        found = twin(self.wait)(Turn(), *given, address, status, report, bound, dtype=kinds)
        elements = np.stack([part.v[0] for part in found]).view(UNSIGNED[self.width])
        return elements.swapaxes(1, 2) if self.rows == 8 else elements

    def in_lane(self, elements: np.ndarray, lane: int) -> np.ndarray:
        """Of [tensors, rows, k] those of a lane, in the order of its registers."""
        _, row, k = elements_of(self.rows, self.K, 1, self.width)[0, lane].T
        return elements[:, row, k].ravel()


def fragment(width: int, gates: int, parts: int = 1, delay: int = 0, rows: int = 16, asked: bool = False) -> Fragment:
    K = (32 if width == 16 else 16) * 16 // rows
    return Fragment(wait_text(rows, K, parts, gates, 1, width, delay, asked), gates * parts, K, rows)


SPECIAL = {
    16: (0, 1, 0x8000, 0x7FFF, 0xFFFE, 0x7C00, 0xFC00, 0x7E00, 0x7F80, 0xFF80, 0x7FC0),
    32: (0, 1, 1 << 31, 0x7FFFFFFF, 0xFFFFFFFE, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFF0000, 0xFFFF),
}


def anything(width: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Values among which are zeros, infinities and NaNs, the ones nearest to the sentinel included."""

    def values(rng: np.random.Generator, n: int) -> np.ndarray:
        found = rng.integers(0, (1 << width) - 1, n, np.uint64)
        return np.where(rng.random(n) < 0.5, rng.choice(np.array(SPECIAL[width], np.uint64), n), found)

    return values


def both(f: Fragment, make: Callable[[], World], lanes: tuple[int, ...] = (0, 13, 31)) -> World:
    """The world of the twin, held against those of the text in some lanes, of which one waits as long as any."""
    world = make()
    elements = f.run_twin(world)
    looks = set()
    for lane in lanes:
        alone = make()
        found, _ = f.run_text(alone, lane)
        assert (found == f.in_lane(elements, lane)).all() or alone.looks < world.looks
        assert (found == alone.seen()[f.places[lane]]).all(), "elements out of order"
        assert alone.stores in (world.stores, [])
        looks.add((alone.looks, tuple(alone.stores)))
    assert max(looks) == (world.looks, tuple(world.stores))
    return world


FORMS = pytest.mark.parametrize(
    ("width", "gates", "parts", "rows", "asked"),
    [
        (16, 1, 1, 16, False), (16, 3, 1, 16, False), (16, 1, 3, 16, False), (32, 1, 1, 16, False),
        (32, 3, 1, 16, False), (32, 3, 3, 16, False), (16, 1, 1, 8, False), (32, 3, 1, 8, False),
        (16, 1, 1, 16, True), (32, 3, 1, 16, True), (16, 3, 3, 8, True),
    ],
)  # fmt: skip


@FORMS
def test_what_is_there_is_found_at_the_first_look(width: int, gates: int, parts: int, rows: int, asked: bool) -> None:
    """NaNs and infinities too: none is the sentinel."""
    f = fragment(width, gates, parts, rows=rows, asked=asked)
    memory = f.memory(anything(width))
    world = both(f, lambda: World(memory))
    assert world.looks == 1 and not world.stores


@FORMS
def test_values_that_arrive_in_parts(width: int, gates: int, parts: int, rows: int, asked: bool) -> None:
    """Each element at a look of its own, neighbours in a word at different ones; some after the first look at the clock
    and the status word."""
    f = fragment(width, gates, parts, rows=rows, asked=asked)
    memory = f.memory(anything(width))
    rng = np.random.default_rng(1)
    late = dict(enumerate(rng.integers(0, 5, memory.size).tolist()))
    late[int(f.places[13, -1])] = LOOKS + 6
    world = both(f, lambda: World(memory, late))
    assert world.looks == LOOKS + 7 and not world.stores


@FORMS
def test_one_sentinel_alone_holds_a_wait_until_it_runs_out(
    width: int, gates: int, parts: int, rows: int, asked: bool
) -> None:
    """In any half, and in any vector. The status word and the host's are set, and the wait goes on with what it has."""
    f = fragment(width, gates, parts, rows=rows, asked=asked)
    memory = f.memory(anything(width))
    places = f.places[13]
    in_vector = 128 // width
    chosen = [i * in_vector + i % in_vector for i in range(places.size // in_vector)]
    chosen += range(in_vector) if gates * parts == 1 else []
    for register in chosen:
        world = World(memory, {int(places[register]): -1})
        found, _ = f.run_text(world, 13)
        assert world.looks == (1 + BOUND) * LOOKS and world.stores == [(STATUS, 1), (REPORT, 1)]
        assert found[register] == (1 << width) - 1 and (np.delete(found, register) != (1 << width) - 1).all()
    both(f, lambda: World(memory, {int(places[-1]): -1}))


@FORMS
def test_once_another_has_given_up_nobody_waits_long(
    width: int, gates: int, parts: int, rows: int, asked: bool
) -> None:
    f = fragment(width, gates, parts, rows=rows, asked=asked)
    memory = f.memory(anything(width))
    world = both(f, lambda: World(memory, {int(f.places[13, 3]): -1}, given_up=1))
    assert world.looks == LOOKS and not world.stores


def test_every_pair_of_halves() -> None:
    """A borrow from the lower half neither hides nor makes a sentinel."""
    f = fragment(16, 1)
    halves = (0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFD, 0xFFFE)
    memory = f.memory(lambda rng, n: np.resize(np.array(list(product(halves, halves))).ravel(), n))
    assert both(f, lambda: World(memory, given_up=1), lanes=tuple(range(32))).looks == 1
    for low, high in [(0xFFFF, half) for half in (*halves, 0xFFFF)] + [(half, 0xFFFF) for half in halves]:
        memory[f.places[13, 4:6]] = low, high
        assert both(f, lambda: World(memory, given_up=1), lanes=(13,)).looks == LOOKS


@pytest.mark.parametrize("delay", [0, 250])
def test_a_first_look_comes_after_the_delay(delay: int) -> None:
    f = fragment(16, 1, delay=delay)
    _, now = f.run_text(World(f.memory(anything(16))), 0)
    assert (now > delay) if delay else (now < 100)
    assert ("nanosleep" in f.wait.text) == bool(delay)


def test_the_bound_holds_where_the_clocks_32_bits_wrap() -> None:
    f = fragment(16, 1)
    memory = f.memory(anything(16))
    world = World(memory, {int(f.places[0, 0]): -1}, began=((1 << 32) - 2) << CLOCK_SHIFT)
    f.run_text(world, 0)
    assert world.looks == (1 + BOUND) * LOOKS and world.stores == [(STATUS, 1), (REPORT, 1)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0xFFFEFFFE", "0xFFFEFFFF"), ("0x80008000", "0x80000000"), ("p, missing, 0;", "p, 0, 0;"), ("+512]", "+0]"),
        ("+1024]", "+512]"), ("mov.u32 bits, 1;", "mov.u32 bits, 0;"), ("add.u32 end, now,", "mov.u32 end,"),
        ("setp.ne.u32 p, bits, 0; @p bra found;", "setp.ne.u32 p, bits, 0;"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_text_is_found(old: str, new: str) -> None:
    f = fragment(16, 3)
    assert old in f.wait.text
    broken = replace(f, wait=f.wait._replace(text=f.wait.text.replace(old, new)))
    memory = f.memory(anything(16))
    late = dict(enumerate(np.random.default_rng(1).integers(0, 5, memory.size).tolist()))
    never = {int(f.places[13, place]): -1 for place in (2, 5)}
    with pytest.raises((AssertionError, PtxError)):
        both(broken, lambda: World(memory, late))
        for missing in never:
            both(broken, lambda missing=missing: World(memory, {missing: -1}))
        both(broken, lambda: World(memory, never, given_up=1))
        both(broken, lambda: World(memory, never, began=77 << CLOCK_SHIFT))
