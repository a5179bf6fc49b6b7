"""One launch per timestep, each way.

Forward, for one tile of rows and hidden units, with h_prev = h_{t-1}:

    a_r = x W_ir^T + b_ir + h_prev W_hr^T + b_hr
    a_z = x W_iz^T + b_iz + h_prev W_hz^T + b_hz
    a_n = x W_in^T + b_in                               q = h_prev W_hn^T + b_hn
    r, z = sigmoid(a_r), sigmoid(a_z);  n = tanh(a_n + r * q);  h = n + z * (h_prev - n)

Without FUSE_INPUT, x W_i^T + b_i of all T was computed before as one library product, `x_proj`. With SAVE_GATES r, z, n
take its place in memory, `rzn`, and q a buffer of its own: what backward needs.

Backward, from the visit `src` to the one before it, `dst`:

    dh_prev = dh * z + dr W_hr + dz W_hz + dq W_hn      (dh, z, dr, dz, dq of src)
    dh of dst = dh_prev + dy;  dn, dr, dz, dq of dst

so the launch that makes dh_{t-1} also makes the gate gradients of t-1: T launches in all. The first (FIRST) has no
gate gradients to read; it knows dh of every unit and makes those of src itself, chunk by chunk, as it multiplies.

The grid is (tiles of rows, tiles of hidden units, directions). Own buffers have dense rows, row = at * stride_row + b:
`at` is the time step and stride_row = B in a dense batch, the first row of the step and 1 in a packed one. Tensors of
the caller (x, dy), and rzn, which lies as x does, have strides in multiples of a unit known at compile time (X_UNIT,
DY_UNIT, and D * 3H of rzn), which tells the compiler their alignment without specialising on T or B.

The product. K is cut into chunks of BLOCK_K, and with SPLIT > 1 each chunk into a part for each warp, as a batch of
products: a tile of 16 x 16 over all of K would be repeated by every warp. The parts are added at the end.

Programmatic dependent launch (PDL, compute capability 9.0). A launch begins while the one before it runs, once each
program of that one has said `launch_dependents`; `gdc_wait` holds a program until the launch before is complete and its
stores are visible. So a program loads what no step makes (the first AHEAD chunks of its weights, x_proj; dy and the
saved gates), lets the next launch begin, and waits. Why this is right:

- The first step of a pass is an ordinary launch: it begins when all work before it is complete. What that work wrote
  (x_proj, a copy of W_h, the saved gates, dh_n) any step of the pass may read before its wait.
- Launches that wait pile up: one may begin while any earlier step of its pass still runs. So what is read before the
  wait is written by no step of the pass: w_hh, b_hh, dy, dh_n, h_0, and in backward y, r, z, n, q. Only in forward
  r, z, n overwrite x_proj: at the step that reads it, after its wait, each element by the program that alone read it.
- Every program waits, whether its rows run or not. So a launch is complete only after the one before it, and whoever
  has waited has all earlier steps behind him. All stores come after the wait: nobody still reads what they overwrite.
"""

import triton
import triton.language as tl

from . import metadata
from .gates import gru_gate_gradients, gru_gates
from .rows import entered_anew, of_direction, running

