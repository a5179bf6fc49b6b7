"""The tests of backend `sequence` can fail: kernels with one mistake each, and each is found by a comparison that
tests/test_sequence.py or, under the scheduler, tests/test_exchange.py makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from tritongru.launch.concurrent import ConcurrencyError, concurrent

import tritongru
from tests.kit.fences import fences, poisoned
from tests.kit.mutants import mutant
from tests.kit.plans import ShrunkenPlan, exchanging
from tests.kit.rule import assert_not_wrong
from tests.test_exchange import SHORT, SHORT_SECONDS, Call, Drawn, assert_not_finite_as_nn_gru, put
from tritongru.inspection.check import Case
from tritongru.launch import runtime, sequence

pytestmark = pytest.mark.interpreted

DENSE = Case(T=2, B=3, I=5, H=18)
BIDIRECTIONAL = replace(DENSE, bidirectional=True)
NO_BIAS = replace(DENSE, bias=False)
PACKED = Case(I=5, H=18, bidirectional=True, lengths=(3, 1, 2))

FORWARD = {
    "products of r and z swapped": ("a_r = add_product(zeros, left, w_r,", "a_r = add_product(zeros, left, w_z,"),
    "product of z dropped": ("a_z = add_product(zeros, left, w_z, 0, PRECISION)", "a_z = zeros"),
    "product of n dropped": ("q = add_product(zeros, left, w_n, 0, PRECISION)", "q = zeros"),
    "x_proj of r dropped": ("a_r += x_r.to(tl.float32) + b_hr", "a_r += b_hr"),
    "x_proj of z dropped": ("a_z += x_z.to(tl.float32) + b_hz", "a_z += b_hz"),
    "x_proj of n dropped": ("x_n.to(tl.float32), q, h)", "0.0 * x_n.to(tl.float32), q, h)"),
    "x_proj of the first step for all": (
        "rzn_ptrs, x_r, x_z, x_n = next_ptrs, next_x_r, next_x_z, next_x_n",
        "rzn_ptrs = next_ptrs",
    ),
    "b_hr dropped": ("x_r.to(tl.float32) + b_hr", "x_r.to(tl.float32)"),
    "b_hz dropped": ("x_z.to(tl.float32) + b_hz", "x_z.to(tl.float32)"),
    "b_hn dropped": ("        q += b_hn\n", ""),
    "b_hn inside the input part": ("        q += b_hn\n", "        x_n = x_n.to(tl.float32) + b_hn\n"),
    "a gate's weights for all": ("(gate * U + offs_u).to(tl.int64) * K", "offs_u.to(tl.int64) * K"),
    "h_0 never read": (
        "h = tl.load(h_0_ptr + row_state[:, None] * P + offs_u[None, :], mask=mask, other=0.0).to(tl.float32)",
        "h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)",
    ),
    "h not handed on": ("h = tl.where(mask, h_new, h)", "h = h"),
    "gates not saved": ("save = mask & (save_gates != 0)", "save = mask & (save_gates == 0)"),
    "r saved as z": ("tl.store(rzn_ptrs + H, z.to(dtype),", "tl.store(rzn_ptrs + H, r.to(dtype),"),
    "z saved as r": ("tl.store(rzn_ptrs, r.to(dtype), mask=save)", "tl.store(rzn_ptrs, z.to(dtype), mask=save)"),
    "n not saved": ("        tl.store(rzn_ptrs + 2 * H, n.to(dtype), mask=save)\n", ""),
    "q not saved": ("q.to(dtype), mask=save)", "q.to(dtype), mask=save & (H == 0))"),
    "gates saved a step late": (
        "        save = mask & (save_gates != 0)\n",
        "        save = mask & (save_gates != 0)\n        rzn_ptrs = next_ptrs\n",
    ),
    "units' mask one short": ("u_mask = offs_u < H\n", "u_mask = offs_u < H - 1\n"),
}  # fmt: skip
BACKWARD = {
    "dh * z dropped": ("acc + dh_z, 0.0)", "acc, 0.0)"),
    "dh without z": ("dh_z = dh * z", "dh_z = dh"),
    "products dropped": ("acc + dh_z, 0.0)", "dh_z, 0.0)"),
    "dr W_hr dropped": ("(dr, dz, dq), w,", "(0.0 * dr, dz, dq), w,"),
    "dz W_hz dropped": ("(dr, dz, dq), w,", "(dr, 0.0 * dz, dq), w,"),
    "dq W_hn dropped": ("(dr, dz, dq), w,", "(dr, dz, 0.0 * dq), w,"),
    "dr and dz swapped": ("(dr, dz, dq), w,", "(dz, dr, dq), w,"),
    "dy dropped": ("dh = dh_prev + dy.to(tl.float32) +", "dh = dh_prev +"),
    "dh_n dropped": (" + dh_n.to(tl.float32)", ""),
    "dh_n at every visit": ("dh_n_mask = mask & ~in_src[:, None]", "dh_n_mask = mask"),
    "h_prev of the wrong step": ("row_before = (at_before * stride_row", "row_before = (at * stride_row"),
    "h_0 never read": ("tl.where(carries[:, None], h, h_0)\n", "h\n"),
    "gates of the last step for all": (
        "dy, r, z, n, q, h_prev = next_dy, next_r, next_z, next_n, next_q, next_h_prev",
        "dy, q, h_prev = next_dy, next_q, next_h_prev",
    ),
    "dy of the last step for all": (
        "dy, r, z, n, q, h_prev = next_dy, next_r, next_z, next_n, next_q, next_h_prev",
        "r, z, n, q, h_prev = next_r, next_z, next_n, next_q, next_h_prev",
    ),
    "dn stored as dq": ("publish(own, dn.to", "publish(own, d_q.to"),
    "dr stored as dz": ("publish(own + P, dr,", "publish(own + P, dz,"),
    "dz stored as dr": ("publish(own + 2 * P, dz,", "publish(own + 2 * P, dr,"),
    "dq stored as dn": ("publish(own + 3 * P, dq,", "publish(own + 3 * P, dn.to(dtype),"),
    "dh_0 of rows that go on": ("ends = mask_src & ~here[:, None]", "ends = mask_src & here[:, None]"),
    "a padding column too many": ("(offs_u < P)[None, :]", "(offs_u < P + 1)[None, :]"),
    "dh_0 not made": ("range((T + want_dh_0) * tiles)", "range(T * tiles)"),
}  # fmt: skip
DIRECTIONS = {
    "x_proj of the other direction": ("offs_b * stride_b) * D + direction", "offs_b * stride_b) * D"),
    "biases of the other direction": ("    b_ptr = of_direction(direction, b_ptr, b_reverse_ptr)\n", ""),
    "weights of the other direction": ("    w_ptr = of_direction(direction, w_ptr, w_reverse_ptr)\n", ""),
    "dy of the other direction": (" + direction * H * stride_dy_h)", ")"),
    "h_prev of the other direction": (
        "row_before = (at_before * stride_row + offs_b) * D + direction",
        "row_before = (at_before * stride_row + offs_b) * D",
    ),
    "q of the other direction": (
        "q = tl.load(q_ptr + row[:, None]", "q = tl.load(q_ptr + (row - direction)[:, None]",
    ),
    "dgates of the other direction": ("e_ptr += direction * size_rows * (4 * P)", "e_ptr += 0"),
}  # fmt: skip
VISITS = {  # which rows run, and when they start and end
    "h_n of the last visit": ("h = tl.where(mask, h_new, h)", "h = h_new"),
    "dh_n at the last visit alone": ("dh_n_mask = mask & ~in_src[:, None]", "dh_n_mask = mask & (visit == 0)"),
    "h_0 at the first visit alone": (
        "mask=mask & ~carries[:, None], other=0.0)\n    return", "mask=mask & (at_before == 0), other=0.0)\n    return",
    ),
    "visits out of order": ("visited(T - 3 - visit,", "visited(T - 2 - visit,"),
    "dh_0 at the last visit alone": ("ends = mask_src & ~here[:, None]", "ends = mask_src & (visit == T)"),
}  # fmt: skip
ROWS = {
    "every row carries": ("here & (offs_b < rows_neighbour)", "here"),
    "no row carries": ("here & (offs_b < rows_neighbour)", "here & (offs_b < 0)"),
    "a row too few": ("here = offs_b < rows", "here = offs_b < rows - 1"),
    "directions swapped": ("tl.where(direction == 0, forward, reverse)", "tl.where(direction == 1, forward, reverse)"),
    "time not turned round": ("t = tl.where(direction == 0, visit, T - 1 - visit)", "t = visit"),
}
MUTANTS = [
    pytest.param(file, old, new, case, id=f"{file}: {part}{name}")
    for file, part, found, case in (
        ("sequence.py", "forward, ", FORWARD, DENSE),
        ("sequence.py", "backward, ", BACKWARD, DENSE),
        ("sequence.py", "", DIRECTIONS, BIDIRECTIONAL),
        ("sequence.py", "", VISITS, PACKED),
        ("rows.py", "", ROWS, PACKED),
        ("sequence.py", "", {"a bias where there is none": ("u_mask & (has_bias != 0)", "u_mask")}, NO_BIAS),
    )
    for name, (old, new) in found.items()
]


@pytest.mark.parametrize("case", [BIDIRECTIONAL, NO_BIAS, PACKED], ids=lambda case: case.name)
def test_the_kernels_as_they_are_survive(case: Case) -> None:
    assert_not_wrong(case, "sequence")


@pytest.mark.parametrize(("file", "old", "new", "case"), MUTANTS)
def test_mutant_is_killed(file: str, old: str, new: str, case: Case, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sequence, "kernels", mutant(tmp_path, file, old, new, module="sequence"))
    with pytest.raises(AssertionError, match="error="), fences(monkeypatch):  # memory nobody wrote is NaN
        assert_not_wrong(case, "sequence")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        pytest.param("rows.py", "here = offs_b < rows", "here = offs_b <= rows", id="a row too many"),
        pytest.param("sequence.py", "u_mask = offs_u < H\n", "u_mask = offs_u < H + 1\n", id="a unit too many"),
        pytest.param(
            "sequence.py",
            "own_mask = here[:, None] & (offs_u < P)[None, :]",
            "own_mask = mask",
            id="padding columns not written",
        ),
        pytest.param(
            "sequence.py",
            "(offs_b < B)[:, None] & u_mask",
            "(offs_b <= B)[:, None] & u_mask",
            id="h_n of a row too many",
        ),
    ],
)
def test_a_wrong_mask_is_killed(file: str, old: str, new: str, tmp_path, monkeypatch) -> None:
    """By the fences, or by the poison beyond every tensor and in memory that nobody wrote."""
    monkeypatch.setattr(sequence, "kernels", mutant(tmp_path, file, old, new, module="sequence"))
    torch.manual_seed(0)
    layer = tritongru.GRU(5, 9, bidirectional=True, backend="sequence")  # rows narrower than a fence
    for p in layer.parameters():
        p.data = poisoned(p.data)
    x = pack_padded_sequence(torch.randn(3, 3, 5), torch.tensor([3, 1, 2]), enforce_sorted=False)
    leaf = poisoned(x.data).requires_grad_()
    with pytest.raises(AssertionError), fences(monkeypatch):
        output, h_n = layer(x._replace(data=leaf), poisoned(torch.randn(2, 3, 9)))
        (output.data.square().sum() + h_n.square().sum()).backward()
        found = [output.data, h_n, leaf.grad, *(p.grad for p in layer.parameters())]
        assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize(
    ("plan", "T", "old", "new"),
    [
        (None, 90, "h = tl.where(mask, h_new, h)", "h = tl.where(mask, y.to(tl.float32), h)"),
        (
            ShrunkenPlan(block_h=16, block_k=16),
            90,
            "tl.store(state_ptrs, h_new, mask=mask)",
            "tl.store(state_ptrs, y.to(tl.float32), mask=mask)",
        ),
    ],
    ids=["one-program", "exchanging"],
)
def test_half_precision_keeps_its_state_in_float32(
    plan: ShrunkenPlan | None, T: int, old: str, new: str, tmp_path, monkeypatch
) -> None:
    """Where z is near 1 a step changes h by less than bfloat16 can hold, and a rounded state would stand still."""
    torch.manual_seed(0)
    layer = tritongru.GRU(3, 16, dtype=torch.bfloat16, backend="sequence")
    with torch.no_grad():
        layer.bias_hh_l0[16:32] += 7.0
    x = torch.randn(T, 2, 3, dtype=torch.bfloat16) + 1
    truth = torch.nn.GRU(3, 16, dtype=torch.float64)
    truth.load_state_dict(layer.state_dict())

    def error() -> float:
        with torch.no_grad():
            found, true = layer(x)[0], truth(x.double())[0]
        return ((found.double() - true).norm() / true.norm()).item()

    with contextlib.ExitStack() as stack:
        if plan is not None:
            stack.enter_context(exchanging(monkeypatch, plan))
            stack.enter_context(concurrent(0))
        kept = error()
        monkeypatch.setattr(sequence, "kernels", mutant(tmp_path, "sequence.py", old, new, module="sequence"))
        assert error() > 4 * kept


# ---- programs that exchange, under the scheduler ---------------------------------------------------------------------

THREE_PROGRAMS = (ShrunkenPlan(), Case(T=2, B=2, I=4, H=20))
WIDE_SLICES = (ShrunkenPlan(block_h=16), Case(T=2, B=3, I=4, H=20))
TWO_TILES = (ShrunkenPlan(), Case(T=2, B=17, I=4, H=16))
TWO_GROUPS = (ShrunkenPlan(groups=2), Case(T=2, B=17, I=4, H=16))
TWO_CHUNKS = (ShrunkenPlan(block_h=16, block_k=16, num_k=2, wait="chunk"), Case(T=2, B=3, I=4, H=20))
CHUNKS_TOGETHER = (replace(TWO_CHUNKS[0], wait="all"), TWO_CHUNKS[1])
PACKED_BOTH = (ShrunkenPlan(), Case(I=4, H=16, bidirectional=True, lengths=(1, 3, 2)))
PACKED_TWO_TILES = (ShrunkenPlan(), Case(I=4, H=16, lengths=(3,) * 2 + (2,) * 16))

# What is broken, how, by which plan and call it is found, and as what: "wrong" values, a "time-out" of the kernel's
# own, or by the "scheduler" (an access out of bounds, a deadlock).
WAITS = {
    "a wait on the wrong step": (
        "e_rows = e_ptr + ((at_before * stride_row", "e_rows = e_ptr + ((at * stride_row", THREE_PROGRAMS, "time-out",
    ),
    "a wait on the wrong step in backward": (
        "e_rows = e_ptr + (at_src * stride_row", "e_rows = e_ptr + (at * stride_row", THREE_PROGRAMS, "time-out",
    ),
    "a reverse row awaited before it starts": (
        "chunk_of(e_rows, carries, P,", "chunk_of(e_rows, here, P,", PACKED_BOTH, "time-out",
    ),
    "a row awaited before its way back starts": (
        "e_rows + (1 + i // NUM_K) * P, in_src, P,", "e_rows + (1 + i // NUM_K) * P, here, P,", PACKED_BOTH, "time-out",
    ),
    "rows of this visit taken for those before": (
        "here, carries = running(offs_b, rows, rows_before)\n        mask",
        "here, carries = running(offs_b, rows, rows)\n        mask", PACKED_BOTH, "time-out",
    ),
    "rows of this visit taken for those of src": (
        "in_src = offs_b < rows_src", "in_src = offs_b < rows", PACKED_BOTH, "time-out",
    ),
    "a wait on the other direction": (
        "e_rows = e_ptr + ((at_before * stride_row + offs_b) * D + direction) * P",
        "e_rows = e_ptr + ((at_before * stride_row + offs_b) * D + 1 - direction) * P", PACKED_BOTH, "time-out",
    ),
    "the next tile's step awaited": (
        "at_before = tl.where(next_tile == 0, at, at_before)", "at_before = at", TWO_TILES, "time-out",
    ),
    "the next tile's step awaited in backward": (
        "at_src = tl.where(next_tile == 0, at, at_src)", "at_src = at", TWO_TILES, "time-out",
    ),
    "the next tile's rows awaited": (
        "rows_before = tl.where(next_tile == 0, rows, rows_before)", "rows_before = rows", TWO_TILES, "time-out",
    ),
    "the next tile's rows awaited in backward": (
        "rows_src = tl.where(next_tile == 0, rows, rows_src)", "rows_src = rows", TWO_TILES, "time-out",
    ),
}  # fmt: skip
PUBLISHED = {
    "padding columns not published": (
        "publish(e_ptrs, padded, here[:, None] & (offs_u < P)[None, :])", "publish(e_ptrs, padded, mask)",
        THREE_PROGRAMS, "time-out",
    ),
    "padding columns not published in backward": (
        "own_mask = here[:, None] & (offs_u < P)[None, :]", "own_mask = mask", THREE_PROGRAMS, "time-out",
    ),
    "a padding column too many": ("(offs_u < P)[None, :]", "(offs_u < P + 1)[None, :]", WIDE_SLICES, "scheduler"),
    "a row published too few": (
        "publish(e_ptrs, padded, here[:, None]", "publish(e_ptrs, padded, (offs_b < rows - 1)[:, None]",
        THREE_PROGRAMS, "time-out",
    ),
    "published twice": (
        "            publish(e_ptrs, padded, here",
        "            publish(e_ptrs, (0.5 * padded).to(dtype), here[:, None] & (offs_u < P)[None, :])\n"
        "            publish(e_ptrs, padded, here", THREE_PROGRAMS, "wrong",
    ),
    "output not written beside an own buffer": (
        "y_mask = mask & (own_exchange != 0)", "y_mask = mask & (own_exchange == 0)", THREE_PROGRAMS, "wrong",
    ),
}  # fmt: skip
TILES = {
    "a stale row tile": (
        "e_rows = e_ptr + ((at_before * stride_row + offs_b)",
        "e_rows = e_ptr + ((at_before * stride_row + rows_of_tile(first_row, 0, BLOCK_B))", TWO_TILES, "wrong",
    ),
    "a stale row tile in backward": (
        "e_rows = e_ptr + (at_src * stride_row + offs_b)",
        "e_rows = e_ptr + (at_src * stride_row + rows_of_tile(first_row, 0, BLOCK_B))", TWO_TILES, "wrong",
    ),
    "state of the first tile": (
        "state_ptrs = state_ptr + row_state[:, None] * H",
        "state_ptrs = state_ptr + (row_state - tile * BLOCK_B)[:, None] * H", TWO_TILES, "wrong",
    ),
    "x_proj of the first tile": (
        "next_b = rows_of_tile(first_row, next_tile, BLOCK_B)\n        next_mask",
        "next_b = rows_of_tile(first_row, 0, BLOCK_B)\n        next_mask", TWO_TILES, "wrong",
    ),
    "gates of the first tile": (
        "next_b = rows_of_tile(first_row, next_tile, BLOCK_B)\n        next_dy",
        "next_b = rows_of_tile(first_row, 0, BLOCK_B)\n        next_dy", TWO_TILES, "wrong",
    ),
    "rows of the visit after": (
        "next_rows = tl.where(next_tile == 0, rows_after, rows)", "next_rows = rows_after", PACKED_TWO_TILES, "wrong",
    ),
    "h_n of the first tile": (
        "for each in range(tiles):\n            offs_b = rows_of_tile(first_row, each, BLOCK_B)\n            offs =",
        "for each in range(1):\n            offs_b = rows_of_tile(first_row, each, BLOCK_B)\n            offs =",
        TWO_TILES, "wrong",
    ),
    "h_0 of the first tile": (
        "for each in range(tiles):\n            offs_b = rows_of_tile(first_row, each, BLOCK_B)\n            row_state",
        "for each in range(1):\n            offs_b = rows_of_tile(first_row, each, BLOCK_B)\n            row_state",
        TWO_TILES, "wrong",
    ),
    "the first group's rows for all": (
        "first_row = tl.program_id(1) * tiles * BLOCK_B", "first_row = 0", TWO_GROUPS, "wrong",
    ),
    "groups that overlap": (
        "first_row = tl.program_id(1) * tiles * BLOCK_B", "first_row = tl.program_id(1) * BLOCK_B",
        (ShrunkenPlan(groups=2), Case(T=2, B=49, I=4, H=16)), "wrong",
    ),
    "the first direction in both launches": (
        "direction = (first_direction + tl.program_id(2))", "direction = tl.program_id(2)",
        (ShrunkenPlan(together=False), Case(T=2, B=2, I=4, H=16, bidirectional=True)), "wrong",
    ),
}  # fmt: skip
STARTS = {
    "h_0 not taken": ("if some_start:", "if some_start & (T < 0):", THREE_PROGRAMS, "wrong"),
    "h_0 at the first visit alone": ("if some_start:", "if some_start & (visit == 0):", PACKED_BOTH, "wrong"),
    "h_0 in every row of a tile where one starts": (
        "with_starting_rows(left, h_0_rows, starts, P,", "with_starting_rows(left, h_0_rows, here, P,",
        PACKED_BOTH, "wrong",
    ),
    "starts in the first tile alone": (
        "(rows_before < first + BLOCK_B) &", "(rows_before < BLOCK_B) &",
        (ShrunkenPlan(), Case(I=4, H=16, bidirectional=True, lengths=(2,) * 17 + (1,))), "wrong",
    ),
    "h_0 of the first chunk": (
        "chunk_of(h_0_rows, starts, size, first_chunk + i,", "chunk_of(h_0_rows, starts, size, i,", TWO_CHUNKS, "wrong",
    ),
}  # fmt: skip
PRODUCTS = {
    "products of r and z swapped": (
        "a_r = add_product(a_r, left, w_r,", "a_r = add_product(a_r, left, w_z,", THREE_PROGRAMS, "wrong",
    ),
    "product of z dropped": ("a_z = add_product(a_z, left,", "a_z = add_product(a_z, (),", THREE_PROGRAMS, "wrong"),
    "product of n dropped": ("q = add_product(q, left,", "q = add_product(q, (),", THREE_PROGRAMS, "wrong"),
    "weights of the first chunk": ("weights[FIRST + i]", "weights[i]", TWO_CHUNKS, "wrong"),
    "dgates of the first chunk": ("in_src, P, i % NUM_K,", "in_src, P, 0,", TWO_CHUNKS, "wrong"),
    "dn, dr, dz for dr, dz, dq": ("(1 + i // NUM_K) * P", "(i // NUM_K) * P", THREE_PROGRAMS, "wrong"),
    "a part of the sum dropped": ("    return a + b\n", "    return a\n", THREE_PROGRAMS, "wrong"),
    "sums of r and z swapped": ("a_r, a_z = tl.split(a_rz)", "a_z, a_r = tl.split(a_rz)", THREE_PROGRAMS, "wrong"),
    "h not handed on": (
        "tl.store(state_ptrs, h_new, mask=mask)", "tl.store(state_ptrs, h, mask=mask)", THREE_PROGRAMS, "wrong",
    ),
    "dh without z": (
        "tl.store(state_ptrs, dh * z, mask=mask)", "tl.store(state_ptrs, dh, mask=mask)", THREE_PROGRAMS, "wrong",
    ),
}  # fmt: skip
RECEIVE = {
    "no wait": ("while (missing != 0) & (lost == 0):", "while (missing > 1) & (lost == 0):", THREE_PROGRAMS, "wrong"),
    "a wait for one poll": (
        "while (missing != 0) & (lost == 0):", "while (missing != 0) & (polls < 1):", THREE_PROGRAMS, "wrong",
    ),
    "a wait for the first chunk alone": (
        "largest = tl.maximum(largest, as_unsigned(found[i]))", "largest = largest", CHUNKS_TOGETHER, "wrong",
    ),
    "a sentinel taken for the least": (
        "return bits.to(tl.uint32, bitcast=True)", "return bits.to(tl.int32, bitcast=True)", THREE_PROGRAMS, "wrong",
    ),
    "the first load kept": (
        "        found = load_all(ptrs, masks)\n        missing = any_missing(found)\n        polls",
        "        missing = any_missing(load_all(ptrs, masks))\n        polls", THREE_PROGRAMS, "wrong",
    ),
}  # fmt: skip
EXCHANGING = [
    pytest.param(file, *rest, id=f"{part}: {name}")
    for part, file, found in (
        ("waits", "sequence.py", WAITS),
        ("published", "sequence.py", PUBLISHED),
        ("tiles", "sequence.py", TILES),
        ("starts", "sequence.py", STARTS),
        ("products", "sequence.py", PRODUCTS),
        ("receive", "exchange.py", RECEIVE),
    )
    for name, rest in found.items()
]


def outcome(plan: ShrunkenPlan, case: Case, monkeypatch, seeds: int = 3) -> str:
    """How a call is found wrong under one of the seeds, or "survived"."""
    for seed in range(seeds):
        found = "survived"
        try:
            with (
                exchanging(monkeypatch, plan),
                concurrent(seed, **SHORT),
                fences(monkeypatch),  # memory that nobody wrote is NaN, and not the sentinel
            ):
                assert_not_wrong(case, "sequence")
        except AssertionError:
            found = "wrong"
        except ConcurrencyError:
            found = "scheduler"
        except RuntimeError as error:
            assert "TRITONGRU_WAIT_SECONDS" in str(error)
            found = "time-out"
        try:
            sequence.check_all()
        except RuntimeError:
            found = "time-out"
        if found != "survived":
            return found
    return "survived"


@pytest.fixture
def short_waits(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", SHORT_SECONDS)
    yield
    with contextlib.suppress(RuntimeError):
        sequence.check_all()


@pytest.mark.parametrize(("plan", "case"), [(*THREE_PROGRAMS,), (*PACKED_BOTH,)])
def test_exchanging_kernels_as_they_are_survive(plan: ShrunkenPlan, case: Case, short_waits, monkeypatch) -> None:
    """With waits as short as the mutants have."""
    assert outcome(plan, case, monkeypatch, seeds=1) == "survived"


@pytest.mark.parametrize(("file", "old", "new", "call", "how"), EXCHANGING)
def test_exchanging_mutant_is_killed(
    file: str, old: str, new: str, call: tuple[ShrunkenPlan, Case], how: str, short_waits, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(sequence, "kernels", mutant(tmp_path, file, old, new, module="sequence"))
    assert outcome(*call, monkeypatch) == how


def test_no_fill_is_killed(short_waits, monkeypatch) -> None:
    bits = sequence._bits
    monkeypatch.setattr(sequence, "_bits", lambda buffer, fill: bits(buffer, fill=False))
    assert outcome(*THREE_PROGRAMS, monkeypatch) == "wrong"


@pytest.fixture
def a_program_is_missing(monkeypatch) -> None:
    launch = runtime.Launch.__call__
    monkeypatch.setattr(
        runtime.Launch, "__call__", lambda self, grid, scalars: launch(self, (grid[0] - 1, *grid[1:]), scalars)
    )


def test_a_missing_program_is_killed(a_program_is_missing, short_waits, monkeypatch) -> None:
    assert outcome(*THREE_PROGRAMS, monkeypatch) == "time-out"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("late = ((now > deadline) |", "late = ((now < 0) |"),
        ("deadline = tl.where(polls == POLLS_PER_LOOK, now + bound, deadline)", "deadline = now + bound"),
    ],
    ids=["never", "put off at every look"],
)
def test_a_wait_without_end_is_killed(
    old: str, new: str, a_program_is_missing, short_waits, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(sequence, "kernels", mutant(tmp_path, "exchange.py", old, new, module="sequence"))
    monkeypatch.setitem(SHORT, "max_steps", 2000)
    assert outcome(*THREE_PROGRAMS, monkeypatch) == "scheduler"


def test_a_sentinel_that_is_published_is_killed(short_waits, tmp_path, monkeypatch) -> None:
    """By test_exchange.py's dy with the sentinel's bits, which arithmetic hands on."""
    drawn = Drawn(Call(*THREE_PROGRAMS, torch.float32))
    put(drawn, "dy", None)
    old = "bits = tl.where(bits == -1, quiet_nan, bits)"
    monkeypatch.setattr(sequence, "kernels", mutant(tmp_path, "exchange.py", old, "bits = bits", module="sequence"))
    with exchanging(monkeypatch, drawn.call.plan):
        drawn.of_ours(0, **SHORT)
    with pytest.raises(RuntimeError, match="TRITONGRU_WAIT_SECONDS"):
        sequence.check_all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_padding_that_is_not_zero_is_killed(short_waits, tmp_path, monkeypatch) -> None:
    """By test_exchange.py's infinite unit: times the zeros of padded weights it is a NaN in the padding."""
    drawn = Drawn(Call(*THREE_PROGRAMS, torch.float32))
    put(drawn, "h_0", float("inf"))
    with torch.no_grad():
        drawn.ours.weight_hh_l0[:, 2].abs_()
    old = "padded = tl.where(u_mask[None, :], y, 0.0).to(dtype)"
    monkeypatch.setattr(sequence, "kernels", mutant(tmp_path, "sequence.py", old, "padded = y", module="sequence"))
    with pytest.raises(AssertionError, match="not finite elsewhere"):
        assert_not_finite_as_nn_gru(drawn, monkeypatch)
