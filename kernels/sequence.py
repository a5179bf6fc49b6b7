"""One launch per sequence, each way: every program keeps its slice of W_h in registers for all timesteps.

Forward, at each visit of a direction, with h_prev = h_{t-1} and x_proj = x W_i^T + b_i computed for all T before:

    a_r = x_proj_r + b_hr + h_prev W_hr^T
    a_z = x_proj_z + b_hz + h_prev W_hz^T
    q   =            b_hn + h_prev W_hn^T
    r, z = sigmoid(a_r), sigmoid(a_z);  n = tanh(x_proj_n + r * q);  h = n + z * (h_prev - n)

Backward, at each visit in the opposite order:

    dh = product + carry (+ dy where the row runs),  product = dr W_hr + dz W_hz + dq W_hn of the visit after
    dq, dr, dz, dn from dh;  carry = dh * z where the row runs, else dh

Written in Gluon, in which layouts are explicit. The grid is (slices of UNITS hidden units, groups of row tiles,
directions). A product needs all units of h_prev (or of the gate gradients); each program of a group makes a slice of
them and publishes it to the others (kernels/exchange.py). Its own units and rows stay in its registers, in float32.

The product. K is split into PARTS tensors of PART units (768 = 3 x 256). Each tensor is divided among the warps, as the
batch dimension of the product: a warp multiplies its own part of K, so it waits only for the h of that part, and one
trip through shared memory adds up the parts of all warps. Weights are factors in registers; those of the last SHARED
gates are in shared memory. A matrix instruction is 16 x 8. What comes from the exchange is its left factor, of 16 rows;
where a tile has 8 rows it is the right factor. So tiles are [rows, units], or [units, rows] with 8 rows; all code but
the product works on either.

One rule for rows. Every row of a tile is published at every visit. A row that does not run publishes the state that it
keeps; in backward it publishes zeros, and carries product + carry. So no wait needs a mask, and h_0 is published like
any other state, in slot 0.

Resets select, they do not multiply, so that NaN and infinity do not come through. Where a row's step t begins a new
sequence, the state that enters t is 0 (in the reverse direction: the state that enters t - 1). Forward takes y and h_n
first, then publishes and carries 0. Backward publishes and carries 0, and stores its gate gradients whole.

A launch takes the visits first_visit .. stop_visit - 1. It hands the state on to the next launch in float32, unrounded:
the results are those of one launch, bit for bit.

Nothing is compiled for one H, T, B or flag, except for RESETS, which take ten instructions of a visit's 250.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from . import metadata, visits
from .exchange import Texts, Words, as_factor, first_vector, place_in_tile, publish, received
from .gates import gru_gate_gradients, gru_gates, load_rzn, store_gradients
from .visits import Tile, cleared, load_saved, place_of, save, timestep

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


class Form(NamedTuple):
    """What a kernel is compiled for: its constants of the same names, and the storage dtype."""

    ROWS: Any
    TILES: Any
    UNITS: Any
    PARTS: Any
    PART: Any
    WARPS: Any
    SHARED: Any
    PRECISION: Any
    DTYPE: Any
    WIDTH: Any  # bits of an element


class Group(NamedTuple):
    """Where the programs of a group hand tiles to each other."""

    begin: Any  # of the first slot
    slot: Any  # elements from one visit's tiles to the next
    own: Any  # the own elements in a tile
    vector: Any  # bytes from the begin of a tile to the first vector that this thread waits for
    words: Any


@gluon.constexpr_function
def factor(side, form):
    """The layout of a factor of the product, 0: left, 1: right, for warps that have a part of K each."""
    return gl.DotOperandLayout(side, products(form.WARPS), 32 // form.WIDTH)


@gluon.constexpr_function
def products(warps):
    """The layout of the product: [warps, 16 rows, 8 units] an instruction, or [warps, 16 units, 8 rows]."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def owned(form):
    """The layout in which threads own the elements of a tile: neighbours in a row, which lie side by side in memory."""
    of_warp = 32 // form.UNITS
    if form.ROWS == 8:
        return gl.BlockedLayout([1, 1], [form.UNITS, of_warp], [1, form.WARPS], [0, 1])
    return gl.BlockedLayout([1, 1], [of_warp, form.UNITS], [form.WARPS, 1], [1, 0])


