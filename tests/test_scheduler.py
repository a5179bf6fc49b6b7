"""The emulator's scheduler, memory and reports (tools/emulator), on small kernels of their own."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritongru.tools.emulator import TWINS, Deadlock, EmulatorError, KernelError, OutOfBounds, emulate, emulating
from tritongru.tools.emulator.values import tensor

pytestmark = pytest.mark.usefixtures("one_thread")

PROGRAMS, SIZE, SEEDS, SENTINEL, INT32 = 5, 64, range(20), -1, torch.int32
LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
WAIT, TIMED = gl.constexpr("wait // of this test"), gl.constexpr("timed // of this test")


def wait_twin(turn, addresses, dtype):
    """Wait until no element is the sentinel."""
    while True:
        found = turn.load(addresses, gl.int32)
        if not (found.v == SENTINEL).any():
            return found
        turn.wait()


def timed_twin(turn, addresses, status, bound, dtype):
    """As the kernels' wait: past `bound` nanoseconds it sets a word, and goes on with what it has."""
    deadline = turn.clock() + int(bound.v)
    while True:
        found = turn.load(addresses, gl.int32)
        if not (found.v == SENTINEL).any():
            return found
        if turn.clock() >= deadline or turn.load(status.v, gl.int32).v:
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
    emulate(ring, (PROGRAMS,), {"x_ptr": x, "tiles_ptr": tiles}, {"SIZE": SIZE, "MISTAKEN": mistaken})
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


def wrong_rings(options: dict, **ring) -> int:
    wrong = 0
    for seed in SEEDS:
        with emulating(seed, **options):
            wrong += not run_ring(**ring)
    return wrong


def test_a_half_written_tile_is_seen() -> None:
    assert wrong_rings({}, mistaken=True) >= 1 and wrong_rings({"tear": 1.0}, mistaken=True) >= 5
    assert wrong_rings({"tear": 0.0}, mistaken=True) == 0  # it is the halves that show it


def test_a_buffer_without_its_fill_is_seen() -> None:
    assert wrong_rings({"policy": "random", "switch": 1.0}, fill=0) == len(SEEDS)


@triton.jit
def note_the_time(out_ptr, x_ptr):
    me = tl.program_id(0) * 4 + tl.program_id(1) * 2 + tl.program_id(2)
    first = tl.extra.cuda.globaltimer()
    tl.load(x_ptr)
    tl.debug_barrier()
    tl.store(out_ptr + 2 * me, first)
    tl.store(out_ptr + 2 * me + 1, tl.extra.cuda.globaltimer())


def times(grid=(2, 2, 2), **options) -> tuple[list[int], list[int]]:
    """When each program began, and ended, on the virtual clock."""
    out = torch.zeros(8, 2, dtype=torch.int64)
    with emulating(**options) as run:
        emulate(note_the_time, grid, {"out_ptr": out, "x_ptr": torch.zeros(1)}, {})
    assert run.policy != "lazy" or run.switches == 0
    return out[:, 0].tolist(), out[:, 1].tolist()


@pytest.mark.parametrize("policy", ["random", "priorities"])
def test_orders_of_programs(policy: str) -> None:
    """Many orders of eight programs in three dimensions, each program once; the same seed, the same order."""
    found = [times(seed=seed, policy=policy)[0] for seed in (*SEEDS, *SEEDS)]
    assert all(len(set(began)) == 8 for began in found) and found[: len(SEEDS)] == found[len(SEEDS) :]
    assert len({tuple(sorted(range(8), key=began.__getitem__)) for began in found}) >= 15


def test_what_moves_the_clock() -> None:
    """A look at it, a load, a barrier and a store are a step each; each launch begins at 0. A lazy program runs on."""
    for _ in range(2):
        began, ended = times(nanoseconds_per_step=7, policy="lazy")
        assert sorted(began) == list(range(7, 337, 42)) and all(b + 28 == e for b, e in zip(began, ended, strict=True))
    out = torch.ones(2, dtype=torch.int64)
    emulate(note_the_time, (1,), {"out_ptr": out, "x_ptr": torch.zeros(1)}, {})
    assert out.tolist() == [0, 0]  # outside `emulating` it stands still


