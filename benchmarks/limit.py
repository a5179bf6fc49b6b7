"""How long a recurrent step takes at the least: for reports, which give the share of it that is reached.

The limit comes from ceilings that micro-benchmarks measured (ceilings.py), none of them a GRU. It decides nothing: what
runs is chosen by measured calls (tritongru/planning/measured.py).

What a step of `sequence` does, per group of programs and row tile (kernels/sequence.py): each program reads the whole
of h (backward: of dr, dz, dq) of the tile from L2, multiplies it with its slice of W_h, which it reads from shared
memory once, and publishes its own units; in one program that holds a small layer (kernels/small.py) every warp reads h
from shared memory instead. A step of `step` is a launch that reads W_h from L2 once per row tile.

Counted: bytes over L2, bytes of weights out of shared memory, the products' full tiles (16 rows, H padded), and the
chain that nothing overlaps when a group has one row tile. Not counted: instruction issue, bank conflicts, how far the
programs of a group drift apart, a poll that comes just too early. So a kernel stays above its limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tritongru.planning import Device, Plan, Problem
from tritongru.planning.problem import BYTES
from tritongru.planning.sequence import SequenceTiles, sequence_tiles
from tritongru.planning.small import SmallTiles
from tritongru.planning.step import StepTiles, step_tiles

BACKENDS = ("step", "sequence")
ROWS_OF_WGMMA = 64  # rows from which on the compiler uses the warp-group instructions


@dataclass(frozen=True)
class Ceilings:
    """What a whole device does at most, and the latencies it has at least. An "SM" is a compute unit on AMD."""

    sms: int  # that the figures of the whole device are for
    clock_ghz: float  # of the SMs, the highest sustained
    l2_read_tb_s: float  # by all SMs, from L2
    l2_bytes_per_clock: float  # by one SM, from L2
    l2_round_trip_ns: float  # of a load that hits L2; where L2 has two partitions, in the far one
    dram_tb_s: float
    half_tflops: float  # matrix peak of fp16 and bf16, dense, accumulated in float32
    tf32_tflops: float  # the same of TF32
    fma_tflops: float  # float32 without matrix instructions (ieee)
    mma_share: float  # of the matrix peaks: what warp-wide instructions (mma.sync) reach
    graph_us: float  # from one small kernel to the next inside a CUDA graph
    stream_us: float  # the same, launched one by one
    shared_bytes_per_clock: float  # of one SM

    def product_tflops(self, dtype: str, precision: str, rows: int) -> float:
        """Rate of the products of tiles of so many rows, on the whole device."""
        if dtype == "fp32" and precision == "ieee":
            return self.fma_tflops
        peak = self.tf32_tflops if dtype == "fp32" else self.half_tflops
        return peak if rows >= ROWS_OF_WGMMA else peak * self.mma_share


# The chain of one row tile, besides L2 and the product itself, in clocks: an estimate. The trips are those that
# kernels/sequence.py has to make.
SHARED_TRIP = 70  # a tile from warp to warp: store, barrier, load
MMA = 33  # the last matrix instruction
GATES = {"forward": 120, "backward": 40}  # two sigmoids and a tanh, one after the other; products with what is there

# Elements that a unit of a row needs at a step from memory, besides what it is multiplied with: x_proj of three gates;
# dy, r, z, n, q, h_prev.
OWN_READS = {"forward": 3, "backward": 6}


@dataclass(frozen=True)
class Limit:
    """The least time of one step of a layer, all its row tiles and directions, in microseconds.

    Of the terms, l2, dram, products and shared are how long each unit is busy: each overlaps the others, and so do the
    row tiles of a group. What nothing overlaps is `latency_us`, the chain of one row tile: publish and read over L2,
    the product, the gates.
    """

    us: float  # launch + the largest of the others
    binding: str  # the longest: "l2", "dram", "products", "shared", "latency" or "launch"
    l2_us: float  # reading from L2: h or gate gradients of all units, x_proj or saved gates; `step`: W_h too
    dram_us: float  # reading W_h that L2 cannot hold (`step`)
    products_us: float
    shared_us: float  # reading the weights from shared memory (`sequence`)
    latency_us: float
    launch_us: float  # the boundary between two kernels in a CUDA graph (`step`)


@lru_cache(maxsize=4096)
def limit_us(
    kind: str,
    backend: str,
    tiles: StepTiles | SequenceTiles | SmallTiles,
    batch: int,
    hidden_size: int,
    directions: int,
    dtype: str,
    precision: str,
    device: Device,
    top: Ceilings,
) -> Limit:
    """The least time of a step of `step` or `sequence` with these tiles.

    kind: "forward" or "backward" (of `step`, also "cell", whose input product is left out, and "backward_first").
    top: ceilings of the device.

    Raises:
        ValueError: another kind or backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    passes = {"forward": "forward", "cell": "forward", "backward": "backward", "backward_first": "backward"}
    if kind not in passes or (backend == "sequence" and kind not in GATES):
        raise ValueError(f"kind must be forward or backward, got {kind!r}")
    if isinstance(tiles, SequenceTiles):
        return _sequence_limit(kind, tiles, batch, hidden_size, directions, dtype, precision, device, top)
    if isinstance(tiles, SmallTiles):
        return _small_limit(kind, tiles, batch, hidden_size, dtype, top)
    return _step_limit(passes[kind], tiles, batch, hidden_size, directions, dtype, precision, device, top)


