"""The emulator's scheduler, memory and reports (tools/emulator), on small kernels of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritongru.tools.emulator import (
    TWINS,
    Deadlock,
    EmulatorError,
    KernelError,
    OutOfBounds,
    emulate,
    emulating,
)
from tritongru.tools.emulator.values import tensor

pytestmark = pytest.mark.usefixtures("one_thread")

PROGRAMS, SIZE, SEEDS = 5, 64, range(20)
SENTINEL = -1
LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
WAIT, TIMED, DELAYED = "wait // of this test", "timed // of this test", "delayed // of this test"


@pytest.fixture(autouse=True)
def _twins(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, twin in ((WAIT, wait_twin), (TIMED, timed_twin), (DELAYED, delayed_twin)):
        monkeypatch.setitem(TWINS, text, twin)


def wait_twin(turn, addresses, dtype):
    """Wait until no element is the sentinel."""
    while True:
        found = turn.load(addresses, gl.int32)
        if not (found.v == SENTINEL).any():
            return found
        turn.wait()


def timed_twin(turn, addresses, status, bound, dtype):
    """As the kernels' wait: past `bound` nanoseconds it sets a word, and goes on with what it has."""
    deadline = None
    while True:
        found = turn.load(addresses, gl.int32)
        if not (found.v == SENTINEL).any():
            return found
        now = turn.clock()
        deadline = now + int(bound.v[0]) if deadline is None else deadline
        if now >= deadline or turn.load(status.v[0], gl.int32).v:
            turn.store(status.v[0], tensor(1))
            return found
        turn.wait()


def delayed_twin(turn, addresses, dtype):
    """Waits by looking again and again, without saying that it waits."""
    while True:
        found = turn.load(addresses, gl.int32)
        if not (found.v == SENTINEL).any():
            return found