@gluon.constexpr_function
def summed(form):
    """The layout in which a thread has of its elements the parts of all warps."""
    of_warp = 32 // form.UNITS
    if form.ROWS == 8:
        return gl.BlockedLayout([form.WARPS, 1, 1], [1, form.UNITS, of_warp], [1, 1, form.WARPS], [1, 2, 0])
    return gl.BlockedLayout([form.WARPS, 1, 1], [1, of_warp, form.UNITS], [1, form.WARPS, 1], [2, 1, 0])


@gluon.constexpr_function
def parts_of_sums(form):
    """The shape of the product."""
    return [form.WARPS, form.UNITS, form.ROWS] if form.ROWS == 8 else [form.WARPS, form.ROWS, form.UNITS]


@gluon.jit
def buffer_of_sums(FORM: gl.constexpr):
    """Shared memory through which the warps add up their parts of one product."""
    shape: gl.constexpr = parts_of_sums(FORM)
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0] if FORM.ROWS == 8 else [2, 1, 0])
    return gl.allocate_shared_memory(gl.float32, shape, layout)


@gluon.jit
def load_weights(w_ptr, FORM: gl.constexpr):
    """This program's slices of w [3, U, K] as factors, in registers or in shared memory: of each gate a tuple of PARTS
    tensors [warps, K of a warp, units], of 8 rows a tile [warps, units, K of a warp]."""
    K: gl.constexpr = FORM.PARTS * FORM.PART
    K_OF_WARP: gl.constexpr = FORM.PART // FORM.WARPS
    OF_K: gl.constexpr = 2 if FORM.ROWS == 8 else 1
    layout: gl.constexpr = factor(0 if FORM.ROWS == 8 else 1, FORM)
    shared: gl.constexpr = gl.SwizzledSharedLayout(128 // FORM.WIDTH, 1, 8, [OF_K, 3 - OF_K, 0])
    warp, k, unit = indices(FORM.WARPS, K_OF_WARP, FORM.UNITS, OF_K, layout)
    weights = ()
    for gate in gl.static_range(3):
        first_unit = (gate * gl.num_programs(0) + gl.program_id(0)) * FORM.UNITS
        rows = w_ptr + first_unit.to(gl.int64) * K
        found = ()
        for part in gl.static_range(FORM.PARTS):
            offs = unit * K + warp * K_OF_WARP + k
            w = as_factor(gl.load(rows + (part * FORM.PART + offs)), FORM.PRECISION)
            found += (gl.allocate_shared_memory(w.dtype, w.shape, shared, w) if 2 - gate < FORM.SHARED else w,)
        weights += (found,)
    return weights


@gluon.jit
def indices(
    WARPS: gl.constexpr, K_OF_WARP: gl.constexpr, OTHER: gl.constexpr, OF_K: gl.constexpr, layout: gl.constexpr
):
    """Of a factor's elements: the warp, k within the warp, and the row or unit. OF_K: the dimension of k."""
    OF_OTHER: gl.constexpr = 3 - OF_K
    k = gl.arange(0, K_OF_WARP, layout=gl.SliceLayout(0, gl.SliceLayout(OF_OTHER, layout)))
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    other = gl.arange(0, OTHER, layout=gl.SliceLayout(0, gl.SliceLayout(OF_K, layout)))
    k = gl.expand_dims(gl.expand_dims(k, 0), OF_OTHER)
    warp = gl.expand_dims(gl.expand_dims(warp, 1), 2)
    other = gl.expand_dims(gl.expand_dims(other, 0), OF_K)
    return warp, k, other


@gluon.jit
def rows_and_units(FORM: gl.constexpr):
    """Of a thread's elements of a tile the row, counted from the tile's first, and the unit of the layer."""
    layout: gl.constexpr = owned(FORM)
    OF_ROW: gl.constexpr = 1 if FORM.ROWS == 8 else 0
    row = gl.expand_dims(gl.arange(0, FORM.ROWS, layout=gl.SliceLayout(1 - OF_ROW, layout)), 1 - OF_ROW)
    unit = gl.expand_dims(gl.arange(0, FORM.UNITS, layout=gl.SliceLayout(OF_ROW, layout)), OF_ROW)
    return row, unit + gl.program_id(0) * FORM.UNITS


@gluon.jit
def own_tiles(first_row, direction, batch, strides, FORM: gl.constexpr):
    """The row tiles that this program serves in turn, and the visits of its group."""
    row, unit = rows_and_units(FORM)
    row += first_row + gl.program_id(1) * (FORM.TILES * FORM.ROWS)
    lengths, longest = visits.lengths_of(row, unit < strides.H, batch, FORM.ROWS, FORM.TILES)
    tiles = ()
    for i in gl.static_range(FORM.TILES):
        tiles += (visits.tile_of(row + i * FORM.ROWS, unit, lengths[i], direction.to(gl.int64), batch, strides),)
    return tiles, longest


@gluon.jit
def group_of(e_ptr, steps, status_ptr, report_ptr, bound, GATES: gl.constexpr, FORM: gl.constexpr):
    """This program's group, which hands over GATES tensors of each tile at each of so many steps."""
    K: gl.constexpr = FORM.PARTS * FORM.PART
    SIZE: gl.constexpr = FORM.TILES * GATES * FORM.ROWS * K
    K_OF_WARP: gl.constexpr = FORM.PART // FORM.WARPS
    OF_K: gl.constexpr = 1 if FORM.ROWS == 8 else 2
    layout: gl.constexpr = factor(1 if FORM.ROWS == 8 else 0, FORM)
    warp, k, row_of_factor = indices(FORM.WARPS, K_OF_WARP, FORM.ROWS, OF_K, layout)
    vector = first_vector(warp, row_of_factor, k, K_OF_WARP, FORM.ROWS, FORM.WIDTH).to(gl.int64)
    row, unit = rows_and_units(FORM)
    slot = gl.num_programs(1).to(gl.int64) * SIZE
    begin = e_ptr + gl.program_id(2) * slot * (steps + 1) + gl.program_id(1).to(gl.int64) * SIZE
    words = Words(status_ptr.to(gl.int64), report_ptr.to(gl.int64), bound)
    return Group(begin, slot, place_in_tile(row, unit, K, FORM.ROWS, FORM.WIDTH), vector, words)


@gluon.jit
def add_product(acc, seen, weights, GATE: gl.constexpr, FIRST: gl.constexpr, FORM: gl.constexpr):
    """acc + the product of the tensors of `seen` from number FIRST on with one gate's weights."""
    for part in gl.static_range(FORM.PARTS):
        w = weights[GATE][part]
        if FORM.SHARED > 2 - GATE:
            w = weights[GATE][part].load(factor(0 if FORM.ROWS == 8 else 1, FORM))
        if FORM.ROWS == 8:
            acc = mma_v2(w, seen[FIRST + part], acc, input_precision=FORM.PRECISION)
        else:
            acc = mma_v2(seen[FIRST + part], w, acc, input_precision=FORM.PRECISION)
    return acc


@gluon.jit
def sum_over_warps(buffer, FORM: gl.constexpr):
    """The sum of the parts of all warps in shared memory: of each thread its own elements."""
    found = gl.sum(buffer.load(summed(FORM)), 0)
    return gl.convert_layout(found, owned(FORM), assert_trivial=True)


@gluon.jit
def three_products(h, weights, sums, FORM: gl.constexpr):
    """h W_hr^T, h W_hz^T, h W_hn^T: of each thread its own elements."""
    zeros = gl.zeros(parts_of_sums(FORM), gl.float32, layout=products(FORM.WARPS))
    sums[0].store(add_product(zeros, h, weights, 0, 0, FORM))
    sums[1].store(add_product(zeros, h, weights, 1, 0, FORM))
    sums[2].store(add_product(zeros, h, weights, 2, 0, FORM))
    return sum_over_warps(sums[0], FORM), sum_over_warps(sums[1], FORM), sum_over_warps(sums[2], FORM)


@gluon.jit
def product_of_gradients(
    tile, group, weights, sums, WAITS: gl.constexpr, TEXTS: gl.constexpr, NEXT: gl.constexpr, FORM: gl.constexpr
):
    """Wait for dr, dz, dq of a tile: dr W_hr + dz W_hz + dq W_hn, of each thread its own elements."""
    PARTS: gl.constexpr = FORM.PARTS
    BYTES: gl.constexpr = FORM.ROWS * PARTS * FORM.PART * FORM.WIDTH // 8
    address = tile.to(gl.int64) + group.vector
    acc = gl.zeros(parts_of_sums(FORM), gl.float32, layout=products(FORM.WARPS))
    if WAITS == 1:
        seen = received(address, group.words, TEXTS, 3 * PARTS, FORM.DTYPE)
        acc = add_product(acc, seen, weights, 0, 0, FORM)
        acc = add_product(acc, seen, weights, 1, PARTS, FORM)
        acc = add_product(acc, seen, weights, 2, 2 * PARTS, FORM)
    else:
        dr = received(address, group.words, TEXTS, PARTS, FORM.DTYPE)
        acc = add_product(acc, dr, weights, 0, 0, FORM)
        dz = received(address + BYTES, group.words, NEXT, PARTS, FORM.DTYPE)
        acc = add_product(acc, dz, weights, 1, 0, FORM)
        dq = received(address + 2 * BYTES, group.words, NEXT, PARTS, FORM.DTYPE)
        acc = add_product(acc, dq, weights, 2, 0, FORM)
    sums.store(acc)
    return sum_over_warps(sums, FORM)


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
    # what this launch serves: directions and rows from these on, visits first_visit .. stop_visit - 1
    first_direction,
    first_row,
    first_visit,
    stop_visit,
    # how the batch lies in memory
    stride_row,  # rows from one timestep to the next in dense rows: B, or 1 in a packed batch, as in kernels/step.py
    packed,
    has_lengths,
    stride_rzn_t,  # in rows of D * 3H
    stride_rzn_b,
    # options
    bound,  # of a wait, in 2^20 nanoseconds
    save_gates,
    has_bias,
    # one row for each timestep and row of the batch
    rzn_ptr,  # [T, B, D, 3H] x_proj, which with save_gates r, z, n overwrite
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    # what programs hand to each other
    e_ptr,  # [directions, slots, groups, TILES, ROWS * K] integers in fragment order: the exchange buffer
    # the state before and after
    h_0_ptr,  # [D, B, H]
    h_n_ptr,  # [D, B, H]
    state_ptr,  # [D, B, H] bits of float32: h between launches; not touched where one launch takes all visits
    # weights
    w_ptr,  # [3, U, K] W_hh, padded with zeros
    w_reverse_ptr,
    b_ptr,  # [3H] b_hh
    b_reverse_ptr,
    # which rows run when
    lengths_ptr,  # [B] int32: how many timesteps each row runs, 1 .. T, read with has_lengths
    resets_ptr,  # [T, B] int8: not 0 where a row's step begins a new sequence; read with RESETS
    starts_ptr,  # [T] int32: the first row of each timestep of a packed batch
    # a wait that ran out is told here: on the device, and to the host
    status_ptr,
    report_ptr,
    # how it is compiled
    RESETS: gl.constexpr,
    PRECISION: gl.constexpr,
    ROWS: gl.constexpr,  # of a tile
    TILES: gl.constexpr,  # that a program serves in turn
    UNITS: gl.constexpr,  # of a program
    PARTS: gl.constexpr,  # tensors that K is made of,
    PART: gl.constexpr,  # of so many units each
    WARPS: gl.constexpr,
    SHARED: gl.constexpr,  # gates whose weights are in shared memory: n, then z, then r
    # how it waits (kernels/exchange.py)
    WAIT: gl.constexpr,
    CONSTRAINTS: gl.constexpr,
    PACK: gl.constexpr,
):
    dtype: gl.constexpr = rzn_ptr.dtype.element_ty
    SIZE: gl.constexpr = ROWS * PARTS * PART  # of a tile in the exchange buffer
    FORM: gl.constexpr = Form(
        ROWS, TILES, UNITS, PARTS, PART, WARPS, SHARED, PRECISION, dtype, dtype.primitive_bitwidth
    )
    TEXTS: gl.constexpr = Texts(WAIT, CONSTRAINTS, PACK)
    batch = visits.Batch(T, B, packed, has_lengths, lengths_ptr, resets_ptr, starts_ptr)
    direction = first_direction + gl.program_id(2)
    memory = visits.memory_of(H, D, stride_row, stride_rzn_t, rzn_ptr, q_ptr, y_ptr)

    # this program's weights, biases, tiles and group
    weights = load_weights(gl.where(direction == 0, w_ptr, w_reverse_ptr), FORM)
    sums = (buffer_of_sums(FORM), buffer_of_sums(FORM), buffer_of_sums(FORM))
    _, unit = rows_and_units(FORM)
    b_ptr = gl.where(direction == 0, b_ptr, b_reverse_ptr)
    b_hr, b_hz, b_hn = visits.load_biases(b_ptr, unit, (unit < H) & (has_bias != 0), H)
    tiles, longest = own_tiles(first_row, direction, batch, visits.Strides(H, D, stride_rzn_b, 0, 0, 0), FORM)
    group = group_of(e_ptr, stop_visit - first_visit, status_ptr, report_ptr, bound, 1, FORM)

    # the state before the first visit is published; x_proj of that visit
    stop = gl.minimum(stop_visit, longest)
    t = gl.where(direction == 0, first_visit, longest - 1 - first_visit)
    step_t = gl.where(direction == 0, 1, -1)
    at = visits.places_of(t, step_t, 2, batch)
    here = group.begin
    h = ()
    x = ()
    for i in gl.static_range(TILES):
        begin = Tile(*tiles[i])
        anew = cleared(t, begin, direction, batch, RESETS)
        h_0 = gl.load(h_0_ptr + begin.of_state, mask=begin.inside & (first_visit == 0) & ~anew, other=0.0)
        bits = gl.load(state_ptr + begin.of_state, mask=begin.inside & (first_visit > 0), other=0)
        h += (gl.where(first_visit == 0, h_0.to(gl.float32), bits.to(gl.float32, bitcast=True)),)
        publish(here + i * SIZE + group.own, as_factor(h[i].to(dtype), PRECISION))
        x += (load_rzn(timestep(memory.rzn, at[0]) + begin.of_x, (t < begin.length) & (first_visit < stop), H),)

    for visit in range(first_visit, stop):
        t_next = t + step_t
        at_last = place_of(t_next + step_t, batch)
        h_next = ()
        x_next = ()
        for i in gl.static_range(TILES):
            tile = Tile(*tiles[i])
            place = here + i * SIZE

            # load: what the next visit needs besides h is asked for before this one waits
            runs_next = (t_next < tile.length) & (visit + 1 < stop)
            x_next += (load_rzn(timestep(memory.rzn, at[1]) + tile.of_x, runs_next, H),)
            clear = cleared(t_next, tile, direction, batch, RESETS)

            # wait
            h_all = received(place.to(gl.int64) + group.vector, group.words, TEXTS, PARTS, dtype)

            # product
            a_r, a_z, q = three_products(h_all, weights, sums, FORM)

            # gates
            x_r, x_z, x_n = x[i]
            a_r += x_r.to(gl.float32) + b_hr
            a_z += x_z.to(gl.float32) + b_hz
            q += b_hn
            h_new, r, z, n = gru_gates(a_r, a_z, x_n.to(gl.float32), q, h[i])
            runs = t < tile.length
            h_new = gl.where(runs, h_new, h[i])
            h_next += (gl.where(clear, 0.0, h_new),)

            # publish: in units past H the state stays the 0 that it begins with
            publish(place + group.slot + group.own, as_factor(h_next[i].to(dtype), PRECISION))

            # save
            save(memory, at[0], tile, h_new, r, z, n, q, runs, save_gates)
        h, x = h_next, x_next
        t, at, here = t_next, at[1:] + (at_last,), here + group.slot

    for i in gl.static_range(TILES):
        end = Tile(*tiles[i])
        gl.store(h_n_ptr + end.of_state, h[i].to(dtype), mask=end.inside & (stop_visit == T))
        gl.store(state_ptr + end.of_state, h[i].to(gl.int32, bitcast=True), mask=end.inside & (stop_visit < T))


