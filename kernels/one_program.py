"""One launch per sequence, each way: every program keeps its slice of W_h on chip for all timesteps.

Forward, at each visit of a direction (kernels/rows.py), with h_prev = h_{t-1} and x_proj = x W_i^T + b_i of all T:

    a_r = x_proj_r + b_hr + h_prev W_hr^T
    a_z = x_proj_z + b_hz + h_prev W_hz^T
    q   =            b_hn + h_prev W_hn^T
    r, z = sigmoid(a_r), sigmoid(a_z);  n = tanh(x_proj_n + r * q);  h = n + z * (h_prev - n)

Backward, at each visit in the opposite order, the visit after it being `src`:

    dh = dy + dh * z of src + dr W_hr + dz W_hz + dq W_hn of src
    dn, dr, dz, dq of this visit from dh

The grid is (slices of BLOCK_H hidden units, groups of row tiles, directions). A product needs the whole of h_prev (or
of the gate gradients of src), of which each program of a group makes its own slice:

    EXCHANGE       they hand their slices to each other through memory (kernels/exchange.py)
    not EXCHANGE   one program owns all units of its row tile, and nothing leaves it

A group's programs work through its row tiles in turn: while one tile's slices are on their way, they make another's.
The visits and tiles are one loop, so that what a step needs besides the product (x_proj; dy and the gates) is asked for
a step ahead, before the wait.

The product. K is cut into NUM_K chunks of BLOCK_K, and with SPLIT > 1 each chunk into SPLIT parts, one per warp, as a
batch of products: a 16 x 16 tile over all of K would be repeated by every warp. The parts are added by halves
(`sum_of_parts`), a shape in which each thread then holds elements of its own, so the gates are computed once.

Nothing is specialised on H: weights come as a padded copy, the exchange buffer's rows are padded to 16 bytes, and the
tensors of the layer are read and written in small tiles, whose alignment matters little.
"""

import triton
import triton.language as tl

from . import metadata
from .exchange import publish, receive
from .gates import gru_gate_gradients, gru_gates
from .rows import of_direction, running, visited
from .step import operand

