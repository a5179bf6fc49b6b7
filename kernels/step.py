"""One launch per timestep, each way.

Forward, for one tile of rows and hidden units, with h_prev = h_{t-1}:

    a_r = x W_ir^T + b_ir + h_prev W_hr^T + b_hr
    a_z = x W_iz^T + b_iz + h_prev W_hz^T + b_hz
    a_n = x W_in^T + b_in                               q = h_prev W_hn^T + b_hn
    r, z = sigmoid(a_r), sigmoid(a_z);  n = tanh(a_n + r * q);  h = n + z * (h_prev - n)

Without FUSE_INPUT, x W_i^T + b_i of all T was computed before, as one library product `x_proj`. With SAVE_GATES, r, z,
n take its place in memory, `rzn`, and q has a buffer of its own: that is what backward needs.

Backward, from the visit `src` to the one before it, `dst`:

    dh_prev = dh * z + dr W_hr + dz W_hz + dq W_hn      (dh, z, dr, dz, dq of src)
    dh of dst = dh_prev + dy;  dq, dr, dz, dn of dst

The launch that makes dh_{t-1} also makes the gate gradients of t-1, so T launches are enough, and one more if dh_0 is
wanted. The first one (FIRST) has no src: the dh of the last visit is dy + dh_n, and it multiplies nothing.

The grid is (tiles of rows, tiles of hidden units, directions). Own buffers have dense rows, row = at * stride_row + b:
in a dense batch `at` is the timestep and stride_row = B, in a packed one `at` is the first row of the step and
stride_row = 1. The caller's tensors (x, dy), and rzn, which lies as x does, have strides in multiples of a unit known
at compile time (X_UNIT, DY_UNIT, D * 3H of rzn): so the compiler knows their alignment, and nothing is compiled for one
T or B.

The product. K is cut into chunks of BLOCK_K. With SPLIT > 1 each chunk is cut into a part for each warp, as a batch of
products; otherwise every warp would repeat a tile of 16 x 16 over all of K. The parts are added at the end.

Programmatic dependent launch (PDL, compute capability 9.0). A launch begins while the one before it runs, once each
program of that one has said `launch_dependents`. `gdc_wait` holds a program until the launch before it is complete and
its stores are visible. So a program loads what no step makes (the first AHEAD chunks of its weights, x_proj; dy and the
saved gates), lets the next launch begin, and waits. Why this is right:

- The first step of a pass is an ordinary launch: it begins when all work before it is complete. What that work wrote
  (x_proj, a copy of W_h, the saved gates, dh_n) any step of the pass may read before its wait.
- Launches that wait pile up: one may begin while any earlier step of its pass still runs. So no step of the pass may
  write what is read before the wait: w_hh, b_hh, dy, dh_n, h_0, and in backward y, r, z, n, q. One exception: in
  forward r, z, n overwrite x_proj, at the step that reads it, after its wait, each element by the one program that
  reads it.
- Every program waits, whether its rows run or not. So a launch completes only after the one before it, and a program
  that has waited has all earlier steps behind it. All stores come after the wait: nobody still reads what they
  overwrite.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import metadata
from .gates import gru_gate_gradients, gru_gates, load_rzn, store_gradients, store_rzn
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


class Form(NamedTuple):
    """What products are compiled for: constants of the kernels, under the same names."""

    H: Any
    BLOCK_B: Any
    BLOCK_H: Any
    BLOCK_K: Any
    SPLIT: Any
    PRECISION: Any


class Visit(NamedTuple):
    """The rows of a tile at a visit of backward, [BLOCK_B] each: pointers to a row's first unit, and masks."""

    dy: Any
    dh_n: Any
    rzn: Any
    q: Any
    y_before: Any  # y of the visit before
    h_0: Any
    runs: Any
    carries: Any  # whether a row's state comes from the visit before, not from h_0
    ends: Any  # whether it is the row's h_n


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A factor of a product. Matrix instructions drop the last 13 bits of a float32 factor under TF32: round them off
    first, to nearest, ties away from zero, as cvt.rna.tf32 does. Infinities stay, NaN is left alone."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def places(FORM: tl.constexpr):
    """Which k each place of a chunk holds: [BLOCK_K], or [SPLIT, BLOCK_K / SPLIT]."""
    if FORM.SPLIT == 1:
        return tl.arange(0, FORM.BLOCK_K)
    else:
        part: tl.constexpr = FORM.BLOCK_K // FORM.SPLIT
        return tl.arange(0, FORM.SPLIT)[:, None] * part + tl.arange(0, part)[None, :]


