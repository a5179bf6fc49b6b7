"""One launch per sequence, each way, of layers so small that one program holds all of W_h: nothing is exchanged.

The equations are kernels/sequence.py's, and so are its rule for rows and what is saved for backward. The grid is (row
tiles, 1, directions): a program owns all hidden units of ROWS rows. W_h is in registers for all timesteps; own units
and rows are too, in float32. What is multiplied by W_h (h_prev; backward, the gate gradients of the visit after) goes
through shared memory, so that every warp reads all of it. Two barriers a visit: before it is read, and before it is
written again. x_proj (backward: dy, the gates, h_prev) is asked for two visits ahead, for DRAM takes longer than one.

Half precision, by matrix instructions (LANES = 0). Units are the left factor of m16n8k16, 16 a warp; rows are the right
one, of which 8 are enough, or 4 side by side with copies of themselves. The three sums of a unit and row lie in one
thread. The instruction gives a thread the units g and g + 8 of a block of 16, and memory wants neighbours: so unit
2 g + i of a block stands at place g + 8 i of both factors, and a thread loads and stores pairs of units.

float32, by FMA: as exact as float32 can be. LANES lanes of a warp share their units, and each has its pieces of K, 4
at a time: a load of 16 bytes, no two of them from one bank. A value of h serves all units of a thread. Then the lanes
add up: at each turn two lanes swap half of their sums, so that in the end each has units (or rows) of its own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from . import metadata
from .gates import gru_gate_gradients, gru_gates
from .sequence import cleared, lengths_of, load_three, place_of, times

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


@gluon.constexpr_function
def _bits(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def _powers(n, dimension, rank, first=1):
    """Bases of a layout: the bits of n places along a dimension, `first` apart."""
    return [[first << i if d == dimension else 0 for d in range(rank)] for i in range(_bits(n))]


@gluon.constexpr_function
def terms_layout(form):
    """float32: of a piece [rows, units, 4 lanes] what a thread multiplies: neighbouring units, so that those of a warp
    are too."""
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
    """float32: of [rows, units, lanes >> turn, 2] what a thread has once lanes have swapped: both of two parts of K, in
    place of both of two units (or rows)."""
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
    """Without bank conflicts in loads. [units, rows] of 16 rows are 32 bytes a unit: every other four are turned."""
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
    even, odd = gl.split(x.reshape([x.shape[0], FORM[3], 2, 2]))
    four = gl.split(even) + gl.split(odd)
    found = ()
    for i in gl.static_range(4):
        found = found + (gl.expand_dims(gl.convert_layout(four[i], layout, assert_trivial=True), WITHOUT),)
    return found


@gluon.jit
def load_weights(
    w_ptr,  # [3H, H]
    gate,
    H,
    TRANSPOSED: gl.constexpr,
    FORM: gl.constexpr,
):
    """One gate's weights [units, K], or their transpose, zeros past H; in float32 a tuple of [1, units, lanes]."""
    UNITS: gl.constexpr = FORM[1]
    LANES: gl.constexpr = FORM[3]
    layout: gl.constexpr = weights_layout(FORM, TRANSPOSED)
    WIDTH: gl.constexpr = UNITS if LANES == 0 else 4 * LANES
    unit = unit_at(gl.expand_dims(gl.arange(0, UNITS, layout=gl.SliceLayout(1, layout)), 1), LANES)
    found = ()
    for piece in gl.static_range(UNITS // WIDTH):
        k = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout)), 0) + piece * WIDTH
        k = unit_at(k, LANES)
        offs = k * H + unit if TRANSPOSED else unit * H + k
        w = gl.load(w_ptr + gate * H * H + offs, mask=(unit < H) & (k < H), other=0.0)
        if LANES == 0:
            found = gl.convert_layout(w, gl.DotOperandLayout(0, matrix_layout(FORM[2]), 2))
        else:
            found = found + in_four(w, 0, FORM)
    return found


