"""One launch per sequence, as kernels/sequence.py has it, with one thing or another done differently.

    BARRIER    programs count themselves in after storing their slices of h_t, and load h_t once all have arrived;
               otherwise the data is its own flag (kernels/exchange.py)
    SPLIT      into how many parts the product's K is cut, one per warp; 1: each warp multiplies over all of K
    STACKED    the three gates' weights are one factor with the units as its rows, and the batch as its columns

The equations are kernels/sequence.py's forward. What is left out is the same in every form: one direction, a dense
batch, H a multiple of 8, all of K in one chunk, one row tile for each program; gates are not saved.

The counter barrier. One counter for each timestep and group, zero beforehand, so that none is ever reset.
1. Every thread stores its elements of h_t; behind a barrier of the program one thread adds 1, a release at GPU scope.
   The barrier puts all the program's stores before the release.
2. One thread of each program adds 0, an acquire, until it finds all; the others learn of it through shared memory, and
   a barrier keeps their loads behind. So the loads, weak ones, see what every program has stored.
A wait is bounded as in exchange.py. One thread alone makes an atomic and hands its answer to all: no vote is needed.
"""

import triton
import triton.language as tl

from ..gates import gru_gates
from ..step import operand
from .exchange import POLLS_PER_LOOK, publish, receive

SCALARS = ("T", "B", "vectors", "bound")
VECTOR = tl.constexpr(8)  # elements that a row of the exchange buffer is padded to: 16 bytes in half precision