@gluon.jit
def received(pointers, TEXT: gl.constexpr):
    return gl.inline_asm_elementwise(TEXT, "=&r,l", [pointers.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def first_of(pointers, base):
    """The mistake: the first element stands for the tile."""
    while gl.load(base, volatile=True) == -1:
        pass
    return gl.load(pointers, volatile=True)


@gluon.jit
def polled(pointers):
    """A wait by the language's own loads."""
    bits = gl.load(pointers, volatile=True)
    while gl.min(bits, 0) == -1:
        bits = gl.load(pointers, volatile=True)
    return bits


@gluon.jit
def ring(x_ptr, tiles_ptr, SIZE: gl.constexpr, HOW: gl.constexpr, TEXT: gl.constexpr):
    """x [SIZE], tiles [PROGRAMS, SIZE] of sentinels: each program adds its number + 1 to its predecessor's tile."""
    i = gl.arange(0, SIZE, layout=LAYOUT)
    me = gl.program_id(0)
    before = tiles_ptr + (me - 1) * SIZE
    if me == 0:
        tile = gl.load(x_ptr + i)
    elif HOW == "first":
        tile = first_of(before + i, before)
    elif HOW == "polled":
        tile = polled(before + i)
    else:
        tile = received(before + i, TEXT)
    gl.store(tiles_ptr + me * SIZE + i, tile + me + 1, cache_modifier=".cg")


def run_ring(how: str = "twin", fill: int = SENTINEL, text: str = WAIT) -> Tensor:
    tiles = torch.full((PROGRAMS, SIZE), fill, dtype=torch.int32)
    arguments = {"x_ptr": torch.arange(SIZE, dtype=torch.int32), "tiles_ptr": tiles}
    emulate(ring, (PROGRAMS,), arguments, {"SIZE": SIZE, "HOW": how, "TEXT": text})
    return tiles


def expected_ring() -> Tensor:
    added = torch.arange(1, PROGRAMS + 1, dtype=torch.int32).cumsum(0)
    return torch.arange(SIZE, dtype=torch.int32) + added[:, None].int()


# ---- who runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how, text", [("twin", WAIT), ("twin", DELAYED), ("polled", WAIT)])
def test_tiles_are_handed_on_right_under_every_seed(how: str, text: str) -> None:
    assert torch.equal(run_ring(how, text=text), expected_ring())  # the lazy policy
    traces = set()
    for seed in SEEDS:
        with emulating(seed) as run:
            assert torch.equal(run_ring(how, text=text), expected_ring())
        traces.add((run.steps, run.switches))
    assert len(traces) >= 10


@pytest.mark.parametrize("options", [{}, {"policy": "random", "switch": 1.0}, {"policy": "priorities"}], ids=str)
def test_a_seed_repeats_its_interleaving(options: dict) -> None:
    def trace(seed: int) -> tuple[int, int]:
        with emulating(seed, **options) as run:
            run_ring()
        return run.steps, run.switches

    first, second = trace(4), trace(5)
    assert (first, second) == (trace(4), trace(5)) and first != second


@gluon.jit
def take_tickets(counter_ptr, order_ptr):
    """order: the numbers of the programs in the order in which they came."""
    ticket = gl.atomic_add(counter_ptr, 1)
    gl.store(order_ptr + ticket, gl.program_id(0) * 100 + gl.program_id(1) * 10 + gl.program_id(2))


@pytest.mark.parametrize("policy", ["random", "priorities"])
def test_orders_of_programs(policy: str) -> None:
    """Many orders of eight programs in three dimensions, each program once; the same seed, the same order."""
    orders = []
    for seed in (*SEEDS, *SEEDS):
        counter, order = torch.zeros(1, dtype=torch.int32), torch.full((8,), -1, dtype=torch.int32)
        with emulating(seed, policy=policy):
            emulate(take_tickets, (2, 2, 2), {"counter_ptr": counter, "order_ptr": order}, {})
        orders.append(tuple(order.tolist()))
    assert all(sorted(order) == [0, 1, 10, 11, 100, 101, 110, 111] for order in orders)
    assert orders[: len(SEEDS)] == orders[len(SEEDS) :]
    assert len(set(orders)) >= 15


def test_the_lazy_policy_switches_only_where_a_program_waits() -> None:
    with emulating(policy="lazy") as run:
        counter, order = torch.zeros(1, dtype=torch.int32), torch.full((8,), -1, dtype=torch.int32)
        emulate(take_tickets, (2, 2, 2), {"counter_ptr": counter, "order_ptr": order}, {})
        assert order.tolist() == [0, 100, 10, 110, 1, 101, 11, 111] and run.switches == 0
        assert torch.equal(run_ring(), expected_ring())
        assert run.switches == 0  # each program finds its predecessor's tile
        run_two_ways()
        assert 0 < run.switches <= 8


@gluon.jit
def two_ways(tiles_ptr, T, SIZE: gl.constexpr, TEXT: gl.constexpr):
    """Two programs, each of which needs the other's tile of the step before: tiles [T + 1, 2, SIZE]."""
    i = gl.arange(0, SIZE, layout=LAYOUT)
    me = gl.program_id(0)
    gl.store(tiles_ptr + me * SIZE + i, i + me, cache_modifier=".cg")
    for t in range(T):
        other = received(tiles_ptr + (2 * t + 1 - me) * SIZE + i, TEXT)
        gl.store(tiles_ptr + (2 * (t + 1) + me) * SIZE + i, other + 1, cache_modifier=".cg")


def run_two_ways(T: int = 4) -> Tensor:
    tiles = torch.full((T + 1, 2, SIZE), SENTINEL, dtype=torch.int32)
    emulate(two_ways, (2,), {"tiles_ptr": tiles, "T": T}, {"SIZE": SIZE, "TEXT": WAIT})
    return tiles


def test_waiting_both_ways() -> None:
    expected = torch.arange(SIZE) + torch.tensor([[0, 1], [2, 1], [2, 3], [4, 3], [4, 5]])[..., None]
    for seed in range(6):
        with emulating(seed):
            assert torch.equal(run_two_ways(), expected.int())


def wrong_rings(**options) -> int:
    wrong = 0
    for seed in SEEDS:
        with emulating(seed, **options):
            wrong += not torch.equal(run_ring("first"), expected_ring())
    return wrong


def test_a_half_written_tile_is_seen() -> None:
    assert wrong_rings() >= 1
    assert wrong_rings(tear=1.0) >= 5
    assert wrong_rings(tear=0.0) == 0  # it is the halves that show it


def test_a_buffer_without_its_fill_is_seen() -> None:
    for seed in SEEDS:
        with emulating(seed, policy="random", switch=1.0):
            assert not torch.equal(run_ring(fill=0), expected_ring())


@gluon.jit
def count_barrier(counter_ptr, tiles_ptr, out_ptr, programs):
    """Everybody's word is there once the counter has reached the number of programs."""
    me = gl.program_id(0)
    gl.store(tiles_ptr + me, me + 1)
    gl.atomic_add(counter_ptr, 1)
    while gl.atomic_add(counter_ptr, 0) < programs:
        pass
    total = 0
    for i in range(programs):
        total += gl.load(tiles_ptr + i)
    gl.atomic_xchg(out_ptr + me, total)


@pytest.mark.parametrize("seed", range(6))
def test_a_barrier_of_atomics(seed: int) -> None:
    def run(programs: int) -> list[int]:
        out = torch.zeros(6, dtype=torch.int32)
        words = {"counter_ptr": torch.zeros(1, dtype=torch.int32), "tiles_ptr": torch.zeros_like(out), "out_ptr": out}
        emulate(count_barrier, (6,), {**words, "programs": programs}, {})
        return out.tolist()

    assert run(6) == [21] * 6
    with emulating(seed):
        assert run(6) == [21] * 6
        with pytest.raises(Deadlock, match=r"updates counter_ptr\[0\] = 6"):
            run(7)


# ---- who waits in vain -----------------------------------------------------------------------------------------------


@gluon.jit
def wait_for_a_tile(tiles_ptr, out_ptr, SIZE: gl.constexpr, HOW: gl.constexpr, TEXT: gl.constexpr):
    """Program 0 ends at once, the others wait for a tile that nobody makes."""
    i = gl.arange(0, SIZE, layout=LAYOUT)
    if gl.program_id(0) > 0:
        tile = polled(tiles_ptr + SIZE + i) if HOW == "polled" else received(tiles_ptr + SIZE + i, TEXT)
        gl.store(out_ptr + i, tile)


def run_in_vain(how: str = "twin", text: str = WAIT, programs: int = 3) -> None:
    tiles, out = torch.zeros(2, SIZE, dtype=torch.int32), torch.zeros(SIZE, dtype=torch.int32)
    tiles[1, 7:9] = SENTINEL
    constants = {"SIZE": SIZE, "HOW": how, "TEXT": text}
    emulate(wait_for_a_tile, (programs,), {"tiles_ptr": tiles, "out_ptr": out}, constants)


@pytest.mark.parametrize("how, text", [("twin", WAIT), ("twin", DELAYED), ("polled", WAIT)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_missing_producer_is_a_deadlock(how: str, text: str, seed: int | None) -> None:
    with pytest.raises(Deadlock) as caught:
        if seed is None:
            run_in_vain(how, text)
        else:
            with emulating(seed):
                run_in_vain(how, text)
    head, *programs = str(caught.value).splitlines()
    assert f"seed {seed or 0}" in head and "1 of 3 programs have ended" in head
    assert "every live program waits" in head and len(programs) == 2
    verb, function = ("loads", polled) if how == "polled" else ("waits for", received)
    for index, line in zip(("(1, 0, 0)", "(2, 0, 0)"), programs, strict=True):
        assert f"program {index} {verb} tiles_ptr[64 .. 127]" in line
        assert "(all bits set in 2 of 64 elements, the first tiles_ptr[71])" in line
        inner, outer = line.split(" at ")[1].split(" < ")
        start = function.fn.__code__.co_firstlineno  # the line of the decorator
        assert inner.endswith(f"in {function.fn.__name__}") and outer.endswith("in wait_for_a_tile")
        assert start < int(inner.split("test_emulator.py:")[1].split()[0]) <= start + 5


def test_who_says_that_it_waits_is_believed() -> None:
    """A clock that stands still ends no wait: once all have looked, it is a Deadlock."""
    for policy in ("lazy", "random", "priorities"):
        with emulating(policy=policy, tear=0, nanoseconds_per_step=0) as run, pytest.raises(Deadlock):
            run_in_vain()
        assert run.steps < 12


def test_who_waits_in_vain_uses_up_no_steps() -> None:
    """A program that waits while another works has no turns; one that works is never held for one that waits."""
    for policy in ("lazy", "random", "priorities"):
        with emulating(policy=policy, max_steps=20_000) as run:
            out = run_worker(2000)
        assert out == [2000, 2000] and run.steps < 12_000


@gluon.jit
def worker(flag_ptr, x_ptr, out_ptr, times, TEXT: gl.constexpr):
    if gl.program_id(0) == 0:
        seen = received(flag_ptr, TEXT)
        gl.store(out_ptr, seen)
    else:
        for i in range(times):
            gl.store(x_ptr, i + gl.load(x_ptr, volatile=True) * 0)
        gl.store(flag_ptr, times)
        gl.store(out_ptr + 1, gl.load(x_ptr) + 1)


def run_worker(times: int) -> list[int]:
    words = {"flag_ptr": torch.full((1,), SENTINEL, dtype=torch.int32), "x_ptr": torch.zeros(1, dtype=torch.int32)}
    out = torch.zeros(2, dtype=torch.int32)
    emulate(worker, (2,), {**words, "out_ptr": out, "times": times}, {"TEXT": WAIT})
    return out.tolist()


@gluon.jit
def wait_for_two(a_ptr, b_ptr):
    """A poll of two words by turns."""
    while (gl.load(a_ptr, volatile=True) == -1) | (gl.load(b_ptr, volatile=True) == -1):
        pass


def test_a_poll_of_two_words() -> None:
    """The one that is missing is named, whichever was looked at last."""
    words = [torch.zeros(1, dtype=torch.int32), torch.full((1,), SENTINEL, dtype=torch.int32)]
    for name, given in (("b_ptr", words), ("a_ptr", words[::-1])):
        with pytest.raises(Deadlock) as caught:
            emulate(wait_for_two, (2,), dict(zip(("a_ptr", "b_ptr"), given, strict=True)), {})
        assert str(caught.value).count(f"loads {name}[0] = -1 (all bits set in 1 of 1 elements") == 2


@gluon.jit
def read_again_and_again(x_ptr, out_ptr, times):
    total = 0
    for _ in range(times):
        total += gl.load(x_ptr, volatile=True)
    gl.store(out_ptr + gl.program_id(0), total)


def test_reading_the_same_again_is_no_deadlock_yet() -> None:
    out = torch.zeros(2, dtype=torch.int32)
    arguments = {"x_ptr": torch.ones(1, dtype=torch.int32), "out_ptr": out}
    emulate(read_again_and_again, (2,), {**arguments, "times": 150}, {})
    assert out.tolist() == [150, 150]
    with pytest.raises(Deadlock, match="every live program waits"):
        emulate(read_again_and_again, (2,), {**arguments, "times": 1000}, {})


def test_the_budget_of_steps() -> None:
    with emulating(max_steps=10), pytest.raises(Deadlock, match=r"(?s)budget of 10 steps.*program \(4, 0, 0\)"):
        run_ring()


@gluon.jit
def plain_poll(x_ptr):
    while gl.load(x_ptr) == -1:
        pass


def test_a_poll_by_plain_loads_ends_too() -> None:
    """A compiler may load once: outside `emulating` such a loop has no points, and uses up its steps."""
    x = torch.full((1,), SENTINEL, dtype=torch.int32)
    with emulating(policy="lazy", max_steps=500), pytest.raises(Deadlock, match="budget of 500 steps"):
        emulate(plain_poll, (2,), {"x_ptr": x}, {})
    with emulating(0), pytest.raises(Deadlock, match="every live program waits"):
        emulate(plain_poll, (2,), {"x_ptr": x}, {})


# ---- the clock -------------------------------------------------------------------------------------------------------


@gluon.jit
def wait_within(tile_ptr, status_ptr, out_ptr, bound, SIZE: gl.constexpr, TEXT: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    status = status_ptr.to(gl.int64) + gl.zeros([SIZE], gl.int64, layout=LAYOUT)
    limit = gl.zeros([SIZE], gl.int64, layout=LAYOUT) + bound
    addresses = (tile_ptr + i).to(gl.int64)
    found = gl.inline_asm_elementwise(
        TEXT, "=&r,l,l,l", [addresses, status, limit], dtype=gl.int32, is_pure=False, pack=1
    )
    gl.store(out_ptr + gl.program_id(0) * SIZE + i, found)


def run_within(bound: int, missing: int = 1) -> tuple[int, Tensor]:
    tile, status = torch.arange(SIZE, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    tile[:missing] = SENTINEL
    out = torch.zeros(3, SIZE, dtype=torch.int32)
    words = {"tile_ptr": tile, "status_ptr": status, "out_ptr": out, "bound": bound}
    emulate(wait_within, (3,), words, {"SIZE": SIZE, "TEXT": TIMED})
    assert all(torch.equal(found, tile) for found in out)
    return int(status.item()), tile


@pytest.mark.parametrize("seed", [0, 1])
def test_a_wait_runs_out_on_the_virtual_clock(seed: int) -> None:
    for bound in (10_000, 10_000_000_000):
        with emulating(seed) as run:
            assert run_within(bound, missing=0)[0] == 0
            assert run_within(bound)[0] == 1
        assert run.steps < 1000  # the clock jumps where nobody can do anything but wait
    with emulating(seed, nanoseconds_per_step=0), pytest.raises(Deadlock, match=r"tile_ptr\[0"):
        run_within(10_000)
    with pytest.raises(Deadlock, match="waits for"):  # as outside of `emulating`
        run_within(10_000)


@triton.jit
def read_clock(out_ptr, x_ptr):
    first = tl.extra.cuda.globaltimer()
    tl.load(x_ptr, volatile=True)
    tl.debug_barrier()
    tl.store(out_ptr, first)
    tl.store(out_ptr + 1, tl.extra.cuda.globaltimer())


def test_what_moves_the_clock() -> None:
    """A look at it, a load, a barrier and a store are a step each; each launch begins at 0."""
    out, x = torch.zeros(2, dtype=torch.int64), torch.zeros(1)
    for _ in range(2):
        with emulating(nanoseconds_per_step=7, policy="lazy"):
            emulate(read_clock, (1,), {"out_ptr": out, "x_ptr": x}, {})
        assert out.tolist() == [7, 35]
    emulate(read_clock, (1,), {"out_ptr": out, "x_ptr": x}, {})
    assert out.tolist() == [0, 0]  # it stands still


@gluon.jit
def slow(flag_ptr, status_ptr, out_ptr, x_ptr, steps, bound, TEXT: gl.constexpr):
    """Program 1 publishes late, while program 0 waits: at most `bound` nanoseconds."""
    if gl.program_id(0) == 0:
        addresses = [flag_ptr.to(gl.int64), status_ptr.to(gl.int64), bound]
        gl.store(out_ptr, gl.inline_asm_elementwise(TEXT, "", addresses, dtype=gl.int32, is_pure=False, pack=1))
    else:
        for i in range(steps):
            gl.store(x_ptr, i)
        gl.store(flag_ptr, 5)


def test_the_clock_does_not_jump_while_a_program_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(turn, flag, status, bound, dtype):
        start = turn.clock()
        while True:
            found = turn.load(flag, gl.int32)
            if found.v != SENTINEL or turn.clock() - start >= int(bound.v):
                return found
            turn.wait()

    monkeypatch.setitem(TWINS, TIMED, twin)
    for seed in range(6):
        for bound, expected in ((10_000_000, 5), (1_000, None)):
            words = {name: torch.full((1,), SENTINEL, dtype=torch.int32) for name in ("flag_ptr", "out_ptr", "x_ptr")}
            words["status_ptr"] = torch.zeros(1, dtype=torch.int32)
            with emulating(seed):
                emulate(slow, (2,), {**words, "steps": 100, "bound": bound}, {"TEXT": TIMED})
            assert words["out_ptr"].item() == 5 or expected is None


# ---- memory ----------------------------------------------------------------------------------------------------------


@gluon.jit
def shifted_copy(x_ptr, y_ptr, shift, size, SIZE: gl.constexpr):
    i = gl.program_id(0) * SIZE + gl.arange(0, SIZE, layout=LAYOUT)
    x = gl.load(x_ptr + i + shift, mask=i < size)
    gl.store(y_ptr + i, x, mask=i < size)


def run_copy(x: Tensor, y: Tensor, shift: int, size: int, programs: int = 1, block: int = SIZE) -> None:
    emulate(shifted_copy, (programs,), {"x_ptr": x, "y_ptr": y, "shift": shift, "size": size}, {"SIZE": block})


def test_out_of_bounds() -> None:
    whole = torch.arange(4096, dtype=torch.float32)
    x, y = whole[1024:1100], whole[2048:2124]  # of one storage, far from each other
    run_copy(x, y, 0, 76, 2)  # what is masked is not accessed
    assert torch.equal(x, y)
    line = shifted_copy.fn.__code__.co_firstlineno + 3
    for shift, count, element in ((1, 1, 76), (-3, 3, -3)):
        message = (
            rf"(?s)seed 3: program \(\d, 0, 0\) loads {count} elements outside.*x_ptr\[{element}\] of 76, the nearest"
            rf" argument\n.*test_emulator.py:{line} in shifted_copy"
        )
        with emulating(3), pytest.raises(OutOfBounds, match=message):
            run_copy(x, y, shift, 76, 2)
    with pytest.raises(OutOfBounds, match=r"stores 4 elements.*y_ptr\[72\] of 72"):
        run_copy(x, y[:72], 0, 76, 2)
    with pytest.raises(OutOfBounds, match=r"loads 64 elements outside.*y_ptr\[1976\] of 76"):  # not one of them inside
        run_copy(x, y, 3000, 64)


def test_a_tile_may_span_two_arguments() -> None:
    whole = torch.arange(8192, dtype=torch.float32)
    far = (whole[5000:5008].data_ptr() - whole.data_ptr()) // 4
    x, y = whole[:4], whole[5000:5008]
    emulate(spread, (1,), {"x_ptr": x, "y_ptr": y, "far": far}, {})
    assert whole[:4].tolist() == [0, 2, 4, 6] and y[4:].tolist() == [10008, 10010, 10012, 10014]
    with pytest.raises(OutOfBounds, match=r"loads 4 elements outside.*y_ptr\[8\] of 8"):
        emulate(spread, (1,), {"x_ptr": x, "y_ptr": y, "far": far + 4}, {})


@gluon.jit
def spread(x_ptr, y_ptr, far):
    i = gl.arange(0, 8, layout=LAYOUT)
    pointers = x_ptr + gl.where(i < 4, i, i + far)
    gl.store(pointers, gl.load(pointers) * 2.0)


@gluon.jit
def misaligned(x_ptr, y_ptr):
    address = x_ptr.to(gl.int64) + 2
    gl.store(y_ptr, gl.load(address.to(y_ptr.dtype)))


def test_a_misaligned_access() -> None:
    with pytest.raises(OutOfBounds, match="no multiples of 4"):
        emulate(misaligned, (1,), {"x_ptr": torch.zeros(4), "y_ptr": torch.zeros(1)}, {})


@gluon.jit
def watched_store(x_ptr, out_ptr, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    if gl.program_id(0) == 0:
        gl.store(x_ptr + i, gl.full([SIZE], 1, gl.int32, LAYOUT))
    else:
        gl.store(out_ptr, gl.sum(gl.load(x_ptr + i), 0))


@pytest.mark.parametrize("tear", [0.0, 1.0])
def test_stores_and_loads_are_torn(tear: float) -> None:
    """Nothing but a whole tile is seen, or a part of it."""
    sums = set()
    for seed in range(40):
        x, out = torch.zeros(SIZE, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with emulating(seed, tear=tear):
            emulate(watched_store, (2,), {"x_ptr": x, "out_ptr": out}, {"SIZE": SIZE})
        assert x.tolist() == [1] * SIZE  # both halves arrive
        sums.add(int(out.item()))
    assert {0, SIZE} <= sums
    assert (len(sums) > 5) == bool(tear)


# ---- errors, and what is left after them -----------------------------------------------------------------------------


@gluon.jit
def fail_in_one(tiles_ptr, SIZE: gl.constexpr, TEXT: gl.constexpr):
    if gl.program_id(0) == 2:
        gl.arange(0, SIZE - 1)
    received(tiles_ptr + gl.arange(0, SIZE, layout=LAYOUT), TEXT)


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_an_error_comes_out_and_leaves_nothing_behind(seed: int | None) -> None:
    threads = threading.active_count()
    tiles = torch.full((SIZE,), SENTINEL, dtype=torch.int32)
    line = fail_in_one.fn.__code__.co_firstlineno + 3
    message = rf"(?s)seed {seed or 0}: program \(2, 0, 0\) raised ValueError: .*powers of 2.*test_emulator.py:{line} in"
    for _ in range(2):
        with pytest.raises(KernelError, match=message) as caught:
            if seed is None:
                emulate(fail_in_one, (4,), {"tiles_ptr": tiles}, {"SIZE": SIZE, "TEXT": WAIT})
            else:
                with emulating(seed):
                    emulate(fail_in_one, (4,), {"tiles_ptr": tiles}, {"SIZE": SIZE, "TEXT": WAIT})
        assert isinstance(caught.value.__cause__, ValueError)
        assert threading.active_count() == threads
        assert torch.equal(run_ring(), expected_ring())
    with emulating(seed or 0) as run:  # also within one block: the next launch
        with pytest.raises(Deadlock):
            run_in_vain()
        steps = run.steps
        assert torch.equal(run_ring(), expected_ring()) and run.steps > steps > 0
    assert threading.active_count() == threads


def test_an_interruption_ends_all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt reaches the thread that launched; the programs end at their next point."""
    interrupted: list[bool] = []
    threads, before = threading.active_count(), signal.getsignal(signal.SIGINT)

    def twin(turn, addresses, dtype):
        if not interrupted:
            interrupted.append(True)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while True:
            turn.give()

    monkeypatch.setitem(TWINS, WAIT, twin)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for seed in range(4):
            interrupted.clear()
            with pytest.raises(KeyboardInterrupt), emulating(seed):
                run_ring()
            assert threading.active_count() == threads
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.setitem(TWINS, WAIT, wait_twin)
    assert torch.equal(run_ring(), expected_ring())


def test_one_block_and_one_launch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulating():
        with pytest.raises(EmulatorError, match="inside another"), emulating():
            pass
        assert torch.equal(run_ring(), expected_ring())
    with pytest.raises(ValueError, match="policy must be"), emulating(policy="fair"):
        pass

    def twin(turn, addresses, dtype):
        run_ring()

    with emulating():
        assert torch.equal(run_ring(), expected_ring())
        monkeypatch.setitem(TWINS, WAIT, twin)
        with pytest.raises(KernelError, match="a launch inside a program of another"):
            run_ring()


def test_launches_of_several_threads_take_turns() -> None:
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(run_ring())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(tiles, expected_ring()) for tiles in found)


def test_an_empty_grid_runs_nothing() -> None:
    emulate(take_tickets, (0, 2), {"counter_ptr": None, "order_ptr": None}, {})


def test_importing_the_package_imports_neither_the_emulator_nor_triton() -> None:
    program = (
        "import sys, tritongru\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'triton' or m.startswith('tritongru.tools.emulator')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
