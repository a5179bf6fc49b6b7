"""The emulator's scheduler, memory and reports (tools/emulator), on small kernels of their own."""

from __future__ import annotations

import signal
import threading
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritongru.tools.emulator import TWINS, Deadlock, KernelError, OutOfBounds, emulate, emulating
from tritongru.tools.emulator.memory import Memory
from tritongru.tools.emulator.values import tensor

PROGRAMS, SIZE, SEEDS, SENTINEL, INT32 = 5, 64, range(20), -1, torch.int32
LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
WAIT, TIMED, NOTE = map(gl.constexpr, ("wait // of this test", "timed // of this test", "note // of this test"))


def wait_twin(turn, addresses, dtype):
    """Wait until no element is the sentinel."""
    while True:
        found = turn.load(addresses.v, gl.int32)
        if not (found.v == SENTINEL).any():
            return found
        turn.wait()


def timed_twin(turn, addresses, status, bound, dtype):
    """As the kernels' wait: past `bound` nanoseconds it sets a word, and goes on with what it has."""
    deadline = turn.clock() + int(bound)
    while True:
        found = turn.load(addresses.v, gl.int32)
        if not (found.v == SENTINEL).any():
            return found
        if turn.clock() >= deadline or turn.load(status.v, gl.int32):
            turn.store(status.v, tensor(1))
            return found
        turn.wait()


@pytest.fixture(autouse=True)
def _twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TWINS, WAIT.value, wait_twin)
    monkeypatch.setitem(TWINS, TIMED.value, timed_twin)