@triton.jit
def sum_of_parts(x, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    """[SPLIT, ...] of SIZE elements each, SPLIT 4 or 8: their sum, flat [SIZE], added by halves in a fixed order."""
    x = tl.permute(tl.reshape(x, (SPLIT, SIZE)), (1, 0))
    if SPLIT == 8:
        a, b = tl.split(tl.reshape(x, (SIZE, 4, 2)))
        x = a + b
    a, b = tl.split(tl.reshape(x, (SIZE, 2, 2)))
    a, b = tl.split(a + b)
    return a + b


@triton.jit
def parts_of_k(BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """Which k each place of a chunk holds: [BLOCK_K], or [SPLIT, BLOCK_K / SPLIT]."""
    if SPLIT == 1:
        return tl.arange(0, BLOCK_K)
    else:
        part: tl.constexpr = BLOCK_K // SPLIT
        return tl.arange(0, SPLIT)[:, None] * part + tl.arange(0, part)[None, :]


@triton.jit
def load_slice(
    w_ptr,  # [3, U, K]
    gate,
    U,
    offs_u,
    NUM_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This program's slice of one gate's weights, a tuple of chunks [(SPLIT,) K, units]: what stays on chip."""
    K: tl.constexpr = NUM_K * BLOCK_K
    k = parts_of_k(BLOCK_K, SPLIT)
    rows = w_ptr + (gate * U + offs_u).to(tl.int64) * K
    found = ()
    for c in tl.static_range(NUM_K):
        if SPLIT == 1:
            ptrs = rows[None, :] + (c * BLOCK_K + k)[:, None]
        else:
            ptrs = rows[None, None, :] + (c * BLOCK_K + k)[:, :, None]
        found = found + (operand(tl.load(ptrs), PRECISION),)
    return found


@triton.jit
def chunk_of(row_ptrs, row_mask, size, chunk, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """Pointers and mask of one chunk [SPLIT, BLOCK_B, BLOCK_K / SPLIT] of rows of `size` elements each."""
    offs_k = (chunk * BLOCK_K + parts_of_k(BLOCK_K, SPLIT))[:, None, :]
    return row_ptrs[None, :, None] + offs_k, row_mask[None, :, None] & (offs_k < size)


@triton.jit
def load_three(ptrs, mask, H):
    """A tile of each of the three gates of rzn, in the storage dtype."""
    r = tl.load(ptrs, mask=mask, other=0.0)
    z = tl.load(ptrs + H, mask=mask, other=0.0)
    n = tl.load(ptrs + 2 * H, mask=mask, other=0.0)
    return r, z, n


@triton.jit
def arrive(counter_ptr):
    """Count this program in: all that its threads have stored is there for whoever meets it."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def meet(counter_ptr, programs, lost, status_ptr, report_ptr, bound):
    """Wait until `programs` have arrived: whether a wait was given up (this one, or before: `lost`)."""
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
    polls = 0
    deadline = tl.zeros((), tl.int64)
    while (arrived < programs) & (lost == 0):
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
        polls += 1
        if polls % POLLS_PER_LOOK == 0:
            now = tl.extra.cuda.globaltimer()
            deadline = tl.where(polls == POLLS_PER_LOOK, now + bound, deadline)
            late = (now > deadline) & (arrived < programs)
            lost = tl.atomic_max(status_ptr, late.to(tl.int32))  # what it was before: the next look gives up
    if (arrived < programs) & (lost != 0):
        tl.store(report_ptr, 1)
    tl.debug_barrier()
    return lost


@triton.jit
def whole_rows(row_ptrs, row_mask, H, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """Pointers and mask of rows of H elements: [BLOCK_B, BLOCK_K], or [SPLIT, BLOCK_B, BLOCK_K / SPLIT]."""
    if SPLIT == 1:
        offs_k = tl.arange(0, BLOCK_K)[None, :]
        return row_ptrs[:, None] + offs_k, row_mask[:, None] & (offs_k < H)
    else:
        return chunk_of(row_ptrs, row_mask, H, 0, BLOCK_K, SPLIT)


@triton.jit
def load_weights(
    w_ptr,  # [3, U, K]
    U,
    first_u,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What stays on chip: r, z, n, each as load_slice has it, or one factor [4 BLOCK_H, K], a quarter of it zero."""
    if STACKED:
        offs = tl.arange(0, 4 * BLOCK_H)
        gate = offs // BLOCK_H
        ptrs = w_ptr + (gate * U + first_u + offs % BLOCK_H).to(tl.int64)[:, None] * BLOCK_K
        w = tl.load(ptrs + tl.arange(0, BLOCK_K)[None, :], mask=(gate < 3)[:, None], other=0.0)
        return (operand(w, PRECISION),)
    else:
        offs_u = first_u + tl.arange(0, BLOCK_H)
        w_r = load_slice(w_ptr, 0, U, offs_u, 1, BLOCK_K, SPLIT, PRECISION)
        w_z = load_slice(w_ptr, 1, U, offs_u, 1, BLOCK_K, SPLIT, PRECISION)
        w_n = load_slice(w_ptr, 2, U, offs_u, 1, BLOCK_K, SPLIT, PRECISION)
        return w_r + w_z + w_n


@triton.jit
def products(
    h_prev,
    w,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
    STACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h_prev W_hr^T, h_prev W_hz^T, h_prev W_hn^T, each [BLOCK_B, BLOCK_H]."""
    h_prev = operand(h_prev, PRECISION)
    if STACKED:
        stack = tl.dot(w[0], tl.trans(h_prev), input_precision=PRECISION)
        by_gate = tl.permute(tl.reshape(stack, (2, 2, BLOCK_H, BLOCK_B)), (3, 2, 0, 1))
        r_n, z_empty = tl.split(by_gate)
        a_r, q = tl.split(r_n)
        a_z, _ = tl.split(z_empty)
    else:
        a_r = tl.dot(h_prev, w[0], input_precision=PRECISION)
        a_z = tl.dot(h_prev, w[1], input_precision=PRECISION)
        q = tl.dot(h_prev, w[2], input_precision=PRECISION)
        if SPLIT > 1:
            parts = tl.join(tl.join(a_r, a_z), tl.join(q, q))
            sums = tl.reshape(sum_of_parts(parts, SPLIT, BLOCK_B * BLOCK_H * 4), (BLOCK_B, BLOCK_H, 2, 2))
            a_rz, q_q = tl.split(sums)
            a_r, a_z = tl.split(a_rz)
            q, _ = tl.split(q_q)
    return a_r, a_z, q


@triton.jit(do_not_specialize=SCALARS)
def study_forward(
    T,
    B,
    vectors,  # H in VECTORs
    bound,  # microseconds that a wait may take
    x_ptr,  # [T, B, 3H] x_proj
    y_ptr,  # [T, B, H]; without BARRIER as integers, full of sentinels
    h_0_ptr,  # [B, H]
    w_ptr,  # [3, U, K] W_hh, padded with zeros
    b_ptr,  # [3H] b_hh
    counter_ptr,  # [T, groups] int32, zero; with BARRIER
    status_ptr,
    report_ptr,
    BARRIER: tl.constexpr,
    SPLIT: tl.constexpr,
    STACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    H = vectors * VECTOR
    programs, groups = tl.num_programs(0), tl.num_programs(1)
    bound = bound.to(tl.int64) * 1000
    offs_b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    offs_u = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_mask = offs_b < B
    u_mask = offs_u < H
    mask = row_mask[:, None] & u_mask[None, :]

    w = load_weights(w_ptr, programs * BLOCK_H, tl.program_id(0) * BLOCK_H, BLOCK_H, BLOCK_K, SPLIT, STACKED, PRECISION)
    b_r = tl.load(b_ptr + offs_u, mask=u_mask, other=0.0).to(tl.float32)[None, :]
    b_z = tl.load(b_ptr + H + offs_u, mask=u_mask, other=0.0).to(tl.float32)[None, :]
    b_n = tl.load(b_ptr + 2 * H + offs_u, mask=u_mask, other=0.0).to(tl.float32)[None, :]
    h = tl.load(h_0_ptr + (offs_b * H)[:, None] + offs_u[None, :], mask=mask, other=0.0).to(tl.float32)

    lost = 0
    row = offs_b
    counter_ptr += tl.program_id(1)
    x_r, x_z, x_n = load_three(x_ptr + (row * 3 * H)[:, None] + offs_u[None, :], mask, H)
    for t in range(T):
        # what the next step needs is asked for before this one waits
        next_ptrs = x_ptr + ((row + B) * 3 * H)[:, None] + offs_u[None, :]
        next_x_r, next_x_z, next_x_n = load_three(next_ptrs, mask & (t + 1 < T), H)

        # the whole of h_prev
        ptrs, left_mask = whole_rows(y_ptr + (row - B) * H, row_mask & (t > 0), H, BLOCK_K, SPLIT)
        if BARRIER:
            if t > 0:
                lost = meet(counter_ptr - groups, programs, lost, status_ptr, report_ptr, bound)
            left = tl.load(ptrs, mask=left_mask, other=0.0)
        else:
            received, lost = receive((ptrs,), (left_mask,), lost, status_ptr, report_ptr, bound, dtype)
            left = received[0]
        if t == 0:
            h_0_ptrs, h_0_mask = whole_rows(h_0_ptr + row * H, row_mask, H, BLOCK_K, SPLIT)
            left = tl.load(h_0_ptrs, mask=h_0_mask, other=0.0)

        a_r, a_z, q = products(left, w, BLOCK_B, BLOCK_H, SPLIT, STACKED, PRECISION)
        a_r += x_r.to(tl.float32) + b_r
        a_z += x_z.to(tl.float32) + b_z
        q += b_n
        h, _, _, _ = gru_gates(a_r, a_z, x_n.to(tl.float32), q, h)
        h = tl.where(lost != 0, float("nan"), h)

        y_ptrs = y_ptr + (row * H)[:, None] + offs_u[None, :]
        if BARRIER:
            tl.store(y_ptrs, h.to(dtype), mask=mask)
            arrive(counter_ptr)
        else:
            publish(y_ptrs, h.to(dtype), mask)
        x_r, x_z, x_n = next_x_r, next_x_z, next_x_n
        row += B
        counter_ptr += groups
