"""A litmus test of the exchange alone: each program hands a block to every other, and counts what it received wrong."""

import pytest
import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritongru.kernels import exchange
from tritongru.kernels.exchange import Texts, Words, first_vector, place, publish, received
from tritongru.kernels.sequence import indices, products
from tritongru.launch.exchange import Buffer, Shape
from tritongru.launch.runtime import Kernel, interpreting, one_step
from tritongru.status import Status, wait_seconds
from tritongru.tools.emulator import emulating, twins

ROWS, DTYPES = 16, (torch.float32, torch.float16, torch.bfloat16)


@gluon.jit
def expected(round, row, unit):
    """What an element holds: whole numbers below 256, exact in every dtype, different from round to round."""
    return ((round * 17 + row * 31 + unit * 7) % 251).to(gl.float32)


@gluon.jit(do_not_specialize=["rounds", "bound"])
def all_to_all(
    rounds,
    bound,
    e_ptr,  # [rounds, K / UNITS blocks] integers in fragment order, full of sentinels
    like_ptr,  # a tensor of the dtype that is handed on; not read
    wrong_ptr,  # [programs] int32: elements that were not as published
    status_ptr,
    report_ptr,
    UNITS: gl.constexpr,  # of a block: what a program publishes
    K: gl.constexpr,
    WARPS: gl.constexpr,
    WAIT: gl.constexpr,
    CONSTRAINTS: gl.constexpr,
    PACK: gl.constexpr,
):
    """In every round a program publishes its block, then waits for everybody's of the same round."""
    dtype: gl.constexpr = like_ptr.dtype.element_ty
    WIDTH: gl.constexpr = dtype.primitive_bitwidth
    TEXTS: gl.constexpr = Texts(WAIT, CONSTRAINTS, PACK)
    left: gl.constexpr = gl.DotOperandLayout(0, products(WARPS), 32 // WIDTH)
    own: gl.constexpr = gl.BlockedLayout([1, 1], [32 // UNITS, UNITS], [WARPS, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(1, own)), 1)
    unit = gl.expand_dims(gl.arange(0, UNITS, layout=gl.SliceLayout(0, own)), 0)
    warp, k, of_left = indices(WARPS, K // WARPS, 16, 2, left)
    vector = first_vector(warp, of_left, k, K // WARPS, 16, WIDTH).to(gl.int64)
    source = warp * (K // WARPS) + k
    owned = source < gl.num_programs(0) * UNITS
    first = gl.program_id(0) * UNITS
    wrong = gl.zeros([WARPS, 16, K // WARPS], gl.int32, layout=left)
    words = Words(status_ptr.to(gl.int64), report_ptr.to(gl.int64), bound)
    here = e_ptr
    for round in range(rounds):
        value = expected(round, row, first + unit)
        publish(here + first * 16 + place(row, unit, 16, WIDTH), value.to(dtype))
        (found,) = received(here.to(gl.int64) + vector, words, TEXTS, 1, dtype)
        right = found.to(gl.float32) == expected(round, of_left, source)
        wrong += gl.where(right | (owned == 0), 0, 1)
        here += 16 * K
    gl.store(wrong_ptr + gl.program_id(0), gl.sum(gl.sum(gl.sum(wrong, 2), 1), 0))


def wrong_elements(programs: int, rounds: int, dtype, device, warps: int = 8) -> int:
    """Elements received wrong by all programs over all rounds; RuntimeError where a wait ran out."""
    width = 8 * dtype.itemsize
    units = exchange.units_of_block(width, ROWS)
    K = max(16 * warps, triton.next_power_of_2(programs * units))
    wait = exchange.wait_text(ROWS, K, 1, 1, warps, width, 0)
    if interpreting():
        twins.register(wait)
    buffer = Buffer(Shape((1, 1, K // units, ROWS * units), programs), rounds, dtype, device).filled(rounds)
    wrong, status = torch.full((programs,), -1, dtype=torch.int32, device=device), Status(device)
    constants = dict(UNITS=units, K=K, WARPS=warps, WAIT=wait.text, CONSTRAINTS=wait.constraints, PACK=wait.pack)
    kernel = Kernel(all_to_all, constants, warps, cooperative=True, max_registers=65536 // (32 * warps) - 1)
    pointers = dict(e_ptr=buffer, wrong_ptr=wrong, status_ptr=status.word, report_ptr=status.report)
    launch = kernel.launch(dict(like_ptr=torch.empty(1, dtype=dtype, device=device), **pointers))
    launch(one_step((programs, 1, 1), (rounds, exchange.bound_of(wait_seconds()))))
    found = int(wrong.sum())  # waits for the device
    status.check()
    assert (wrong >= 0).all(), "a program did not run to its end"
    return found


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_the_emulator(dtype: torch.dtype) -> None:
    for seed in range(4):
        with emulating(seed):
            assert wrong_elements(5, 4, dtype, torch.device("cpu"), warps=2) == 0


@pytest.mark.interpreted
def test_it_can_fail(monkeypatch) -> None:
    """In a buffer that is not full of sentinels nobody waits."""
    monkeypatch.setattr("tritongru.launch.exchange.SENTINEL", 0)
    with emulating(1):
        assert wrong_elements(5, 4, torch.float16, torch.device("cpu"), warps=2) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_on_a_gpu(dtype: torch.dtype, share: float) -> None:
    """10,000 rounds of all programs the device holds, half of them, a tenth."""
    device = torch.device("cuda", torch.cuda.current_device())
    programs = max(2, int(torch.cuda.get_device_properties(device).multi_processor_count * share))
    assert wrong_elements(programs, 10_000, dtype, device) == 0