# ---- who waits in vain, and for how long -----------------------------------------------------------------------------


@gluon.jit
def wait_for_a_tile(tiles_ptr, SIZE: gl.constexpr):
    """Program 0 ends at once, the others wait for a tile that nobody makes."""
    i = gl.arange(0, SIZE, layout=LAYOUT)
    if gl.program_id(0) > 0:
        received(tiles_ptr + SIZE + i)


def run_in_vain() -> None:
    tiles = torch.zeros(2, SIZE, dtype=INT32)
    tiles[1, 7:9] = SENTINEL
    emulate(wait_for_a_tile, (3,), {"tiles_ptr": tiles}, {"SIZE": SIZE})


@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("policy", ["lazy", "random", "priorities"])
def test_a_missing_producer_is_a_deadlock(policy: str, still: bool) -> None:
    """At once where the clock stands still, else once nobody looks at it."""
    options = {"nanoseconds_per_step": 0} if still else {}
    with emulating(5, policy=policy, tear=0, **options) as run, pytest.raises(Deadlock) as caught:
        run_in_vain()
    assert run.steps < (12 if still else 2000)
    head, *programs = str(caught.value).splitlines()
    assert "seed 5: every live program waits" in head and "1 of 3 programs have ended" in head
    start = received.fn.__code__.co_firstlineno  # the line of the decorator
    for index, line in zip(("(1, 0, 0)", "(2, 0, 0)"), programs, strict=True):
        assert f"program {index} waits for tiles_ptr[64 .. 127]" in line
        assert "(all bits set in 2 of 64 elements, the first tiles_ptr[71])" in line
        assert f" at test_scheduler.py:{start + 2} in received < test_scheduler.py:" in line
        assert line.endswith("in wait_for_a_tile")


@gluon.jit
def poll(x_ptr):
    while gl.load(x_ptr, volatile=True) == -1:
        pass


def test_the_budget_of_steps() -> None:
    with emulating(max_steps=10), pytest.raises(Deadlock, match=r"(?s)budget of 10 steps.*program \(4, 0, 0\)"):
        run_ring()
    for policy in ("lazy", "random"):  # who waits otherwise than by a twin uses it up
        with emulating(policy=policy, max_steps=500), pytest.raises(Deadlock, match="budget of 500 steps"):
            emulate(poll, (2,), {"x_ptr": torch.full((1,), SENTINEL, dtype=INT32)}, {})


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
    emulate(wait_within, (4,), {**words, "steps": steps, "bound": bound}, {})
    return bool(status), out[1:].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_wait_runs_out_on_the_virtual_clock(seed: int) -> None:
    """It jumps where nobody can do anything but wait, and not while a program works."""
    for bound in (10_000, 10_000_000_000):
        with emulating(seed) as run:
            assert run_within(0, bound) == (True, [SENTINEL] * 3)
        assert run.steps < 1000
    with emulating(seed) as run:
        assert run_within(100, 10_000_000) == (False, [5] * 3)
    assert run.steps < 2000  # a program that waits while another works has no turns
    with emulating(seed, nanoseconds_per_step=0), pytest.raises(Deadlock, match=r"waits for flag_ptr\[0\] = -1"):
        run_within(0, 10_000)
    with pytest.raises(Deadlock, match="waits for"):  # as outside of `emulating`
        run_within(0, 10_000)


# ---- memory ----------------------------------------------------------------------------------------------------------


