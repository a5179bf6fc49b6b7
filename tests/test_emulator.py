"""The emulator (tools/emulator): values are rounded as a GPU rounds them, what nobody wrote is poison, a tile comes in
parts and in every order, no access is out of bounds, whoever waits in vain is told of, and no thread stays behind. That
it computes kernels right and finds their mistakes, test_kernels.py, test_exchange.py and test_mutants.py show."""

import signal
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritongru.tools import emulator
from tritongru.tools.emulator import TWINS, Deadlock, KernelError, OutOfBounds, emulate, emulating
from tritongru.tools.emulator.language import FUNCTIONS
from tritongru.tools.emulator.launch import Memory
from tritongru.tools.emulator.values import RAW, raw, unraw

PROGRAMS, SIZE, SEEDS, SENTINEL = 5, 64, range(20), -1
LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
INT32, FP32, HALVES = torch.int32, torch.float32, (torch.float16, torch.bfloat16)
TYPES = {getattr(torch, name): getattr(gl, name) for name in ("int16", "int32", "float32", "float16", "bfloat16")}
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def given(x: Tensor) -> emulator.Tensor:
    dtype = TYPES[x.dtype]
    bits = x.numpy() if x.dtype != torch.bfloat16 else x.view(torch.int16).numpy()
    return emulator.Tensor(unraw(bits.view(RAW[dtype]), dtype), dtype)


def assert_computed(found: emulator.Tensor, expected: Tensor) -> None:
    """Bit for bit; a NaN as any other."""
    assert found.dtype == TYPES[expected.dtype]
    bits = expected.view(torch.int16 if expected.itemsize == 2 else INT32).numpy()
    right = (raw(found.v, found.dtype).view(bits.dtype) == bits) | (expected.isnan().numpy() & (found.v != found.v))
    assert right.all(), (found.v[~right], expected[torch.from_numpy(~right)])


@quiet
def test_integers_are_those_of_c() -> None:
    """They wrap around, and a quotient is cut towards zero."""
    a = torch.tensor([-(2**31), -7, -6, -1, 0, 1, 7, 2**31 - 1], dtype=INT32)
    x = given(a)
    assert_computed(x + 5, a + 5)
    assert_computed(x * 3, a * 3)
    assert_computed(x // 3, torch.div(a, 3, rounding_mode="trunc"))
    assert_computed(x % 3, torch.fmod(a, 3))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@quiet
def test_casts_round_to_nearest_even_and_bitcasts_keep_bits(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=INT32).to(torch.int16)
    assert_computed(given(every).to(TYPES[dtype], bitcast=True).to(gl.float32), every.view(dtype).float())
    kept = given(every.view(dtype)).to(gl.int16, bitcast=True)
    assert (kept.v == every.numpy()).all()  # NaNs too
    exact = every.view(dtype).float()
    exact = exact[exact.isfinite()]
    between = [exact * (1 + 2.0**-8), exact * (1 + 2.0**-9), exact * (1 + 2.0**-11 - 2.0**-20)]
    special = torch.tensor([float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, -0.0, float("nan"), 65520.0])
    for x in (exact, *between, special):
        assert_computed(given(x).to(TYPES[dtype]), x.to(dtype))


@pytest.mark.parametrize("dtype", [FP32, *HALVES], ids=str)
def test_products_of_the_tensor_core(dtype: torch.dtype) -> None:
    """Of float32 it reads as many bits as TF32 has."""
    for batch in ((), (4,)):
        a, b = torch.randn(*batch, 16, 32).to(dtype), torch.randn(*batch, 32, 8).to(dtype)
        found = FUNCTIONS["mma_v2"](given(a), given(b), given(torch.ones(*batch, 16, 8)))
        read = [(x.view(INT32) & ~0x1FFF).view(FP32) if dtype == FP32 else x for x in (a, b)]
        expected = read[0].double() @ read[1].double() + 1
        torch.testing.assert_close(torch.from_numpy(found.v).double(), expected, rtol=1e-5, atol=1e-5)


@gluon.jit
def masks(a_ptr, b_ptr, n, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    gl.store(b_ptr + i, gl.load(a_ptr + i, mask=i < n))
    gl.store(b_ptr + SIZE + i, gl.load(a_ptr + i, mask=i < n, other=7))
    gl.store(b_ptr + 2 * SIZE + i, gl.load(a_ptr + i, mask=i < n, other=0), mask=(i < n) & (i != 1))
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    gl.store(b_ptr + 3 * SIZE + i, gl.allocate_shared_memory(b_ptr.dtype.element_ty, [SIZE], layout).load(LAYOUT))


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, INT32, torch.int8], ids=str)
def test_masked_lanes_touch_no_memory_and_are_poisoned_and_so_is_fresh_shared_memory(dtype: torch.dtype) -> None:
    n = 10
    a, b = torch.arange(1, n + 1).to(dtype), torch.zeros(4, SIZE, dtype=dtype)
    emulate(masks, (1, 1, 1), {"a_ptr": a, "b_ptr": b, "n": n}, {"SIZE": SIZE})
    poisoned, filled, stored, fresh = b
    assert torch.equal(poisoned[:n], a) and torch.equal(filled[:n], a)
    for poison in (poisoned[n:], fresh):
        assert poison.isnan().all() if dtype.is_floating_point else (poison > 40).all()
    assert (filled[n:] == 7).all() and stored[:3].tolist() == [1, 0, 3] and not stored[n:].any()


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
        (LANES + 500, r"64 elements outside every tensor, the first x\[500\] of 76"),
        (LANES + 1024 * (LANES > 31), ""),  # a tile may span two arguments
        (LANES + 1112 * (LANES > 31), r"1 elements outside every tensor, the first y\[151\] of 151"),
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