FORWARD_SCALARS = (
    "slot", "at", "rows", "rows_before", "rows_after",
    "at_reverse", "rows_reverse", "rows_before_reverse", "rows_after_reverse",
)  # fmt: skip
BACKWARD_SCALARS = (
    "src", "dst", "before", "rows_src", "rows_dst", "rows_before",
    "src_reverse", "dst_reverse", "before_reverse", "rows_src_reverse", "rows_dst_reverse", "rows_before_reverse",
)  # fmt: skip
SIZES = ("B", "stride_row", "size_rows", "stride_x_b", "stride_rzn_t", "stride_rzn_b", "stride_dy_t", "stride_dy_b")


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A factor of a product. Matrix instructions drop the last 13 bits of a float32 factor under TF32: round them off
    first, to nearest, ties away from zero, as cvt.rna.tf32 does. Infinities stay, NaN is left alone."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def places(BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """Which k each place of a chunk holds: [BLOCK_K], or [SPLIT, BLOCK_K / SPLIT]."""
    if SPLIT == 1:
        return tl.arange(0, BLOCK_K)
    else:
        part: tl.constexpr = BLOCK_K // SPLIT
        return tl.arange(0, SPLIT)[:, None] * part + tl.arange(0, part)[None, :]


@triton.jit
def load_left(row_ptrs, row_mask, k, stride_k, K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """A chunk of the left factor, [(SPLIT,) BLOCK_B, K]; row_ptrs [BLOCK_B]: where each row starts."""
    if SPLIT == 1:
        ptrs = row_ptrs[:, None] + k[None, :].to(tl.int64) * stride_k
        mask = row_mask[:, None] & (k < K)[None, :]
    else:
        ptrs = row_ptrs[None, :, None] + k[:, None, :].to(tl.int64) * stride_k
        mask = row_mask[None, :, None] & (k < K)[:, None, :]
    return operand(tl.load(ptrs, mask=mask, other=0.0), PRECISION)


@triton.jit
def load_weights(
    w_ptr,  # [3, H, K], or in backward [3, K, H]
    k,
    offs_h,
    stride_k,
    stride_h,
    K: tl.constexpr,
    H: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk of the right factor of each gate, [(SPLIT,) K, BLOCK_H]."""
    units = offs_h.to(tl.int64) * stride_h
    if SPLIT == 1:
        ptrs = w_ptr + (k.to(tl.int64) * stride_k)[:, None] + units[None, :]
        mask = (k < K)[:, None] & (offs_h < H)[None, :]
    else:
        ptrs = w_ptr + (k.to(tl.int64) * stride_k)[:, :, None] + units[None, None, :]
        mask = (k < K)[:, :, None] & (offs_h < H)[None, None, :]
    w_r = tl.load(ptrs, mask=mask, other=0.0)
    w_z = tl.load(ptrs + H * K, mask=mask, other=0.0)
    w_n = tl.load(ptrs + 2 * H * K, mask=mask, other=0.0)
    return operand(w_r, PRECISION), operand(w_z, PRECISION), operand(w_n, PRECISION)


