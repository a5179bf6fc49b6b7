"""What a plan costs, counted from its sizes: launches, bytes, flops. Nothing here is a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from .problem import BYTES, Problem
from .sequence import SequenceTiles

ROWS_AT_ONCE = 1 << 14  # with recompute: rows whose gates, and then gate gradients, are there at once
ROWS_OF_A_SUM = 128  # of a column sum's rows, how many one launch adds: see launch/products.py

Counts = tuple[tuple[str, int], ...]  # (what, how many)
TilesOfPass = Callable[[str, int], SequenceTiles]  # of "forward" or "backward" of so many directions


def steps_at_once(T: int, B: int) -> int:
    """Timesteps of a chunk of backward with recompute."""
    return min(T, max(1, ROWS_AT_ONCE // B))


def in_chunks(p: Problem) -> bool:
    """Whether backward goes chunk by chunk."""
    return p.recompute and not p.packed and steps_at_once(p.time, p.batch) < p.time


def chunks(p: Problem) -> int:
    """How many there are, in each direction."""
    return -(-p.time // steps_at_once(p.time, p.batch))


def partial_sums(rows: int) -> list[int]:
    """How many sums are left after each stage of a column sum but the last, which adds the last of these up."""
    found = []
    while rows > ROWS_OF_A_SUM:
        rows = -(-rows // ROWS_OF_A_SUM)
        found.append(rows)
    return found


def _column_sum_launches(rows: int) -> int:
    """One per stage, and one for the rows of a stage that are too few for a sum like the others."""
    before = [rows, *partial_sums(rows)]
    return len(before) + sum(n % ROWS_OF_A_SUM > 0 for n in before[:-1])


@dataclass(frozen=True)
class Launches:
    """Launches of one call by what they are; `forward` and `backward` begin with the recurrent ones.

    Counted for a contiguous input that needs no gradient, without dropout; h_0 is given and needs none. A view, an
    allocation or a change of shape launches nothing.
    """

    forward: Counts
    backward: Counts


@dataclass(frozen=True)
class Cost:
    """Bytes and flops. Of a packed batch the first three are a bound: as if every row ran at every timestep."""

    saved_bytes: int  # kept for backward beyond input, output, h_0 and weights
    peak_forward_bytes: int  # the most at once in forward beyond input, h_0, weights, output and h_n
    peak_backward_bytes: int  # the same in backward, what was saved included, gradients of weights and input not
    step_bytes: int  # read by all programs of one forward step of one layer, W_h once per row tile, h per column tile
    step_flops: int  # of that step's products


def step_launches(p: Problem) -> Launches:
    """Launches of backend `step`; tests/test_launches.py holds them against what really ran.

    "library product" is a matrix product of PyTorch's, "copy" any PyTorch launch that only moves data (cat, roll, flip,
    gather, cast), "host to device" a memcpy of a small index.
    """
    L, T, several = p.layers, p.time, p.time > 1
    forward = Counter({"step_forward": L * T})
    forward.update(_forward_launches(p) if several else {"copy": L > 1})
    forward["copy"] += L * several  # h_0 into the buffer that hands h on
    return Launches(_counted(forward), _counted(_backward_launches(p, _of_step)) if p.training else ())


def _of_step(visits: int, directions: int, want_dh_0: bool, last: bool) -> Mapping[str, int]:
    """Launches of a layer's backward in `step`; those of T = 1 give dh_0 in any case."""
    return {"step_backward": visits - (visits > 1 and not want_dh_0)}


def sequence_launches(p: Problem, tiles: TilesOfPass) -> Launches:
    """Launches of backend `sequence`, as `step_launches` counts them. A "padded copy" is a fill and a copy."""
    forward = Counter(_forward_launches(p))
    for what, n in _of_sequence("forward", tiles("forward", p.directions), p, p.time, p.directions).items():
        forward[what] += p.layers * n
    if not p.training:
        return Launches(_counted(forward), ())

    def recurrence(visits: int, directions: int, want_dh_0: bool, last: bool) -> Mapping[str, int]:
        found = Counter(_of_sequence("backward", tiles("backward", directions), p, visits, directions))
        found["copy"] += last and _narrow(p)  # dh_n in float32, in which dh comes from the chunk after it
        return found

    return Launches(_counted(forward), _counted(_backward_launches(p, recurrence)))