def _sequence_limit(
    kind: str, tiles: SequenceTiles, B: int, H: int, D: int, dtype: str, precision: str, device: Device, top: Ceilings
) -> Limit:
    size, clocks_per_us = BYTES[dtype], 1e3 * top.clock_ghz
    forward = kind == "forward"
    K = tiles.block_k * tiles.num_k
    turns = tiles.tiles  # row tiles that one SM works through at each step
    # elements of a row that a program reads of all units' (h; dr, dz, dq), and of its own (OWN_READS)
    whole = (1 if forward else 3) * tiles.units
    own = OWN_READS[kind] * min(tiles.block_h, H)
    one_sm = top.l2_bytes_per_clock * clocks_per_us  # bytes in a microsecond, as the next
    all_sms = 1e6 * top.l2_read_tb_s
    rows = min(B, tiles.rows)  # of a launch
    read_by_one = min(rows, turns * tiles.block_b) * (whole + own) * size
    read_by_all = tiles.directions * rows * (tiles.programs * whole + OWN_READS[kind] * H) * size

    flops = 2 * tiles.block_b * 3 * tiles.block_h * K  # of a program and row tile: rows of padding are multiplied too
    product = flops * top.sms / (1e6 * top.product_tflops(dtype, precision, tiles.block_b))
    weights = tiles.shared_gates * tiles.block_h * K * size
    shared = weights / (top.shared_bytes_per_clock * clocks_per_us)

    waits = tiles.waits  # each begins after the one before it
    # The poll that ends a wait loads all of it, after the last program has published: a group's programs at once.
    awaited = min(rows, tiles.block_b) * whole * size
    latency = max(product, shared) + (MMA + SHARED_TRIP + GATES[kind]) / clocks_per_us
    latency += waits * top.l2_round_trip_ns / 1e3 + max(awaited / one_sm, tiles.programs * awaited / all_sms)

    launches = D // tiles.directions * tiles.row_launches(B)  # one after the other
    return _limit(
        launch=0.0,
        l2=launches * max(read_by_one / one_sm, read_by_all / all_sms),
        products=launches * turns * product,
        shared=launches * turns * shared,
        latency=launches * latency,
    )


