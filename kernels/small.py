"""One launch per sequence, each way, of layers so small that one program holds all of W_h: nothing is exchanged.

Equations, the rule for rows and what is saved for backward are those of kernels/sequence.py. The grid is (row tiles, 1,
directions): a program owns all hidden units of ROWS rows. W_h stays in registers for all timesteps, and so do the
program's own units and rows, in float32. What W_h is multiplied with (h_prev, or in backward the gate gradients of the
visit after) goes through shared memory, from which every warp reads all of it. That takes two barriers a visit: one
before it is read, one before it is written again. x_proj (in backward dy, the gates and h_prev) is loaded AHEAD (1 or
2) visits before it is used, because DRAM takes longer than one visit.

Half precision uses matrix instructions (LANES = 0). Units are the left factor of m16n8k16, 16 for each warp. Rows are
the right factor: 8 of them are enough; of 4 each is there twice. The three sums of a unit and row are in one thread.
The instruction gives a thread the units g and g + 8 of a block of 16, but neighbours are faster to load and store. So
unit 2 g + i of a block takes place g + 8 i in both factors (units 0 and 1 the places 0 and 8): the thread that gets
places g and g + 8 holds the units 2 g and 2 g + 1, which it loads and stores as a pair.

float32 uses FMA, which is as exact as float32 can be. LANES lanes of a warp share their units. Each lane has pieces of
K, 4 elements each: a load of 16 bytes, no two of them from one bank. A value of h serves all units of a thread. Then
the lanes add up: in each turn two lanes swap half of their sums, so that in the end each has units (or rows) of its
own.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from . import metadata, visits
from .gates import gru_gate_gradients, gru_gates, load_rzn, store_gradients
from .visits import cleared, load_saved, place_of, save, timestep

FORWARD_SCALARS = (
    "T", "B", "H", "D", "stride_row", "packed", "has_lengths", "stride_rzn_t", "stride_rzn_b", "save_gates", "has_bias",
)  # fmt: skip
BACKWARD_SCALARS = (
    "T", "B", "H", "D", "stride_row", "packed", "has_lengths", "stride_rzn_t", "stride_rzn_b", "size_rows",
    "stride_dy_t", "stride_dy_b", "stride_dy_h", "want_dh",
)  # fmt: skip
# Read or written once, element by element: one compiled kernel serves every alignment of them.
ANY_ALIGNMENT = (
    "h_0_ptr", "h_n_ptr", "dh_n_ptr", "dh_0_ptr", "w_ptr", "w_reverse_ptr", "b_ptr", "b_reverse_ptr", "lengths_ptr",
    "resets_ptr", "starts_ptr",
)  # fmt: skip


class Form(NamedTuple):
    """What a kernel is compiled for: its constants of the same names."""

    ROWS: Any
    UNITS: Any
    WARPS: Any
    LANES: Any


@gluon.constexpr_function
def _bits(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def _powers(n, dimension, rank, first=1):
    """Bases of a layout: the bits of n places along a dimension, `first` apart."""
    return [[first << i if d == dimension else 0 for d in range(rank)] for i in range(_bits(n))]


@gluon.constexpr_function
def terms_layout(form):
    """float32: of a piece [rows, units, 4 * lanes] what a thread multiplies: neighbouring units, so that those of a
    warp are too."""
    rows, units, warps, lanes = form
    of_thread = units * lanes // (32 * warps)
    return gl.BlockedLayout([rows, of_thread, 4], [1, 32 // lanes, lanes], [1, warps, 1], [2, 1, 0])


@gluon.constexpr_function
def sums_layout(form):
    """float32: of [rows, units, lanes] what a thread adds up."""
    rows, units, warps, lanes = form
    return gl.BlockedLayout([rows, units * lanes // (32 * warps), 1], [1, 32 // lanes, lanes], [1, warps, 1], [2, 1, 0])


@gluon.constexpr_function
def turns(form):
    """float32: how often lanes swap halves before each has elements of its own, or all lanes have taken part."""
    rows, units, warps, lanes = form
    return min(_bits(rows * units * lanes // (32 * warps)), _bits(lanes))


@gluon.constexpr_function
def swapped_layout(form, turn):
    """float32: of [rows, units, lanes >> turn, 2] what a thread has once lanes have swapped: both partial sums of one
    unit (or row), where it had one partial sum of two."""
    rows, units, warps, lanes = form
    of_thread, of_warp = units * lanes // (32 * warps), units // warps
    mine = _powers(of_thread, 1, 4) + _powers(rows, 0, 4)
    lane = mine[:turn] + _powers(lanes >> turn, 2, 4) + _powers(32 // lanes, 1, 4, of_thread)
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], *mine[turn:]], lane, _powers(warps, 1, 4, of_warp), [], [rows, units, lanes >> turn, 2]
    )


@gluon.constexpr_function
def own_layout(form):
    """Of [rows, units] what a thread owns: the sums that its product leaves there."""
    rows, units, warps, lanes = form
    if lanes == 0:
        pairs, of_pair = ([], 1) if rows == 4 else ([[1, 0]], 2)
        registers = [[0, 1], *pairs, *_powers(rows // 8, 0, 2, 8)] if rows > 4 else [[0, 1]]
        lane = _powers(4, 0, 2, of_pair) + _powers(8, 1, 2, 2)
        return gl.DistributedLinearLayout(registers, lane, _powers(warps, 1, 2, 16), [], [rows, units])
    of_thread, of_warp = units * lanes // (32 * warps), units // warps
    mine = _powers(of_thread, 1, 2) + _powers(rows, 0, 2)
    n = turns(form)
    lane = mine[:n] + [[0, 0]] * (_bits(lanes) - n) + _powers(32 // lanes, 1, 2, of_thread)
    return gl.DistributedLinearLayout(mine[n:], lane, _powers(warps, 1, 2, of_warp), [], [rows, units])


@gluon.constexpr_function
def matrix_layout(warps):
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def weights_layout(form, transposed):
    """In which [units, K] of one gate are read: with neighbours in memory in neighbouring lanes, or as they stay."""
    _, _, warps, lanes = form
    if lanes == 0:
        order = [0, 1] if transposed else [1, 0]
        return gl.BlockedLayout(
            [1, 1], [32, 1] if transposed else [1, 32], [1, warps] if transposed else [warps, 1], order
        )
    return gl.SliceLayout(0, terms_layout(form))


@gluon.constexpr_function
def factor_layout(form):
    """Of what is multiplied by the weights, from shared memory."""
    _, _, warps, lanes = form
    if lanes == 0:
        return gl.DotOperandLayout(1, matrix_layout(warps), 2)
    return gl.SliceLayout(1, terms_layout(form))


@gluon.constexpr_function
def shared_layout(form):
    """Without bank conflicts in loads. [units, rows] of 16 rows are 32 bytes a unit: alternate groups of four units
    are swizzled."""
    rows, _, _, lanes = form
    if lanes == 0:
        return gl.SwizzledSharedLayout(8, 4, 2 if rows == 16 else 1, [1, 0])
    return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])


@gluon.constexpr_function
def size_of_factor(form):
    """Of what goes through shared memory: [K, rows], in float32 [rows, K]."""
    rows, units, _, lanes = form
    return [units, max(rows, 8)] if lanes == 0 else [rows, units]


@gluon.jit
def unit_at(place, LANES: gl.constexpr):
    """The unit at a place of the factors."""
    if LANES == 0:
        return place // 16 * 16 + place % 8 * 2 + place % 16 // 8
    else:
        return place


@gluon.jit
def in_four(x, WITHOUT: gl.constexpr, FORM: gl.constexpr):
    """The four values of every lane in a piece [.., 4 lanes], as factors of [rows, units, lanes]; one of the first two
    dimensions is WITHOUT."""
    layout: gl.constexpr = gl.SliceLayout(WITHOUT, sums_layout(FORM))
    even, odd = gl.split(x.reshape([x.shape[0], FORM.LANES, 2, 2]))
    four = gl.split(even) + gl.split(odd)
    found = ()
    for i in gl.static_range(4):
        found = found + (gl.expand_dims(gl.convert_layout(four[i], layout, assert_trivial=True), WITHOUT),)
    return found


@gluon.jit
def load_weights(w_ptr, H, TRANSPOSED: gl.constexpr, FORM: gl.constexpr):
    """The gates of w [3H, H], zeros past H: each [units, K] or transposed; in float32 a tuple of [1, units, lanes]."""
    layout: gl.constexpr = weights_layout(FORM, TRANSPOSED)
    WIDTH: gl.constexpr = FORM.UNITS if FORM.LANES == 0 else 4 * FORM.LANES
    unit = unit_at(gl.expand_dims(gl.arange(0, FORM.UNITS, layout=gl.SliceLayout(1, layout)), 1), FORM.LANES)
    weights = ()
    for gate in gl.static_range(3):
        found = ()
        for piece in gl.static_range(FORM.UNITS // WIDTH):
            k = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout)), 0) + piece * WIDTH
            k = unit_at(k, FORM.LANES)
            offs = k * H + unit if TRANSPOSED else unit * H + k
            w = gl.load(w_ptr + gate * H * H + offs, mask=(unit < H) & (k < H), other=0.0)
            if FORM.LANES == 0:
                found = gl.convert_layout(w, gl.DotOperandLayout(0, matrix_layout(FORM.WARPS), 2))
            else:
                found += in_four(w, 0, FORM)
        weights += (found,)
    return weights


@gluon.jit
def hand_over(shared, x, FORM: gl.constexpr):
    """Put own [rows, units] where all warps read it."""
    UNITS: gl.constexpr = FORM.UNITS
    if FORM.LANES == 0:
        if FORM.ROWS == 4:
            x = gl.join(x, x).permute([0, 2, 1]).reshape([8, UNITS])
        x = x.reshape([x.shape[0], UNITS // 16, 8, 2]).permute([1, 3, 2, 0])
        shared.store(x.reshape(shared.shape))
    else:
        shared.store(x)


@gluon.jit
def received(shared, FORM: gl.constexpr):
    """All of it, as a factor; in float32 a tuple of [rows, 1, lanes]."""
    LANES: gl.constexpr = FORM.LANES
    layout: gl.constexpr = factor_layout(FORM)
    if LANES == 0:
        return shared.load(layout)
    else:
        found = ()
        for piece in gl.static_range(FORM.UNITS // (4 * LANES)):
            x = shared.slice(piece * 4 * LANES, 4 * LANES, dim=1).load(layout)
            found = found + in_four(x, 1, FORM)
        return found


@gluon.jit
def product(w, x, FORM: gl.constexpr):
    """One gate's weights times a factor: [units, rows]; in float32 [rows, units, lanes], the sums over a lane's K."""
    if FORM.LANES == 0:
        return mma_v2(w, x, gl.zeros(size_of_factor(FORM), gl.float32, layout=matrix_layout(FORM.WARPS)))
    else:
        parts = w[0] * x[0]
        for k in gl.static_range(1, len(w)):  # a loop, so that each multiply-add is one FMA; of tl.sum's only some are
            parts += w[k] * x[k]
        return parts


@gluon.jit
def own_sums(parts, FORM: gl.constexpr):
    """Own [rows, units] of a product."""
    ROWS: gl.constexpr = FORM.ROWS
    UNITS: gl.constexpr = FORM.UNITS
    LANES: gl.constexpr = FORM.LANES
    own: gl.constexpr = own_layout(FORM)
    if LANES == 0:
        if ROWS == 4:
            parts = gl.split(parts.reshape([UNITS // 16, 2, 8, 4, 2]))[0]
        else:
            parts = parts.reshape([UNITS // 16, 2, 8, ROWS])
        return gl.convert_layout(parts.permute([3, 0, 2, 1]).reshape([ROWS, UNITS]), own, assert_trivial=True)
    else:
        for turn in gl.static_range(turns(FORM)):
            parts = parts.reshape([ROWS, UNITS, LANES >> (turn + 1), 2])
            parts = gl.sum(gl.convert_layout(parts, swapped_layout(FORM, turn + 1)), 3)
        return gl.convert_layout(gl.sum(parts, 2), own, assert_trivial=True)


@gluon.jit
def own_tile(direction, batch, strides, FORM: gl.constexpr):
    """The rows and units of each thread, the units, and the visits of this program."""
    layout: gl.constexpr = own_layout(FORM)
    row = gl.expand_dims(gl.arange(0, FORM.ROWS, layout=gl.SliceLayout(1, layout)), 1) + gl.program_id(0) * FORM.ROWS
    unit = gl.expand_dims(gl.arange(0, FORM.UNITS, layout=gl.SliceLayout(0, layout)), 0)
    lengths, longest = visits.lengths_of(row, row >= 0, batch, FORM.ROWS, 1)
    return visits.tile_of(row, unit, lengths[0], direction, batch, strides), unit, longest


@gluon.jit(
    do_not_specialize=FORWARD_SCALARS,
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
    launch_metadata=metadata.small_forward,
)
def small_forward(
    T,
    B,
    H,
    D,
    # how the batch lies in memory
    stride_row,  # rows from one timestep to the next in dense rows: B, or 1 in a packed batch, as in kernels/step.py
    packed,
    has_lengths,
    stride_rzn_t,  # in rows of D * 3H
    stride_rzn_b,
    # options
    save_gates,
    has_bias,
    # one row for each timestep and row of the batch
    rzn_ptr,  # [T, B, D, 3H] x_proj, which with save_gates r, z, n overwrite
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    # the state before and after
    h_0_ptr,  # [D, B, H]
    h_n_ptr,  # [D, B, H]
    # weights
    w_ptr,  # [3H, H] W_hh
    w_reverse_ptr,
    b_ptr,  # [3H] b_hh
    b_reverse_ptr,
    # which rows run when
    lengths_ptr,  # [B] int32: how many timesteps each row runs, 1 .. T, read with has_lengths
    resets_ptr,  # [T, B] int8: not 0 where a row's step begins a new sequence; read with RESETS
    starts_ptr,  # [T] int32: the first row of each timestep of a packed batch
    # how it is compiled
    ROWS: gl.constexpr,
    UNITS: gl.constexpr,  # at least H; K as well
    WARPS: gl.constexpr,
    LANES: gl.constexpr,  # that share a unit; 0: matrix instructions
    VECTOR: gl.constexpr,  # units that a thread reads and writes at once: they divide H, and rows are aligned
    AHEAD: gl.constexpr,  # visits ahead of which x_proj is asked for, 1 or 2
    RESETS: gl.constexpr,
):
    FORM: gl.constexpr = Form(ROWS, UNITS, WARPS, LANES)
    dtype: gl.constexpr = rzn_ptr.dtype.element_ty
    H = H // VECTOR * VECTOR  # tells the compiler that VECTOR divides H
    batch = visits.Batch(T, B, packed, has_lengths, lengths_ptr, resets_ptr, starts_ptr)
    direction = gl.program_id(2)
    memory = visits.memory_of(H, D, stride_row, stride_rzn_t, rzn_ptr, q_ptr, y_ptr)

    # this program's weights, biases and tile
    w_r, w_z, w_n = load_weights(gl.where(direction == 0, w_ptr, w_reverse_ptr), H, False, FORM)
    h_shared = gl.allocate_shared_memory(dtype, size_of_factor(FORM), shared_layout(FORM))
    tile, unit, longest = own_tile(direction, batch, visits.Strides(H, D, stride_rzn_b, 0, 0, 0), FORM)
    is_unit = unit < H
    b_ptr = gl.where(direction == 0, b_ptr, b_reverse_ptr)
    b_hr, b_hz, b_hn = visits.load_biases(b_ptr, unit, is_unit & (has_bias != 0), H)

    # the state before the first visit; x_proj of the first AHEAD visits
    t = gl.where(direction == 0, 0, longest - 1)
    step_t = gl.where(direction == 0, 1, -1)
    at = visits.places_of(t, step_t, AHEAD + 1, batch)
    anew = cleared(t, tile, direction, batch, RESETS)
    h = gl.load(h_0_ptr + tile.of_state, mask=tile.inside & ~anew, other=0.0).to(gl.float32)
    x = ()
    for i in gl.static_range(AHEAD):
        runs_first = (t + i * step_t < tile.length) & (i < longest) & is_unit
        x += (load_rzn(timestep(memory.rzn, at[i], VECTOR) + tile.of_x, runs_first, H),)

    for visit in range(longest):
        # load: what a later visit needs besides h
        t_ahead = t + AHEAD * step_t
        at_last = place_of(t_ahead + step_t, batch)
        runs_ahead = (t_ahead < tile.length) & (visit + AHEAD < longest) & is_unit
        x_ahead = load_rzn(timestep(memory.rzn, at[AHEAD], VECTOR) + tile.of_x, runs_ahead, H)
        clear = cleared(t + step_t, tile, direction, batch, RESETS)

        # hand h over, product
        hand_over(h_shared, h.to(dtype), FORM)
        h_all = received(h_shared, FORM)
        a_r = product(w_r, h_all, FORM)
        a_z = product(w_z, h_all, FORM)
        q = product(w_n, h_all, FORM)

        # gates
        x_r, x_z, x_n = x[0]
        a_r = own_sums(a_r, FORM) + (x_r.to(gl.float32) + b_hr)
        a_z = own_sums(a_z, FORM) + (x_z.to(gl.float32) + b_hz)
        q = own_sums(q, FORM) + b_hn
        h_new, r, z, n = gru_gates(a_r, a_z, x_n.to(gl.float32), q, h)
        runs = (t < tile.length) & is_unit
        h = gl.where(runs, h_new, h)

        # save. An element of x_proj was loaded by the lanes of one warp, in one instruction, and is used by now.
        save(memory, at[0], tile, h, r, z, n, q, runs, save_gates, VECTOR)
        h = gl.where(clear & is_unit, 0.0, h)
        t, at, x = t + step_t, at[1:] + (at_last,), x[1:] + (x_ahead,)

    gl.store(h_n_ptr + tile.of_state, h.to(dtype), mask=tile.inside)


@gluon.jit
def load_own(memory, dy, at, at_before, t, t_before, tile, exists, VECTOR: gl.constexpr):
    """What gate gradients are made from besides dh, in the storage dtype: dy, r, z, n, q, h_prev. exists: whether
    there is this visit."""
    runs = (t < tile.length) & exists
    goes_on = runs & (t_before >= 0) & (t_before < tile.length)  # at its first visit a row comes from h_0
    dy, r, z, n, q = load_saved(memory, dy, at, tile, runs, VECTOR)
    h_prev = gl.load(timestep(memory.y, at_before, VECTOR) + tile.of_y, mask=goes_on, other=0.0)
    return dy, r, z, n, q, h_prev


@gluon.jit(
    do_not_specialize=BACKWARD_SCALARS,
    do_not_specialize_on_alignment=ANY_ALIGNMENT,
    launch_metadata=metadata.small_backward,
)
def small_backward(
    T,
    B,
    H,
    D,
    # how the batch lies in memory
    stride_row,
    packed,
    has_lengths,
    stride_rzn_t,
    stride_rzn_b,
    size_rows,  # rows of one direction in dgates
    stride_dy_t,
    stride_dy_b,
    stride_dy_h,  # with VECTOR > 1 it is 1
    # option
    want_dh,
    # one row for each timestep and row of the batch, and the states
    dy_ptr,  # [T, B, D, H]
    dh_n_ptr,  # [D, B, H] float32
    rzn_ptr,  # [T, B, D, 3H] r, z, n
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    h_0_ptr,  # [D, B, H]
    dgates_ptr,  # [D, T, B, 4H] dq, dr, dz, dn
    dh_0_ptr,  # [D, B, H] float32
    # weights
    w_ptr,  # [3H, H] W_hh
    w_reverse_ptr,
    # which rows run when, and how it is compiled, as in forward
    lengths_ptr,
    resets_ptr,
    starts_ptr,
    ROWS: gl.constexpr,
    UNITS: gl.constexpr,
    WARPS: gl.constexpr,
    LANES: gl.constexpr,
    VECTOR: gl.constexpr,
    AHEAD: gl.constexpr,
    RESETS: gl.constexpr,
):
    FORM: gl.constexpr = Form(ROWS, UNITS, WARPS, LANES)
    dtype: gl.constexpr = rzn_ptr.dtype.element_ty
    H = H // VECTOR * VECTOR  # tells the compiler that VECTOR divides H
    batch = visits.Batch(T, B, packed, has_lengths, lengths_ptr, resets_ptr, starts_ptr)
    direction = gl.program_id(2)
    memory = visits.memory_of(H, D, stride_row, stride_rzn_t, rzn_ptr, q_ptr, y_ptr)
    dys = visits.Series(dy_ptr, stride_dy_t)
    dgates = visits.Series(
        dgates_ptr + visits.times(direction * size_rows, 4 * H // VECTOR) * VECTOR, stride_row * (4 * H)
    )

    # this program's weights and tile
    w_r, w_z, w_n = load_weights(gl.where(direction == 0, w_ptr, w_reverse_ptr), H, True, FORM)
    dr_shared = gl.allocate_shared_memory(dtype, size_of_factor(FORM), shared_layout(FORM))
    dz_shared = gl.allocate_shared_memory(dtype, size_of_factor(FORM), shared_layout(FORM))
    dq_shared = gl.allocate_shared_memory(dtype, size_of_factor(FORM), shared_layout(FORM))
    stride_dy_b = stride_dy_b // VECTOR * VECTOR
    strides = visits.Strides(H, D, stride_rzn_b, stride_dy_b, stride_dy_h if VECTOR == 1 else 1, 0)
    tile, unit, longest = own_tile(direction, batch, strides, FORM)
    is_unit = unit < H

    # dh_n is what the first visit carries; what the first AHEAD visits need besides dh
    dh = gl.load(dh_n_ptr + tile.of_state, mask=tile.inside, other=0.0)
    h_0 = gl.load(h_0_ptr + tile.of_state, mask=tile.inside, other=0.0)
    t = gl.where(direction == 0, longest - 1, 0)
    step_t = gl.where(direction == 0, -1, 1)
    at = visits.places_of(t, step_t, AHEAD + 2, batch)
    given = ()
    for i in gl.static_range(AHEAD):
        t_i = t + i * step_t
        given += (load_own(memory, dys, at[i], at[i + 1], t_i, t_i + step_t, tile, (i < longest) & is_unit, VECTOR),)

    for visit in range(longest):
        # load: what a later visit needs besides dh
        t_ahead = t + AHEAD * step_t
        t_later = t_ahead + step_t
        at_last = place_of(t_later + step_t, batch)
        exists = (visit + AHEAD < longest) & is_unit
        given_ahead = load_own(memory, dys, at[AHEAD], at[AHEAD + 1], t_ahead, t_later, tile, exists, VECTOR)
        clear = cleared(t, tile, direction, batch, RESETS) & is_unit

        # gates: dh is the product and what is carried
        dy, r, z, n, q, h_prev = given[0]
        dh += dy.to(gl.float32)
        runs = (t < tile.length) & is_unit
        begins = (t + step_t < 0) | (t + step_t >= tile.length)
        h_prev = gl.where(clear, 0.0, gl.where(begins, h_0, h_prev).to(gl.float32))
        z = z.to(gl.float32)
        dq, dr, dz, dn = gru_gate_gradients(dh, r.to(gl.float32), z, n.to(gl.float32), q.to(gl.float32), h_prev)
        dh = gl.where(runs, dh * z, dh)
        dr = gl.where(runs, dr, 0.0).to(dtype)
        dz = gl.where(runs, dz, 0.0).to(dtype)
        dq = gl.where(runs, dq, 0.0).to(dtype)

        # hand the gate gradients over
        hand_over(dr_shared, dr, FORM)
        hand_over(dz_shared, dz, FORM)
        hand_over(dq_shared, dq, FORM)

        # save
        store_gradients(timestep(dgates, at[0], VECTOR) + tile.of_dgates, dq, dr, dz, dn, runs, H)

        # product
        parts = product(w_r, received(dr_shared, FORM), FORM)
        parts += product(w_z, received(dz_shared, FORM), FORM)
        parts += product(w_n, received(dq_shared, FORM), FORM)
        dh = gl.where(clear, 0.0, dh + own_sums(parts, FORM))
        t, at, given = t + step_t, at[1:] + (at_last,), given[1:] + (given_ahead,)

    gl.store(dh_0_ptr + tile.of_state, dh, mask=tile.inside & (want_dh != 0))