@gluon.jit
def load_own(memory, dy, h_0_ptr, at, at_before, t, t_before, tile, exists):
    """What a tile's gate gradients are made from besides dh, in the storage dtype: dy, r, z, n, q, h_prev. exists:
    whether the pass has this visit."""
    runs = (t < tile.length) & exists
    dy, r, z, n, q = load_saved(memory, dy, at, tile, runs)
    begins = (t_before < 0) | (t_before >= tile.length)  # at its first visit a row comes from h_0
    before = gl.where(begins, h_0_ptr + tile.of_state, timestep(memory.y, at_before) + tile.of_y)
    return dy, r, z, n, q, gl.load(before, mask=runs, other=0.0)


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
    # what this launch serves, as in forward; the last of its visits comes first
    first_direction,
    first_row,
    first_visit,
    stop_visit,
    # how the batch lies in memory
    stride_row,
    packed,
    has_lengths,
    stride_rzn_t,
    stride_rzn_b,
    bound,  # of a wait, as in forward
    size_rows,  # rows of one direction in dgates
    stride_dy_t,
    stride_dy_b,
    stride_dy_h,
    want_dh,  # whether dh of the state that the first visit begins with is made
    # one row for each timestep and row of the batch, and the states
    dy_ptr,  # [T, B, D, H]
    dh_n_ptr,  # [D, B, H] float32: dh of the state that the last visit ends with
    rzn_ptr,  # [T, B, D, 3H] r, z, n
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    h_0_ptr,  # [D, B, H]
    e_ptr,  # [directions, slots, groups, TILES, 3, ROWS * K] integers in fragment order: dr, dz, dq
    dgates_ptr,  # [D, T, B, 4H] dq, dr, dz, dn
    dh_0_ptr,  # [D, B, H] float32; may be dh_n
    # weights
    w_ptr,  # [3, U, K] the transposes of W_hr, W_hz, W_hn, padded with zeros
    w_reverse_ptr,
    # which rows run when, and where a wait that ran out is told, as in forward
    lengths_ptr,
    resets_ptr,
    starts_ptr,
    status_ptr,
    report_ptr,
    # how it is compiled, and how it waits, as in forward
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
    WAIT: gl.constexpr,
    WAIT_NEXT: gl.constexpr,  # the same without a sleep: what is awaited after another gate is there by then
    CONSTRAINTS: gl.constexpr,
    PACK: gl.constexpr,
):
    dtype: gl.constexpr = rzn_ptr.dtype.element_ty
    GATE: gl.constexpr = ROWS * PARTS * PART  # of a tile in the exchange buffer
    FORM: gl.constexpr = Form(
        ROWS, TILES, UNITS, PARTS, PART, WARPS, SHARED, PRECISION, dtype, dtype.primitive_bitwidth
    )
    TEXTS: gl.constexpr = Texts(WAIT, CONSTRAINTS, PACK)
    NEXT: gl.constexpr = Texts(WAIT_NEXT, CONSTRAINTS, PACK)
    batch = visits.Batch(T, B, packed, has_lengths, lengths_ptr, resets_ptr, starts_ptr)
    direction = first_direction + gl.program_id(2)
    memory = visits.memory_of(H, D, stride_row, stride_rzn_t, rzn_ptr, q_ptr, y_ptr)
    dys = visits.Series(dy_ptr, stride_dy_t)
    dgates = visits.Series(dgates_ptr, stride_row * (4 * H))

    # this program's weights, tiles and group
    weights = load_weights(gl.where(direction == 0, w_ptr, w_reverse_ptr), FORM)
    sums = buffer_of_sums(FORM)
    strides = visits.Strides(H, D, stride_rzn_b, stride_dy_b, stride_dy_h, size_rows)
    tiles, longest = own_tiles(first_row, direction, batch, strides, FORM)
    group = group_of(e_ptr, stop_visit - first_visit, status_ptr, report_ptr, bound, 3, FORM)

    # what comes from the visit after the last: dh_n as what is carried, no gate gradients
    last = gl.minimum(stop_visit, longest) - 1
    t = gl.where(direction == 0, last, longest - 1 - last)
    step_t = gl.where(direction == 0, -1, 1)
    at = visits.places_of(t, step_t, 3, batch)
    here = group.begin
    nothing = gl.zeros([UNITS, ROWS] if ROWS == 8 else [ROWS, UNITS], dtype, layout=owned(FORM))
    carry = ()
    given = ()
    for i in gl.static_range(TILES):
        begin = Tile(*tiles[i])
        for gate in gl.static_range(3):
            publish(here + (3 * i + gate) * GATE + group.own, nothing)
        carry += (gl.load(dh_n_ptr + begin.of_state, mask=begin.inside, other=0.0),)
        given += (load_own(memory, dys, h_0_ptr, at[0], at[1], t, t + step_t, begin, last >= first_visit),)

    for back in range(first_visit, last + 1):
        t_next = t + step_t
        t_after = t_next + step_t
        at_last = place_of(t_after + step_t, batch)
        carry_next = ()
        given_next = ()
        for i in gl.static_range(TILES):
            tile = Tile(*tiles[i])
            place = here + 3 * i * GATE

            # load: what the next visit needs besides dh is asked for before this one waits
            given_next += (load_own(memory, dys, h_0_ptr, at[1], at[2], t_next, t_after, tile, back < last),)
            clear = cleared(t, tile, direction, batch, RESETS)

            # wait, product
            product = product_of_gradients(place, group, weights, sums, WAITS, TEXTS, NEXT, FORM)

            # gates
            dy, r, z, n, q, h_prev = given[i]
            dh = product + carry[i] + dy.to(gl.float32)
            z = z.to(gl.float32)
            h_prev = gl.where(clear, 0.0, h_prev.to(gl.float32))
            dq, dr, dz, dn = gru_gate_gradients(dh, r.to(gl.float32), z, n.to(gl.float32), q.to(gl.float32), h_prev)
            dr, dz, dq = dr.to(dtype), dz.to(dtype), dq.to(dtype)
            runs = t < tile.length
            carry_next += (gl.where(clear, 0.0, gl.where(runs, dh * z, dh)),)

            # publish; zeros for rows that do not run or that a reset clears
            own = place + group.slot + group.own
            publish(own, as_factor(gl.where(runs & ~clear, dr, nothing), PRECISION))
            publish(own + GATE, as_factor(gl.where(runs & ~clear, dz, nothing), PRECISION))
            publish(own + 2 * GATE, as_factor(gl.where(runs & ~clear, dq, nothing), PRECISION))

            # save
            store_gradients(timestep(dgates, at[0]) + tile.of_dgates, dq, dr, dz, dn, runs, H)
        carry, given = carry_next, given_next
        t, at, here = t_next, at[1:] + (at_last,), here + group.slot

    if want_dh != 0:
        for i in gl.static_range(TILES):
            end = Tile(*tiles[i])
            place = here + 3 * i * GATE
            product = product_of_gradients(place, group, weights, sums, WAITS, TEXTS, NEXT, FORM)
            gl.store(dh_0_ptr + end.of_state, product + carry[i], mask=end.inside)
