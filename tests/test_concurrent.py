"""The scheduler that runs a grid's programs at once (tritongru/launch/concurrent.py), on small kernels of its own."""

from __future__ import annotations

import threading

import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor
from triton.runtime.errors import InterpreterError

from tritongru.launch.concurrent import ConcurrencyError, Deadlock, OutOfBounds, concurrent, running_concurrently
from tritongru.launch.interpreter import repair

pytestmark = pytest.mark.interpreted

PROGRAMS, SIZE, SEEDS = 5, 64, range(20)
SENTINEL = -1


@triton.jit
def wait_for_all(ptrs):
    bits = tl.load(ptrs, volatile=True)
    while tl.min(bits) == -1:
        bits = tl.load(ptrs, volatile=True)
    return bits


@triton.jit
def wait_for_first(ptrs, base):
    """The mistake: the first element stands for the tile."""
    while tl.load(base, volatile=True) == -1:
        pass
    return tl.load(ptrs, volatile=True)


@triton.jit
def ring(
    x_ptr,  # [SIZE]
    tiles_ptr,  # [PROGRAMS, SIZE] int32, full of sentinels
    SIZE: tl.constexpr,
    FIRST_ONLY: tl.constexpr,
):
    """Each program adds its number + 1 to its predecessor's tile; the first takes x."""
    offs = tl.arange(0, SIZE)
    me = tl.program_id(0)
    if me == 0:
        tile = tl.load(x_ptr + offs)
    else:
        before = tiles_ptr + (me - 1) * SIZE
        tile = wait_for_first(before + offs, before) if FIRST_ONLY else wait_for_all(before + offs)
    tl.store(tiles_ptr + me * SIZE + offs, tile + me + 1, cache_modifier=".cg")


def run_ring(seed: int, fill: int = SENTINEL, first_only: bool = False, **options) -> tuple[Tensor, tuple[int, int]]:
    """The tiles, and (steps, switches)."""
    tiles = torch.full((PROGRAMS, SIZE), fill, dtype=torch.int32)
    x = torch.arange(SIZE, dtype=torch.int32)
    with concurrent(seed, **options) as scheduler:
        ring[(PROGRAMS,)](x, tiles, SIZE=SIZE, FIRST_ONLY=first_only)
    return tiles, (scheduler.steps, scheduler.switches)


def expected_ring() -> Tensor:
    added = torch.arange(1, PROGRAMS + 1, dtype=torch.int32).cumsum(0)
    return torch.arange(SIZE, dtype=torch.int32) + added[:, None].int()


def test_tiles_are_handed_on_right_under_every_seed() -> None:
    found = [run_ring(seed) for seed in SEEDS]
    assert all(torch.equal(tiles, expected_ring()) for tiles, _ in found)
    assert len({trace for _, trace in found}) >= 10


@pytest.mark.parametrize("options", [{}, {"policy": "random", "switch": 1.0}, {"policy": "priorities"}], ids=str)
def test_a_seed_repeats_its_interleaving(options: dict) -> None:
    traces = [[run_ring(seed, **options)[1] for seed in (4, 5)] for _ in range(2)]
    assert traces[0] == traces[1]
    assert traces[0][0] != traces[0][1]


@triton.jit
def take_tickets(counter_ptr, order_ptr):
    """order: the numbers of the programs in the order in which they came."""
    ticket = tl.atomic_add(counter_ptr, 1)
    tl.store(order_ptr + ticket, tl.program_id(0) * 100 + tl.program_id(1) * 10 + tl.program_id(2))


@pytest.mark.parametrize("policy", ["random", "priorities"])
def test_orders_of_programs(policy: str) -> None:
    """Many orders of eight programs in three dimensions, each program once; the same seed, the same order."""
    orders = []
    for seed in (*SEEDS, *SEEDS):
        order = torch.full((8,), -1, dtype=torch.int32)
        with concurrent(seed, policy=policy):
            take_tickets[(2, 2, 2)](torch.zeros(1, dtype=torch.int32), order)
        orders.append(tuple(order.tolist()))
    assert all(sorted(order) == [0, 1, 10, 11, 100, 101, 110, 111] for order in orders)
    assert orders[: len(SEEDS)] == orders[len(SEEDS) :]
    assert len(set(orders)) >= 15


def wrong_rings(**options) -> int:
    return sum(not torch.equal(run_ring(seed, **options)[0], expected_ring()) for seed in SEEDS)


def test_a_half_written_tile_is_seen() -> None:
    assert wrong_rings(first_only=True) >= 1
    assert wrong_rings(first_only=True, tear=1.0) >= 5
    assert wrong_rings(first_only=True, tear=0.0) == 0  # it is the halves that show it


def test_a_buffer_without_its_fill_is_seen() -> None:
    assert wrong_rings(fill=0) == len(SEEDS)