@triton.jit
def load_ahead(
    w_ptr,
    offs_h,
    stride_k,
    stride_h,
    K: tl.constexpr,
    H: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first AHEAD chunks of the right factors, (w_r, w_z, w_n) of each."""
    found = ()
    for c in tl.static_range(AHEAD):
        k = c * BLOCK_K + places(BLOCK_K, SPLIT)
        found = found + (load_weights(w_ptr, k, offs_h, stride_k, stride_h, K, H, SPLIT, PRECISION),)
    return found


@triton.jit
def zeros(BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr):
    """Where products are added up: [(SPLIT,) BLOCK_B, BLOCK_H] float32."""
    if SPLIT == 1:
        return tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    else:
        return tl.zeros((SPLIT, BLOCK_B, BLOCK_H), tl.float32)


@triton.jit
def sum_of_parts(x, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr):
    """The sum of the warps' parts, [BLOCK_B, BLOCK_H], SPLIT a power of two: by halves, in a fixed order, so that each
    thread is left with elements of its own and gates are computed once."""
    if SPLIT == 1:
        return x
    else:
        x = tl.permute(tl.reshape(x, (SPLIT, BLOCK_B * BLOCK_H)), (1, 0))
        if SPLIT == 8:
            a, b = tl.split(tl.reshape(x, (BLOCK_B * BLOCK_H, 4, 2)))
            x = a + b
        if SPLIT >= 4:
            a, b = tl.split(tl.reshape(x, (BLOCK_B * BLOCK_H, 2, 2)))
            x = a + b
        a, b = tl.split(x)
        return tl.reshape(a + b, (BLOCK_B, BLOCK_H))


@triton.jit
def product(acc, left, right, PRECISION: tl.constexpr):
    """acc + left right, of a chunk."""
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def add_products(
    acc_r,
    acc_z,
    acc_n,
    row_ptrs,  # [BLOCK_B] where each row of the left factor starts
    row_mask,
    stride_k,
    w_ptr,  # [3H, K] r, z, n
    ahead,  # its first chunks
    offs_h,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc_g += left W_g^T for the three gates, chunk by chunk, first those whose weights are here."""
    AHEAD: tl.constexpr = len(ahead)
    lefts = ()
    for c in tl.static_range(AHEAD):  # all are asked for before the first is needed
        k = c * BLOCK_K + places(BLOCK_K, SPLIT)
        lefts = lefts + (load_left(row_ptrs, row_mask, k, stride_k, K, SPLIT, PRECISION),)
    for c in tl.static_range(AHEAD):
        acc_r = product(acc_r, lefts[c], ahead[c][0], PRECISION)
        acc_z = product(acc_z, lefts[c], ahead[c][1], PRECISION)
        acc_n = product(acc_n, lefts[c], ahead[c][2], PRECISION)
    for k in range(AHEAD * BLOCK_K, K, BLOCK_K):
        offs_k = k + places(BLOCK_K, SPLIT)
        left = load_left(row_ptrs, row_mask, offs_k, stride_k, K, SPLIT, PRECISION)
        w_r, w_z, w_n = load_weights(w_ptr, offs_k, offs_h, 1, K, K, H, SPLIT, PRECISION)
        acc_r = product(acc_r, left, w_r, PRECISION)
        acc_z = product(acc_z, left, w_z, PRECISION)
        acc_n = product(acc_n, left, w_n, PRECISION)
    return acc_r, acc_z, acc_n


@triton.jit
def load_gates(rzn_ptrs, q_ptrs, cols, mask, H: tl.constexpr):
    """r, z, n, q of a tile, as float32; rzn_ptrs, q_ptrs [BLOCK_B] point at the first unit of each row."""
    ptrs = rzn_ptrs[:, None] + cols[None, :]
    r = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(ptrs + H, mask=mask, other=0.0).to(tl.float32)
    n = tl.load(ptrs + 2 * H, mask=mask, other=0.0).to(tl.float32)
    q = tl.load(q_ptrs[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return r, z, n, q


@triton.jit
def load_h_prev(y_ptrs, h_0_ptrs, cols, mask, carries):
    """h_prev of a tile, as float32: y of the visit before where the row carries its state, h_0 where it starts.

    Two loads, not one through a choice of pointers, which Triton's AMD backend cannot compile.
    """
    y = tl.load(y_ptrs[:, None] + cols[None, :], mask=mask & carries[:, None], other=0.0)
    h_0 = tl.load(h_0_ptrs[:, None] + cols[None, :], mask=mask & ~carries[:, None], other=0.0)
    return tl.where(carries[:, None], y, h_0).to(tl.float32)


@triton.jit
def load_dh(dh_n_ptrs, dy_ptrs, stride_dy_h, cols, mask, ends):
    """What arrives at h of a tile from outside the recurrence, as float32: dy, and dh_n where the row ends here."""
    dh_n = tl.load(dh_n_ptrs[:, None] + cols[None, :], mask=mask & ends[:, None], other=0.0).to(tl.float32)
    dy = tl.load(dy_ptrs[:, None] + cols[None, :].to(tl.int64) * stride_dy_h, mask=mask, other=0.0).to(tl.float32)
    return dh_n + dy


@triton.jit
def load_dgates(row_ptrs, row_mask, k, H: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """dr, dz, dq of a chunk, [(SPLIT,) BLOCK_B, K]; row_ptrs [BLOCK_B]: where each row of dgates starts."""
    dr = load_left(row_ptrs + H, row_mask, k, 1, H, SPLIT, PRECISION)
    dz = load_left(row_ptrs + 2 * H, row_mask, k, 1, H, SPLIT, PRECISION)
    dq = load_left(row_ptrs + 3 * H, row_mask, k, 1, H, SPLIT, PRECISION)
    return dr, dz, dq


@triton.jit
def store_dgates(dgates_ptr, row, cols, mask, dn, dr, dz, dq, H: tl.constexpr):
    """dn, dr, dz, dq of a tile side by side into dgates [rows, 4H], cast to its dtype."""
    ptrs = dgates_ptr + row[:, None] * (4 * H) + cols[None, :]
    dtype = dgates_ptr.dtype.element_ty
    tl.store(ptrs, dn.to(dtype), mask=mask)
    tl.store(ptrs + H, dr.to(dtype), mask=mask)
    tl.store(ptrs + 2 * H, dz.to(dtype), mask=mask)
    tl.store(ptrs + 3 * H, dq.to(dtype), mask=mask)


@triton.jit(do_not_specialize=[*FORWARD_SCALARS, *SIZES], launch_metadata=metadata.step_forward)
def step_forward(
    slot,  # which half of `h` is read: the other one is written
    at,  # where this visit lies, how many rows run at it, at the one before and the one after: forward direction ...
    rows,
    rows_before,
    rows_after,
    at_reverse,  # ... and the reverse one
    rows_reverse,
    rows_before_reverse,
    rows_after_reverse,
    x_ptr,  # [T, B, I]; read with FUSE_INPUT (where T is 1) only, as are w_ih and b_ih
    w_ih_ptr,  # [3H, I]
    w_hh_ptr,  # [3H, H]
    b_ih_ptr,  # [3H]
    b_hh_ptr,  # [3H]
    w_ih_reverse_ptr,
    w_hh_reverse_ptr,
    b_ih_reverse_ptr,
    b_hh_reverse_ptr,
    h_ptr,  # [2, D, B, H] h_prev, both halves begin as h_0; with T = 1 h_0 itself
    y_ptr,  # [T, B, D, H]
    h_n_ptr,  # [D, B, H]
    state_ptr,  # [D, B, H] float32: h unrounded, where y is narrower
    rzn_ptr,  # [T, B, D, 3H] x_proj, unless FUSE_INPUT; with SAVE_GATES r, z, n in its place
    q_ptr,  # [T, B, D, H]; written with SAVE_GATES
    lengths_ptr,  # [B] int32, 1 .. T; read with PADDED
    resets_ptr,  # [T, B] int8; read with RESETS
    B,
    stride_row,
    stride_x_b,
    stride_x_i,
    stride_rzn_t,  # in rows of D * 3H, as is stride_rzn_b
    stride_rzn_b,
    I: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    X_UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUSE_INPUT: tl.constexpr,
    KEEP_STATE: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    PADDED: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    direction = tl.program_id(2).to(tl.int64)
    if D == 2:
        at = of_direction(direction, at, at_reverse)
        rows = of_direction(direction, rows, rows_reverse)
        rows_before = of_direction(direction, rows_before, rows_before_reverse)
        rows_after = of_direction(direction, rows_after, rows_after_reverse)
        w_ih_ptr = of_direction(direction, w_ih_ptr, w_ih_reverse_ptr)
        w_hh_ptr = of_direction(direction, w_hh_ptr, w_hh_reverse_ptr)
        b_ih_ptr = of_direction(direction, b_ih_ptr, b_ih_reverse_ptr)
        b_hh_ptr = of_direction(direction, b_hh_ptr, b_hh_reverse_ptr)

    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = offs_h < H
    step_t = 1 - 2 * direction
    runs, carries = running(offs_b, rows, rows_before, at, at - step_t, lengths_ptr, PADDED)
    _, goes_on = running(offs_b, rows, rows_after, at, at + step_t, lengths_ptr, PADDED)
    enters = runs & ~entered_anew(at, offs_b, direction, runs, carries, B, resets_ptr, RESETS)  # with a state
    mask = runs[:, None] & h_mask[None, :]
    mask_h = enters[:, None] & h_mask[None, :]
    offs_b = offs_b.to(tl.int64)
    row = at.to(tl.int64) * stride_row + offs_b
    row_state = direction * B + offs_b
    h_prev_ptrs = h_ptr + (slot * D * B + row_state) * H
    h_next_ptrs = h_ptr + ((1 - slot) * D * B + row_state) * H
    row_rzn = at.to(tl.int64) * stride_rzn_t + offs_b * stride_rzn_b
    rzn_ptrs = rzn_ptr + ((row_rzn * D + direction) * (3 * H))[:, None] + offs_h[None, :]

    # load: what no step makes; it is there when the products are done
    ahead = load_ahead(w_hh_ptr, offs_h, 1, H, H, H, AHEAD, BLOCK_K, SPLIT, PRECISION)
    if not FUSE_INPUT:
        x_r = tl.load(rzn_ptrs, mask=mask, other=0.0)
        x_z = tl.load(rzn_ptrs + H, mask=mask, other=0.0)
        x_n = tl.load(rzn_ptrs + 2 * H, mask=mask, other=0.0)
    if HAS_BIAS:
        b_hr = tl.load(b_hh_ptr + offs_h, mask=h_mask, other=0.0)
        b_hz = tl.load(b_hh_ptr + H + offs_h, mask=h_mask, other=0.0)
        b_hn = tl.load(b_hh_ptr + 2 * H + offs_h, mask=h_mask, other=0.0)
        if FUSE_INPUT:
            b_ir = tl.load(b_ih_ptr + offs_h, mask=h_mask, other=0.0)
            b_iz = tl.load(b_ih_ptr + H + offs_h, mask=h_mask, other=0.0)
            b_in = tl.load(b_ih_ptr + 2 * H + offs_h, mask=h_mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    # wait
    if PDL:
        tl.extra.cuda.gdc_wait()
    state_ptrs = state_ptr + row_state[:, None] * H + offs_h[None, :]
    if KEEP_STATE:  # this program alone reads and writes its tile of the state
        state = tl.load(state_ptrs, mask=mask_h & carries[:, None], other=0.0)
        h_prev = tl.load(h_prev_ptrs[:, None] + offs_h[None, :], mask=mask_h & ~carries[:, None], other=0.0)
    else:
        h_prev = tl.load(h_prev_ptrs[:, None] + offs_h[None, :], mask=mask_h, other=0.0)

    # the three gate products
    a_r = zeros(BLOCK_B, BLOCK_H, SPLIT)
    a_z = zeros(BLOCK_B, BLOCK_H, SPLIT)
    a_n = zeros(BLOCK_B, BLOCK_H, SPLIT)
    q = zeros(BLOCK_B, BLOCK_H, SPLIT)
    if FUSE_INPUT:
        x_ptrs = x_ptr + offs_b * stride_x_b * X_UNIT
        a_r, a_z, a_n = add_products(
            a_r, a_z, a_n, x_ptrs, runs, stride_x_i, w_ih_ptr, (), offs_h, I, H, BLOCK_K, SPLIT, PRECISION
        )
    a_r, a_z, q = add_products(
        a_r, a_z, q, h_prev_ptrs, enters, 1, w_hh_ptr, ahead, offs_h, H, H, BLOCK_K, SPLIT, PRECISION
    )
    a_r = sum_of_parts(a_r, BLOCK_B, BLOCK_H, SPLIT)
    a_z = sum_of_parts(a_z, BLOCK_B, BLOCK_H, SPLIT)
    a_n = sum_of_parts(a_n, BLOCK_B, BLOCK_H, SPLIT)
    q = sum_of_parts(q, BLOCK_B, BLOCK_H, SPLIT)

    # the rest of the four sums, in float32
    if not FUSE_INPUT:
        a_r += x_r.to(tl.float32)
        a_z += x_z.to(tl.float32)
        a_n += x_n.to(tl.float32)
    if HAS_BIAS:
        a_r += b_hr.to(tl.float32)[None, :]
        a_z += b_hz.to(tl.float32)[None, :]
        q += b_hn.to(tl.float32)[None, :]
        if FUSE_INPUT:
            a_r += b_ir.to(tl.float32)[None, :]
            a_z += b_iz.to(tl.float32)[None, :]
            a_n += b_in.to(tl.float32)[None, :]
    h_prev = h_prev.to(tl.float32)
    if KEEP_STATE:
        h_prev = tl.where(carries[:, None], state, h_prev)

    h, r, z, n = gru_gates(a_r, a_z, a_n, q, h_prev)

    y = h.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + ((row * D + direction) * H)[:, None] + offs_h[None, :], y, mask=mask)
    tl.store(h_next_ptrs[:, None] + offs_h[None, :], y, mask=mask & goes_on[:, None])
    tl.store(h_n_ptr + row_state[:, None] * H + offs_h[None, :], y, mask=mask & ~goes_on[:, None])
    if KEEP_STATE:
        tl.store(state_ptrs, h, mask=mask)
    # In place: this program alone reads and writes its tile of rzn. Within it, an element of r, z or n depends on the
    # element of x_proj in its place, so no thread stores before that was loaded by itself, or by another one and handed
    # over: through shared memory, whose barrier no thread passes before its loads are done, or by a shuffle, which
    # waits for the data likewise. One thread alone loads an element (tests/test_compiles.py: no tile has fewer elements
    # than there are threads), so that nobody loads it later for nothing.
    if SAVE_GATES:
        dtype = rzn_ptr.dtype.element_ty
        tl.store(rzn_ptrs, r.to(dtype), mask=mask)
        tl.store(rzn_ptrs + H, z.to(dtype), mask=mask)
        tl.store(rzn_ptrs + 2 * H, n.to(dtype), mask=mask)
        tl.store(q_ptr + ((row * D + direction) * H)[:, None] + offs_h[None, :], q.to(dtype), mask=mask)


@triton.jit(do_not_specialize=[*BACKWARD_SCALARS, *SIZES], launch_metadata=metadata.step_backward)
def step_backward(
    src,  # where the gradient comes from, where it goes to, and the visit before that, forward direction ...
    dst,
    before,
    rows_src,
    rows_dst,
    rows_before,
    src_reverse,  # ... and the reverse one
    dst_reverse,
    before_reverse,
    rows_src_reverse,
    rows_dst_reverse,
    rows_before_reverse,
    dy_ptr,  # [T, B, D, H]
    dh_n_ptr,  # [D, B, H]
    w_hh_ptr,  # [3H, H]
    w_hh_reverse_ptr,
    h_0_ptr,  # [D, B, H]
    y_ptr,  # [T, B, D, H]
    rzn_ptr,  # [T, B, D, 3H] r, z, n
    q_ptr,  # [T, B, D, H]
    dgates_ptr,  # [D, T, B, 4H] dn, dr, dz, dq
    dh_ptr,  # [D, B, H] float32: dh of the visit before
    dh_0_ptr,  # [D, B, H]
    lengths_ptr,  # [B] int32, 1 .. T; read with PADDED
    resets_ptr,  # [T, B] int8; read with RESETS
    B,
    stride_row,
    stride_rzn_t,  # in rows of D * 3H, as is stride_rzn_b
    stride_rzn_b,
    stride_dy_t,
    stride_dy_b,
    stride_dy_h,
    size_rows,  # rows of one direction in dgates: T * B, or those of the packed batch
    H: tl.constexpr,
    D: tl.constexpr,
    DY_UNIT: tl.constexpr,
    FIRST: tl.constexpr,
    PADDED: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    direction = tl.program_id(2).to(tl.int64)
    if D == 2:
        src = of_direction(direction, src, src_reverse)
        dst = of_direction(direction, dst, dst_reverse)
        before = of_direction(direction, before, before_reverse)
        rows_src = of_direction(direction, rows_src, rows_src_reverse)
        rows_dst = of_direction(direction, rows_dst, rows_dst_reverse)
        rows_before = of_direction(direction, rows_before, rows_before_reverse)
        w_hh_ptr = of_direction(direction, w_hh_ptr, w_hh_reverse_ptr)

    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = offs_h < H
    in_src, goes_on = running(offs_b, rows_src, rows_dst, src, dst, lengths_ptr, PADDED)
    in_dst, dst_carries = running(offs_b, rows_dst, rows_before, dst, before, lengths_ptr, PADDED)
    src_anew = entered_anew(src, offs_b, direction, in_src, goes_on, B, resets_ptr, RESETS)
    dst_anew = entered_anew(dst, offs_b, direction, in_dst, dst_carries, B, resets_ptr, RESETS)
    mask_src = in_src[:, None] & h_mask[None, :]
    mask_dst = in_dst[:, None] & h_mask[None, :]
    offs_b = offs_b.to(tl.int64)
    row_src = src.to(tl.int64) * stride_row + offs_b
    row_dst = dst.to(tl.int64) * stride_row + offs_b
    row_before = before.to(tl.int64) * stride_row + offs_b
    row_state = direction * B + offs_b
    row_rzn_src = src.to(tl.int64) * stride_rzn_t + offs_b * stride_rzn_b
    row_rzn_dst = dst.to(tl.int64) * stride_rzn_t + offs_b * stride_rzn_b
    rzn_src_ptrs = rzn_ptr + (row_rzn_src * D + direction) * (3 * H)
    rzn_dst_ptrs = rzn_ptr + (row_rzn_dst * D + direction) * (3 * H)
    q_src_ptrs = q_ptr + (row_src * D + direction) * H
    q_dst_ptrs = q_ptr + (row_dst * D + direction) * H
    dgates_ptr += direction * size_rows * (4 * H)
    dy_ptr += direction * H * stride_dy_h
    dy_src_ptrs = dy_ptr + (src.to(tl.int64) * stride_dy_t + offs_b * stride_dy_b) * DY_UNIT
    dy_dst_ptrs = dy_ptr + (dst.to(tl.int64) * stride_dy_t + offs_b * stride_dy_b) * DY_UNIT
    y_dst_ptrs = y_ptr + (row_dst * D + direction) * H
    y_before_ptrs = y_ptr + (row_before * D + direction) * H
    h_0_ptrs = h_0_ptr + row_state * H
    dh_n_ptrs = dh_n_ptr + row_state * H

    # load: what no step makes; not so in FIRST, whose registers are full
    dh_ptrs = dh_ptr + row_state[:, None] * H + offs_h[None, :]
    ends_at_dst = in_dst & ~in_src
    ahead = load_ahead(w_hh_ptr, offs_h, H, 1, H, H, AHEAD, BLOCK_K, SPLIT, PRECISION)
    if not FIRST:
        z_src = tl.load(rzn_src_ptrs[:, None] + H + offs_h[None, :], mask=mask_src, other=0.0)
        dh = load_dh(dh_n_ptrs, dy_dst_ptrs, stride_dy_h, offs_h, mask_dst, ends_at_dst)
        r, z, n, q = load_gates(rzn_dst_ptrs, q_dst_ptrs, offs_h, mask_dst, H)
        h_prev = load_h_prev(y_before_ptrs, h_0_ptrs, offs_h, mask_dst & ~dst_anew[:, None], dst_carries)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    # wait
    if PDL:
        tl.extra.cuda.gdc_wait()
    if not FIRST:  # this program alone reads and writes its tile of dh
        dh_src = tl.load(dh_ptrs, mask=mask_src, other=0.0)

    # dr W_hr + dz W_hz + dq W_hn of src
    dh_prev = zeros(BLOCK_B, BLOCK_H, SPLIT)
    dgates_src_ptrs = dgates_ptr + row_src * (4 * H)
    lefts = ()
    for c in tl.static_range(AHEAD):  # all are asked for before the first is needed
        k = c * BLOCK_K + places(BLOCK_K, SPLIT)
        lefts = lefts + (load_dgates(dgates_src_ptrs, in_src, k, H, SPLIT, PRECISION),)
    for c in tl.static_range(AHEAD):
        for gate in tl.static_range(3):
            dh_prev = product(dh_prev, lefts[c][gate], ahead[c][gate], PRECISION)
    for k in range(AHEAD * BLOCK_K, H, BLOCK_K):
        offs_k = k + places(BLOCK_K, SPLIT)
        if FIRST:
            mask = in_src[:, None] & (offs_k < H)[None, :]
            dh_k = load_dh(dh_n_ptrs, dy_src_ptrs, stride_dy_h, offs_k, mask, in_src)
            r_k, z_k, n_k, q_k = load_gates(rzn_src_ptrs, q_src_ptrs, offs_k, mask, H)
            h_k = load_h_prev(y_dst_ptrs, h_0_ptrs, offs_k, mask, goes_on)  # of a row that begins anew unread
            _, dr, dz, dq = gru_gate_gradients(dh_k, r_k, z_k, n_k, q_k, h_k)
            dtype = dgates_ptr.dtype.element_ty  # products take the storage dtype, as in later launches
            dr, dz, dq = (
                operand(dr.to(dtype), PRECISION),
                operand(dz.to(dtype), PRECISION),
                operand(dq.to(dtype), PRECISION),
            )
        else:
            dr, dz, dq = load_dgates(dgates_src_ptrs, in_src, offs_k, H, SPLIT, PRECISION)
        w_r, w_z, w_n = load_weights(w_hh_ptr, offs_k, offs_h, H, 1, H, H, SPLIT, PRECISION)
        dh_prev = product(dh_prev, dr, w_r, PRECISION)
        dh_prev = product(dh_prev, dz, w_z, PRECISION)
        dh_prev = product(dh_prev, dq, w_n, PRECISION)
    dh_prev = sum_of_parts(dh_prev, BLOCK_B, BLOCK_H, SPLIT)

    # + dh * z of src
    if FIRST:
        dh_src = load_dh(dh_n_ptrs, dy_src_ptrs, stride_dy_h, offs_h, mask_src, in_src)
        r, z_src, n, q = load_gates(rzn_src_ptrs, q_src_ptrs, offs_h, mask_src, H)
        h_prev = load_h_prev(y_dst_ptrs, h_0_ptrs, offs_h, mask_src & ~src_anew[:, None], goes_on)
        dn, dr, dz, dq = gru_gate_gradients(dh_src, r, z_src, n, q, h_prev)
        store_dgates(dgates_ptr, row_src, offs_h, mask_src, dn, dr, dz, dq, H)
    dh_prev += dh_src * z_src.to(tl.float32)
    dh_prev = tl.where(src_anew[:, None], 0.0, dh_prev)

    # a row that started at src ends its way back here
    ends = in_src & ~goes_on
    dh_0_ptrs = dh_0_ptr + row_state[:, None] * H + offs_h[None, :]
    tl.store(dh_0_ptrs, dh_prev.to(dh_0_ptr.dtype.element_ty), mask=mask_src & ends[:, None])

    # the gate gradients of dst; a row that ended at dst begins its way back there
    if FIRST:
        dh = load_dh(dh_n_ptrs, dy_dst_ptrs, stride_dy_h, offs_h, mask_dst, ends_at_dst)
        r, z, n, q = load_gates(rzn_dst_ptrs, q_dst_ptrs, offs_h, mask_dst, H)
        h_prev = load_h_prev(y_before_ptrs, h_0_ptrs, offs_h, mask_dst & ~dst_anew[:, None], dst_carries)
    dh += tl.where(in_src[:, None], dh_prev, 0.0)
    dn, dr, dz, dq = gru_gate_gradients(dh, r, z, n, q, h_prev)
    store_dgates(dgates_ptr, row_dst, offs_h, mask_dst, dn, dr, dz, dq, H)
    tl.store(dh_ptrs, dh, mask=mask_dst)