WAIT = gl.constexpr("wait // of this test")


def wait_twin(turn, addresses, dtype):
    while True:
        found = turn.load(addresses.v, gl.int32)
        if not (found.v == SENTINEL).any():
            return found
        turn.wait()


@pytest.fixture(autouse=True)
def _twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TWINS, WAIT.value, wait_twin)


@gluon.jit
def received(pointers):
    return gl.inline_asm_elementwise(WAIT, "=&r,l", [pointers.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def ring(x_ptr, tiles_ptr, SIZE: gl.constexpr, MISTAKEN: gl.constexpr):
    """Each adds its number + 1 to the tile before. MISTAKEN: it takes the tile to be there by its first element."""
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
    tiles, x = torch.full((PROGRAMS, SIZE), fill, dtype=INT32), torch.arange(SIZE, dtype=INT32)
    emulate(ring, (PROGRAMS, 1, 1), {"x_ptr": x, "tiles_ptr": tiles}, {"SIZE": SIZE, "MISTAKEN": mistaken})
    return torch.equal(tiles, x + torch.arange(1, PROGRAMS + 1, dtype=INT32).cumsum(0)[:, None].int())


def test_tiles_are_handed_on_right_under_every_seed() -> None:
    assert run_ring()  # each until it waits
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
        ({}, {"fill": 0}, 15, 20),  # a buffer without its fill is seen
    ],
)
def test_mistakes_that_an_interleaving_shows(options: dict, ring: dict, least: int, most: int) -> None:
    wrong = 0
    for seed in SEEDS:
        with emulating(seed, **options):
            wrong += not run_ring(**ring)
    assert least <= wrong <= most


@gluon.jit
def wait_for_a_tile(tiles_ptr, SIZE: gl.constexpr):
    """Program 0 ends at once, the others wait for a tile that nobody makes."""
    i = gl.arange(0, SIZE, layout=LAYOUT)
    if gl.program_id(0) > 0:
        received(tiles_ptr + SIZE + i)


@pytest.mark.parametrize("switch", [0, -1])
def test_a_missing_producer_is_a_deadlock(switch: float) -> None:
    """Where the clock stands still; who goes on asking the clock uses the steps up."""
    tiles = torch.zeros(2, SIZE, dtype=INT32)
    tiles[1, 7:9] = SENTINEL
    launch = wait_for_a_tile, (3, 1, 1), {"tiles_ptr": tiles}, {"SIZE": SIZE}
    with emulating(5, switch=switch, tear=0, nanoseconds_per_step=0) as run, pytest.raises(Deadlock) as caught:
        emulate(*launch)
    assert run.steps < 12
    head, *programs = str(caught.value).splitlines()
    assert head == "seed 5: every live program waits for what nobody changes any more (2 of 3 programs have not ended)"
    for index, line in zip(("(1, 0, 0)", "(2, 0, 0)"), programs, strict=True):
        assert f"program {index} at test_emulator.py:" in line and " in received < test_emulator.py:" in line
        assert line.endswith(" in wait_for_a_tile waits for 2 elements, the first tiles_ptr[71] of 128")
    with emulating(switch=switch, max_steps=500), pytest.raises(Deadlock, match="budget of 500 steps"):
        emulate(*launch)


@pytest.mark.parametrize("switch", [0, -1])
def test_a_wait_that_runs_out_takes_few_steps(switch: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps where nobody can do anything but wait."""

    def twin(turn, addresses, dtype):
        while turn.clock() < 2_000_000_000:
            found = turn.load(addresses.v, gl.int32)
            turn.wait()
        return found

    monkeypatch.setitem(TWINS, WAIT.value, twin)
    with emulating(switch=switch) as run:
        emulate(wait_for_a_tile, (3, 1, 1), {"tiles_ptr": torch.full((2, SIZE), SENTINEL, dtype=INT32)}, {"SIZE": SIZE})
    assert run.steps < 1000


@gluon.jit
def fail_in_one(tiles_ptr, SIZE: gl.constexpr):
    if gl.program_id(0) == 2:
        gl.arange(0, SIZE - 1)
    received(tiles_ptr + gl.arange(0, SIZE, layout=LAYOUT))


@pytest.mark.parametrize("options", [{"switch": 0, "tear": 0}, {"seed": 0}, {"seed": 1}], ids=str)
def test_an_error_comes_out_with_its_line_and_leaves_nothing_behind(options: dict) -> None:
    threads = threading.active_count()
    tiles = torch.full((SIZE,), SENTINEL, dtype=INT32)
    line = fail_in_one.fn.__code__.co_firstlineno + 3
    message = rf"(?s)program \(2, 0, 0\) raised ValueError: .*powers of 2.*test_emulator.py:{line} in fail_in_one"
    with emulating(**options):
        for _ in range(2):
            with pytest.raises(KernelError, match=message) as caught:
                emulate(fail_in_one, (4, 1, 1), {"tiles_ptr": tiles}, {"SIZE": SIZE})
            assert isinstance(caught.value.__cause__, ValueError)
            assert threading.active_count() == threads and run_ring()


def test_an_interruption_ends_all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt reaches the thread that launched; the programs end at their next point."""
    threads, before = threading.active_count(), signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = iter([partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)])

    def twin(turn: object, addresses: Tensor, dtype: object) -> None:
        next(interrupt, bool)()  # once
        while True:
            turn.clock()

    monkeypatch.setitem(TWINS, WAIT.value, twin)
    try:
        with pytest.raises(KeyboardInterrupt), emulating(0):
            run_ring()
        assert threading.active_count() == threads
    finally:
        signal.signal(signal.SIGINT, before)