@triton.jit
def wait_for_a_tile(tiles_ptr, out_ptr, SIZE: tl.constexpr):
    """Program 0 ends at once, the others wait for a tile that nobody makes."""
    offs = tl.arange(0, SIZE)
    if tl.program_id(0) > 0:
        tile = wait_for_all(tiles_ptr + SIZE + offs)
        tl.store(out_ptr + offs, tile)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_missing_producer_is_a_deadlock(seed: int) -> None:
    tiles, out = torch.zeros(2, SIZE, dtype=torch.int32), torch.zeros(SIZE, dtype=torch.int32)
    tiles[1, 7:9] = SENTINEL
    with pytest.raises(Deadlock) as caught, concurrent(seed):
        wait_for_a_tile[(3,)](tiles, out, SIZE=SIZE)
    head, *programs = str(caught.value).splitlines()
    assert f"seed {seed}" in head and "1 of 3 programs have ended" in head
    assert len(programs) == 2
    for index, line in zip(("(1, 0, 0)", "(2, 0, 0)"), programs, strict=True):
        assert f"program {index} loads tiles_ptr[71] = -1 (all bits set, as in 2 of 64 elements)" in line
        assert "in wait_for_all < test_concurrent.py:" in line and line.endswith("in wait_for_a_tile")
    start = wait_for_all.fn.__code__.co_firstlineno  # the line of the decorator
    place = int(programs[0].split("test_concurrent.py:")[1].split()[0])
    assert start + 2 <= place <= start + 4


@triton.jit
def wait_for_two(a_ptr, b_ptr):
    """A poll of two words by turns."""
    while (tl.load(a_ptr, volatile=True) == -1) | (tl.load(b_ptr, volatile=True) == -1):
        pass


@triton.jit
def read_again_and_again(x_ptr, out_ptr, times):
    total = 0
    for _ in range(times):
        total += tl.load(x_ptr)
    tl.store(out_ptr, total)


def test_what_is_a_poll() -> None:
    a, b = torch.zeros(1, dtype=torch.int32), torch.full((1,), SENTINEL, dtype=torch.int32)
    with pytest.raises(Deadlock, match="every live program polls"), concurrent():
        wait_for_two[(2,)](a, b)
    with concurrent():
        read_again_and_again[(2,)](a + 1, b, 150)
    assert b.item() == 150


def test_the_budget_of_steps() -> None:
    with pytest.raises(Deadlock, match=r"(?s)budget of 10 steps.*program \(4, 0, 0\)"):
        run_ring(0, max_steps=10)


@triton.jit
def shifted_copy(x_ptr, y_ptr, shift, size, SIZE: tl.constexpr):
    offs = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs + shift, mask=offs < size)
    tl.store(y_ptr + offs, x, mask=offs < size)


def test_out_of_bounds() -> None:
    whole = torch.arange(4096, dtype=torch.float32)
    x, y = whole[1024:1100], whole[2048:2124]  # of one storage, far from each other
    with concurrent():
        shifted_copy[(2,)](x, y, 0, 76, SIZE=64)  # what is masked is not accessed
        shifted_copy[(1,)](whole[10:12], whole[12:16], 0, 4, SIZE=8)  # a tile may span two arguments
    assert torch.equal(x, y) and whole[12:16].tolist() == [10, 11, 12, 13]
    for shift, count, element in ((1, 1, 76), (-3, 3, -3)):
        message = rf"(?s)loads {count} elements.*x_ptr\[{element}\] of 76.*in shifted_copy"
        with pytest.raises(OutOfBounds, match=message), concurrent():
            shifted_copy[(2,)](x, y, shift, 76, SIZE=64)
    with pytest.raises(OutOfBounds, match=r"stores 4 elements.*y_ptr\[72\] of 72"), concurrent():
        shifted_copy[(2,)](x, y[:72], 0, 76, SIZE=64)


@triton.jit
def fail_in_one(tiles_ptr, SIZE: tl.constexpr):
    if tl.program_id(0) == 2:
        tl.arange(0, SIZE - 1)  # refused, when the program comes to it
    wait_for_all(tiles_ptr + tl.arange(0, SIZE))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_an_error_comes_out_and_leaves_all_as_it_was(seed: int) -> None:
    threads = threading.active_count()
    executor, own = interpreter.GridExecutor, set(vars(interpreter.interpreter_builder))
    tiles = torch.full((SIZE,), SENTINEL, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="power of 2"), concurrent(seed):
        fail_in_one[(4,)](tiles, SIZE=SIZE)
    assert threading.active_count() == threads
    assert interpreter.GridExecutor is executor and not running_concurrently()
    assert set(vars(interpreter.interpreter_builder)) <= own | {"grid_dim", "grid_idx"}
    assert all(tl.core.is_builtin(function) for function in (tl.load, tl.extra.cuda.globaltimer))

    x, y = torch.arange(8.0), torch.zeros(8)
    shifted_copy[(2,)](x, y, 0, 8, SIZE=4)  # the plain interpreter
    assert torch.equal(x, y)
    assert torch.equal(run_ring(seed)[0], expected_ring())
    with concurrent(seed) as scheduler:  # also within one block: the next launch
        with pytest.raises(Deadlock):
            wait_for_a_tile[(2,)](tiles.repeat(2), tiles, SIZE=SIZE)
        steps = scheduler.steps
        shifted_copy[(2,)](x, y.zero_(), 0, 8, SIZE=4)
    assert torch.equal(x, y) and scheduler.steps > steps > 0