@gluon.jit
def hand_over(shared, x, FORM: gl.constexpr):
    """Put own [rows, units] where all warps read it."""
    UNITS: gl.constexpr = FORM[1]
    if FORM[3] == 0:
        if FORM[0] == 4:
            x = gl.join(x, x).permute([0, 2, 1]).reshape([8, UNITS])
        x = x.reshape([x.shape[0], UNITS // 16, 8, 2]).permute([1, 3, 2, 0])
        shared.store(x.reshape(shared.shape))
    else:
        shared.store(x)


@gluon.jit
def received(shared, FORM: gl.constexpr):
    """All of it, as a factor; in float32 a tuple of [rows, 1, lanes]."""
    LANES: gl.constexpr = FORM[3]
    layout: gl.constexpr = factor_layout(FORM)
    if LANES == 0:
        return shared.load(layout)
    else:
        found = ()
        for piece in gl.static_range(FORM[1] // (4 * LANES)):
            x = shared.slice(piece * 4 * LANES, 4 * LANES, dim=1).load(layout)
            found = found + in_four(x, 1, FORM)
        return found


@gluon.jit
def product(w, x, FORM: gl.constexpr):
    """One gate's weights times a factor: [units, rows]; in float32 [rows, units, lanes], the sums over a lane's K."""
    if FORM[3] == 0:
        return mma_v2(w, x, gl.zeros(size_of_factor(FORM), gl.float32, layout=matrix_layout(FORM[2])))
    else:
        parts = w[0] * x[0]
        for k in gl.static_range(1, len(w)):  # in this order, where a sum of the compiler's would not be fused
            parts += w[k] * x[k]
        return parts


@gluon.jit
def own_sums(parts, FORM: gl.constexpr):
    """Own [rows, units] of a product."""
    ROWS: gl.constexpr = FORM[0]
    UNITS: gl.constexpr = FORM[1]
    LANES: gl.constexpr = FORM[3]
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
def time_step(ptr, at, step, VECTOR: gl.constexpr):
    """Where a timestep lies; step: elements from one to the next, a multiple of VECTOR."""
    return ptr + times(at, step // VECTOR) * VECTOR


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
    stride_row,  # rows from one time step to the next in dense rows: B, or 1 in a packed batch, as in kernels/step.py
    packed,
    has_lengths,
    stride_rzn_t,  # in rows of D * 3H
    stride_rzn_b,
    save_gates,
    has_bias,
    rzn_ptr,  # [T, B, D, 3H] x_proj, which with save_gates r, z, n overwrite
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    h_0_ptr,  # [D, B, H]
    h_n_ptr,  # [D, B, H]
    w_ptr,  # [3H, H] W_hh
    w_reverse_ptr,
    b_ptr,  # [3H] b_hh
    b_reverse_ptr,
    lengths_ptr,  # [B] int32: how many time steps each row runs, 1 .. T, read with has_lengths
    resets_ptr,  # [T, B] int8: not 0 where a row's step begins a new sequence; read with RESETS
    starts_ptr,  # [T] int32: the first row of each time step of a packed batch
    ROWS: gl.constexpr,
    UNITS: gl.constexpr,  # at least H; K as well
    WARPS: gl.constexpr,
    LANES: gl.constexpr,  # that share a unit; 0: matrix instructions
    VECTOR: gl.constexpr,  # units that a thread reads and writes at once: they divide H, and rows are aligned
    AHEAD: gl.constexpr,  # visits ahead of which x_proj is asked for, 1 or 2
    RESETS: gl.constexpr,
):
    dtype: gl.constexpr = rzn_ptr.dtype.element_ty
    FORM: gl.constexpr = (ROWS, UNITS, WARPS, LANES)
    own: gl.constexpr = own_layout(FORM)
    H = H // VECTOR * VECTOR
    direction = gl.program_id(2)
    w_ptr = gl.where(direction == 0, w_ptr, w_reverse_ptr)
    b_ptr = gl.where(direction == 0, b_ptr, b_reverse_ptr)
    w_r = load_weights(w_ptr, 0, H, False, FORM)
    w_z = load_weights(w_ptr, 1, H, False, FORM)
    w_n = load_weights(w_ptr, 2, H, False, FORM)
    h_shared = gl.allocate_shared_memory(dtype, size_of_factor(FORM), shared_layout(FORM))

    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, own)), 1) + gl.program_id(0) * ROWS
    unit = gl.expand_dims(gl.arange(0, UNITS, layout=gl.SliceLayout(0, own)), 0)
    is_unit = unit < H
    b_mask = is_unit & (has_bias != 0)
    b_hr = gl.load(b_ptr + unit, mask=b_mask, other=0.0).to(gl.float32)
    b_hz = gl.load(b_ptr + H + unit, mask=b_mask, other=0.0).to(gl.float32)
    b_hn = gl.load(b_ptr + 2 * H + unit, mask=b_mask, other=0.0).to(gl.float32)
    lengths, longest = lengths_of(row, row >= 0, B, T, has_lengths, lengths_ptr, ROWS, 1)
    length = lengths[0]

    # rows of x_proj and of y, in elements from those of a time step
    of_x = (row.to(gl.int64) * stride_rzn_b * D + direction) * (3 * H) + unit
    of_y = (row * D + direction) * H + unit
    of_state = (direction * B + row) * H + unit
    step_x = stride_rzn_t * D * (3 * H)
    step_y = stride_row * D * H

    # the state that the first visit begins with; x_proj of the first two
    t = gl.where(direction == 0, 0, longest - 1)
    anew = cleared(t, row, length, direction, B, resets_ptr, RESETS)
    h = gl.load(h_0_ptr + of_state, mask=(row < B) & is_unit & ~anew, other=0.0).to(gl.float32)
    step_t = gl.where(direction == 0, 1, -1)
    at = place_of(t, T, packed, starts_ptr)
    at_next = place_of(t + step_t, T, packed, starts_ptr)
    at_ahead = at_next
    x = load_three(time_step(rzn_ptr, at, step_x, VECTOR) + of_x, (t < length) & is_unit, H)
    if AHEAD == 2:
        mask_next = (t + step_t < length) & (longest > 1) & is_unit
        x_next = load_three(time_step(rzn_ptr, at_next, step_x, VECTOR) + of_x, mask_next, H)
        at_ahead = place_of(t + 2 * step_t, T, packed, starts_ptr)
    for visit in range(longest):
        # load
        t_ahead = t + AHEAD * step_t
        at_later = place_of(t_ahead + step_t, T, packed, starts_ptr)
        mask_ahead = (t_ahead < length) & (visit + AHEAD < longest) & is_unit
        x_ahead = load_three(time_step(rzn_ptr, at_ahead, step_x, VECTOR) + of_x, mask_ahead, H)
        clear = cleared(t + step_t, row, length, direction, B, resets_ptr, RESETS)

        # hand h over, product
        hand_over(h_shared, h.to(dtype), FORM)
        h_all = received(h_shared, FORM)
        a_r = product(w_r, h_all, FORM)
        a_z = product(w_z, h_all, FORM)
        q = product(w_n, h_all, FORM)

        # gates
        a_r = own_sums(a_r, FORM) + (x[0].to(gl.float32) + b_hr)
        a_z = own_sums(a_z, FORM) + (x[1].to(gl.float32) + b_hz)
        q = own_sums(q, FORM) + b_hn
        h_new, r, z, n = gru_gates(a_r, a_z, x[2].to(gl.float32), q, h)
        runs = (t < length) & is_unit
        h = gl.where(runs, h_new, h)

        # save. An element of x_proj was loaded by the lanes of one warp, in one instruction, and is used by now.
        gl.store(time_step(y_ptr, at, step_y, VECTOR) + of_y, h.to(dtype), mask=runs)
        saves = runs & (save_gates != 0)
        rzn = time_step(rzn_ptr, at, step_x, VECTOR) + of_x
        gl.store(rzn, r.to(dtype), mask=saves)
        gl.store(rzn + H, z.to(dtype), mask=saves)
        gl.store(rzn + 2 * H, n.to(dtype), mask=saves)
        gl.store(time_step(q_ptr, at, step_y, VECTOR) + of_y, q.to(dtype), mask=saves)
        h = gl.where(clear & is_unit, 0.0, h)
        if AHEAD == 2:
            x, x_next = x_next, x_ahead
            at, at_next = at_next, at_ahead
        else:
            x = x_ahead
            at = at_ahead
        t, at_ahead = t + step_t, at_later

    gl.store(h_n_ptr + of_state, h.to(dtype), mask=(row < B) & is_unit)


