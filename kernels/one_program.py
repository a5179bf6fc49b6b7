"""One launch per sequence, each way, where one program holds all of W_h: small layers. Nothing is exchanged.

The equations are kernels/sequence.py's. The grid is (1, row tiles, directions). A program owns all hidden units of its
rows and keeps h (or the gate gradients) from visit to visit. What a visit needs besides the product (x_proj; dy and the
gates) is asked for a visit ahead.
"""

import triton
import triton.language as tl

from . import metadata
from .gates import gru_gate_gradients, gru_gates
from .rows import of_direction, running, visited
from .step import operand

FORWARD_SCALARS = (
    "T", "B", "H", "D", "stride_row", "packed", "stride_rzn_t", "stride_rzn_b", "save_gates", "has_bias",
)  # fmt: skip
BACKWARD_SCALARS = (
    "T", "B", "H", "D", "stride_row", "packed", "stride_rzn_t", "stride_rzn_b", "size_rows", "stride_dy_t",
    "stride_dy_b", "stride_dy_h", "want_dh_0",
)  # fmt: skip
# Read and written in small tiles, where alignment matters little: one compiled kernel serves every layout of them.
ANY_ALIGNMENT = (
    "rzn_ptr", "q_ptr", "y_ptr", "dy_ptr", "dgates_ptr", "h_0_ptr", "dh_n_ptr", "h_n_ptr", "dh_0_ptr", "b_ptr",
    "b_reverse_ptr", "sizes_ptr", "starts_ptr",
)  # fmt: skip


@triton.jit
def load_weights(w_ptr, gate, offs, K: tl.constexpr, PRECISION: tl.constexpr):
    """One gate's weights [K, units], from [3, units, K]: what stays on chip."""
    return operand(tl.load(w_ptr + (gate * K + offs[None, :]) * K + offs[:, None]), PRECISION)


@triton.jit
def product(left, weights, acc, PRECISION: tl.constexpr):
    return tl.dot(operand(left, PRECISION), weights, acc, input_precision=PRECISION)


@triton.jit
def rzn_tile(rzn_ptr, at, offs_b, offs_u, stride_t, stride_b, direction, H, D):
    """Pointers to r of a tile in rzn [T, B, D, 3H], whose strides of T and B are given in rows of D * 3H."""
    row = (at * stride_t + offs_b * stride_b) * D + direction
    return rzn_ptr + row[:, None] * (3 * H) + offs_u[None, :]


@triton.jit
def load_three(ptrs, mask, H):
    """A tile of each of the three gates of rzn, in the storage dtype."""
    r = tl.load(ptrs, mask=mask, other=0.0)
    z = tl.load(ptrs + H, mask=mask, other=0.0)
    n = tl.load(ptrs + 2 * H, mask=mask, other=0.0)
    return r, z, n