def _of_sequence(kind: str, tiles: SequenceTiles, p: Problem, visits: int, directions: int) -> Counter[str]:
    """A pass of one layer: its launches, the fill before each, W_hh as the kernel reads it."""
    fits = (tiles.programs * tiles.block_h, tiles.units) == (p.hidden_size, p.hidden_size)
    found = Counter({"padded copy": directions * (not fits), "copy": directions * (fits and kind == "backward")})
    if not tiles.exchange:
        found[f"one_program_{kind}"] = 1
        return found
    each = tiles.visits_per_launch(kind, p.dtype, visits, visits * p.batch, p.hidden_size, directions)
    launches = -(-visits // each) * tiles.row_launches(p.batch) * (directions // tiles.directions)
    found[f"sequence_{kind}"] = launches
    found["fill"] = launches * (1 + (tiles.programs * tiles.block_h < tiles.units))  # sentinels, zeros in the padding
    return found


def _forward_launches(p: Problem) -> Counter[str]:
    """The projection of every layer, and the layers' h_n put together."""
    both = p.directions == 2  # W_i and b_i side by side
    return Counter({"library product": p.layers, "copy": p.layers * both * (1 + p.bias) + (p.layers > 1)})


# (visits, directions, want_dh_0, last): launches of a backward, `last` where dh_n is the caller's
Recurrence = Callable[[int, int, bool, bool], Mapping[str, int]]


def _backward_launches(p: Problem, recurrence: Recurrence) -> Counter[str]:
    if in_chunks(p):
        return _backward_launches_in_chunks(p, recurrence)
    L, D, bias = p.layers, p.directions, p.bias
    parts = 2 if p.time > 1 and not p.packed else 1  # of h_prev: in a dense batch y and h_0 apart
    found = Counter({what: L * n for what, n in recurrence(p.time, D, False, True).items()})
    # per direction: dW_i; dW_h; per inner layer dx
    found["library product"] += L * D * (1 + parts) + (L - 1) * D
    # per direction: dW_i into order r z n; the two db put together (and cast); h_prev gathered; W_i for dx
    found["copy"] += L * D * (1 + bias * (2 + _narrow(p)) + p.packed * 2) + (L - 1) * D
    found["column sum"] += L * D * bias * _column_sum_launches(p.time * p.batch)
    found["host to device"] += L * D * p.packed
    if (
        p.recompute
    ):  # x_proj, W_i and b_i side by side for it; h_prev gathered; h_prev W_h^T, and q's copy, of each part
        found["library product"] += L * (1 + D * parts)
        found["copy"] += L * ((D == 2) * (1 + bias) + D * (p.packed * 2 + parts))
        found["element-wise"] += L * D * parts * 4
    return found


def _backward_launches_in_chunks(p: Problem, recurrence: Recurrence) -> Counter[str]:
    L, D, T, B, bias = p.layers, p.directions, p.time, p.batch, p.bias
    steps = steps_at_once(T, B)
    weights = 2 + 2 * bias
    found: Counter[str] = Counter()
    for direction in range(D):
        for stop in range(T, 0, -steps):
            length, first, last = min(stop, steps), stop <= steps, stop == T
            parts = 2 if length > 1 else 1
            for what, n in recurrence(length, 1, not first, last).items():  # dh of h_0 is not wanted
                found[what] += L * n
            # x_proj; h_prev W_h^T and dW_h of each part; dW_i; per inner layer dx
            found["library product"] += L * (2 + 2 * parts) + (L - 1)
            # x, y, dy turned round, or y of one direction; h of the visit before
            found["copy"] += L * (3 if direction else D == 2 and B * length > 1) + L * (D == 2 and B > 1 and not first)
            # q; dW_i into order r z n; the two db; W_i for dx, dx itself (the reverse one turned back)
            found["copy"] += L * (parts + 1 + bias * (2 + _narrow(p))) + (L - 1) * 2
            if _narrow(p):  # the sums become float32 at the first chunk, and are rounded after the last
                found["copy"] += L * weights * (last + first)
            found["column sum"] += L * bias * _column_sum_launches(length * B)
            found["element-wise"] += L * (4 * parts + weights * (not last)) + (L - 1) * direction
    return found


def _narrow(p: Problem) -> bool:
    return p.dtype in ("fp16", "bf16")


def _counted(counts: Mapping[str, int]) -> Counts:
    return tuple((what, int(n)) for what, n in counts.items() if n)


def step_cost(p: Problem, block_b: int, block_h: int) -> Cost:
    """Bytes and flops of backend `step`; tests/test_memory.py holds the bytes against what is allocated."""
    B, H, D, size = p.batch, p.hidden_size, p.directions, BYTES[p.dtype]
    row_tiles, column_tiles = -(-B // block_b), -(-H // block_h)
    inputs = p.input_size if p.time == 1 else 0
    step_bytes = D * size * (row_tiles * 3 * H * (H + inputs) + column_tiles * B * (H + inputs) + B * 3 * H)
    several = p.time > 1
    return Cost(
        saved_bytes(p),
        # h of two steps, and h in float32 where y is narrower
        peak_forward_bytes(p, D * B * H * (2 * size + 4 * _narrow(p)) if several else 0, projects=several),
        peak_backward_bytes(p, _dh_in_float32(p)) if p.training else 0,
        step_bytes,
        2 * D * B * 3 * H * (H + inputs),
    )


def _dh_in_float32(p: Problem) -> OwnBytes:
    return lambda first, last, visits, directions: directions * p.batch * p.hidden_size * 4


def sequence_cost(p: Problem, tiles: TilesOfPass) -> Cost:
    """Bytes and flops of backend `sequence`; tests/test_memory.py holds the bytes against what is allocated."""
    B, H, D, size = p.batch, p.hidden_size, p.directions, BYTES[p.dtype]
    forward = tiles("forward", D)
    fits = (forward.programs * forward.block_h, forward.units) == (H, H)
    each = forward.visits_per_launch("forward", p.dtype, p.time, p.time * B, H, D)
    own = D * 3 * forward.programs * forward.block_h * forward.units * size * (not fits)  # W_hh as the kernel reads it
    own += exchange_bytes("forward", forward, p, p.time, D) + D * B * H * 4 * (each < p.time)  # h between launches
    reads = forward.programs * -(-B // forward.block_b) * forward.block_b * H * size if forward.exchange else 0

    def own_backward(first: bool, last: bool, visits: int, directions: int) -> int:
        found = tiles("backward", directions)
        # dh_n and dh_0 are float32, also where the caller's are narrower
        rows = B * H * (4 * last * _narrow(p) + (4 - size) * first)
        weights = 3 * found.programs * found.block_h * found.units * size
        return directions * (weights + rows) + exchange_bytes("backward", found, p, visits, directions)

    return Cost(
        saved_bytes(p),
        peak_forward_bytes(p, own, projects=True),
        peak_backward_bytes(p, own_backward) if p.training else 0,
        D * (reads + B * 3 * H * size),
        2 * D * B * 3 * H * H,
    )


def exchange_bytes(kind: str, tiles: SequenceTiles, p: Problem, visits: int, directions: int) -> int:
    """Bytes of the exchange buffer of a pass."""
    each = tiles.visits_per_launch(kind, p.dtype, visits, visits * p.batch, p.hidden_size, directions)
    return tiles.slot_bytes(kind, p.dtype) * (each + 1)


def _gates(p: Problem) -> int:
    """Bytes of r, z, n, q of one layer."""
    return p.directions * p.time * p.batch * 4 * p.hidden_size * BYTES[p.dtype]


def _output(p: Problem) -> int:
    """Bytes of the output of one layer."""
    return p.directions * p.time * p.batch * p.hidden_size * BYTES[p.dtype]


def _inputs(p: Problem, layer: int) -> int:
    """Features that go into a layer."""
    return p.input_size if layer == 0 else p.directions * p.hidden_size


def _side_by_side(p: Problem, layer: int) -> int:
    """Bytes of both directions' W_i and b_i in one, which the projection takes."""
    return 2 * 3 * p.hidden_size * (_inputs(p, layer) + p.bias) * BYTES[p.dtype] if p.directions == 2 else 0


def saved_bytes(p: Problem) -> int:
    """r, z, n in the memory of x_proj, and q, of every layer; the outputs of inner layers."""
    if not p.training:
        return 0
    return (0 if p.recompute else p.layers * _gates(p)) + (p.layers - 1) * _output(p)


def peak_forward_bytes(p: Problem, own: int, projects: bool) -> int:
    """`own`: what a backend allocates in a layer's forward besides x_proj, q, y and h_n, and frees again; `projects`:
    whether x_proj is there at all."""
    gates, output = _gates(p), _output(p)
    saves = p.training and not p.recompute
    h_n = p.directions * p.batch * p.hidden_size * BYTES[p.dtype] if p.layers > 1 else 0  # kept to be put together
    peak = 0
    for layer in range(p.layers):
        kept = layer * ((gates if saves else 0) + output) if p.training else min(layer, 1) * output
        kept += layer * h_n
        if projects:
            peak = max(peak, kept + _side_by_side(p, layer) + gates * 3 // 4)
        rows = gates if saves else gates * 3 // 4 if projects else 0
        peak = max(peak, kept + rows + own + (output if layer < p.layers - 1 else 0) + h_n)
    return peak


# (first, last, visits, directions): what a backend allocates besides dgates and dh_0 for a chunk of time that is the
# first, or the last
OwnBytes = Callable[[bool, bool, int, int], int]


def peak_backward_bytes(p: Problem, own: OwnBytes) -> int:
    size, D, B, H = BYTES[p.dtype], p.directions, p.batch, p.hidden_size
    N, gates, output = p.time * B, _gates(p), _output(p)
    peak = 0
    for layer in range(p.layers):
        I, inner = _inputs(p, layer), layer < p.layers - 1
        kept = (0 if p.recompute else (layer + 1) * gates) + min(layer + 1, p.layers - 1) * output
        kept += inner * output  # dy, which the layer above has made
        dx = N * I * size if layer > 0 else 0
        if in_chunks(p):
            peak = max(peak, kept + dx + _chunk_bytes(p, I, own, layer > 0))
            continue
        h_prev = N * H * size if p.packed else 0  # of a direction, gathered
        again = gates if p.recompute else 0
        if p.recompute:
            peak = max(peak, kept + _side_by_side(p, layer) + gates * 3 // 4)
            part = N if p.packed else max(N - B, B)
            peak = max(peak, kept + again + h_prev + 3 * H * min(part, ROWS_AT_ONCE) * size)
        dgates = D * N * 4 * H * size
        peak = max(peak, kept + again + dgates + own(True, True, p.time, D) + D * B * H * size)
        kept -= gates - again  # they have been read
        # W_i and dW_i in the order of dgates
        peak = max(peak, kept + dgates + dx + max(3 * H * I * size, h_prev, _column_sums(p, N)))
    return peak


def _column_sums(p: Problem, rows: int) -> int:
    """Bytes of the sums of dgates' columns: of one stage and the next, and of the last and the same cast."""
    if not p.bias:
        return 0
    size = BYTES[p.dtype]
    wide, stages = max(4, size), [0, *partial_sums(rows), 1]
    return 4 * p.hidden_size * max(wide + size * _narrow(p), *(wide * (a + b) for a, b in pairwise(stages)))


def _chunk_bytes(p: Problem, I: int, own: OwnBytes, want_dx: bool) -> int:
    """The most that a chunk of a direction takes, what is carried from chunk to chunk included."""
    size, B, H, both = BYTES[p.dtype], p.batch, p.hidden_size, p.directions == 2
    wide, steps = max(4, size), steps_at_once(p.time, B)
    weights = 3 * H * (I + H) + 6 * H * p.bias  # elements of a direction's gradients
    peak = 0
    for direction in range(p.directions):
        for stop in range(p.time, 0, -steps):
            first, last, R = stop <= steps, stop == p.time, min(stop, steps) * B
            turned = R * (I + 2 * H) if direction else R * H * (both and R > 1)  # x, y, dy in the direction's order
            before = turned * size  # and dh, and the sums where they are not the gradients themselves
            before += 0 if last else B * H * wide + weights * wide * _narrow(p)
            gates, dgates, dx = R * 4 * H * size, R * 4 * H * size, R * I * size * want_dx
            dh = B * H * (size if first else wide)
            h_prev = B * H * size * (both and B > 1 and not first)
            found = weights * size if _narrow(p) or not last else 0
            d_w_ih = 3 * H * I * size * (2 if found else 1)  # before and after its gates are put in order
            d_b = found + _column_sums(p, R) - 6 * H * p.bias * size * _narrow(p)  # the cast comes before them
            peak = max(
                peak,
                before + gates + 3 * H * max(R - B, B) * size,
                before + gates + dgates + own(first, last, R // B, 1) + dh + h_prev,
                before + dgates + dx + dh * (not first) + max(d_w_ih, d_b),
                before + found + dx * (1 + direction) + dh * (not first),
            )
    return peak