@gluon.jit
def copy(x_ptr, y_ptr, shift, size, far, skew, SIZE: gl.constexpr):
    """x[shift:] to y; `far` more of its upper half, and `skew` bytes beside."""
    i = gl.program_id(0) * SIZE + gl.arange(0, SIZE, layout=LAYOUT)
    of_x = (x_ptr.to(gl.int64) + skew).to(x_ptr.dtype) + gl.where(i < SIZE // 2, i, i + far)
    x = gl.load(of_x + shift, mask=i < size)
    gl.store(y_ptr + i, x, mask=i < size)


def run_copy(x: Tensor, y: Tensor, shift: int = 0, size: int = 76, far: int = 0, skew: int = 0) -> None:
    numbers = {"shift": shift, "size": size, "far": far, "skew": skew}
    emulate(copy, (2,), {"x_ptr": x, "y_ptr": y, **numbers}, {"SIZE": SIZE})


def test_out_of_bounds() -> None:
    whole = torch.arange(4096, dtype=torch.float32)
    x, y = whole[1024:1100], whole[2048:2124]  # of one storage, far from each other
    run_copy(x, y)  # what is masked is not accessed
    assert torch.equal(x, y)
    line = copy.fn.__code__.co_firstlineno + 5
    at = rf"of 76, the nearest argument\n  at test_scheduler.py:{line} in copy"
    for shift, count, element in ((1, 1, 76), (-3, 3, -3)):
        message = rf"seed 3: program \(\d, 0, 0\) loads {count} elements outside.*x_ptr\[{element}\] {at}"
        with emulating(3), pytest.raises(OutOfBounds, match=message):
            run_copy(x, y, shift)
    with pytest.raises(OutOfBounds, match=r"stores 4 elements.*y_ptr\[72\] of 72"):
        run_copy(x, y[:72])
    with pytest.raises(OutOfBounds, match=r"loads 64 elements outside.*y_ptr\[1976\] of 76"):  # not one of them inside
        run_copy(x, y, 3000, 64)
    with pytest.raises(OutOfBounds, match="no multiples of 4"):
        run_copy(x, y, skew=2)


def test_a_tile_may_span_two_arguments() -> None:
    whole = torch.arange(4096, dtype=torch.float32)
    x, y = whole[1024:1056], whole[2048:2176]
    run_copy(x, y, size=64, far=1024)
    assert torch.equal(y[:32], x) and torch.equal(y[32:64], torch.arange(2080.0, 2112.0))
    with pytest.raises(OutOfBounds, match=r"loads 32 elements outside.*y_ptr\[160\] of 128"):
        run_copy(x, y, size=64, far=1152)


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
                emulate(fail_in_one, (4,), {"tiles_ptr": tiles}, {"SIZE": SIZE})
            assert isinstance(caught.value.__cause__, ValueError)
            assert threading.active_count() == threads and run_ring()
        with pytest.raises(Deadlock):
            run_in_vain()
        steps = run.steps
        assert threading.active_count() == threads and run_ring() and run.steps > steps > 0


def test_an_interruption_ends_all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt reaches the thread that launched; the programs end at their next point."""
    interrupted: list[int] = []
    threads, before = threading.active_count(), signal.getsignal(signal.SIGINT)

    def twin(turn, addresses, dtype):
        if seed not in interrupted:
            interrupted.append(seed)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while True:
            turn.clock()

    monkeypatch.setitem(TWINS, WAIT.value, twin)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for seed in range(4):
            with pytest.raises(KeyboardInterrupt), emulating(seed):
                run_ring()
            assert threading.active_count() == threads
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_block_and_one_launch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulating():
        with pytest.raises(EmulatorError, match="inside another"), emulating():
            pass
        assert run_ring()
    with pytest.raises(ValueError, match="policy must be"), emulating(policy="fair"):
        pass
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(run_ring())) for _ in range(4)]  # they take turns
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    monkeypatch.setitem(TWINS, WAIT.value, lambda *given, dtype: run_ring())
    with pytest.raises(KernelError, match="a launch inside a program of another"):
        run_ring()


def test_an_empty_grid_runs_nothing() -> None:
    emulate(note_the_time, (0, 2), {"out_ptr": None, "x_ptr": None}, {})