@gluon.jit
def load_own(
    dy_ptr, rzn_ptr, q_ptr, y_ptr, of_dy, of_x, of_y, at, at_before, t, t_before, length, mask,
    stride_dy_t, step_x, step_y, H, VECTOR: gl.constexpr,
):  # fmt: skip
    """What gate gradients are made from besides dh, in the storage dtype: dy, r, z, n, q, h_prev."""
    runs = (t < length) & mask
    goes_on = runs & (t_before >= 0) & (t_before < length)  # at its first visit a row comes from h_0
    dy = gl.load(time_step(dy_ptr, at, stride_dy_t, VECTOR) + of_dy, mask=runs, other=0.0)
    r, z, n = load_three(time_step(rzn_ptr, at, step_x, VECTOR) + of_x, runs, H)
    q = gl.load(time_step(q_ptr, at, step_y, VECTOR) + of_y, mask=runs, other=0.0)
    h_prev = gl.load(time_step(y_ptr, at_before, step_y, VECTOR) + of_y, mask=goes_on, other=0.0)
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
    stride_row,
    packed,
    has_lengths,
    stride_rzn_t,
    stride_rzn_b,
    size_rows,  # rows of one direction in dgates
    stride_dy_t,
    stride_dy_b,
    stride_dy_h,  # with VECTOR > 1 it is 1
    want_dh,
    dy_ptr,  # [T, B, D, H]
    dh_n_ptr,  # [D, B, H] float32
    rzn_ptr,  # [T, B, D, 3H] r, z, n
    q_ptr,  # [T, B, D, H]
    y_ptr,  # [T, B, D, H]
    h_0_ptr,  # [D, B, H]
    dgates_ptr,  # [D, T, B, 4H] dn, dr, dz, dq
    dh_0_ptr,  # [D, B, H] float32
    w_ptr,  # [3H, H] W_hh
    w_reverse_ptr,
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
    dtype: gl.constexpr = rzn_ptr.dtype.element_ty
    FORM: gl.constexpr = (ROWS, UNITS, WARPS, LANES)
    own: gl.constexpr = own_layout(FORM)
    H = H // VECTOR * VECTOR
    direction = gl.program_id(2)
    w_ptr = gl.where(direction == 0, w_ptr, w_reverse_ptr)
    w_r = load_weights(w_ptr, 0, H, True, FORM)
    w_z = load_weights(w_ptr, 1, H, True, FORM)
    w_n = load_weights(w_ptr, 2, H, True, FORM)
    dr_shared = gl.allocate_shared_memory(dtype, size_of_factor(FORM), shared_layout(FORM))
    dz_shared = gl.allocate_shared_memory(dtype, size_of_factor(FORM), shared_layout(FORM))
    dq_shared = gl.allocate_shared_memory(dtype, size_of_factor(FORM), shared_layout(FORM))

    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, own)), 1) + gl.program_id(0) * ROWS
    unit = gl.expand_dims(gl.arange(0, UNITS, layout=gl.SliceLayout(0, own)), 0)
    is_unit = unit < H
    lengths, longest = lengths_of(row, row >= 0, B, T, has_lengths, lengths_ptr, ROWS, 1)
    length = lengths[0]

    b = row.to(gl.int64)
    if VECTOR == 1:
        of_dy = b * stride_dy_b + (direction.to(gl.int64) * H + unit) * stride_dy_h
    else:
        of_dy = b * (stride_dy_b // VECTOR * VECTOR) + (direction.to(gl.int64) * H + unit)
    of_x = (b * stride_rzn_b * D + direction) * (3 * H) + unit
    of_y = (row * D + direction) * H + unit
    of_dgates = row * (4 * H) + unit
    of_state = (direction * B + row) * H + unit
    dgates_ptr += times(direction * size_rows, 4 * H // VECTOR) * VECTOR
    step_x = stride_rzn_t * D * (3 * H)
    step_y = stride_row * D * H
    step_dgates = stride_row * (4 * H)

    # dh_n is what the first visit carries; what the first two need besides dh
    dh = gl.load(dh_n_ptr + of_state, mask=(row < B) & is_unit, other=0.0)
    h_0 = gl.load(h_0_ptr + of_state, mask=(row < B) & is_unit, other=0.0)
    t = gl.where(direction == 0, longest - 1, 0)
    step_t = gl.where(direction == 0, -1, 1)
    at = place_of(t, T, packed, starts_ptr)
    at_next = place_of(t + step_t, T, packed, starts_ptr)
    at_ahead = at_next
    at_later = place_of(t + 2 * step_t, T, packed, starts_ptr)
    given = load_own(
        dy_ptr, rzn_ptr, q_ptr, y_ptr, of_dy, of_x, of_y, at, at_next, t, t + step_t, length, (longest > 0) & is_unit,
        stride_dy_t, step_x, step_y, H, VECTOR,
    )  # fmt: skip
    if AHEAD == 2:
        given_next = load_own(
            dy_ptr, rzn_ptr, q_ptr, y_ptr, of_dy, of_x, of_y, at_next, at_later, t + step_t, t + 2 * step_t, length,
            (longest > 1) & is_unit, stride_dy_t, step_x, step_y, H, VECTOR,
        )  # fmt: skip
        at_ahead = at_later
        at_later = place_of(t + 3 * step_t, T, packed, starts_ptr)
    for visit in range(longest):
        # load
        t_ahead = t + AHEAD * step_t
        at_last = place_of(t_ahead + 2 * step_t, T, packed, starts_ptr)
        given_ahead = load_own(
            dy_ptr, rzn_ptr, q_ptr, y_ptr, of_dy, of_x, of_y, at_ahead, at_later, t_ahead, t_ahead + step_t, length,
            (visit + AHEAD < longest) & is_unit, stride_dy_t, step_x, step_y, H, VECTOR,
        )  # fmt: skip
        clear = cleared(t, row, length, direction, B, resets_ptr, RESETS) & is_unit

        # gates: dh is the product and what is carried
        dy, r, z, n, q, h_prev = given
        dh += dy.to(gl.float32)
        runs = (t < length) & is_unit
        begins = (t + step_t < 0) | (t + step_t >= length)
        h_prev = gl.where(clear, 0.0, gl.where(begins, h_0, h_prev).to(gl.float32))
        z = z.to(gl.float32)
        dn, dr, dz, dq = gru_gate_gradients(dh, r.to(gl.float32), z, n.to(gl.float32), q.to(gl.float32), h_prev)
        dh = gl.where(runs, dh * z, dh)
        dr = gl.where(runs, dr, 0.0).to(dtype)
        dz = gl.where(runs, dz, 0.0).to(dtype)
        dq = gl.where(runs, dq, 0.0).to(dtype)

        # hand the gate gradients over
        hand_over(dr_shared, dr, FORM)
        hand_over(dz_shared, dz, FORM)
        hand_over(dq_shared, dq, FORM)

        # save
        dgates = time_step(dgates_ptr, at, step_dgates, VECTOR) + of_dgates
        gl.store(dgates, dn.to(dtype), mask=runs)
        gl.store(dgates + H, dr, mask=runs)
        gl.store(dgates + 2 * H, dz, mask=runs)
        gl.store(dgates + 3 * H, dq, mask=runs)

        # product
        parts = product(w_r, received(dr_shared, FORM), FORM)
        parts += product(w_z, received(dz_shared, FORM), FORM)
        parts += product(w_n, received(dq_shared, FORM), FORM)
        dh = gl.where(clear, 0.0, dh + own_sums(parts, FORM))
        if AHEAD == 2:
            given, given_next = given_next, given_ahead
            at, at_next = at_next, at_ahead
        else:
            given = given_ahead
            at = at_ahead
        t, at_ahead, at_later = t + step_t, at_later, at_last

    gl.store(dh_0_ptr + of_state, dh, mask=(row < B) & is_unit & (want_dh != 0))