@triton.jit
def load(row_ptrs, cols, mask):
    """A tile [BLOCK_B, columns]; row_ptrs [BLOCK_B] point at the first unit of each row."""
    return tl.load(row_ptrs[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store(row_ptrs, cols, value, mask):
    """Store such a tile, cast to the dtype of the memory."""
    tl.store(row_ptrs[:, None] + cols[None, :], value.to(row_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def load_left(row_ptrs, row_mask, k, stride_k, K: tl.constexpr, FORM: tl.constexpr):
    """A chunk of the left factor, [(SPLIT,) BLOCK_B, BLOCK_K]; row_ptrs [BLOCK_B]: where each row starts."""
    if FORM.SPLIT == 1:
        ptrs = row_ptrs[:, None] + k[None, :].to(tl.int64) * stride_k
        mask = row_mask[:, None] & (k < K)[None, :]
    else:
        ptrs = row_ptrs[None, :, None] + k[:, None, :].to(tl.int64) * stride_k
        mask = row_mask[None, :, None] & (k < K)[:, None, :]
    return operand(tl.load(ptrs, mask=mask, other=0.0), FORM.PRECISION)


@triton.jit
def load_weights(w_ptr, k, offs_h, K: tl.constexpr, TRANSPOSED: tl.constexpr, FORM: tl.constexpr):
    """A chunk of each gate's right factor, [(SPLIT,) BLOCK_K, BLOCK_H], of w [3, H, K], or TRANSPOSED [3, K, H]."""
    H: tl.constexpr = FORM.H
    of_k = k.to(tl.int64) * (H if TRANSPOSED else 1)
    of_h = offs_h.to(tl.int64) * (1 if TRANSPOSED else K)
    if FORM.SPLIT == 1:
        ptrs = w_ptr + of_k[:, None] + of_h[None, :]
        mask = (k < K)[:, None] & (offs_h < H)[None, :]
    else:
        ptrs = w_ptr + of_k[:, :, None] + of_h[None, None, :]
        mask = (k < K)[:, :, None] & (offs_h < H)[None, None, :]
    w_r, w_z, w_n = load_rzn(ptrs, mask, H * K)
    return operand(w_r, FORM.PRECISION), operand(w_z, FORM.PRECISION), operand(w_n, FORM.PRECISION)


@triton.jit
def load_ahead(w_ptr, offs_h, AHEAD: tl.constexpr, TRANSPOSED: tl.constexpr, FORM: tl.constexpr):
    """The first AHEAD chunks of the right factors of W_h, (w_r, w_z, w_n) of each."""
    found = ()
    for c in tl.static_range(AHEAD):
        found += (load_weights(w_ptr, c * FORM.BLOCK_K + places(FORM), offs_h, FORM.H, TRANSPOSED, FORM),)
    return found


@triton.jit
def zeros(FORM: tl.constexpr):
    """Where products are added up: [(SPLIT,) BLOCK_B, BLOCK_H] float32."""
    if FORM.SPLIT == 1:
        return tl.zeros((FORM.BLOCK_B, FORM.BLOCK_H), tl.float32)
    else:
        return tl.zeros((FORM.SPLIT, FORM.BLOCK_B, FORM.BLOCK_H), tl.float32)


@triton.jit
def sum_of_parts(x, FORM: tl.constexpr):
    """The sum of the warps' parts, [BLOCK_B, BLOCK_H], SPLIT a power of two: by halves, in a fixed order, so that each
    thread is left with elements of its own and gates are computed once."""
    BLOCK_B: tl.constexpr = FORM.BLOCK_B
    BLOCK_H: tl.constexpr = FORM.BLOCK_H
    if FORM.SPLIT == 1:
        return x
    else:
        x = tl.permute(tl.reshape(x, (FORM.SPLIT, BLOCK_B * BLOCK_H)), (1, 0))
        if FORM.SPLIT == 8:
            a, b = tl.split(tl.reshape(x, (BLOCK_B * BLOCK_H, 4, 2)))
            x = a + b
        if FORM.SPLIT >= 4:
            a, b = tl.split(tl.reshape(x, (BLOCK_B * BLOCK_H, 2, 2)))
            x = a + b
        a, b = tl.split(x)
        return tl.reshape(a + b, (BLOCK_B, BLOCK_H))


@triton.jit
def product(acc, left, right, FORM: tl.constexpr):
    """acc + left right, of a chunk."""
    return tl.dot(left, right, acc, input_precision=FORM.PRECISION)


@triton.jit
def add_products(
    acc, row_ptrs, row_mask, stride_k, w_ptr, ahead, offs_h, K: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """acc + left W^T for each of the three gates, chunk by chunk, first those chunks whose weights are here.

    row_ptrs [BLOCK_B]: where each row of the left factor starts.
    """
    acc_r, acc_z, acc_n = acc
    AHEAD: tl.constexpr = len(ahead)
    lefts = ()
    for c in tl.static_range(AHEAD):  # all are asked for before the first is needed
        lefts += (load_left(row_ptrs, row_mask, c * FORM.BLOCK_K + places(FORM), stride_k, K, FORM),)
    for c in tl.static_range(AHEAD):
        acc_r = product(acc_r, lefts[c], ahead[c][0], FORM)
        acc_z = product(acc_z, lefts[c], ahead[c][1], FORM)
        acc_n = product(acc_n, lefts[c], ahead[c][2], FORM)
    for k in range(AHEAD * FORM.BLOCK_K, K, FORM.BLOCK_K):
        offs_k = k + places(FORM)
        left = load_left(row_ptrs, row_mask, offs_k, stride_k, K, FORM)
        w_r, w_z, w_n = load_weights(w_ptr, offs_k, offs_h, K, False, FORM)
        acc_r = product(acc_r, left, w_r, FORM)
        acc_z = product(acc_z, left, w_z, FORM)
        acc_n = product(acc_n, left, w_n, FORM)
    return acc_r, acc_z, acc_n


@triton.jit
def add(sums, given):
    """Add to three sums what was loaded of each gate, in float32; given is () where there is nothing to add."""
    r, z, n = sums
    if len(given) == 3:
        r += given[0].to(tl.float32)
        z += given[1].to(tl.float32)
        n += given[2].to(tl.float32)
    return r, z, n


@triton.jit
def load_own(at, anew, cols, cols_mask, stride_dy_h, H: tl.constexpr):
    """What a tile's gate gradients are made from at a visit, in float32: dh from outside the recurrence (dy, and dh_n
    where a row ends), r, z, n, q, h_prev. anew: rows whose h_prev is 0 by a reset.

    y and h_0 are two loads, not one through a choice of pointers, which Triton's AMD backend cannot compile.
    """
    mask = at.runs[:, None] & cols_mask[None, :]
    dh_n = load(at.dh_n, cols, mask & at.ends[:, None]).to(tl.float32)
    dy = tl.load(at.dy[:, None] + cols[None, :].to(tl.int64) * stride_dy_h, mask=mask, other=0.0).to(tl.float32)
    r, z, n = load_rzn(at.rzn[:, None] + cols[None, :], mask, H)
    q = load(at.q, cols, mask)
    enters = mask & ~anew[:, None]
    y = load(at.y_before, cols, enters & at.carries[:, None])
    h_0 = load(at.h_0, cols, enters & ~at.carries[:, None])
    h_prev = tl.where(at.carries[:, None], y, h_0).to(tl.float32)
    return dh_n + dy, r.to(tl.float32), z.to(tl.float32), n.to(tl.float32), q.to(tl.float32), h_prev


@triton.jit
def load_gradients(row_ptrs, row_mask, k, FORM: tl.constexpr):
    """dr, dz, dq of a chunk, [(SPLIT,) BLOCK_B, BLOCK_K]; row_ptrs [BLOCK_B]: where each row of dgates starts."""
    H: tl.constexpr = FORM.H
    dr = load_left(row_ptrs + H, row_mask, k, 1, H, FORM)
    dz = load_left(row_ptrs + 2 * H, row_mask, k, 1, H, FORM)
    dq = load_left(row_ptrs, row_mask, k, 1, H, FORM)
    return dr, dz, dq


@triton.jit
def product_of_gradients(row_ptrs, row_mask, w_ptr, ahead, offs_h, FORM: tl.constexpr):
    """dr W_hr + dz W_hz + dq W_hn of a visit; row_ptrs [BLOCK_B]: where each row of dgates starts."""
    AHEAD: tl.constexpr = len(ahead)
    acc = zeros(FORM)
    lefts = ()
    for c in tl.static_range(AHEAD):  # all are asked for before the first is needed
        lefts += (load_gradients(row_ptrs, row_mask, c * FORM.BLOCK_K + places(FORM), FORM),)
    for c in tl.static_range(AHEAD):
        for gate in tl.static_range(3):
            acc = product(acc, lefts[c][gate], ahead[c][gate], FORM)
    for k in range(AHEAD * FORM.BLOCK_K, FORM.H, FORM.BLOCK_K):
        offs_k = k + places(FORM)
        dr, dz, dq = load_gradients(row_ptrs, row_mask, offs_k, FORM)
        w_r, w_z, w_n = load_weights(w_ptr, offs_k, offs_h, FORM.H, True, FORM)
        acc = product(acc, dr, w_r, FORM)
        acc = product(acc, dz, w_z, FORM)
        acc = product(acc, dq, w_n, FORM)
    return sum_of_parts(acc, FORM)


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
    # input and weights
    x_ptr,  # [T, B, I]; read with FUSE_INPUT (where T is 1) only, as are w_ih and b_ih
    w_ih_ptr,  # [3H, I]
    w_hh_ptr,  # [3H, H]
    b_ih_ptr,  # [3H]
    b_hh_ptr,  # [3H]
    w_ih_reverse_ptr,
    w_hh_reverse_ptr,
    b_ih_reverse_ptr,
    b_hh_reverse_ptr,
    # states
    h_ptr,  # [2, D, B, H] h_prev, both halves begin as h_0; with T = 1 h_0 itself
    y_ptr,  # [T, B, D, H]
    h_n_ptr,  # [D, B, H]
    state_ptr,  # [D, B, H] float32: h unrounded, where y is narrower
    # what backward needs
    rzn_ptr,  # [T, B, D, 3H] x_proj, unless FUSE_INPUT; with SAVE_GATES r, z, n in its place
    q_ptr,  # [T, B, D, H]; written with SAVE_GATES
    # which rows run when, and where they lie
    lengths_ptr,  # [B] int32, 1 .. T; read with PADDED
    resets_ptr,  # [T, B] int8; read with RESETS
    B,
    stride_row,
    stride_x_b,
    stride_x_i,
    stride_rzn_t,  # in rows of D * 3H, as is stride_rzn_b
    stride_rzn_b,
    # how it is compiled
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
    FORM: tl.constexpr = Form(H, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT, PRECISION)
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

    # the tile: its rows and units, which of them run here, enter with a state, and run at the next visit
    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = offs_h < H
    step_t = 1 - 2 * direction
    runs, carries = running(offs_b, rows, rows_before, at, at - step_t, lengths_ptr, PADDED)
    _, goes_on = running(offs_b, rows, rows_after, at, at + step_t, lengths_ptr, PADDED)
    enters = runs & ~entered_anew(at, offs_b, direction, runs, carries, B, resets_ptr, RESETS)
    mask = runs[:, None] & h_mask[None, :]
    mask_h = enters[:, None] & h_mask[None, :]

    # where its rows lie
    offs_b = offs_b.to(tl.int64)
    row_y = ((at.to(tl.int64) * stride_row + offs_b) * D + direction) * H
    row_state = direction * B + offs_b
    of_state = row_state * H
    row_rzn = ((at.to(tl.int64) * stride_rzn_t + offs_b * stride_rzn_b) * D + direction) * (3 * H)
    h_prev_ptrs = h_ptr + (slot * D * B + row_state) * H
    h_next_ptrs = h_ptr + ((1 - slot) * D * B + row_state) * H
    rzn_ptrs = (rzn_ptr + row_rzn)[:, None] + offs_h[None, :]

    # load: what no earlier step writes, early, so that it arrives during the products
    ahead = load_ahead(w_hh_ptr, offs_h, AHEAD, False, FORM)
    x_proj = () if FUSE_INPUT else load_rzn(rzn_ptrs, mask, H)
    b_hh = load_rzn(b_hh_ptr + offs_h, h_mask, H) if HAS_BIAS else ()
    b_ih = load_rzn(b_ih_ptr + offs_h, h_mask, H) if HAS_BIAS and FUSE_INPUT else ()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    # wait
    if PDL:
        tl.extra.cuda.gdc_wait()
    if KEEP_STATE:  # this program alone reads and writes its tile of the state
        state = load(state_ptr + of_state, offs_h, mask_h & carries[:, None])
        h_prev = load(h_prev_ptrs, offs_h, mask_h & ~carries[:, None])
    else:
        h_prev = load(h_prev_ptrs, offs_h, mask_h)

    # product
    a_r, a_z, a_n, q = zeros(FORM), zeros(FORM), zeros(FORM), zeros(FORM)
    if FUSE_INPUT:
        x_ptrs = x_ptr + offs_b * stride_x_b * X_UNIT
        a_r, a_z, a_n = add_products((a_r, a_z, a_n), x_ptrs, runs, stride_x_i, w_ih_ptr, (), offs_h, I, FORM)
    a_r, a_z, q = add_products((a_r, a_z, q), h_prev_ptrs, enters, 1, w_hh_ptr, ahead, offs_h, H, FORM)
    a_r, a_z = sum_of_parts(a_r, FORM), sum_of_parts(a_z, FORM)
    a_n, q = sum_of_parts(a_n, FORM), sum_of_parts(q, FORM)

    # gates
    a_r, a_z, a_n = add((a_r, a_z, a_n), x_proj)
    a_r, a_z, q = add((a_r, a_z, q), b_hh)
    a_r, a_z, a_n = add((a_r, a_z, a_n), b_ih)
    h_prev = h_prev.to(tl.float32)
    if KEEP_STATE:
        h_prev = tl.where(carries[:, None], state, h_prev)
    h, r, z, n = gru_gates(a_r, a_z, a_n, q, h_prev)

    # publish: h for the next step, or for the caller
    y = h.to(y_ptr.dtype.element_ty)
    store(y_ptr + row_y, offs_h, y, mask)
    store(h_next_ptrs, offs_h, y, mask & goes_on[:, None])
    store(h_n_ptr + of_state, offs_h, y, mask & ~goes_on[:, None])
    if KEEP_STATE:
        store(state_ptr + of_state, offs_h, h, mask)

    # save, in place. This is safe: each element of x_proj is loaded by one thread (tests/test_compiles.py: no tile has
    # fewer elements than threads), and reaches the thread that overwrites it by a barrier or shuffle after that load.
    if SAVE_GATES:
        store_rzn(rzn_ptrs, r, z, n, mask, H)
        store(q_ptr + row_y, offs_h, q, mask)


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
    # what comes from outside the recurrence, weights, and what forward has left
    dy_ptr,  # [T, B, D, H]
    dh_n_ptr,  # [D, B, H]
    w_hh_ptr,  # [3H, H]
    w_hh_reverse_ptr,
    h_0_ptr,  # [D, B, H]
    y_ptr,  # [T, B, D, H]
    rzn_ptr,  # [T, B, D, 3H] r, z, n
    q_ptr,  # [T, B, D, H]
    # what is made
    dgates_ptr,  # [D, T, B, 4H] dq, dr, dz, dn
    dh_ptr,  # [D, B, H] float32: dh of the visit before
    dh_0_ptr,  # [D, B, H]
    # which rows run when, and where they lie
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
    # how it is compiled
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
    FORM: tl.constexpr = Form(H, BLOCK_B, BLOCK_H, BLOCK_K, SPLIT, PRECISION)
    direction = tl.program_id(2).to(tl.int64)
    if D == 2:
        src = of_direction(direction, src, src_reverse)
        dst = of_direction(direction, dst, dst_reverse)
        before = of_direction(direction, before, before_reverse)
        rows_src = of_direction(direction, rows_src, rows_src_reverse)
        rows_dst = of_direction(direction, rows_dst, rows_dst_reverse)
        rows_before = of_direction(direction, rows_before, rows_before_reverse)
        w_hh_ptr = of_direction(direction, w_hh_ptr, w_hh_reverse_ptr)

    # the tile: its rows and units, which of them run at each visit, go on, and enter it anew; at no src none runs
    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = offs_h < H
    in_src, goes_on = running(offs_b, rows_src, rows_dst, src, dst, lengths_ptr, PADDED)
    in_dst, dst_carries = running(offs_b, rows_dst, rows_before, dst, before, lengths_ptr, PADDED)
    src_anew = entered_anew(src, offs_b, direction, in_src, goes_on, B, resets_ptr, RESETS)
    dst_anew = entered_anew(dst, offs_b, direction, in_dst, dst_carries, B, resets_ptr, RESETS)
    mask_src = in_src[:, None] & h_mask[None, :]
    mask_dst = in_dst[:, None] & h_mask[None, :]

    # where its rows lie
    offs_b = offs_b.to(tl.int64)
    row_src = src.to(tl.int64) * stride_row + offs_b
    row_dst = dst.to(tl.int64) * stride_row + offs_b
    of_dst = (row_dst * D + direction) * H
    of_before = ((before.to(tl.int64) * stride_row + offs_b) * D + direction) * H
    row_state = (direction * B + offs_b) * H
    dgates_ptr += direction * size_rows * (4 * H)
    dy_ptr += direction * H * stride_dy_h
    dy_dst = dy_ptr + (dst.to(tl.int64) * stride_dy_t + offs_b * stride_dy_b) * DY_UNIT
    rzn_src = rzn_ptr + ((src.to(tl.int64) * stride_rzn_t + offs_b * stride_rzn_b) * D + direction) * (3 * H)
    rzn_dst = rzn_ptr + ((dst.to(tl.int64) * stride_rzn_t + offs_b * stride_rzn_b) * D + direction) * (3 * H)
    dh_n, h_0 = dh_n_ptr + row_state, h_0_ptr + row_state
    at_dst = Visit(dy_dst, dh_n, rzn_dst, q_ptr + of_dst, y_ptr + of_before, h_0, in_dst, dst_carries, in_dst & ~in_src)

    # load: what no step makes; a row that ended at dst begins its way back there
    ahead = load_ahead(w_hh_ptr, offs_h, AHEAD, True, FORM)
    z_src = load(rzn_src + H, offs_h, mask_src)
    dh, r, z, n, q, h_prev = load_own(at_dst, dst_anew, offs_h, h_mask, stride_dy_h, H)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    # wait
    if PDL:
        tl.extra.cuda.gdc_wait()

    # product, + dh * z of src; a row that started at src ends its way back here
    if not FIRST:
        dh_src = load(dh_ptr + row_state, offs_h, mask_src)  # this program alone reads and writes its tile of dh
        dh_prev = product_of_gradients(dgates_ptr + row_src * (4 * H), in_src, w_hh_ptr, ahead, offs_h, FORM)
        dh_prev += dh_src * z_src.to(tl.float32)
        dh_prev = tl.where(src_anew[:, None], 0.0, dh_prev)
        store(dh_0_ptr + row_state, offs_h, dh_prev, mask_src & (in_src & ~goes_on)[:, None])
        dh += tl.where(in_src[:, None], dh_prev, 0.0)

    # gates of dst
    dq, dr, dz, dn = gru_gate_gradients(dh, r, z, n, q, h_prev)

    # publish
    dgates_dst = dgates_ptr + row_dst * (4 * H)
    store_gradients(dgates_dst[:, None] + offs_h[None, :], dq, dr, dz, dn, mask_dst, H)
    store(dh_ptr + row_state, offs_h, dh, mask_dst)
