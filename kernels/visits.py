"""What the kernels of whole sequences share: which rows run at each visit, and where a timestep lies in memory.

A direction visits its timesteps in turn: the forward one t = 0 .. T - 1, the reverse one t = T - 1 .. 0. A backward
pass visits them in the opposite order. Which rows run at a visit is the rule of kernels/rows.py. A loop is as long as
the longest row of its tiles, and the reverse direction begins at that row's last timestep.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .exchange import MULTIPLY
from .gates import load_rzn, store_rzn


class Batch(NamedTuple):
    """Which rows run when, and where they lie: arguments of the kernels, under the same names."""

    T: Any
    B: Any
    packed: Any
    has_lengths: Any
    lengths_ptr: Any
    resets_ptr: Any
    starts_ptr: Any


class Series(NamedTuple):
    """A tensor of all timesteps."""

    ptr: Any
    step: Any  # elements from one timestep to the next


class Memory(NamedTuple):
    """What forward leaves behind for each timestep."""

    H: Any
    rzn: Any
    q: Any
    y: Any


class Strides(NamedTuple):
    """Sizes and strides that locate a row in a timestep: arguments of the kernels, under the same names. Forward passes
    0 for the last three."""

    H: Any
    D: Any
    stride_rzn_b: Any
    stride_dy_b: Any
    stride_dy_h: Any
    size_rows: Any


class Tile(NamedTuple):
    """A row tile of a program: the row of each element that a thread owns, and where the element lies."""

    row: Any  # in the batch
    length: Any  # how many timesteps the row runs; 0 past the batch
    inside: Any  # whether the batch has the row and the layer the unit
    of_x: Any  # from the beginning of a timestep: in rzn
    of_y: Any  # in y and q
    of_dy: Any  # in dy
    of_dgates: Any  # in dgates
    of_state: Any  # in h_0, h_n, dh_n, dh_0


@gluon.jit
def memory_of(H, D, stride_row, stride_rzn_t, rzn_ptr, q_ptr, y_ptr):
    step_y = stride_row * D * H
    return Memory(H, Series(rzn_ptr, stride_rzn_t * D * (3 * H)), Series(q_ptr, step_y), Series(y_ptr, step_y))


@gluon.jit
def tile_of(row, unit, length, direction, batch, strides):
    """The tile of these rows and units. direction: int32 where a timestep has fewer than 2^31 elements, else int64."""
    H, D, stride_rzn_b, stride_dy_b, stride_dy_h, size_rows = strides
    b = row.to(direction.dtype)
    of_x = (b.to(gl.int64) * stride_rzn_b * D + direction) * (3 * H) + unit
    of_y = (b * D + direction) * H + unit
    of_dy = b.to(gl.int64) * stride_dy_b + (direction.to(gl.int64) * H + unit) * stride_dy_h
    of_dgates = (direction * size_rows + b) * (4 * H) + unit
    of_state = (direction * batch.B + b) * H + unit
    return Tile(row, length, (row < batch.B) & (unit < H), of_x, of_y, of_dy, of_dgates, of_state)


@gluon.jit
def lengths_of(rows, is_unit, batch, ROWS: gl.constexpr, TILES: gl.constexpr):
    """How many timesteps each element of each tile runs: those past the batch, and units past H, none. And the visits
    of the group: the length of its longest row, the same for programs whose units are all past H."""
    lengths = ()
    longest = batch.T if batch.has_lengths == 0 else 0
    for i in gl.static_range(TILES):
        inside = rows + i * ROWS < batch.B
        given = gl.load(batch.lengths_ptr + rows + i * ROWS, mask=inside & (batch.has_lengths != 0), other=0)
        if batch.has_lengths != 0:
            longest = gl.maximum(longest, gl.max(gl.max(given, 0), 0))
        runs = gl.where(batch.has_lengths != 0, given, gl.where(inside, batch.T, 0))
        lengths += (gl.where(is_unit, runs, 0),)
    return lengths, longest


@gluon.jit
def cleared(t, tile, direction, batch, RESETS: gl.constexpr):
    """For each element: does a reset clear the state that enters step t? The reverse direction enters it from t + 1.
    Outside of its steps a row has no resets."""
    if RESETS:
        each = tile.row + gl.zeros_like(tile.length)  # as wide as the mask
        boundary = t + direction
        ptrs = batch.resets_ptr + times(boundary, batch.B) + each
        return gl.load(ptrs, mask=(t >= 0) & (boundary < tile.length), other=0) != 0
    else:
        return gl.zeros_like(tile.length) != 0


@gluon.jit
def times(a, b):
    """The product of two int32 as int64 in one instruction; in a loop the compiler takes four for the same."""
    return gl.inline_asm_elementwise(MULTIPLY, "=l,r,r", [a, b], dtype=gl.int64, is_pure=True, pack=1)


@gluon.jit
def place_of(t, batch):
    """Where timestep t lies: in a packed batch the first row of it, else t itself. Any number for a t outside."""
    return gl.load(batch.starts_ptr + t, mask=(batch.packed != 0) & (t >= 0) & (t < batch.T), other=t)


@gluon.jit
def places_of(t, step_t, VISITS: gl.constexpr, batch):
    """Where the timesteps of a visit at t and of those after it lie."""
    places = ()
    for i in gl.static_range(VISITS):
        places += (place_of(t + i * step_t, batch),)
    return places


@gluon.jit
def timestep(series, at, VECTOR: gl.constexpr = 1):
    """Where a timestep begins. VECTOR: a divisor of the steps from one to the next, which keeps loads aligned."""
    return series.ptr + times(at, series.step // VECTOR) * VECTOR


@gluon.jit
def load_biases(b_ptr, unit, mask, H):
    """b_hr, b_hz, b_hn of own units, in float32."""
    r, z, n = load_rzn(b_ptr + unit, mask, H)
    return r.to(gl.float32), z.to(gl.float32), n.to(gl.float32)


@gluon.jit
def load_saved(memory, dy, at, tile, runs, VECTOR: gl.constexpr = 1):
    """dy, r, z, n, q: all that makes gate gradients but dh of the visit after and h_prev. In the storage dtype."""
    dy = gl.load(timestep(dy, at, VECTOR) + tile.of_dy, mask=runs, other=0.0)
    r, z, n = load_rzn(timestep(memory.rzn, at, VECTOR) + tile.of_x, runs, memory.H)
    q = gl.load(timestep(memory.q, at, VECTOR) + tile.of_y, mask=runs, other=0.0)
    return dy, r, z, n, q


@gluon.jit
def save(memory, at, tile, h, r, z, n, q, runs, save_gates, VECTOR: gl.constexpr = 1):
    """Store y, and with save_gates what backward needs."""
    dtype: gl.constexpr = memory.y.ptr.dtype.element_ty
    gl.store(timestep(memory.y, at, VECTOR) + tile.of_y, h.to(dtype), mask=runs)
    saves = runs & (save_gates != 0)
    store_rzn(timestep(memory.rzn, at, VECTOR) + tile.of_x, r, z, n, saves, memory.H)
    gl.store(timestep(memory.q, at, VECTOR) + tile.of_y, q.to(dtype), mask=saves)