@triton.jit(
    do_not_specialize=FORWARD_SCALARS,
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
    launch_metadata=metadata.one_program_forward,
)
def one_program_forward(
    T,
    B,
    H,
    D,
    stride_row,  # rows from one time step to the next in dense rows: B, or 1 in a packed batch, as in kernels/step.py
    packed,
    stride_rzn_t,  # in rows of D * 3H
    stride_rzn_b,
    save_gates,
    has_bias,
    rzn_ptr,  # [T, B, D, 3H] x_proj, which with save_gates r, z, n overwrite
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    h_0_ptr,  # [D, B, H]
    h_n_ptr,  # [D, B, H]
    w_ptr,  # [3, K, K] W_hh, padded with zeros
    w_reverse_ptr,
    b_ptr,  # [3H] b_hh
    b_reverse_ptr,
    sizes_ptr,  # [T] int32: batch_sizes of a packed batch, and the first row of each time step
    starts_ptr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    K: tl.constexpr,  # units of a program, at least H
):
    dtype: tl.constexpr = rzn_ptr.dtype.element_ty
    direction = tl.program_id(2).to(tl.int64)
    w_ptr = of_direction(direction, w_ptr, w_reverse_ptr)
    b_ptr = of_direction(direction, b_ptr, b_reverse_ptr)
    offs_u = tl.arange(0, K)
    u_mask = offs_u < H
    offs_b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)

    w_r = load_weights(w_ptr, 0, offs_u, K, PRECISION)
    w_z = load_weights(w_ptr, 1, offs_u, K, PRECISION)
    w_n = load_weights(w_ptr, 2, offs_u, K, PRECISION)
    b_mask = u_mask & (has_bias != 0)
    b_hr = tl.load(b_ptr + offs_u, mask=b_mask, other=0.0).to(tl.float32)[None, :]
    b_hz = tl.load(b_ptr + H + offs_u, mask=b_mask, other=0.0).to(tl.float32)[None, :]
    b_hn = tl.load(b_ptr + 2 * H + offs_u, mask=b_mask, other=0.0).to(tl.float32)[None, :]

    # the state of every row begins as h_0, and a row that does not run yet keeps it
    state = (direction * B + offs_b)[:, None] * H + offs_u[None, :]
    state_mask = (offs_b < B)[:, None] & u_mask[None, :]
    h = tl.load(h_0_ptr + state, mask=state_mask, other=0.0).to(tl.float32)
    zeros = tl.zeros((BLOCK_B, K), tl.float32)

    at, rows = visited(0, T, B, direction, sizes_ptr, starts_ptr, packed)
    rzn_ptrs = rzn_tile(rzn_ptr, at, offs_b, offs_u, stride_rzn_t, stride_rzn_b, direction, H, D)
    x_r, x_z, x_n = load_three(rzn_ptrs, (offs_b < rows)[:, None] & u_mask[None, :], H)
    for visit in range(T):
        mask = (offs_b < rows)[:, None] & u_mask[None, :]
        next_at, next_rows = visited(visit + 1, T, B, direction, sizes_ptr, starts_ptr, packed)
        next_ptrs = rzn_tile(rzn_ptr, next_at, offs_b, offs_u, stride_rzn_t, stride_rzn_b, direction, H, D)
        next_x_r, next_x_z, next_x_n = load_three(next_ptrs, (offs_b < next_rows)[:, None] & u_mask[None, :], H)

        left = h.to(dtype)
        a_r = product(left, w_r, zeros, PRECISION) + x_r.to(tl.float32) + b_hr
        a_z = product(left, w_z, zeros, PRECISION) + x_z.to(tl.float32) + b_hz
        q = product(left, w_n, zeros, PRECISION) + b_hn
        h_new, r, z, n = gru_gates(a_r, a_z, x_n.to(tl.float32), q, h)
        h = tl.where(mask, h_new, h)

        offs = ((at * stride_row + offs_b) * D + direction)[:, None] * H + offs_u[None, :]
        tl.store(y_ptr + offs, h_new.to(dtype), mask=mask)
        save = mask & (save_gates != 0)
        tl.store(rzn_ptrs, r.to(dtype), mask=save)
        tl.store(rzn_ptrs + H, z.to(dtype), mask=save)
        tl.store(rzn_ptrs + 2 * H, n.to(dtype), mask=save)
        tl.store(q_ptr + offs, q.to(dtype), mask=save)
        rzn_ptrs, x_r, x_z, x_n, at, rows = next_ptrs, next_x_r, next_x_z, next_x_n, next_at, next_rows

    tl.store(h_n_ptr + state, h.to(dtype), mask=state_mask)


@triton.jit
def load_own(
    dy_ptr, rzn_ptr, q_ptr, y_ptr, h_0_ptr, at, at_before, rows, rows_before, offs_b, offs_u, u_mask, direction,
    stride_row, stride_dy_t, stride_dy_b, stride_dy_h, stride_rzn_t, stride_rzn_b, B, H, D,
):  # fmt: skip
    """What a tile's gate gradients are made from besides dh of src, in the storage dtype: dy, r, z, n, q, h_prev."""
    here, carries = running(offs_b, rows, rows_before)
    mask = here[:, None] & u_mask[None, :]
    row = (at * stride_row + offs_b) * D + direction
    row_before = (at_before * stride_row + offs_b) * D + direction
    dy_ptrs = dy_ptr + (at * stride_dy_t + offs_b * stride_dy_b + direction * H * stride_dy_h)[:, None]
    dy = tl.load(dy_ptrs + offs_u[None, :].to(tl.int64) * stride_dy_h, mask=mask, other=0.0)
    rzn_ptrs = rzn_tile(rzn_ptr, at, offs_b, offs_u, stride_rzn_t, stride_rzn_b, direction, H, D)
    r, z, n = load_three(rzn_ptrs, mask, H)
    q = tl.load(q_ptr + row[:, None] * H + offs_u[None, :], mask=mask, other=0.0)
    h = tl.load(y_ptr + row_before[:, None] * H + offs_u[None, :], mask=mask & carries[:, None], other=0.0)
    row_state = direction * B + offs_b
    h_0 = tl.load(h_0_ptr + row_state[:, None] * H + offs_u[None, :], mask=mask & ~carries[:, None], other=0.0)
    return dy, r, z, n, q, tl.where(carries[:, None], h, h_0)


