"""A litmus test of the exchange alone: every program hands tiles to every other, and counts what it received wrong."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritongru.kernels.exchange import publish, receive
from tritongru.launch.runtime import Launch
from tritongru.launch.sequence import SENTINEL, Status, wait_seconds


@triton.jit
def expected(program, round, element):
    """What an element holds: whole numbers below 256, exact in every dtype, different from round to round."""
    return ((program * 31 + round * 17 + element * 7) % 251).to(tl.float32)


@triton.jit(do_not_specialize=["rounds", "bound"])
def all_to_all(
    rounds,
    bound,  # microseconds
    tiles_ptr,  # [rounds, programs, SIZE] integers, full of sentinels
    like_ptr,  # a tensor of the dtype that is handed on; not read
    wrong_ptr,  # [programs] int32: elements that were not as published
    status_ptr,
    report_ptr,
    PROGRAMS: tl.constexpr,  # a power of two at least as large as the grid
    SIZE: tl.constexpr,
):
    """In every round a program publishes its tile, then waits for everybody's of the same round."""
    dtype: tl.constexpr = like_ptr.dtype.element_ty
    me = tl.program_id(0)
    programs = tl.num_programs(0)
    elements = tl.arange(0, SIZE)
    sources = tl.arange(0, PROGRAMS)
    mask = (sources < programs)[:, None] & (elements >= 0)[None, :]
    wrong = 0
    lost = 0
    for round in range(rounds):
        first = programs.to(tl.int64) * round
        own = tiles_ptr + (first + me) * SIZE + elements
        publish(own, expected(me, round, elements).to(dtype), elements >= 0)
        ptrs = (tiles_ptr + (first + sources)[:, None] * SIZE + elements[None, :],)
        found, lost = receive(ptrs, (mask,), lost, status_ptr, report_ptr, bound.to(tl.int64) * 1000, dtype)
        right = found[0].to(tl.float32) == expected(sources[:, None], round, elements[None, :])
        wrong += tl.sum(tl.where(mask & ~right, 1, 0))
    tl.store(wrong_ptr + me, wrong)


def wrong_elements(
    programs: int, rounds: int, size: int, dtype: torch.dtype, device: torch.device, fill: int = SENTINEL
) -> int:
    """Elements received wrong by all programs over all rounds; RuntimeError where a wait ran out."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    tiles = torch.full((rounds, programs, size), fill, dtype=bits, device=device)
    wrong = torch.full((programs,), -1, dtype=torch.int32, device=device)
    status = Status(device)
    launch = Launch(
        all_to_all, ("rounds", "bound"),
        dict(
            tiles_ptr=tiles, like_ptr=torch.empty(1, dtype=dtype, device=device), wrong_ptr=wrong,
            status_ptr=status.word, report_ptr=status.report,
            PROGRAMS=triton.next_power_of_2(programs), SIZE=size,
        ),
        num_warps=4, num_stages=1, cooperative=True,
    )  # fmt: skip
    launch((programs, 1, 1), (rounds, int(1e6 * wait_seconds())))
    found = int(wrong.sum())  # waits for the device
    status.check()
    assert (wrong >= 0).all(), "a program did not run to its end"
    return found
