"""One launch per sequence, each way: every program keeps its slice of W_h in registers for all timesteps.

Forward, at each visit of a direction (kernels/rows.py), with h_prev = h_{t-1} and x_proj = x W_i^T + b_i of all T:

    a_r = x_proj_r + b_hr + h_prev W_hr^T
    a_z = x_proj_z + b_hz + h_prev W_hz^T
    q   =            b_hn + h_prev W_hn^T
    r, z = sigmoid(a_r), sigmoid(a_z);  n = tanh(x_proj_n + r * q);  h = n + z * (h_prev - n)

Backward, at each visit in the opposite order:

    dh = product + carry (+ dy where the row runs),  product = dr W_hr + dz W_hz + dq W_hn of the visit after
    dn, dr, dz, dq from dh;  carry = dh * z where the row runs, else dh

Written in Gluon, in which layouts are explicit. The grid is (slices of UNITS hidden units, groups of row tiles,
directions). A product needs the whole of h_prev (or of the gate gradients), of which each program of a group makes its
own slice and publishes it (kernels/exchange.py). Own units and rows stay in registers, in float32.

The product. K is `PARTS` tensors of PART units each, and each of these is cut over the warps, as the batch dimension of
the product: a warp multiplies its own K, so it waits for the h of its own K alone, and one trip through shared memory
adds the parts of all warps. Weights are factors in registers, those of the last SHARED gates in shared memory. A matrix
instruction is 16 x 8: what comes from the exchange is its left factor, of 16 rows, or the right one where a tile has 8
rows. Tiles are [rows, units] then, or [units, rows]: all that is not the product works on either.

Asking early. With ASK what the next tile in turn awaits is asked for before this one's product, and looked at after it.

One rule for rows. Every row of a tile is published at every visit, whether it runs or not: one that does not publishes
the state that it keeps (backward: zeros, and it carries product + carry). So nothing masks rows while waiting, and h_0
is published like any other state, in slot 0. A group's loop is as long as its longest row.

Resets select, so that NaN and infinity do not come through. Where a row's step t begins a new sequence, the state that
enters t (in the reverse direction t - 1) is 0: forward publishes and carries on 0, after y and h_n were taken, and
backward publishes and carries on 0, its gate gradients stored whole.

A launch takes the visits first_visit .. stop_visit - 1 of a sequence. From one launch to the next goes the state, in
float32 as it is: the values are those of one launch, bit for bit.

Nothing is specialised on H, T, B or flags, but for RESETS, which take ten instructions of a visit's 250. The stages of
a visit are named: load, wait, product, gates, publish, save.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from . import metadata
from .exchange import MULTIPLY, as_factor, first_vector, place_in_tile, publish
from .gates import gru_gate_gradients, gru_gates

FORWARD_SCALARS = (
    "T", "B", "H", "D", "first_direction", "first_row", "first_visit", "stop_visit", "stride_row", "packed",
    "has_lengths", "stride_rzn_t", "stride_rzn_b", "bound", "save_gates", "has_bias",
)  # fmt: skip
BACKWARD_SCALARS = (
    "T", "B", "H", "D", "first_direction", "first_row", "first_visit", "stop_visit", "stride_row", "packed",
    "has_lengths", "stride_rzn_t", "stride_rzn_b", "bound", "size_rows", "stride_dy_t", "stride_dy_b",
    "stride_dy_h", "want_dh",
)  # fmt: skip
# Read and written element by element: one compiled kernel serves every layout of them.
ANY_ALIGNMENT = (
    "rzn_ptr", "q_ptr", "y_ptr", "dy_ptr", "dgates_ptr", "h_0_ptr", "h_n_ptr", "state_ptr", "dh_n_ptr", "dh_0_ptr",
    "b_ptr", "b_reverse_ptr", "lengths_ptr", "resets_ptr", "starts_ptr", "status_ptr", "report_ptr",
)  # fmt: skip


@gluon.constexpr_function
def factor(side, WARPS, WIDTH):
    """The layout of a factor of the product, 0: left, 1: right, for warps that have a part of K each."""
    return gl.DotOperandLayout(side, products(WARPS), 32 // WIDTH)


@gluon.constexpr_function
def products(WARPS):
    """The layout of the product: [warps, 16 rows, 8 units] an instruction, or [warps, 16 units, 8 rows]."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def owned(ROWS, UNITS, WARPS):
    """The layout in which threads own the elements of a tile: neighbours in a row, which lie side by side in memory."""
    if ROWS == 8:
        return gl.BlockedLayout([1, 1], [UNITS, 32 // UNITS], [1, WARPS], [0, 1])
    return gl.BlockedLayout([1, 1], [32 // UNITS, UNITS], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def summed(ROWS, UNITS, WARPS):
    """The layout in which a thread has of its elements the parts of all warps."""
    if ROWS == 8:
        return gl.BlockedLayout([WARPS, 1, 1], [1, UNITS, 32 // UNITS], [1, 1, WARPS], [1, 2, 0])
    return gl.BlockedLayout([WARPS, 1, 1], [1, 32 // UNITS, UNITS], [1, WARPS, 1], [2, 1, 0])


@gluon.constexpr_function
def parts_of_sums(ROWS, UNITS, WARPS):
    """The shape of the product."""
    return [WARPS, UNITS, ROWS] if ROWS == 8 else [WARPS, ROWS, UNITS]


@gluon.jit
def load_weights(
    w_ptr,  # [3, U, K]
    gate,
    first_unit,
    IN_SHARED: gl.constexpr,
    ROWS: gl.constexpr,
    UNITS: gl.constexpr,
    PARTS: gl.constexpr,
    PART: gl.constexpr,
    WARPS: gl.constexpr,
    PRECISION: gl.constexpr,
):
    """One gate's slice as a factor: a tuple of PARTS tensors [warps, K of a warp, units], of 8 rows a tile [warps,
    units, K of a warp]. IN_SHARED: where the factors are loaded from at every product, else they are in registers."""
    WIDTH: gl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth
    K_OF_WARP: gl.constexpr = PART // WARPS
    OF_K: gl.constexpr = 2 if ROWS == 8 else 1
    OF_UNIT: gl.constexpr = 3 - OF_K
    layout: gl.constexpr = factor(0 if ROWS == 8 else 1, WARPS, WIDTH)
    shared: gl.constexpr = gl.SwizzledSharedLayout(128 // WIDTH, 1, 8, [OF_K, OF_UNIT, 0])
    warp, k, unit = indices(WARPS, K_OF_WARP, UNITS, OF_K, layout)
    offs = unit * (PARTS * PART) + warp * K_OF_WARP + k
    rows = w_ptr + (gate * gl.num_programs(0) * UNITS + first_unit).to(gl.int64) * (PARTS * PART)
    found = ()
    for part in gl.static_range(PARTS):
        w = as_factor(gl.load(rows + (part * PART + offs)), PRECISION)
        found = found + (gl.allocate_shared_memory(w.dtype, w.shape, shared, w) if IN_SHARED else w,)
    return found


@gluon.jit
def indices(
    WARPS: gl.constexpr, K_OF_WARP: gl.constexpr, OTHER: gl.constexpr, OF_K: gl.constexpr, layout: gl.constexpr
):
    """Of a factor's elements the warp, the k of the warp's, and the row or unit. OF_K: the dimension of k."""
    OF_OTHER: gl.constexpr = 3 - OF_K
    k = gl.arange(0, K_OF_WARP, layout=gl.SliceLayout(0, gl.SliceLayout(OF_OTHER, layout)))
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    other = gl.arange(0, OTHER, layout=gl.SliceLayout(0, gl.SliceLayout(OF_K, layout)))
    k = gl.expand_dims(gl.expand_dims(k, 0), OF_OTHER)
    warp = gl.expand_dims(gl.expand_dims(warp, 1), 2)
    other = gl.expand_dims(gl.expand_dims(other, 0), OF_K)
    return warp, k, other


@gluon.jit
def first_vector_of_thread(ROWS: gl.constexpr, PART: gl.constexpr, WARPS: gl.constexpr, WIDTH: gl.constexpr):
    """Bytes from a tile's begin to the first vector that a thread waits for."""
    OF_K: gl.constexpr = 1 if ROWS == 8 else 2
    layout: gl.constexpr = factor(1 if ROWS == 8 else 0, WARPS, WIDTH)
    warp, k, row = indices(WARPS, PART // WARPS, ROWS, OF_K, layout)
    return first_vector(warp, row, k, PART // WARPS, ROWS, WIDTH).to(gl.int64)


@gluon.jit
def rows_and_units(ROWS: gl.constexpr, UNITS: gl.constexpr, WARPS: gl.constexpr):
    """Of a thread's elements of a tile the row, and the unit of its program's."""
    own: gl.constexpr = owned(ROWS, UNITS, WARPS)
    OF_ROW: gl.constexpr = 1 if ROWS == 8 else 0
    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1 - OF_ROW, own)), 1 - OF_ROW)
    unit = gl.expand_dims(gl.arange(0, UNITS, layout=gl.SliceLayout(OF_ROW, own)), OF_ROW)
    return row, unit


@gluon.jit
def add_product(
    acc, seen, weights, FIRST: gl.constexpr, IN_SHARED: gl.constexpr, ROWS: gl.constexpr, PRECISION: gl.constexpr
):
    """acc + the product of the tensors of `seen` from number FIRST on with one gate's weights."""
    for part in gl.static_range(len(weights)):
        w = weights[part]
        if IN_SHARED:
            w = weights[part].load(factor(0 if ROWS == 8 else 1, acc.shape[0], seen[0].dtype.primitive_bitwidth))
        if ROWS == 8:
            acc = mma_v2(w, seen[FIRST + part], acc, input_precision=PRECISION)
        else:
            acc = mma_v2(seen[FIRST + part], w, acc, input_precision=PRECISION)
    return acc


@gluon.jit
def sum_over_warps(buffer, ROWS: gl.constexpr, UNITS: gl.constexpr, WARPS: gl.constexpr):
    """The sum of the parts of all warps in shared memory: of each thread its own elements."""
    found = gl.sum(buffer.load(summed(ROWS, UNITS, WARPS)), 0)
    return gl.convert_layout(found, owned(ROWS, UNITS, WARPS), assert_trivial=True)


@gluon.constexpr_function
def bits_of(dtype, TENSORS):
    return (gl.int32 if dtype == gl.float32 else gl.int16,) * TENSORS


@gluon.jit
def first_look(
    address, ASK: gl.constexpr, CONSTRAINTS: gl.constexpr, PACK: gl.constexpr, TENSORS: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """Ask for TENSORS factors: for `received`, which looks at what came."""
    kinds: gl.constexpr = bits_of(dtype, TENSORS)
    return gl.inline_asm_elementwise(ASK, CONSTRAINTS, [address], dtype=kinds, is_pure=False, pack=PACK)


@gluon.jit
def received(
    asked, address, status, report, bound,
    WAIT: gl.constexpr, CONSTRAINTS: gl.constexpr, PACK: gl.constexpr, TENSORS: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Wait for TENSORS factors (kernels/exchange.py). asked: what a first look found before, or ()."""
    kinds: gl.constexpr = bits_of(dtype, TENSORS)
    given = asked + (address, status, report, bound)
    seen = gl.inline_asm_elementwise(WAIT, CONSTRAINTS, given, dtype=kinds, is_pure=False, pack=PACK)
    found = ()
    for i in gl.static_range(TENSORS):
        found = found + (seen[i].to(dtype, bitcast=True),)
    return found


@gluon.jit
def lengths_of(
    rows, is_unit, B, T, has_lengths, lengths_ptr, ROWS: gl.constexpr, TILES: gl.constexpr
):  # fmt: skip
    """How many timesteps each element of each tile runs: those past the batch, and units past H, none. And the visits
    of the group: the length of its longest row, the same for programs whose units are all past H."""
    lengths = ()
    longest = T if has_lengths == 0 else 0
    for i in gl.static_range(TILES):
        inside = rows + i * ROWS < B
        given = gl.load(lengths_ptr + rows + i * ROWS, mask=inside & (has_lengths != 0), other=0)
        if has_lengths != 0:
            longest = gl.maximum(longest, gl.max(gl.max(given, 0), 0))
        runs = gl.where(has_lengths != 0, given, gl.where(inside, T, 0))
        lengths = lengths + (gl.where(is_unit, runs, 0),)
    return lengths, longest


@gluon.jit
def cleared(t, row, length, direction, B, resets_ptr, RESETS: gl.constexpr):
    """Of each element whether the state that enters its row's step t is 0 by a reset. The reverse direction comes from
    t + 1. Outside of its steps a row has none."""
    if RESETS:
        each = row + gl.zeros_like(length)  # as wide as the mask
        boundary = t + direction
        ptrs = resets_ptr + times(boundary, B) + each
        return gl.load(ptrs, mask=(t >= 0) & (boundary < length), other=0) != 0
    else:
        return gl.zeros_like(length) != 0


@gluon.jit
def times(a, b):
    """The product of two int32 as int64 in one instruction; in a loop the compiler takes four for the same."""
    return gl.inline_asm_elementwise(MULTIPLY, "=l,r,r", [a, b], dtype=gl.int64, is_pure=True, pack=1)


@gluon.jit
def place_of(time, T, packed, starts_ptr):
    """Where a timestep lies: in a packed batch the first row of it, else itself. Any number for one that is not."""
    return gl.load(starts_ptr + time, mask=(packed != 0) & (time >= 0) & (time < T), other=time)


@gluon.jit
def load_three(ptrs, mask, H):
    """A tile of each of the three gates of rzn, in the storage dtype."""
    r = gl.load(ptrs, mask=mask, other=0.0)
    z = gl.load(ptrs + H, mask=mask, other=0.0)
    n = gl.load(ptrs + 2 * H, mask=mask, other=0.0)
    return r, z, n


@gluon.jit(
    do_not_specialize=FORWARD_SCALARS,
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
    launch_metadata=metadata.sequence_forward,
)
def sequence_forward(
    T,
    B,
    H,
    D,
    first_direction,  # of the directions, and
    first_row,  # of the rows that this launch serves
    first_visit,
    stop_visit,
    stride_row,  # rows from one time step to the next in dense rows: B, or 1 in a packed batch, as in kernels/step.py
    packed,
    has_lengths,
    stride_rzn_t,  # in rows of D * 3H
    stride_rzn_b,
    bound,  # of a wait, in 2^20 nanoseconds
    save_gates,
    has_bias,
    rzn_ptr,  # [T, B, D, 3H] x_proj, which with save_gates r, z, n overwrite
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    e_ptr,  # [directions, slots, groups, TILES, ROWS * K] integers in fragment order: the exchange buffer
    h_0_ptr,  # [D, B, H]
    h_n_ptr,  # [D, B, H]
    state_ptr,  # [D, B, H] bits of float32: h between launches; not touched where one launch takes all visits
    w_ptr,  # [3, U, K] W_hh, padded with zeros
    w_reverse_ptr,
    b_ptr,  # [3H] b_hh
    b_reverse_ptr,
    lengths_ptr,  # [B] int32: how many time steps each row runs, 1 .. T, read with has_lengths
    resets_ptr,  # [T, B] int8: not 0 where a row's step begins a new sequence; read with RESETS
    starts_ptr,  # [T] int32: the first row of each time step of a packed batch
    status_ptr,
    report_ptr,
    RESETS: gl.constexpr,
    PRECISION: gl.constexpr,
    ROWS: gl.constexpr,  # of a tile
    TILES: gl.constexpr,  # that a program serves in turn
    UNITS: gl.constexpr,
    PARTS: gl.constexpr,
    PART: gl.constexpr,
    WARPS: gl.constexpr,
    SHARED: gl.constexpr,  # gates whose weights are in shared memory: n, then z, then r
    ASK: gl.constexpr,  # a first look (kernels/exchange.py), taken for the next tile in turn before this one's product
    ASK_CONSTRAINTS: gl.constexpr,
    WAIT: gl.constexpr,
    CONSTRAINTS: gl.constexpr,
    PACK: gl.constexpr,
):
    dtype: gl.constexpr = rzn_ptr.dtype.element_ty
    WIDTH: gl.constexpr = dtype.primitive_bitwidth
    K: gl.constexpr = PARTS * PART
    PARTS_OF_SUMS: gl.constexpr = parts_of_sums(ROWS, UNITS, WARPS)
    sums: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0] if ROWS == 8 else [2, 1, 0])

    direction = first_direction + gl.program_id(2)
    group = gl.program_id(1)
    first_unit = gl.program_id(0) * UNITS
    w_ptr = gl.where(direction == 0, w_ptr, w_reverse_ptr)
    b_ptr = gl.where(direction == 0, b_ptr, b_reverse_ptr)
    w_n = load_weights(w_ptr, 2, first_unit, SHARED > 0, ROWS, UNITS, PARTS, PART, WARPS, PRECISION)
    w_z = load_weights(w_ptr, 1, first_unit, SHARED > 1, ROWS, UNITS, PARTS, PART, WARPS, PRECISION)
    w_r = load_weights(w_ptr, 0, first_unit, SHARED > 2, ROWS, UNITS, PARTS, PART, WARPS, PRECISION)
    sum_r = gl.allocate_shared_memory(gl.float32, PARTS_OF_SUMS, sums)
    sum_z = gl.allocate_shared_memory(gl.float32, PARTS_OF_SUMS, sums)
    sum_n = gl.allocate_shared_memory(gl.float32, PARTS_OF_SUMS, sums)

    # what this thread has of each tile: its rows and units
    row, unit = rows_and_units(ROWS, UNITS, WARPS)
    unit += first_unit
    is_unit = unit < H
    b_mask = is_unit & (has_bias != 0)
    b_hr = gl.load(b_ptr + unit, mask=b_mask, other=0.0).to(gl.float32)
    b_hz = gl.load(b_ptr + H + unit, mask=b_mask, other=0.0).to(gl.float32)
    b_hn = gl.load(b_ptr + 2 * H + unit, mask=b_mask, other=0.0).to(gl.float32)
    first = first_row + group * (TILES * ROWS)
    lengths, longest = lengths_of(first + row, is_unit, B, T, has_lengths, lengths_ptr, ROWS, TILES)
    stop = gl.minimum(stop_visit, longest)

    # the thread's first vector of a tile, its own elements of one, and from slot to slot
    vector = first_vector_of_thread(ROWS, PART, WARPS, WIDTH)
    status = status_ptr.to(gl.int64)
    report = report_ptr.to(gl.int64)
    own_place = place_in_tile(row, unit, K, ROWS, WIDTH)
    slot = gl.num_programs(1).to(gl.int64) * (TILES * ROWS * K)
    here = e_ptr + gl.program_id(2) * slot * (stop_visit - first_visit + 1) + group.to(gl.int64) * (TILES * ROWS * K)

    # rows of x_proj and of y, in elements from those of a time step
    of_x = ()
    of_y = ()
    for i in gl.static_range(TILES):
        b = (first + i * ROWS + row).to(gl.int64)
        of_x = of_x + ((b * stride_rzn_b * D + direction) * (3 * H) + unit,)
        of_y = of_y + ((b * D + direction) * H + unit,)
    step_x = stride_rzn_t * D * (3 * H)
    step_y = stride_row * D * H

    # the state that the first visit begins with is published before
    t = gl.where(direction == 0, first_visit, longest - 1 - first_visit)
    step_t = gl.where(direction == 0, 1, -1)
    at = place_of(t, T, packed, starts_ptr)
    at_next = place_of(t + step_t, T, packed, starts_ptr)
    h = ()
    x = ()
    for i in gl.static_range(TILES):
        b = (first + i * ROWS + row).to(gl.int64)
        state = (direction.to(gl.int64) * B + b) * H + unit
        mask = (b < B) & is_unit
        anew = cleared(t, first + i * ROWS + row, lengths[i], direction, B, resets_ptr, RESETS)
        begins = gl.load(h_0_ptr + state, mask=mask & (first_visit == 0) & ~anew, other=0.0).to(gl.float32)
        goes_on = gl.load(state_ptr + state, mask=mask & (first_visit > 0), other=0)
        h_i = gl.where(first_visit == 0, begins, goes_on.to(gl.float32, bitcast=True))
        publish(here + i * (ROWS * K) + own_place, as_factor(h_i.to(dtype), PRECISION))
        h = h + (h_i,)
        x = x + (load_three(rzn_ptr + times(at, step_x) + of_x[i], (t < lengths[i]) & (first_visit < stop), H),)

    asked = ()
    if ASK != "":
        asked = first_look(here.to(gl.int64) + vector, ASK, ASK_CONSTRAINTS, PACK, PARTS, dtype)
    zeros = gl.zeros(PARTS_OF_SUMS, gl.float32, layout=products(WARPS))
    for visit in range(first_visit, stop):
        t_next = t + step_t
        at_after = place_of(t_next + step_t, T, packed, starts_ptr)
        x_next = ()
        h_next = ()
        for i in gl.static_range(TILES):
            # load: what the next visit needs besides h is asked for before this one waits
            mask_next = (t_next < lengths[i]) & (visit + 1 < stop)
            x_next = x_next + (load_three(rzn_ptr + times(at_next, step_x) + of_x[i], mask_next, H),)
            clear = cleared(t_next, first + i * ROWS + row, lengths[i], direction, B, resets_ptr, RESETS)

            # wait
            tile = here + i * (ROWS * K)
            seen = received(
                asked, tile.to(gl.int64) + vector, status, report, bound, WAIT, CONSTRAINTS, PACK, PARTS, dtype
            )
            if ASK != "":
                following = here + slot if i + 1 == TILES else tile + ROWS * K
                asked = first_look(following.to(gl.int64) + vector, ASK, ASK_CONSTRAINTS, PACK, PARTS, dtype)

            # product
            sum_r.store(add_product(zeros, seen, w_r, 0, SHARED > 2, ROWS, PRECISION))
            sum_z.store(add_product(zeros, seen, w_z, 0, SHARED > 1, ROWS, PRECISION))
            sum_n.store(add_product(zeros, seen, w_n, 0, SHARED > 0, ROWS, PRECISION))
            a_r = sum_over_warps(sum_r, ROWS, UNITS, WARPS)
            a_z = sum_over_warps(sum_z, ROWS, UNITS, WARPS)
            q = sum_over_warps(sum_n, ROWS, UNITS, WARPS)

            # gates
            a_r += x[i][0].to(gl.float32) + b_hr
            a_z += x[i][1].to(gl.float32) + b_hz
            q += b_hn
            h_new, r, z, n = gru_gates(a_r, a_z, x[i][2].to(gl.float32), q, h[i])
            runs = t < lengths[i]
            h_new = gl.where(runs, h_new, h[i])
            y = h_new.to(dtype)
            h_new = gl.where(clear, 0.0, h_new)
            h_next = h_next + (h_new,)

            # publish: in units past H the state stays the 0 that it begins with
            publish(tile + slot + own_place, as_factor(h_new.to(dtype), PRECISION))

            # save
            gl.store(y_ptr + times(at, step_y) + of_y[i], y, mask=runs)
            saves = runs & (save_gates != 0)
            rzn = rzn_ptr + times(at, step_x) + of_x[i]
            gl.store(rzn, r.to(dtype), mask=saves)
            gl.store(rzn + H, z.to(dtype), mask=saves)
            gl.store(rzn + 2 * H, n.to(dtype), mask=saves)
            gl.store(q_ptr + times(at, step_y) + of_y[i], q.to(dtype), mask=saves)
        h, x = h_next, x_next
        t, at, at_next = t_next, at_next, at_after
        here += slot

    for i in gl.static_range(TILES):
        b = (first + i * ROWS + row).to(gl.int64)
        state = (direction.to(gl.int64) * B + b) * H + unit
        mask = (b < B) & is_unit
        gl.store(h_n_ptr + state, h[i].to(dtype), mask=mask & (stop_visit == T))
        gl.store(state_ptr + state, h[i].to(gl.int32, bitcast=True), mask=mask & (stop_visit < T))


@gluon.jit
def load_own(
    dy_ptr, rzn_ptr, q_ptr, y_ptr, h_0_ptr, of_dy, of_x, of_y, of_h_0, at, at_before, t, t_before, length, mask,
    stride_dy_t, step_x, step_y, stride_dy_h, H,
):  # fmt: skip
    """What a tile's gate gradients are made from besides dh, in the storage dtype: dy, r, z, n, q, h_prev."""
    runs = (t < length) & mask
    dy = gl.load(dy_ptr + times(at, stride_dy_t) + of_dy, mask=runs, other=0.0)
    r, z, n = load_three(rzn_ptr + times(at, step_x) + of_x, runs, H)
    q = gl.load(q_ptr + times(at, step_y) + of_y, mask=runs, other=0.0)
    begins = (t_before < 0) | (t_before >= length)  # at its first visit a row comes from h_0
    h_prev = gl.load(gl.where(begins, h_0_ptr + of_h_0, y_ptr + times(at_before, step_y) + of_y), mask=runs, other=0.0)
    return dy, r, z, n, q, h_prev


@gluon.jit(
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
    first_row,
    first_visit,  # of the visits first_visit .. stop_visit - 1 the last one comes first
    stop_visit,
    stride_row,
    packed,
    has_lengths,
    stride_rzn_t,
    stride_rzn_b,
    bound,
    size_rows,  # rows of one direction in dgates
    stride_dy_t,
    stride_dy_b,
    stride_dy_h,
    want_dh,  # dh of the state that the first visit begins with
    dy_ptr,  # [T, B, D, H]
    dh_n_ptr,  # [D, B, H] float32: dh of the state that the last visit ends with
    rzn_ptr,  # [T, B, D, 3H] r, z, n
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    h_0_ptr,  # [D, B, H]
    e_ptr,  # [directions, slots, groups, TILES, 3, ROWS * K] integers in fragment order: dr, dz, dq
    dgates_ptr,  # [D, T, B, 4H] dn, dr, dz, dq
    dh_0_ptr,  # [D, B, H] float32; may be dh_n
    w_ptr,  # [3, U, K] the transposes of W_hr, W_hz, W_hn, padded with zeros
    w_reverse_ptr,
    lengths_ptr,
    resets_ptr,
    starts_ptr,
    status_ptr,
    report_ptr,
    RESETS: gl.constexpr,
    PRECISION: gl.constexpr,
    ROWS: gl.constexpr,
    TILES: gl.constexpr,
    UNITS: gl.constexpr,
    PARTS: gl.constexpr,
    PART: gl.constexpr,
    WARPS: gl.constexpr,
    SHARED: gl.constexpr,
    WAITS: gl.constexpr,  # 1: all three gate gradients are awaited at once; 3: one after another
    ASK: gl.constexpr,
    ASK_CONSTRAINTS: gl.constexpr,
    WAIT: gl.constexpr,
    WAIT_NEXT: gl.constexpr,  # the same without a sleep: what is awaited after another gate is there by then
    CONSTRAINTS: gl.constexpr,
    PACK: gl.constexpr,
):
    dtype: gl.constexpr = rzn_ptr.dtype.element_ty
    WIDTH: gl.constexpr = dtype.primitive_bitwidth
    K: gl.constexpr = PARTS * PART
    GATE: gl.constexpr = ROWS * K
    PARTS_OF_SUMS: gl.constexpr = parts_of_sums(ROWS, UNITS, WARPS)
    sums: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0] if ROWS == 8 else [2, 1, 0])

    direction = first_direction + gl.program_id(2)
    group = gl.program_id(1)
    first_unit = gl.program_id(0) * UNITS
    w_ptr = gl.where(direction == 0, w_ptr, w_reverse_ptr)
    w_n = load_weights(w_ptr, 2, first_unit, SHARED > 0, ROWS, UNITS, PARTS, PART, WARPS, PRECISION)
    w_z = load_weights(w_ptr, 1, first_unit, SHARED > 1, ROWS, UNITS, PARTS, PART, WARPS, PRECISION)
    w_r = load_weights(w_ptr, 0, first_unit, SHARED > 2, ROWS, UNITS, PARTS, PART, WARPS, PRECISION)
    sum_dh = gl.allocate_shared_memory(gl.float32, PARTS_OF_SUMS, sums)

    row, unit = rows_and_units(ROWS, UNITS, WARPS)
    unit += first_unit
    is_unit = unit < H
    first = first_row + group * (TILES * ROWS)
    lengths, longest = lengths_of(first + row, is_unit, B, T, has_lengths, lengths_ptr, ROWS, TILES)
    last = gl.minimum(stop_visit, longest) - 1

    vector = first_vector_of_thread(ROWS, PART, WARPS, WIDTH)
    status = status_ptr.to(gl.int64)
    report = report_ptr.to(gl.int64)
    own_place = place_in_tile(row, unit, K, ROWS, WIDTH)
    slot = gl.num_programs(1).to(gl.int64) * (TILES * 3 * GATE)
    here = e_ptr + gl.program_id(2) * slot * (stop_visit - first_visit + 1) + group.to(gl.int64) * (TILES * 3 * GATE)

    of_dy = ()
    of_x = ()
    of_y = ()
    of_dgates = ()
    of_state = ()
    for i in gl.static_range(TILES):
        b = (first + i * ROWS + row).to(gl.int64)
        of_dy = of_dy + (b * stride_dy_b + (direction.to(gl.int64) * H + unit) * stride_dy_h,)
        of_x = of_x + ((b * stride_rzn_b * D + direction) * (3 * H) + unit,)
        of_y = of_y + ((b * D + direction) * H + unit,)
        of_dgates = of_dgates + ((direction.to(gl.int64) * size_rows + b) * (4 * H) + unit,)
        of_state = of_state + ((direction.to(gl.int64) * B + b) * H + unit,)
    step_x = stride_rzn_t * D * (3 * H)
    step_y = stride_row * D * H
    step_dgates = stride_row * (4 * H)

    # what comes from the visit after the last: dh_n as what is carried, no gate gradients
    t = gl.where(direction == 0, last, longest - 1 - last)
    step_t = gl.where(direction == 0, -1, 1)
    at = place_of(t, T, packed, starts_ptr)
    at_next = place_of(t + step_t, T, packed, starts_ptr)
    at_after = place_of(t + 2 * step_t, T, packed, starts_ptr)
    nothing = gl.zeros([UNITS, ROWS] if ROWS == 8 else [ROWS, UNITS], dtype, layout=owned(ROWS, UNITS, WARPS))
    carry = ()
    given = ()
    for i in gl.static_range(TILES):
        for gate in gl.static_range(3):
            publish(here + (3 * i + gate) * GATE + own_place, nothing)
        mask = (first + i * ROWS + row < B) & is_unit
        carry = carry + (gl.load(dh_n_ptr + of_state[i], mask=mask, other=0.0),)
        given = given + (
            load_own(
                dy_ptr, rzn_ptr, q_ptr, y_ptr, h_0_ptr, of_dy[i], of_x[i], of_y[i], of_state[i], at, at_next, t,
                t + step_t, lengths[i], last >= first_visit, stride_dy_t, step_x, step_y, stride_dy_h, H,
            ),
        )  # fmt: skip

    asked = ()
    if ASK != "":
        asked = first_look(here.to(gl.int64) + vector, ASK, ASK_CONSTRAINTS, PACK, 3 * PARTS, dtype)
    zeros = gl.zeros(PARTS_OF_SUMS, gl.float32, layout=products(WARPS))
    for back in range(first_visit, last + 1):
        t_next = t + step_t
        t_after = t_next + step_t
        at_last = place_of(t_after + step_t, T, packed, starts_ptr)
        carry_next = ()
        given_next = ()
        for i in gl.static_range(TILES):
            # load: what the next visit needs besides dh is asked for before this one waits
            given_next = given_next + (
                load_own(
                    dy_ptr, rzn_ptr, q_ptr, y_ptr, h_0_ptr, of_dy[i], of_x[i], of_y[i], of_state[i], at_next,
                    at_after, t_next, t_after, lengths[i], back < last, stride_dy_t, step_x, step_y, stride_dy_h, H,
                ),
            )  # fmt: skip
            clear = cleared(t, first + i * ROWS + row, lengths[i], direction, B, resets_ptr, RESETS)

            # wait, product
            tile = here + 3 * i * GATE
            following = here + slot if i + 1 == TILES else tile + 3 * GATE
            acc, asked = product_of_gradients(
                asked, tile.to(gl.int64) + vector, following.to(gl.int64) + vector, status, report, bound, w_r, w_z,
                w_n, zeros, SHARED, WAITS, ASK, ASK_CONSTRAINTS, WAIT, WAIT_NEXT, CONSTRAINTS, PACK, PARTS,
                GATE * (WIDTH // 8), dtype, ROWS, PRECISION,
            )  # fmt: skip
            sum_dh.store(acc)
            dh = sum_over_warps(sum_dh, ROWS, UNITS, WARPS) + carry[i]

            # gates
            dy, r, z, n, q, h_prev = given[i]
            dh += dy.to(gl.float32)
            runs = t < lengths[i]
            z = z.to(gl.float32)
            h_prev = gl.where(clear, 0.0, h_prev.to(gl.float32))
            dn, dr, dz, dq = gru_gate_gradients(dh, r.to(gl.float32), z, n.to(gl.float32), q.to(gl.float32), h_prev)
            dr, dz, dq = dr.to(dtype), dz.to(dtype), dq.to(dtype)
            carry_next = carry_next + (gl.where(clear, 0.0, gl.where(runs, dh * z, dh)),)

            # publish: of what a row has handed on, where it runs and nothing was cleared
            published = tile + slot + own_place
            hands_on = runs & ~clear
            publish(published, as_factor(gl.where(hands_on, dr, nothing), PRECISION))
            publish(published + GATE, as_factor(gl.where(hands_on, dz, nothing), PRECISION))
            publish(published + 2 * GATE, as_factor(gl.where(hands_on, dq, nothing), PRECISION))

            # save
            dgates = dgates_ptr + times(at, step_dgates) + of_dgates[i]
            gl.store(dgates, dn.to(dtype), mask=runs)
            gl.store(dgates + H, dr, mask=runs)
            gl.store(dgates + 2 * H, dz, mask=runs)
            gl.store(dgates + 3 * H, dq, mask=runs)
        carry, given = carry_next, given_next
        t, at, at_next, at_after = t_next, at_next, at_after, at_last
        here += slot

    if want_dh != 0:
        for i in gl.static_range(TILES):
            tile = here + 3 * i * GATE
            following = tile if i + 1 == TILES else tile + 3 * GATE
            acc, asked = product_of_gradients(
                asked, tile.to(gl.int64) + vector, following.to(gl.int64) + vector, status, report, bound, w_r, w_z,
                w_n, zeros, SHARED, WAITS, ASK, ASK_CONSTRAINTS, WAIT, WAIT_NEXT, CONSTRAINTS, PACK, PARTS,
                GATE * (WIDTH // 8), dtype, ROWS, PRECISION,
            )  # fmt: skip
            sum_dh.store(acc)
            dh = sum_over_warps(sum_dh, ROWS, UNITS, WARPS) + carry[i]
            gl.store(dh_0_ptr + of_state[i], dh, mask=(first + i * ROWS + row < B) & is_unit)


@gluon.jit
def product_of_gradients(
    asked, address, following, status, report, bound, w_r, w_z, w_n, zeros, SHARED: gl.constexpr, WAITS: gl.constexpr,
    ASK: gl.constexpr, ASK_CONSTRAINTS: gl.constexpr, WAIT: gl.constexpr, WAIT_NEXT: gl.constexpr,
    CONSTRAINTS: gl.constexpr, PACK: gl.constexpr, PARTS: gl.constexpr, GATE_BYTES: gl.constexpr, dtype: gl.constexpr,
    ROWS: gl.constexpr, PRECISION: gl.constexpr,
):  # fmt: skip
    """Wait for dr, dz, dq of a tile: dr W_hr + dz W_hz + dq W_hn, in the parts of the warps; and a first look at those
    of the tile that follows."""
    if WAITS == 1:
        seen = received(asked, address, status, report, bound, WAIT, CONSTRAINTS, PACK, 3 * PARTS, dtype)
        if ASK != "":
            asked = first_look(following, ASK, ASK_CONSTRAINTS, PACK, 3 * PARTS, dtype)
        acc = add_product(zeros, seen, w_r, 0, SHARED > 2, ROWS, PRECISION)
        acc = add_product(acc, seen, w_z, PARTS, SHARED > 1, ROWS, PRECISION)
        acc = add_product(acc, seen, w_n, 2 * PARTS, SHARED > 0, ROWS, PRECISION)
    else:
        seen_r = received((), address, status, report, bound, WAIT, CONSTRAINTS, PACK, PARTS, dtype)
        acc = add_product(zeros, seen_r, w_r, 0, SHARED > 2, ROWS, PRECISION)
        seen_z = received((), address + GATE_BYTES, status, report, bound, WAIT_NEXT, CONSTRAINTS, PACK, PARTS, dtype)
        acc = add_product(acc, seen_z, w_z, 0, SHARED > 1, ROWS, PRECISION)
        address += 2 * GATE_BYTES
        seen_q = received((), address, status, report, bound, WAIT_NEXT, CONSTRAINTS, PACK, PARTS, dtype)
        acc = add_product(acc, seen_q, w_n, 0, SHARED > 0, ROWS, PRECISION)
    return acc, asked