@triton.jit(
    do_not_specialize=BACKWARD_SCALARS,
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
    launch_metadata=metadata.one_program_backward,
)
def one_program_backward(
    T,
    B,
    H,
    D,
    stride_row,
    packed,
    stride_rzn_t,
    stride_rzn_b,
    size_rows,  # rows of one direction in dgates
    stride_dy_t,
    stride_dy_b,
    stride_dy_h,
    want_dh_0,
    dy_ptr,  # [T, B, D, H]
    dh_n_ptr,  # [D, B, H] float32
    rzn_ptr,  # [T, B, D, 3H] r, z, n
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    h_0_ptr,  # [D, B, H]
    dgates_ptr,  # [D, T, B, 4H] dn, dr, dz, dq
    dh_0_ptr,  # [D, B, H] float32
    w_ptr,  # [3, K, K] the transposes of W_hr, W_hz, W_hn, padded with zeros
    w_reverse_ptr,
    sizes_ptr,
    starts_ptr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    K: tl.constexpr,
):
    dtype: tl.constexpr = rzn_ptr.dtype.element_ty
    direction = tl.program_id(2).to(tl.int64)
    w_ptr = of_direction(direction, w_ptr, w_reverse_ptr)
    offs_u = tl.arange(0, K)
    u_mask = offs_u < H
    offs_b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    state = (direction * B + offs_b)[:, None] * H + offs_u[None, :]
    dgates_ptr += direction * size_rows * (4 * H)

    w_r = load_weights(w_ptr, 0, offs_u, K, PRECISION)
    w_z = load_weights(w_ptr, 1, offs_u, K, PRECISION)
    w_n = load_weights(w_ptr, 2, offs_u, K, PRECISION)

    at, rows = visited(T - 1, T, B, direction, sizes_ptr, starts_ptr, packed)
    at_before, rows_before = visited(T - 2, T, B, direction, sizes_ptr, starts_ptr, packed)
    rows_src = 0
    dy, r, z, n, q, h_prev = load_own(
        dy_ptr, rzn_ptr, q_ptr, y_ptr, h_0_ptr, at, at_before, rows, rows_before, offs_b, offs_u, u_mask, direction,
        stride_row, stride_dy_t, stride_dy_b, stride_dy_h, stride_rzn_t, stride_rzn_b, B, H, D,
    )  # fmt: skip
    dr = tl.zeros((BLOCK_B, K), dtype)
    dz = tl.zeros((BLOCK_B, K), dtype)
    dq = tl.zeros((BLOCK_B, K), dtype)
    dh_z = tl.zeros((BLOCK_B, K), tl.float32)
    for visit in range(T + want_dh_0):  # from the last visit of the direction on: this is number T - 1 - visit
        here = offs_b < rows
        in_src = offs_b < rows_src
        mask = here[:, None] & u_mask[None, :]
        mask_src = in_src[:, None] & u_mask[None, :]
        at_next, rows_next = visited(T - 3 - visit, T, B, direction, sizes_ptr, starts_ptr, packed)
        next_dy, next_r, next_z, next_n, next_q, next_h_prev = load_own(
            dy_ptr, rzn_ptr, q_ptr, y_ptr, h_0_ptr, at_before, at_next, rows_before, rows_next, offs_b, offs_u, u_mask,
            direction, stride_row, stride_dy_t, stride_dy_b, stride_dy_h, stride_rzn_t, stride_rzn_b, B, H, D,
        )  # fmt: skip

        # dh of src, handed on: dh * z + dr W_hr + dz W_hz + dq W_hn
        dh_n_mask = mask & ~in_src[:, None]  # a row that ends at this visit begins its way back here
        dh_n = tl.load(dh_n_ptr + state, mask=dh_n_mask, other=0.0)
        acc = product(dr, w_r, tl.zeros((BLOCK_B, K), tl.float32), PRECISION)
        acc = product(dz, w_z, acc, PRECISION)
        acc = product(dq, w_n, acc, PRECISION)
        dh_prev = tl.where(mask_src, acc + dh_z, 0.0)

        # the gate gradients of this visit
        dh = dh_prev + dy.to(tl.float32) + dh_n.to(tl.float32)
        z = z.to(tl.float32)
        dn, d_r, d_z, d_q = gru_gate_gradients(
            dh, r.to(tl.float32), z, n.to(tl.float32), q.to(tl.float32), h_prev.to(tl.float32)
        )
        dr, dz, dq = d_r.to(dtype), d_z.to(dtype), d_q.to(dtype)
        own = dgates_ptr + ((at * stride_row + offs_b) * (4 * H))[:, None] + offs_u[None, :]
        tl.store(own, dn.to(dtype), mask=mask)
        tl.store(own + H, dr, mask=mask)
        tl.store(own + 2 * H, dz, mask=mask)
        tl.store(own + 3 * H, dq, mask=mask)
        dh_z = dh * z

        # a row that started at src ends its way back here
        tl.store(dh_0_ptr + state, dh_prev, mask=mask_src & ~here[:, None])

        dy, r, z, n, q, h_prev = next_dy, next_r, next_z, next_n, next_q, next_h_prev
        rows_src = rows
        at, rows, at_before, rows_before = at_before, rows_before, at_next, rows_next