@gluon.jit
def received(pointers):
    return gl.inline_asm_elementwise(WAIT, "=&r,l", [pointers.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def ring(x_ptr, tiles_ptr, SIZE: gl.constexpr, MISTAKEN: gl.constexpr):
    """x [SIZE], tiles [PROGRAMS, SIZE] of sentinels: each program adds its number + 1 to its predecessor's tile.
    MISTAKEN: where its first element is there, the tile is thought to be."""
    i = gl.arange(0, SIZE, layout=LAYOUT)
    me = gl.program_id(0)
    before = tiles_ptr + (me - 1) * SIZE
    if me == 0:
        tile = gl.load(x_ptr + i)
    elif MISTAKEN:
        received(before)
        tile = gl.load(before + i)
    else:
        tile = received(before + i)
    gl.store(tiles_ptr + me * SIZE + i, tile + me + 1)


def run_ring(mistaken: bool = False, fill: int = SENTINEL) -> bool:
    """Whether what comes is right."""
    tiles, x = torch.full((PROGRAMS, SIZE), fill, dtype=INT32), torch.arange(SIZE, dtype=INT32)
    emulate(ring, (PROGRAMS, 1, 1), {"x_ptr": x, "tiles_ptr": tiles}, {"SIZE": SIZE, "MISTAKEN": mistaken})
    return torch.equal(tiles, x + torch.arange(1, PROGRAMS + 1, dtype=INT32).cumsum(0)[:, None].int())


# ---- who runs --------------------------------------------------------------------------------------------------------


def test_tiles_are_handed_on_right_under_every_seed() -> None:
    assert run_ring()  # the lazy policy
    traces: dict[int, tuple[int, int]] = {}
    for seed in (*SEEDS, *SEEDS):
        with emulating(seed) as found:
            assert run_ring()
        trace = (found.steps, found.switches)
        assert traces.setdefault(seed, trace) == trace, "a seed repeats its interleaving"
    assert len(set(traces.values())) >= 10


@pytest.mark.parametrize(
    ("options", "ring", "least", "most"),
    [
        ({}, {"mistaken": True}, 1, 20),  # a half-written tile is seen
        ({"tear": 1.0}, {"mistaken": True}, 5, 20),
        ({"tear": 0.0}, {"mistaken": True}, 0, 0),  # it is the halves that show it
        ({"policy": "random"}, {"fill": 0}, 15, 20),  # a buffer without its fill is seen
    ],
)
def test_mistakes_that_an_interleaving_shows(options: dict, ring: dict, least: int, most: int) -> None:
    wrong = 0
    for seed in SEEDS:
        with emulating(seed, **options):
            wrong += not run_ring(**ring)
    assert least <= wrong <= most


@gluon.jit
def note():
    gl.inline_asm_elementwise(NOTE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


def order(**options) -> list[tuple[int, int, int]]:
    """In which eight programs begin."""
    with emulating(**options) as run, pytest.MonkeyPatch.context() as patch:
        found: list[tuple[int, int, int]] = []
        patch.setitem(TWINS, NOTE.value, lambda turn, dtype: found.append(turn.point().index))
        emulate(note, (2, 2, 2), {}, {})
    assert sorted(found) == list(product(range(2), repeat=3)) and (run.policy != "lazy" or run.switches == 0)
    return found


@pytest.mark.parametrize(("policy", "least"), [("random", 15), ("priorities", 15), ("lazy", 1)])
def test_orders_of_programs(policy: str, least: int) -> None:
    found = [order(seed=seed, policy=policy) for seed in SEEDS]
    assert len(set(map(tuple, found))) >= least and found == [order(seed=seed, policy=policy) for seed in SEEDS]


def test_a_policy_that_is_none() -> None:
    with pytest.raises(ValueError, match="policy must be"), emulating(policy="fair"):
        pass


# ---- who waits in vain, and for how long -----------------------------------------------------------------------------


@gluon.jit
def wait_for_a_tile(tiles_ptr, SIZE: gl.constexpr):
    """Program 0 ends at once, the others wait for a tile that nobody makes."""
    i = gl.arange(0, SIZE, layout=LAYOUT)
    if gl.program_id(0) > 0:
        received(tiles_ptr + SIZE + i)


@pytest.mark.parametrize("policy", ["lazy", "random", "priorities"])
def test_a_missing_producer_is_a_deadlock(policy: str) -> None:
    """Where the clock stands still."""
    tiles = torch.zeros(2, SIZE, dtype=INT32)
    tiles[1, 7:9] = SENTINEL
    with emulating(5, policy=policy, tear=0, nanoseconds_per_step=0) as run, pytest.raises(Deadlock) as caught:
        emulate(wait_for_a_tile, (3, 1, 1), {"tiles_ptr": tiles}, {"SIZE": SIZE})
    assert run.steps < 12
    head, *programs = str(caught.value).splitlines()
    assert head == "seed 5: every live program waits for what nobody changes any more (2 of 3 programs have not ended)"
    start = received.fn.__code__.co_firstlineno  # the line of the decorator
    for index, line in zip(("(1, 0, 0)", "(2, 0, 0)"), programs, strict=True):
        assert f"program {index} at test_scheduler.py:{start + 2} in received < test_scheduler.py:" in line
        assert line.endswith(" in wait_for_a_tile waits for 2 elements, the first tiles_ptr[71] of 128")


@gluon.jit
def poll(tiles_ptr):
    while gl.load(tiles_ptr, volatile=True) == -1:
        pass


@pytest.mark.parametrize("policy", ["lazy", "random"])
@pytest.mark.parametrize(("kernel", "constants"), [(poll, {}), (wait_for_a_tile, {"SIZE": SIZE})], ids=["loop", "twin"])
def test_who_waits_for_ever_uses_the_steps_up(kernel, constants: dict, policy: str) -> None:
    message = r"(?s)budget of 500 steps.*program \(2, 0, 0\) at .*"
    with emulating(policy=policy, max_steps=500), pytest.raises(Deadlock, match=message):
        emulate(kernel, (3, 1, 1), {"tiles_ptr": torch.full((2, SIZE), SENTINEL, dtype=INT32)}, constants)


@gluon.jit
def wait_within(flag_ptr, status_ptr, out_ptr, x_ptr, steps, bound):
    """Program 0 publishes after some steps, or never; the others wait at most `bound` nanoseconds."""
    if gl.program_id(0) > 0:
        given = [flag_ptr.to(gl.int64), status_ptr.to(gl.int64), bound]
        found = gl.inline_asm_elementwise(TIMED, "=&r,l,l,l", given, dtype=gl.int32, is_pure=False, pack=1)
        gl.store(out_ptr + gl.program_id(0), found)
    else:
        for i in range(steps):
            gl.store(x_ptr, i)
        if steps > 0:
            gl.store(flag_ptr, 5)


def run_within(steps: int, bound: int) -> tuple[bool, list[int]]:
    """Whether a wait ran out, and what three programs went on with."""
    words = {name: torch.full((1,), SENTINEL, dtype=INT32) for name in ("flag_ptr", "x_ptr")}
    status, out = torch.zeros(1, dtype=INT32), torch.zeros(4, dtype=INT32)
    words |= {"status_ptr": status, "out_ptr": out}
    emulate(wait_within, (4, 1, 1), {**words, "steps": steps, "bound": bound}, {})
    return bool(status), out[1:].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_wait_runs_out_on_the_virtual_clock(seed: int) -> None:
    """It jumps where nobody can do anything but wait, and not while a program works."""
    for bound in (10_000, 2_000_000_000):
        with emulating(seed) as run:
            assert run_within(0, bound) == (True, [SENTINEL] * 3)
        assert run.steps < 1000
    with emulating(seed) as run:
        assert run_within(100, 10_000_000) == (False, [5] * 3)
    assert run.steps < 2000  # a program that waits while another works has no turns
    with pytest.raises(Deadlock, match=r"waits for 1 elements, the first flag_ptr\[0\] of 1"):  # outside of `emulating`
        run_within(0, 10_000)


# ---- memory ----------------------------------------------------------------------------------------------------------

WHOLE = torch.arange(4096, dtype=torch.float32)
X, Y = WHOLE[1024:1100], WHOLE[2048:2200:2]  # of one storage, far from each other
LANES = np.arange(64)


@pytest.mark.parametrize(
    ("elements", "message"),  # addresses in elements of X
    [
        (LANES, ""),
        (np.int64(75), ""),
        (LANES + 13, r"1 elements outside every tensor, the first x\[76\] of 76"),
        (LANES - 3, r"3 elements outside every tensor, the first x\[-3\] of 76"),
        (LANES - 3000, r"64 elements outside every tensor, the first x\[-3000\] of 76"),
        (LANES + 500, r"64 elements outside every tensor, the first x\[500\] of 76"),
        (LANES + 1024 * (LANES > 31), ""),  # a tile may span two arguments
        (LANES + 1112 * (LANES > 31), r"1 elements outside every tensor, the first y\[151\] of 151"),
        (np.int64(1024 + 151), r"1 elements outside every tensor, the first y\[151\] of 151"),
        (LANES + 0.5, "64 elements at addresses that are no multiples of 4"),
    ],
)
def test_out_of_bounds(elements: np.ndarray, message: str) -> None:
    memory, addresses = Memory({"y": Y, "n": 3, "x": X}), X.data_ptr() + (4 * elements).astype(np.int64)
    if message:
        with pytest.raises(OutOfBounds, match=f"loads {message}$"):
            memory.checked("loads", addresses, 4)
    else:
        assert memory.checked("loads", addresses, 4) == (addresses.min(), addresses.max())
        assert (memory.load(addresses, np.dtype(np.float32)) == elements + 1024).all()


@gluon.jit
def copy(x_ptr, y_ptr, size, SIZE: gl.constexpr):
    i = gl.program_id(0) * SIZE + gl.arange(0, SIZE, layout=LAYOUT)
    x = gl.load(x_ptr + i, mask=i < size)
    gl.store(y_ptr + i, x, mask=i < size)


def test_an_access_out_of_bounds_is_told_with_its_line() -> None:
    y = torch.zeros(72)
    emulate(copy, (2, 1, 1), {"x_ptr": X, "y_ptr": y, "size": 72}, {"SIZE": SIZE})  # what is masked is not accessed
    assert torch.equal(X[:72], y)
    line = copy.fn.__code__.co_firstlineno + 4
    message = rf"seed 3: program \(1, 0, 0\) .*stores 4 .*y_ptr\[72\] of 72\n  at test_scheduler.py:{line} in copy"
    with emulating(3), pytest.raises(OutOfBounds, match=message):
        emulate(copy, (2, 1, 1), {"x_ptr": X, "y_ptr": y, "size": 76}, {"SIZE": SIZE})


# ---- errors, and what is left after them -----------------------------------------------------------------------------


@gluon.jit
def fail_in_one(tiles_ptr, SIZE: gl.constexpr):
    if gl.program_id(0) == 2:
        gl.arange(0, SIZE - 1)
    received(tiles_ptr + gl.arange(0, SIZE, layout=LAYOUT))


@pytest.mark.parametrize("options", [{"policy": "lazy"}, *({"seed": seed} for seed in range(4))], ids=str)
def test_an_error_comes_out_and_leaves_nothing_behind(options: dict) -> None:
    threads = threading.active_count()
    tiles = torch.full((SIZE,), SENTINEL, dtype=INT32)
    line = fail_in_one.fn.__code__.co_firstlineno + 3
    message = rf"(?s)program \(2, 0, 0\) raised ValueError: .*powers of 2.*test_scheduler.py:{line} in fail_in_one"
    with emulating(**options) as run:
        for _ in range(2):
            with pytest.raises(KernelError, match=message) as caught:
                emulate(fail_in_one, (4, 1, 1), {"tiles_ptr": tiles}, {"SIZE": SIZE})
            assert isinstance(caught.value.__cause__, ValueError)
            steps = run.steps
            assert threading.active_count() == threads and run_ring() and run.steps > steps


@pytest.mark.parametrize("seed", range(4))
def test_an_interruption_ends_all_programs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt reaches the thread that launched; the programs end at their next point."""
    interrupted: list[int] = []
    threads, before = threading.active_count(), signal.getsignal(signal.SIGINT)

    def twin(turn: object, addresses: Tensor, dtype: object) -> None:
        if not interrupted:
            interrupted.append(seed)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while True:
            turn.clock()

    monkeypatch.setitem(TWINS, WAIT.value, twin)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), emulating(seed):
            run_ring()
        assert threading.active_count() == threads
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_thread_is_left_waiting_where_not_all_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, start = threading.active_count(), threading.Thread.start

    def start_three(thread: threading.Thread) -> None:
        if threading.active_count() == threads + 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start new thread"):
        patch.setattr(threading.Thread, "start", start_three)
        run_ring()
    assert threading.active_count() == threads and run_ring()


def test_one_launch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KernelError, match="a launch while another one runs"):
        patch.setitem(TWINS, WAIT.value, lambda *given, dtype: run_ring())
        run_ring()
    with emulating(3) as outer, emulating(4):
        assert run_ring() and outer.steps == 0