FORWARD_SCALARS = (
    "T", "B", "H", "D", "first_direction", "tiles", "stride_row", "packed", "stride_rzn_t", "stride_rzn_b", "vectors",
    "bound", "save_gates", "own_exchange", "has_bias",
)  # fmt: skip
BACKWARD_SCALARS = (
    "T", "B", "H", "D", "first_direction", "tiles", "stride_row", "packed", "stride_rzn_t", "stride_rzn_b", "vectors",
    "bound", "size_rows", "stride_dy_t", "stride_dy_b", "stride_dy_h", "want_dh_0",
)  # fmt: skip
# Read and written in small tiles, where alignment matters little: one compiled kernel serves every layout of them.
ANY_ALIGNMENT = (
    "rzn_ptr", "q_ptr", "y_ptr", "dy_ptr", "dh_n_ptr", "h_n_ptr", "dh_0_ptr", "state_ptr", "b_ptr", "b_reverse_ptr",
    "sizes_ptr", "starts_ptr", "status_ptr", "report_ptr",
)  # fmt: skip
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
def with_starting_rows(left, h_0_rows, starts, size, first_chunk, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """The chunks, from number `first_chunk` on, with the rows that start here taken from h_0."""
    found = ()
    for i in tl.static_range(len(left)):
        ptrs, mask = chunk_of(h_0_rows, starts, size, first_chunk + i, BLOCK_K, SPLIT)
        found = found + (tl.where(mask, tl.load(ptrs, mask=mask, other=0.0), left[i]),)
    return found


@triton.jit
def add_product(acc, chunks, weights, FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + the products of the chunks with as many chunks of weights, from number FIRST on."""
    for i in tl.static_range(len(chunks)):
        acc = tl.dot(operand(chunks[i], PRECISION), weights[FIRST + i], acc, input_precision=PRECISION)
    return acc


@triton.jit
def rows_of_tile(first_row, tile, BLOCK_B: tl.constexpr):
    """The rows of a group's tile, int64."""
    return (first_row + tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)


@triton.jit
def next_step(tile, visit, tiles):
    """The row tile and the visit after these: a group works through its tiles at each visit."""
    wraps = tile + 1 == tiles
    return tl.where(wraps, 0, tile + 1), tl.where(wraps, visit + 1, visit)


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
    launch_metadata=metadata.sequence_forward,
)
def sequence_forward(
    T,
    B,
    H,
    D,
    first_direction,  # of the directions that this launch serves
    tiles,  # row tiles of a group
    stride_row,  # rows from one time step to the next in dense rows: B, or 1 in a packed batch, as in kernels/step.py
    packed,
    stride_rzn_t,  # in rows of D * 3H
    stride_rzn_b,
    vectors,  # padded units of a direction in a row of the exchange buffer, in VECTORs
    bound,  # microseconds that a wait may take
    save_gates,
    own_exchange,  # the exchange buffer is not y itself
    has_bias,
    rzn_ptr,  # [T, B, D, 3H] x_proj, which with save_gates r, z, n overwrite
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    e_ptr,  # [T, B, D, P] integers, P = vectors * VECTOR: the exchange buffer, full of sentinels
    h_0_ptr,  # [D, B, P]
    h_n_ptr,  # [D, B, H]
    state_ptr,  # [D, B, H] float32: h unrounded
    w_ptr,  # [3, U, K] W_hh, padded with zeros
    w_reverse_ptr,
    b_ptr,  # [3H] b_hh
    b_reverse_ptr,
    sizes_ptr,  # [T] int32: batch_sizes of a packed batch, and the first row of each time step
    starts_ptr,
    status_ptr,
    report_ptr,
    EXCHANGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PER_WAIT: tl.constexpr,  # chunks that are awaited together
):
    dtype: tl.constexpr = rzn_ptr.dtype.element_ty
    direction = (first_direction + tl.program_id(2)).to(tl.int64)
    w_ptr = of_direction(direction, w_ptr, w_reverse_ptr)
    b_ptr = of_direction(direction, b_ptr, b_reverse_ptr)
    U = tl.num_programs(0) * BLOCK_H
    P = vectors * VECTOR
    offs_u = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    u_mask = offs_u < H
    first_row = tl.program_id(1) * tiles * BLOCK_B
    bound = bound.to(tl.int64) * 1000

    w_r = load_slice(w_ptr, 0, U, offs_u, NUM_K, BLOCK_K, SPLIT, PRECISION)
    w_z = load_slice(w_ptr, 1, U, offs_u, NUM_K, BLOCK_K, SPLIT, PRECISION)
    w_n = load_slice(w_ptr, 2, U, offs_u, NUM_K, BLOCK_K, SPLIT, PRECISION)
    b_mask = u_mask & (has_bias != 0)
    b_hr = tl.load(b_ptr + offs_u, mask=b_mask, other=0.0).to(tl.float32)[None, :]
    b_hz = tl.load(b_ptr + H + offs_u, mask=b_mask, other=0.0).to(tl.float32)[None, :]
    b_hn = tl.load(b_ptr + 2 * H + offs_u, mask=b_mask, other=0.0).to(tl.float32)[None, :]

    # the state of every row begins as h_0, and a row that does not run yet keeps it
    if EXCHANGE:
        for each in range(tiles):
            offs_b = rows_of_tile(first_row, each, BLOCK_B)
            row_state = direction * B + offs_b
            mask = (offs_b < B)[:, None] & u_mask[None, :]
            h = tl.load(h_0_ptr + row_state[:, None] * P + offs_u[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(state_ptr + row_state[:, None] * H + offs_u[None, :], h, mask=mask)
    else:
        offs_b = rows_of_tile(first_row, 0, BLOCK_B)
        row_state = direction * B + offs_b
        mask = (offs_b < B)[:, None] & u_mask[None, :]
        h = tl.load(h_0_ptr + row_state[:, None] * P + offs_u[None, :], mask=mask, other=0.0).to(tl.float32)

    lost = 0
    tile = 0
    visit = 0
    at, rows = visited(0, T, B, direction, sizes_ptr, starts_ptr, packed)
    at_before = at
    rows_before = 0
    offs_b = rows_of_tile(first_row, 0, BLOCK_B)
    mask = (offs_b < rows)[:, None] & u_mask[None, :]
    rzn_ptrs = rzn_tile(rzn_ptr, at, offs_b, offs_u, stride_rzn_t, stride_rzn_b, direction, H, D)
    x_r, x_z, x_n = load_three(rzn_ptrs, mask, H)
    for _ in range(T * tiles):
        offs_b = rows_of_tile(first_row, tile, BLOCK_B)
        here, carries = running(offs_b, rows, rows_before)
        mask = here[:, None] & u_mask[None, :]
        row_state = direction * B + offs_b

        # what the next step needs is asked for before this one waits
        next_tile, next_visit = next_step(tile, visit, tiles)
        at_after, rows_after = visited(visit + 1, T, B, direction, sizes_ptr, starts_ptr, packed)
        next_at = tl.where(next_tile == 0, at_after, at)
        next_rows = tl.where(next_tile == 0, rows_after, rows)
        next_b = rows_of_tile(first_row, next_tile, BLOCK_B)
        next_mask = (next_b < next_rows)[:, None] & u_mask[None, :]
        next_ptrs = rzn_tile(rzn_ptr, next_at, next_b, offs_u, stride_rzn_t, stride_rzn_b, direction, H, D)
        next_x_r, next_x_z, next_x_n = load_three(next_ptrs, next_mask, H)

        # the three gate products with the whole of h_prev; this program's own units of it, unrounded
        if EXCHANGE:
            state_ptrs = state_ptr + row_state[:, None] * H + offs_u[None, :]
            e_rows = e_ptr + ((at_before * stride_row + offs_b) * D + direction) * P
            h_0_rows = h_0_ptr + row_state * P
            starts = here & ~carries
            first = first_row + tile * BLOCK_B
            some_start = (rows_before < first + BLOCK_B) & (rows_before < rows) & (first < rows)
            a_r = tl.zeros((SPLIT, BLOCK_B, BLOCK_H), tl.float32)
            a_z = tl.zeros((SPLIT, BLOCK_B, BLOCK_H), tl.float32)
            q = tl.zeros((SPLIT, BLOCK_B, BLOCK_H), tl.float32)
            for wait in tl.static_range(NUM_K // PER_WAIT):
                ptrs = ()
                masks = ()
                for i in tl.static_range(PER_WAIT):
                    ptr, chunk_mask = chunk_of(e_rows, carries, P, wait * PER_WAIT + i, BLOCK_K, SPLIT)
                    ptrs = ptrs + (ptr,)
                    masks = masks + (chunk_mask,)
                left, lost = receive(ptrs, masks, lost, status_ptr, report_ptr, bound, dtype)
                if wait == 0:  # behind the barriers of a wait, which order it after another thread's store
                    h = tl.load(state_ptrs, mask=mask, other=0.0)
                if some_start:
                    left = with_starting_rows(left, h_0_rows, starts, P, wait * PER_WAIT, BLOCK_K, SPLIT)
                a_r = add_product(a_r, left, w_r, wait * PER_WAIT, PRECISION)
                a_z = add_product(a_z, left, w_z, wait * PER_WAIT, PRECISION)
                q = add_product(q, left, w_n, wait * PER_WAIT, PRECISION)
            # side by side, so that one way through shared memory serves all three (the fourth slot is not read)
            parts = tl.join(tl.join(a_r, a_z), tl.join(q, q))
            sums = tl.reshape(sum_of_parts(parts, SPLIT, BLOCK_B * BLOCK_H * 4), (BLOCK_B, BLOCK_H, 2, 2))
            a_rz, q_q = tl.split(sums)
            a_r, a_z = tl.split(a_rz)
            q, _ = tl.split(q_q)
        else:
            left = (h.to(dtype),)
            zeros = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
            a_r = add_product(zeros, left, w_r, 0, PRECISION)
            a_z = add_product(zeros, left, w_z, 0, PRECISION)
            q = add_product(zeros, left, w_n, 0, PRECISION)

        # the rest of the four sums, in float32
        a_r += x_r.to(tl.float32) + b_hr
        a_z += x_z.to(tl.float32) + b_hz
        q += b_hn
        h_new, r, z, n = gru_gates(a_r, a_z, x_n.to(tl.float32), q, h)
        if EXCHANGE:
            h_new = tl.where(lost != 0, float("nan"), h_new)
        y = h_new.to(dtype)

        row = (at * stride_row + offs_b) * D + direction
        if EXCHANGE:
            e_ptrs = e_ptr + row[:, None] * P + offs_u[None, :]
            padded = tl.where(u_mask[None, :], y, 0.0).to(dtype)
            publish(e_ptrs, padded, here[:, None] & (offs_u < P)[None, :])
            tl.store(state_ptrs, h_new, mask=mask)
            y_mask = mask & (own_exchange != 0)
        else:
            h = tl.where(mask, h_new, h)
            y_mask = mask
        tl.store(y_ptr + row[:, None] * H + offs_u[None, :], y, mask=y_mask)
        save = mask & (save_gates != 0)
        tl.store(rzn_ptrs, r.to(dtype), mask=save)
        tl.store(rzn_ptrs + H, z.to(dtype), mask=save)
        tl.store(rzn_ptrs + 2 * H, n.to(dtype), mask=save)
        tl.store(q_ptr + row[:, None] * H + offs_u[None, :], q.to(dtype), mask=save)

        rzn_ptrs, x_r, x_z, x_n = next_ptrs, next_x_r, next_x_z, next_x_n
        at_before = tl.where(next_tile == 0, at, at_before)
        rows_before = tl.where(next_tile == 0, rows, rows_before)
        at, rows, tile, visit = next_at, next_rows, next_tile, next_visit

    # the state of a row that has ended is its h_n
    if EXCHANGE:
        tl.debug_barrier()  # a thread may read what another has stored
        for each in range(tiles):
            offs_b = rows_of_tile(first_row, each, BLOCK_B)
            offs = (direction * B + offs_b)[:, None] * H + offs_u[None, :]
            mask = (offs_b < B)[:, None] & u_mask[None, :]
            tl.store(h_n_ptr + offs, tl.load(state_ptr + offs, mask=mask, other=0.0).to(dtype), mask=mask)
    else:
        offs_b = rows_of_tile(first_row, 0, BLOCK_B)
        offs = (direction * B + offs_b)[:, None] * H + offs_u[None, :]
        mask = (offs_b < B)[:, None] & u_mask[None, :]
        tl.store(h_n_ptr + offs, h.to(dtype), mask=mask)


@triton.jit
def load_own(
    dy_ptr, rzn_ptr, q_ptr, y_ptr, h_0_ptr, at, at_before, rows, rows_before, offs_b, offs_u, u_mask, direction,
    stride_row, stride_dy_t, stride_dy_b, stride_dy_h, stride_rzn_t, stride_rzn_b, B, H, D, P,
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
    h_0 = tl.load(h_0_ptr + row_state[:, None] * P + offs_u[None, :], mask=mask & ~carries[:, None], other=0.0)
    return dy, r, z, n, q, tl.where(carries[:, None], h, h_0)


@triton.jit(
    do_not_specialize=BACKWARD_SCALARS,
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
    launch_metadata=metadata.sequence_backward,
)
def sequence_backward(
    T,
    B,
    H,
    D,
    first_direction,
    tiles,
    stride_row,
    packed,
    stride_rzn_t,
    stride_rzn_b,
    vectors,
    bound,
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
    h_0_ptr,  # [D, B, P]
    e_ptr,  # [D, T, B, 4P] integers: dgates dn, dr, dz, dq, full of sentinels
    state_ptr,  # [D, B, H] float32: dh * z of the visit after
    dh_0_ptr,  # [D, B, H] float32
    w_ptr,  # [3, U, K] the transposes of W_hr, W_hz, W_hn, padded with zeros
    w_reverse_ptr,
    sizes_ptr,
    starts_ptr,
    status_ptr,
    report_ptr,
    EXCHANGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PER_WAIT: tl.constexpr,  # of the 3 NUM_K chunks
):
    dtype: tl.constexpr = rzn_ptr.dtype.element_ty
    direction = (first_direction + tl.program_id(2)).to(tl.int64)
    w_ptr = of_direction(direction, w_ptr, w_reverse_ptr)
    U = tl.num_programs(0) * BLOCK_H
    P = vectors * VECTOR
    offs_u = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    u_mask = offs_u < H
    first_row = tl.program_id(1) * tiles * BLOCK_B
    bound = bound.to(tl.int64) * 1000
    e_ptr += direction * size_rows * (4 * P)

    w = ()
    for gate in tl.static_range(3):
        w = w + load_slice(w_ptr, gate, U, offs_u, NUM_K, BLOCK_K, SPLIT, PRECISION)

    lost = 0
    tile = 0
    visit = 0  # counts from the last visit of the direction: this is number T - 1 - visit
    at, rows = visited(T - 1, T, B, direction, sizes_ptr, starts_ptr, packed)
    at_before, rows_before = visited(T - 2, T, B, direction, sizes_ptr, starts_ptr, packed)
    at_src = at
    rows_src = 0
    offs_b = rows_of_tile(first_row, 0, BLOCK_B)
    dy, r, z, n, q, h_prev = load_own(
        dy_ptr, rzn_ptr, q_ptr, y_ptr, h_0_ptr, at, at_before, rows, rows_before, offs_b, offs_u, u_mask, direction,
        stride_row, stride_dy_t, stride_dy_b, stride_dy_h, stride_rzn_t, stride_rzn_b, B, H, D, P,
    )  # fmt: skip
    if not EXCHANGE:
        dr = tl.zeros((BLOCK_B, BLOCK_H), dtype)
        dz = tl.zeros((BLOCK_B, BLOCK_H), dtype)
        dq = tl.zeros((BLOCK_B, BLOCK_H), dtype)
        dh_z = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    for _ in range((T + want_dh_0) * tiles):
        offs_b = rows_of_tile(first_row, tile, BLOCK_B)
        here = offs_b < rows
        in_src = offs_b < rows_src
        mask = here[:, None] & u_mask[None, :]
        mask_src = in_src[:, None] & u_mask[None, :]
        row_state = direction * B + offs_b

        # what the next step needs is asked for before this one waits
        next_tile, next_visit = next_step(tile, visit, tiles)
        at_next, rows_next = visited(T - 3 - visit, T, B, direction, sizes_ptr, starts_ptr, packed)
        next_at = tl.where(next_tile == 0, at_before, at)
        next_rows = tl.where(next_tile == 0, rows_before, rows)
        next_at_before = tl.where(next_tile == 0, at_next, at_before)
        next_rows_before = tl.where(next_tile == 0, rows_next, rows_before)
        next_b = rows_of_tile(first_row, next_tile, BLOCK_B)
        next_dy, next_r, next_z, next_n, next_q, next_h_prev = load_own(
            dy_ptr, rzn_ptr, q_ptr, y_ptr, h_0_ptr, next_at, next_at_before, next_rows, next_rows_before, next_b,
            offs_u, u_mask, direction, stride_row, stride_dy_t, stride_dy_b, stride_dy_h, stride_rzn_t, stride_rzn_b,
            B, H, D, P,
        )  # fmt: skip

        # dh of src, handed on: dh * z + dr W_hr + dz W_hz + dq W_hn
        state_ptrs = state_ptr + row_state[:, None] * H + offs_u[None, :]
        dh_n_mask = mask & ~in_src[:, None]  # a row that ends at this visit begins its way back here
        dh_n = tl.load(dh_n_ptr + row_state[:, None] * H + offs_u[None, :], mask=dh_n_mask, other=0.0)
        if EXCHANGE:
            e_rows = e_ptr + (at_src * stride_row + offs_b) * (4 * P)
            acc = tl.zeros((SPLIT, BLOCK_B, BLOCK_H), tl.float32)
            for wait in tl.static_range(3 * NUM_K // PER_WAIT):
                ptrs = ()
                masks = ()
                for i in tl.static_range(wait * PER_WAIT, (wait + 1) * PER_WAIT):  # the chunks of dr, of dz, of dq
                    ptr, chunk_mask = chunk_of(e_rows + (1 + i // NUM_K) * P, in_src, P, i % NUM_K, BLOCK_K, SPLIT)
                    ptrs = ptrs + (ptr,)
                    masks = masks + (chunk_mask,)
                left, lost = receive(ptrs, masks, lost, status_ptr, report_ptr, bound, dtype)
                if wait == 0:  # behind the barriers of a wait, which order it after another thread's store
                    dh_z = tl.load(state_ptrs, mask=mask_src, other=0.0)
                acc = add_product(acc, left, w, wait * PER_WAIT, PRECISION)
            acc = tl.reshape(sum_of_parts(acc, SPLIT, BLOCK_B * BLOCK_H), (BLOCK_B, BLOCK_H))
        else:
            acc = add_product(tl.zeros((BLOCK_B, BLOCK_H), tl.float32), (dr, dz, dq), w, 0, PRECISION)
        dh_prev = tl.where(mask_src, acc + dh_z, 0.0)
        if EXCHANGE:
            dh_prev = tl.where(lost != 0, float("nan"), dh_prev)

        # the gate gradients of this visit
        dh = dh_prev + dy.to(tl.float32) + dh_n.to(tl.float32)
        z = z.to(tl.float32)
        dn, d_r, d_z, d_q = gru_gate_gradients(
            dh, r.to(tl.float32), z, n.to(tl.float32), q.to(tl.float32), h_prev.to(tl.float32)
        )
        own = e_ptr + ((at * stride_row + offs_b) * (4 * P))[:, None] + offs_u[None, :]
        own_mask = here[:, None] & (offs_u < P)[None, :]  # in the padding all four are 0
        dr, dz, dq = d_r.to(dtype), d_z.to(dtype), d_q.to(dtype)
        publish(own + P, dr, own_mask)
        publish(own + 2 * P, dz, own_mask)
        publish(own + 3 * P, dq, own_mask)
        publish(own, dn.to(dtype), own_mask)
        if EXCHANGE:
            tl.store(state_ptrs, dh * z, mask=mask)
        else:
            dh_z = dh * z

        # a row that started at src ends its way back here
        ends = mask_src & ~here[:, None]
        dh_0_ptrs = dh_0_ptr + row_state[:, None] * H + offs_u[None, :]
        tl.store(dh_0_ptrs, dh_prev.to(dh_0_ptr.dtype.element_ty), mask=ends)

        dy, r, z, n, q, h_prev = next_dy, next_r, next_z, next_n, next_q, next_h_prev
        at_src = tl.where(next_tile == 0, at, at_src)
        rows_src = tl.where(next_tile == 0, rows, rows_src)
        at, rows, at_before, rows_before = next_at, next_rows, next_at_before, next_rows_before
        tile, visit = next_tile, next_visit
