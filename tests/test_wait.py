"""The wait of kernels/exchange.py: its PTX as a thread executes it (tests/kit/ptx.py) and its twin in Python under the
emulator, held against the same cases; and the fragment order, against the compiler's own layout."""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.experimental.gluon import language as gl

from tests.kit.layouts import places
from tests.kit.mutants import edited
from tests.kit.ptx import Access, PtxError, execute
from tritongru.kernels import exchange
from tritongru.kernels.exchange import CLOCK_SHIFT, LOOKS, displacements, wait_text
from tritongru.tools.emulator import TWINS, Tensor
from tritongru.tools.emulator.language import bound
from tritongru.tools.emulator.twins import twin


def elements_of(rows: int, k: int, warps: int, width: int) -> np.ndarray:
    """(warp, row, k) of each register of each lane, by the compiler's layout of a factor: [warps, 32, registers, 3]."""
    mma = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])
    side, shape = (1, [warps, k, rows]) if rows == 8 else (0, [warps, rows, k])
    found = places(gl.DotOperandLayout(side, mma, 32 // width), shape)
    return found[..., [0, 2, 1]] if rows == 8 else found


def in_kernel(function: Any, *given: Any) -> np.ndarray:
    """What a function of kernels/exchange.py says of arrays."""
    arrays = [Tensor(x.astype(np.int32), tl.int32) if isinstance(x, np.ndarray) else x for x in given]
    return bound(function.fn)(*arrays).v


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


BASE, STATUS, REPORT = 0x7F00_0000_1000, 0x7E00_0000_0000, 0x7E00_0000_0040
NS_PER_LOOK = (1 << CLOCK_SHIFT) // LOOKS  # so that a unit of the bound is LOOKS looks
BOUND = 2
SPECIAL = {
    16: (0, 1, 0x8000, 0x7FFF, 0xFFFE, 0x7C00, 0xFC00, 0x7E00, 0x7F80, 0xFF80, 0x7FC0),
    32: (0, 1, 1 << 31, 0x7FFFFFFF, 0xFFFFFFFE, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFF0000, 0xFFFF),
}


@dataclass
class World:
    """A tile of one warp, of which some elements arrive before a certain look; a clock. To a twin it is the turn."""

    memory: np.ndarray  # as they are in the end
    late: dict[int, int] = field(default_factory=dict)  # by place: the look before which it arrives; -1: never
    given_up: int = 0  # the status word
    began: int = 0  # nanoseconds on the clock
    looks: int = 0
    stores: list[tuple[int, int]] = field(default_factory=list)

    def clock(self) -> int:
        return self.began + self.looks * NS_PER_LOOK

    def wait(self) -> None:
        pass

    def seen(self) -> np.ndarray:
        found = self.memory.copy()
        found[[place for place, look in self.late.items() if look < 0 or look >= self.looks]] = ~found.dtype.type(0)
        return found

    def load(self, addresses: Any, dtype: tl.dtype) -> Tensor:
        if np.ndim(addresses) == 0:
            assert int(addresses) == STATUS
            return Tensor(np.int32(self.given_up), tl.int32)
        self.looks += 1
        size = dtype.primitive_bitwidth // 8
        return Tensor(self.seen().view(f"i{size}")[(addresses - BASE) // size], dtype)

    def store(self, address: Any, value: Tensor) -> None:
        self.stores.append((int(address), int(value.v)))


class Fragment:
    """The wait of one warp, and where its elements are."""

    def __init__(self, width: int, gates: int, parts: int = 1, rows: int = 16, delay: int = 0):
        self.width, self.rows, self.tensors, self.size = width, rows, gates * parts, width // 8
        self.K = (32 if width == 16 else 16) * 16 // rows
        self.wait = wait_text(rows, self.K, parts, gates, 1, width, delay)
        self.order = elements_of(rows, self.K, 1, width)[0]
        # of each register of each lane the place of its element: [32, tensors * registers of one]
        first = in_kernel(exchange.first_vector, *np.moveaxis(self.order, -1, 0), self.K, rows, width)[:, :1]
        byte = np.arange(len(self.wait.displacements) * 16 // self.size) * self.size
        self.places = (first + np.array(self.wait.displacements)[byte // 16] + byte % 16) // self.size
        # values among which are zeros, infinities and NaNs, the ones nearest to the sentinel included
        rng, n = np.random.default_rng(self.places.size), self.tensors * rows * self.K
        found = rng.integers(0, (1 << width) - 1, n, np.uint64)
        found = np.where(rng.random(n) < 0.5, rng.choice(np.array(SPECIAL[width], np.uint64), n), found)
        self.memory = found.astype(f"u{self.size}")

    def run_text(self, world: World, lane: int) -> tuple[np.ndarray, int]:
        """The elements that a lane ends with, and the nanoseconds that it slept."""
        pack = self.wait.pack
        first = BASE + int(self.places[lane, 0]) * self.size

        def load(access: Access) -> list[int]:
            assert access.modifiers[:2] == ("relaxed", "gpu")
            if access.address == STATUS:
                return [world.given_up]
            assert access.count == 4
            world.looks += access.address == first + self.wait.displacements[0]
            at = (access.address - BASE) // 4
            return world.seen().view(np.uint32)[at : at + 4].tolist()

        def store(access: Access, values: list[int]) -> None:
            assert access.modifiers[:2] == ("relaxed", "gpu" if access.address == STATUS else "sys")
            world.stores.append((access.address, *values))

        inputs = [first] * pack + [STATUS] * pack + [REPORT] * pack + [BOUND] * pack
        found, slept = execute(self.wait.text, self.wait.constraints, inputs, load, store, world.clock)
        return np.array(found, np.uint32).view(f"u{self.size}"), slept

    def run_twin(self, world: World) -> np.ndarray:
        """The elements [tensors, rows, k] that the warp ends with."""
        row, k = np.arange(self.rows)[:, None], np.arange(self.K)[None, :]
        first = in_kernel(exchange.first_vector, np.zeros_like(row), row, k, self.K, self.rows, self.width)
        first = np.broadcast_to(first, (self.rows, self.K)).astype(np.int64)
        address = Tensor(BASE + (first.T if self.rows == 8 else first)[None], tl.int64)
        kinds = (getattr(tl, f"int{self.width}"),) * self.tensors
        words = [Tensor(np.int64(x), tl.int64) for x in (STATUS, REPORT, BOUND)]
        found = twin(self.wait, world, address, *words, dtype=kinds)
        elements = np.stack([part.v[0] for part in found]).view(f"u{self.size}")
        return elements.swapaxes(1, 2) if self.rows == 8 else elements

    def both(self, lanes: tuple[int, ...] = (0, 13, 31), **options: Any) -> World:
        """The world of the twin, held against those of the text in some lanes, of which one waits as long as any."""
        world, looks = World(self.memory, **options), set()
        elements = self.run_twin(world)
        for lane in lanes:
            alone = World(self.memory, **options)
            found, _ = self.run_text(alone, lane)
            _, row, k = self.order[lane].T
            assert (found == elements[:, row, k].ravel()).all() or alone.looks < world.looks
            assert (found == alone.seen()[self.places[lane]]).all(), "elements out of order"
            assert alone.stores in (world.stores, [])
            looks.add((alone.looks, tuple(alone.stores)))
        assert max(looks) == (world.looks, tuple(world.stores))
        return world


FORMS = [(16, 1), (16, 3), (16, 1, 3), (32, 1), (32, 3), (32, 3, 3), (16, 1, 1, 8), (32, 3, 1, 8)]


@pytest.fixture(params=FORMS, ids=str)
def f(request: pytest.FixtureRequest) -> Fragment:
    return Fragment(*request.param)


def arriving(f: Fragment) -> dict[int, int]:
    """Each element at a look of its own, neighbours in a word at different ones."""
    return dict(enumerate(np.random.default_rng(1).integers(0, 5, f.memory.size).tolist()))


def never(f: Fragment) -> dict[int, int]:
    return {int(f.places[13, -1]): -1}


ENDS = {  # what is late; the rest of the world; how many looks it takes, and whether the wait runs out
    "at the first look": (lambda f: {}, {}, 1, False),
    "in parts": (lambda f: {**arriving(f), int(f.places[13, -1]): LOOKS + 6}, {}, LOOKS + 7, False),
    "when it runs out": (never, {}, (1 + BOUND) * LOOKS, True),
    "once another has given up": (never, {"given_up": 1}, LOOKS, False),
    "where 32 bits of the clock wrap": (never, {"began": ((1 << 32) - 2) << CLOCK_SHIFT}, (1 + BOUND) * LOOKS, True),
}


@pytest.mark.parametrize("end", ENDS)
def test_when_a_wait_ends(f: Fragment, end: str) -> None:
    """NaNs and infinities too are there: none is the sentinel. Past the bound both status words are set."""
    late, options, looks, out = ENDS[end]
    world = f.both(late=late(f), **options)
    assert world.looks == looks and world.stores == [(STATUS, 1), (REPORT, 1)] * out


def test_one_sentinel_alone_holds_a_wait_until_it_runs_out(f: Fragment) -> None:
    """In any half, and in any vector; the wait goes on with what it has."""
    places, in_vector = f.places[13], 128 // f.width
    in_each = [i * in_vector + i % in_vector for i in range(places.size // in_vector)]
    for register in {*in_each, *range(in_vector if f.tensors == 1 else 0)}:
        world = World(f.memory, {int(places[register]): -1})
        found, _ = f.run_text(world, 13)
        assert world.looks == (1 + BOUND) * LOOKS
        assert np.flatnonzero(found == (1 << f.width) - 1).tolist() == [register]


def test_every_pair_of_halves() -> None:
    """A borrow from the lower half neither hides nor makes a sentinel."""
    f = Fragment(16, 1)
    halves = (0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFD, 0xFFFE)
    f.memory = np.resize(np.array(list(product(halves, halves)), np.uint16).ravel(), f.memory.size)
    assert f.both(tuple(range(32)), given_up=1).looks == 1
    for pair in [*product([0xFFFF], (*halves, 0xFFFF)), *product(halves, [0xFFFF])]:
        f.memory[f.places[13, 4:6]] = pair
        assert f.both((13,), given_up=1).looks == LOOKS


@pytest.mark.parametrize("delay", [0, 250])
def test_a_first_look_comes_after_the_delay(delay: int) -> None:
    f = Fragment(16, 1, delay=delay)
    assert f.run_text(World(f.memory), 0)[1] == delay
    assert ("nanosleep" in f.wait.text.split("look:")[0]) == bool(delay)


@pytest.mark.parametrize(
    "edit",
    [
        "0xFFFE{FFFE=>FFFF}", "0x8000{8000=>0000}", "p, {missing=>0}, 0;", "+{512=>0}]", "+{1024=>512}]",
        "mov.u32 bits, {1=>0};", "{add.u32 end, now=>mov.u32 end}", "setp.ne.u32 p, bits, 0;{ @p bra found;=>}",
    ],
)  # fmt: skip
def test_a_mistake_in_the_text_is_found(edit: str) -> None:
    f = Fragment(16, 3)
    f.wait = f.wait._replace(text=edited(f.wait.text, edit))
    missing = {int(f.places[13, place]): -1 for place in (2, 5)}
    with pytest.raises(PtxError, match="constraints"):  # without early clobber an output may lose an input
        execute(f.wait.text, f.wait.constraints.replace("&", ""), [])
    with pytest.raises((AssertionError, PtxError)):
        f.both(late=arriving(f))
        for place in missing:
            f.both(late={place: -1})
        f.both(late=missing, given_up=1)
        f.both(late=missing, began=77 << CLOCK_SHIFT)


@pytest.mark.parametrize(("text", "width"), [(exchange.MULTIPLY, 64), (exchange.ROUND_TO_TF32, 32)], ids=["*", "tf32"])
def test_twins_of_one_instruction(text: Any, width: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (np.append(np.array(SPECIAL[32], np.uint32), rng.integers(0, 1 << 32, 200, np.uint32)) for _ in range(2))
    rng.shuffle(b)
    if width == 64:
        given, kind, constraints = [Tensor(x.view(np.int32), tl.int32) for x in (a, b)], tl.int64, "=&l,r,r"
    else:
        given, kind, constraints = [Tensor(a.view(np.float32), tl.float32)], tl.int32, "=&r,r"
    found = TWINS[text.value](None, *given, dtype=kind).v
    for i, pair in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        ((expected,), _) = execute(text.value, constraints, pair[: len(given)])
        assert found[i].item() & ((1 << width) - 1) == expected