@triton.jit
def count_barrier(counter_ptr, tiles_ptr, out_ptr, programs):
    """Everybody's word is there once the counter has reached the number of programs."""
    me = tl.program_id(0)
    tl.store(tiles_ptr + me, me + 1)
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < programs:
        pass
    total = 0
    for i in range(programs):
        total += tl.load(tiles_ptr + i)
    tl.atomic_xchg(out_ptr + me, total)


@pytest.mark.parametrize("seed", range(6))
def test_a_barrier_of_atomics(seed: int) -> None:
    out = torch.zeros(6, dtype=torch.int32)
    with concurrent(seed):
        count_barrier[(6,)](torch.zeros(1, dtype=torch.int32), torch.zeros(6, dtype=torch.int32), out, 6)
    assert out.tolist() == [21] * 6
    with pytest.raises(Deadlock, match=r"updates counter_ptr\[0\] = 6"), concurrent(seed):
        count_barrier[(6,)](torch.zeros(1, dtype=torch.int32), torch.zeros(6, dtype=torch.int32), out, 7)


@triton.jit
def wait_within(tile_ptr, polls_ptr, bound, POLLS_PER_LOOK: tl.constexpr):
    """Waits for a word, at most `bound` nanoseconds, and says how often it looked; program 0 never writes it."""
    me = tl.program_id(0)
    start = tl.extra.cuda.globaltimer()
    polls = 0
    go_on = 1
    while (tl.load(tile_ptr, volatile=True) == -1) & (go_on == 1):
        polls += 1
        if polls % POLLS_PER_LOOK == 0:
            go_on = (tl.extra.cuda.globaltimer() - start < bound).to(tl.int32)
    tl.store(polls_ptr + me, polls)


def timed_out(seed: int, bound: int, every: int = 1, **options) -> list[int]:
    polls = torch.zeros(3, dtype=torch.int32)
    with concurrent(seed, **options):
        wait_within[(3,)](torch.full((1,), SENTINEL, dtype=torch.int32), polls, bound, POLLS_PER_LOOK=every)
    return polls.tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_clock_ends_a_wait(seed: int) -> None:
    polls = timed_out(seed, 2_000_000)
    assert polls == timed_out(seed, 2_000_000)  # 2000 steps of 1 us for three programs, of two steps a poll
    assert 600 < sum(polls) < 1800 and max(polls) > 201
    sooner = timed_out(seed, 2_000_000, nanoseconds_per_step=100_000)
    assert min(sooner) >= 1 and sum(sooner) < 60
    assert min(timed_out(seed, 1_000_000, every=64)) >= 64  # a rare look is progress too
    with pytest.raises(Deadlock, match="budget"):
        timed_out(seed, 2_000_000, max_steps=500)


@triton.jit
def read_clock(out_ptr, x_ptr):
    first = tl.extra.cuda.globaltimer()
    tl.load(x_ptr)
    tl.store(out_ptr, first)
    tl.store(out_ptr + 1, tl.extra.cuda.globaltimer())


def test_the_clock_of_the_plain_interpreter_and_of_the_scheduler() -> None:
    repair()
    out, x = torch.zeros(2, dtype=torch.int64), torch.zeros(1)
    read_clock[(1,)](out, x)
    first, second = out.tolist()
    assert 0 < first < second
    for _ in range(2):  # each launch begins at 0
        with concurrent(nanoseconds_per_step=7):
            read_clock[(1,)](out, x)
        assert out.tolist() == [7, 28]


@triton.jit
def other_assembly(x_ptr):
    tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr, 1)


def test_other_assembly_is_refused() -> None:
    repair()
    with pytest.raises(InterpreterError, match="inline_asm not supported"):
        other_assembly[(1,)](torch.zeros(1))


def test_one_block_at_a_time() -> None:
    assert not running_concurrently()
    with concurrent():
        assert running_concurrently()
        with pytest.raises(ConcurrencyError, match="inside another"), concurrent():
            pass
        assert running_concurrently()
    assert not running_concurrently()