def _small_limit(kind: str, tiles: SmallTiles, B: int, H: int, dtype: str, top: Ceilings) -> Limit:
    size, clocks_per_us = BYTES[dtype], 1e3 * top.clock_ghz
    t, factors = tiles, 1 if kind == "forward" else 3  # h; or dr, dz, dq
    turns = -(-t.programs * t.directions // top.sms)  # programs that one SM has at each step
    rows = t.rows if t.lanes else max(t.rows, 8)  # that are multiplied
    read = OWN_READS[kind] * H * size  # of a row
    rate = top.product_tflops(dtype, "ieee", rows)
    product = 2 * rows * 3 * t.units * t.units * top.sms / (1e6 * rate)
    # every warp reads all that is multiplied
    shared = t.num_warps * factors * t.units * rows * size / (top.shared_bytes_per_clock * clocks_per_us)
    one_sm, all_sms = top.l2_bytes_per_clock * clocks_per_us, 1e6 * top.l2_read_tb_s
    return _limit(
        launch=0.0,
        l2=max(turns * min(B, t.rows) * read / one_sm, t.directions * B * read / all_sms),
        products=turns * product,
        shared=turns * shared,
        latency=max(product, shared) + (MMA * (t.lanes == 0) + SHARED_TRIP + GATES[kind]) / clocks_per_us,
    )


def _step_limit(
    kind: str, tiles: StepTiles, B: int, H: int, D: int, dtype: str, precision: str, device: Device, top: Ceilings
) -> Limit:
    size, clocks_per_us = BYTES[dtype], 1e3 * top.clock_ghz
    factors = 1 if kind == "forward" else 3  # h; or dr, dz, dq
    row_tiles, column_tiles = -(-B // tiles.block_b), -(-H // tiles.block_h)
    turns = -(-row_tiles * column_tiles * D // top.sms)  # programs that one SM runs at each step
    units, rows = min(tiles.block_h, H), min(B, tiles.block_b)
    weights = D * 3 * H * H * size
    after = H - min(H, tiles.ahead * tiles.block_k)  # of K: the weights that are read after the launch before is done
    read_by_one = (3 * units * after + rows * (factors * H + OWN_READS[kind] * units)) * size
    read_by_all = row_tiles * weights + D * B * H * (column_tiles * factors + OWN_READS[kind]) * size
    outside = max(0, weights - device.l2_bytes) if device.l2_bytes else 0  # of L2; 0: unknown
    flops = 2 * tiles.block_b * 3 * tiles.block_h * H  # of a program: rows of padding are multiplied too
    return _limit(
        # As it is measured it holds a small kernel's own latency, which is not added again. Beside the launch before it
        # a step waits until that one's stores are acknowledged, then for its own loads: two ways to L2 and back.
        launch=2 * top.l2_round_trip_ns / 1e3 if tiles.pdl else top.graph_us,
        l2=max(turns * read_by_one / (top.l2_bytes_per_clock * clocks_per_us), read_by_all / (1e6 * top.l2_read_tb_s)),
        dram=outside / (1e6 * top.dram_tb_s),
        products=turns * flops * top.sms / (1e6 * top.product_tflops(dtype, precision, tiles.block_b)),
    )


def weights_us(H: int, directions: int, dtype: str, device: Device, top: Ceilings) -> float:
    """What reading W_h once takes: from L2 what that holds of it, and the rest from DRAM. Microseconds."""
    weights = directions * 3 * H * H * BYTES[dtype]
    held = min(weights, device.l2_bytes or weights)  # 0: unknown
    return max(held / top.l2_read_tb_s, (weights - held) / top.dram_tb_s) / 1e6


def _limit(
    launch: float, l2: float, products: float, dram: float = 0.0, shared: float = 0.0, latency: float = 0.0
) -> Limit:
    units = {"l2": l2, "dram": dram, "products": products, "shared": shared, "latency": latency}
    binding = max(units, key=lambda name: units[name])
    return Limit(
        us=launch + units[binding], binding="launch" if launch > units[binding] else binding,
        l2_us=l2, dram_us=dram, products_us=products, shared_us=shared, latency_us=latency, launch_us=launch,
    )  # fmt: skip


@dataclass(frozen=True)
class CallLimit:
    """The least time of a whole call, in microseconds: `us` is the sum of the other two, which nothing overlaps."""

    us: float
    recurrence_us: float  # all steps of all layers
    products_us: float  # the library products around: projection, and in training dx, dW_i, dW_h
    backend: str  # whose steps are the shorter ones: "step" or "sequence"
    binding: tuple[str, ...]  # what binds a step, of each pass (Limit.binding)


def call_limit_us(problem: Problem, device: Device, top: Ceilings, rows: int | None = None) -> CallLimit:
    """The least time of a call by the better of `step` and `sequence`, as they are tiled for it.

    Every gradient is counted, that of the input too. Not counted, since another implementation need not have them: the
    fill of the exchange buffer, copies of the weights, sums of the biases' gradients.

    top: as in `limit_us`. rows: of a packed batch, the sum of its lengths; a step then has rows / T of them, rounded
    down: a step's limit is convex in its rows, so that the mean over the steps is no less.
    """
    p = problem
    N = p.time * p.batch if rows is None else rows
    passes = ("forward", "backward") if p.training else ("forward",)
    shape = (p.hidden_size, p.directions, p.dtype, p.precision, device)
    best: tuple[float, str, tuple[str, ...]] | None = None
    for backend in BACKENDS if p.time > 1 else ("step",):  # one step is a launch in any case
        steps = []
        for kind in passes:
            tiles = (step_tiles if backend == "step" else sequence_tiles)(kind, p.batch, *shape)
            if isinstance(tiles, str):
                break
            steps.append(limit_us(kind, backend, tiles, max(N // p.time, 1), *shape, top))
        if len(steps) < len(passes):
            continue
        us = p.layers * p.time * sum(step.us for step in steps)
        if best is None or us < best[0]:
            best = us, backend, tuple(step.binding for step in steps)
    assert best is not None  # `step` serves every size
    around = sum(_products_us(p, layer, N, device, top) for layer in range(p.layers))
    return CallLimit(best[0] + around, best[0], around, best[1], best[2])


def _products_us(p: Problem, layer: int, N: int, device: Device, top: Ceilings) -> float:
    """The least time of a layer's library products, one after the other: of each its flops at the matrix peak, or its
    factors and result once over L2, where they fit, else DRAM."""
    H, D, size = p.hidden_size, p.directions, BYTES[p.dtype]
    I = p.input_size if layer == 0 else D * H
    x_by_w = [(N, I, D * 3 * H)]  # rows, reduced, columns; dW_i and dx have the same three sizes
    products = x_by_w + (2 * x_by_w + D * [(3 * H, N, H)] if p.training else [])
    total = 0.0
    for m, k, n in products:
        moved = size * (m * k + k * n + m * n)
        in_l2 = device.l2_bytes == 0 or moved <= device.l2_bytes  # 0: unknown
        rate = top.l2_read_tb_s if in_l2 else top.dram_tb_s
        flops = 2 * m * k * n
        total += max(flops / top.product_tflops(p.dtype, p.precision, ROWS_OF_WGMMA), moved / rate) / 1e6
    return total


def step_traffic(plan: Plan) -> tuple[int, int]:
    """Of one forward step of one layer: bytes that its programs read, W_h once per row tile and h once per column tile
    (`sequence`: what is exchanged), and flops of its products."""
    p, tiles = plan.problem, dict(plan.tiles)
    B, H, D, size = p.batch, p.hidden_size, p.directions, BYTES[p.dtype]
    if plan.backend == "sequence":
        found = tiles["forward"]
        received = 0
        if isinstance(found, SequenceTiles):
            received = found.programs * -(-B // found.block_b) * found.block_b * H * size
        return D * (received + B * 3 * H * size), 2 * D * B * 3 * H * H
    found = tiles["cell" if p.time == 1 else "forward"]
    inputs = p.input_size if p.time == 1 else 0
    read = -(-B // found.block_b) * 3 * H * (H + inputs) + -(-H // found.block_h) * B * (H + inputs)
    return D * size * (read + (0 if inputs else B * 3 * H)), 2 * D * B * 3 * H * (H + inputs)
