"""How long a recurrent step takes at the least: for reports, which give the share of it that is reached.

The limit comes from ceilings that micro-benchmarks measured, none of them a GRU. It decides nothing: what runs is
chosen by measured calls (planning/measured.py).

What a step of `sequence` does, per group of programs and row tile (kernels/sequence.py): each program reads the whole
of h (backward: of dr, dz, dq) of the tile from L2, multiplies it with its slice of W_h, which it reads from shared
memory once, and publishes its own units. A step of `step` is a launch that reads W_h from L2 once per row tile.

Counted: bytes over L2, bytes of weights out of shared memory, the products' full tiles (16 rows, H padded), and the
chain that nothing overlaps when a group has one row tile. Not counted: instruction issue, bank conflicts, how far the
programs of a group drift apart, a poll that comes just too early. So a kernel stays above its limit.

Sources of the numbers
    [row]      benchmarks/results/nvidia-h200/ceilings.csv: measured by benchmarks/ceilings.py
    [benches]  github.com/te42kyfo/gpu-benches, result files (A100 80 GB, H100 PCIe, H200, L40, MI210), and its copy
               github.com/RRZE-HPC/gpu-benches (GH200, whose GPU is that of the H200, and MI300X)
    [Luo]      Luo et al., Dissecting the NVIDIA Hopper Architecture through Microbenchmarking, arXiv:2501.12084: H800,
               A100, RTX 4090; here as others quote its sections 6.2, 7.1 and tables 3 to 5
    [B200]     a pointer chase and grid-stride reads on a B200 at 1.587 GHz, in a public repository's notes; Chips and
               Cheese, "Nvidia's B200: Keeping the CUDA Juggernaut Rolling", has the same two figures
    [cheese]   Chips and Cheese, "Blackwell: Nvidia's Massive GPU", as quoted by others: the RTX PRO 6000, the chip of
               the RTX 5090 with 188 SMs
    [4090]     github.com/smallscientist1/cuda_microbenchmark, analysis_RTX4090.md
    [azure]    github.com/samuel-bohman/AI-benchmarking-guide, Azure ND H100 v5 results (BabelStream)
    [paper]    the vendor's white paper or product page: dense matrix peaks with float32 accumulation, clocks, DRAM
    estimate   no measurement found; the comment says what it is taken from
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from .devices import DEVICES, Device, _described
from .problem import BYTES, Problem
from .sequence import SequenceTiles, sequence_tiles
from .step import StepTiles, step_tiles

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
    shared_bytes_per_clock: float = (
        128.0  # of one SM: 32 banks of 4 bytes [paper]; measured 127.9 on H800 [Luo, table 5]
    )

    def product_tflops(self, dtype: str, precision: str, rows: int) -> float:
        """Rate of the products of tiles of so many rows, on the whole device."""
        if dtype == "fp32" and precision == "ieee":
            return self.fma_tflops
        peak = self.tf32_tflops if dtype == "fp32" else self.half_tflops
        return peak if rows >= ROWS_OF_WGMMA else peak * self.mma_share


# l2_bytes_per_clock: 64 is an estimate, half of the 128 bytes that a warp asks for; an SM of an H200 got 92 [row].
CEILINGS = {
    "a100": Ceilings(
        sms=108,
        clock_ghz=1.41,  # [paper]
        l2_read_tb_s=5.4,  # [benches] gpu-l2-cache, 2 to 25 MB
        l2_bytes_per_clock=64,
        l2_round_trip_ns=289,  # [benches] gpu-latency at 29 MB, which is more than one partition; 150 in the near one
        dram_tb_s=1.88,  # [benches] gpu-stream, read
        half_tflops=312, tf32_tflops=156, fma_tflops=19.5,  # [paper: A100]
        mma_share=1.0,  # mma.sync is its only matrix instruction
        graph_us=1.3, stream_us=2.6,  # [benches] gpu-small-kernels, 64 KB
    ),
    "h100": Ceilings(
        sms=132,
        clock_ghz=1.98,  # clockRate that the driver reports
        l2_read_tb_s=11.9,  # estimate: that of H200, the same chip; H100 PCIe: 7.0 with 114 SMs, 1.755 GHz [benches]
        l2_bytes_per_clock=92.3,  # estimate: that of H200
        l2_round_trip_ns=230,  # [benches] gpu-latency, H100 PCIe at 29 MB; 414 clocks of H800 [Luo, table 4]; near: 151
        dram_tb_s=3.2,  # [azure]
        half_tflops=989, tf32_tflops=494, fma_tflops=66.9,  # [paper: H100 SXM5]
        mma_share=0.63,  # [Luo, section 6.2]: mma.sync reaches 62.9 % of the peak, wgmma more than 95 %
        graph_us=1.13, stream_us=2.4,  # estimate: that of H200
    ),
    "h200": Ceilings(  # [row], but for stream_us
        sms=132,
        clock_ghz=1.98,
        l2_read_tb_s=11.9,
        l2_bytes_per_clock=92.3,
        l2_round_trip_ns=254,
        dram_tb_s=4.48,
        half_tflops=881, tf32_tflops=448, fma_tflops=50.9,
        mma_share=0.71,
        graph_us=1.13,
        stream_us=2.4,  # [benches] gpu-small-kernels, 64 KB; 5.71 in the row, whose host was the slower one
        shared_bytes_per_clock=128,
    ),
    "b200": Ceilings(
        sms=148,
        clock_ghz=1.965,  # the highest that the driver offers [B200]
        l2_read_tb_s=21.2,  # [B200], at 64 MiB
        l2_bytes_per_clock=128,  # estimate: all SMs together got 90 each at 1.587 GHz, so more than 64
        l2_round_trip_ns=226,  # estimate: 281 at 64 MiB and 1.587 GHz [B200], at this clock; near: 150
        dram_tb_s=6.75,  # [B200]
        half_tflops=2250, tf32_tflops=1125, fma_tflops=74.4,  # [paper: DGX B200]; float32: SMs x 128 x clock
        mma_share=0.33,  # estimate: what an SM of Hopper reaches with mma.sync per clock
        graph_us=1.13, stream_us=2.4,  # estimate: that of H200
    ),
    "rtx4090": Ceilings(
        sms=128,
        clock_ghz=2.52,  # [paper: Ada]
        l2_read_tb_s=4.9,  # [4090]; L40, the same chip with 142 SMs, has 5.2 to 5.7 [benches]
        l2_bytes_per_clock=64,
        l2_round_trip_ns=107,  # [cheese]; L40 has 111 [benches]
        dram_tb_s=1.01,  # [paper]
        half_tflops=165, tf32_tflops=82.6, fma_tflops=82.6,  # [paper: Ada]
        mma_share=1.0,
        graph_us=0.9, stream_us=1.6,  # estimate: that of L40 [benches]
    ),
    "l4": Ceilings(
        sms=58,
        clock_ghz=2.04,  # [paper]
        l2_read_tb_s=2.3,  # estimate: L40's 5.7 by SMs
        l2_bytes_per_clock=64,
        l2_round_trip_ns=111,  # estimate: that of L40
        dram_tb_s=0.3,  # [paper]
        half_tflops=121, tf32_tflops=60.5, fma_tflops=30.3,  # [paper: L4]
        mma_share=1.0,
        graph_us=0.9, stream_us=1.6,  # estimate: that of L40
    ),
    "rtx5090": Ceilings(
        sms=170,
        clock_ghz=2.41,  # [paper: RTX Blackwell]
        l2_read_tb_s=7.9,  # estimate: 8.7 of RTX PRO 6000 [cheese] by SMs
        l2_bytes_per_clock=64,
        l2_round_trip_ns=130,  # [cheese], RTX PRO 6000
        dram_tb_s=1.79,  # [paper]
        half_tflops=209.5, tf32_tflops=104.8, fma_tflops=104.8,  # [paper: RTX Blackwell]
        mma_share=1.0,
        graph_us=0.9, stream_us=1.6,  # estimate: that of L40
    ),
    "mi300x": Ceilings(
        sms=304,
        clock_ghz=2.1,  # [paper: CDNA 3]
        l2_read_tb_s=27.0,  # [benches] gpu-cache, the 8 dies together
        l2_bytes_per_clock=64,
        l2_round_trip_ns=204,  # [benches] gpu-latency, within a die
        dram_tb_s=4.8,  # [benches] gpu-stream, read
        half_tflops=1307, tf32_tflops=654, fma_tflops=163,  # [paper: CDNA 3]
        mma_share=1.0,
        graph_us=2.0, stream_us=2.0,  # estimate: that of MI210 [benches]
    ),
}  # fmt: skip

# Capabilities without a described device, and one whose SMs are nearly theirs: estimate.
_LIKE = {86: 89, 103: 100, 121: 120}

# The chain of one row tile, besides L2 and the product itself, in clocks: estimate, of which a load from shared memory
# is measured, 29 on H800 and B200 [Luo, table 3], [B200]. The trips are those that kernels/sequence.py has to make.
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


@lru_cache(maxsize=64)
def ceilings(device: Device) -> Ceilings | None:
    """Ceilings of a device; None where nothing like it is described.

    A device that is no described product (or a part of one: MIG) has those of the nearest one, by SMs.
    """
    key = _nearest(device)
    if key is None:
        return None
    found = CEILINGS[key]
    if device.sms == found.sms:
        return found
    part = device.sms / found.sms
    return replace(
        found, sms=device.sms, l2_read_tb_s=part * found.l2_read_tb_s, dram_tb_s=part * found.dram_tb_s,
        half_tflops=part * found.half_tflops, tf32_tflops=part * found.tf32_tflops, fma_tflops=part * found.fma_tflops,
    )  # fmt: skip


def _nearest(device: Device) -> str | None:
    known = _described(device.name)
    for key in CEILINGS:
        if DEVICES[key] is known:
            return key
    capability = _LIKE.get(device.capability or 0, device.capability)
    alike = [
        key
        for key in CEILINGS
        if DEVICES[key].vendor == device.vendor
        and (DEVICES[key].arch == device.arch if device.vendor == "amd" else DEVICES[key].capability == capability)
    ]
    return min(alike, key=lambda key: abs(DEVICES[key].sms - device.sms), default=None)


@lru_cache(maxsize=4096)
def limit_us(
    kind: str,
    backend: str,
    tiles: StepTiles | SequenceTiles,
    batch: int,
    hidden_size: int,
    directions: int,
    dtype: str,
    precision: str,
    device: Device,
    top: Ceilings | None = None,
) -> Limit | None:
    """The least time of a step of `step` or `sequence` with these tiles; None on a device whose ceilings are unknown.

    kind: "forward" or "backward" (of `step`, also "cell", whose input product is left out, and "backward_first").
    top: ceilings measured on the device; None: those of CEILINGS.

    Raises:
        ValueError: another kind or backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    passes = {"forward": "forward", "cell": "forward", "backward": "backward", "backward_first": "backward"}
    if kind not in passes or (backend == "sequence" and kind not in GATES):
        raise ValueError(f"kind must be forward or backward, got {kind!r}")
    found = top or ceilings(device)
    if found is None:
        return None
    if isinstance(tiles, SequenceTiles):
        return _sequence_limit(kind, tiles, batch, hidden_size, directions, dtype, precision, device, found)
    return _step_limit(passes[kind], tiles, batch, hidden_size, directions, dtype, precision, device, found)


def _sequence_limit(
    kind: str, tiles: SequenceTiles, B: int, H: int, D: int, dtype: str, precision: str, device: Device, top: Ceilings
) -> Limit:
    size, clocks_per_us = BYTES[dtype], 1e3 * top.clock_ghz
    forward = kind == "forward"
    K = tiles.block_k * tiles.num_k
    # row tiles that one SM works through at each step: a group's, or those of the groups that share it
    turns = tiles.tiles if tiles.exchange else -(-tiles.groups * tiles.directions // top.sms)
    # elements of a row that a program reads of all units' (h; dr, dz, dq), and of its own (OWN_READS)
    whole = (1 if forward else 3) * tiles.units if tiles.exchange else 0
    own = OWN_READS[kind] * min(tiles.block_h, H)
    one_sm = top.l2_bytes_per_clock * clocks_per_us  # bytes in a microsecond, as the next
    all_sms = 1e6 * top.l2_read_tb_s
    rows = min(B, tiles.rows)  # of a launch
    read_by_one = min(rows, turns * tiles.block_b) * (whole + own) * size
    read_by_all = tiles.directions * rows * (tiles.programs * whole + OWN_READS[kind] * H) * size

    flops = 2 * tiles.block_b * 3 * tiles.block_h * K  # of a program and row tile: rows of padding are multiplied too
    product = flops * top.sms / (1e6 * top.product_tflops(dtype, precision, tiles.block_b))
    # AMD's programs keep the weights in registers
    gates = 0 if device.vendor == "amd" else tiles.shared_gates if tiles.exchange else 3
    weights = gates * tiles.block_h * K * size
    shared = weights / (top.shared_bytes_per_clock * clocks_per_us)

    clocks = MMA + SHARED_TRIP + GATES[kind]  # the parts of the sums; without exchange, h into the matrix layout
    latency = max(product, shared)
    if tiles.exchange:
        waits = tiles.waits  # each begins after the one before it
        # The poll that ends a wait loads all of it, after the last program has published: a group's programs at once.
        awaited = min(rows, tiles.block_b) * whole * size
        latency += waits * top.l2_round_trip_ns / 1e3 + max(awaited / one_sm, tiles.programs * awaited / all_sms)
    latency += clocks / clocks_per_us

    launches = D // tiles.directions * tiles.row_launches(B)  # one after the other
    return _limit(
        launch=0.0,
        l2=launches * max(read_by_one / one_sm, read_by_all / all_sms),
        products=launches * turns * product,
        shared=launches * turns * shared,
        latency=launches * latency,
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
    read_by_one = (3 * units * H + rows * (factors * H + OWN_READS[kind] * units)) * size
    read_by_all = row_tiles * weights + D * B * H * (column_tiles * factors + OWN_READS[kind]) * size
    in_l2 = device.l2_bytes == 0 or weights <= device.l2_bytes  # 0: unknown
    flops = 2 * tiles.block_b * 3 * tiles.block_h * H  # of a program: rows of padding are multiplied too
    return _limit(
        launch=top.graph_us,  # as it is measured it holds a small kernel's own latency, which is not added again
        l2=max(turns * read_by_one / (top.l2_bytes_per_clock * clocks_per_us), read_by_all / (1e6 * top.l2_read_tb_s)),
        dram=0.0 if in_l2 else weights / (1e6 * top.dram_tb_s),
        products=turns * flops * top.sms / (1e6 * top.product_tflops(dtype, precision, tiles.block_b)),
    )


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


def call_limit_us(
    problem: Problem, device: Device, top: Ceilings | None = None, rows: int | None = None
) -> CallLimit | None:
    """The least time of a call by the better of `step` and `sequence`, as they are tiled for it.

    Every gradient is counted, that of the input too. Not counted, since another implementation need not have them: the
    fill of the exchange buffer, copies of the weights, sums of the biases' gradients.

    top: as in `limit_us`. rows: of a packed batch, the sum of its lengths; a step then has rows / T of them, rounded
    down: a step's limit is convex in its rows, so that the mean over the steps is no less.

    None on a device whose ceilings are unknown.
    """
    p, found = problem, top or ceilings(device)
    if found is None:
        return None
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
            steps.append(limit_us(kind, backend, tiles, max(N // p.time, 1), *shape, found))
        if len(steps) < len(passes):
            continue
        known = [step for step in steps if step is not None]
        us = p.layers * p.time * sum(step.us for step in known)
        if best is None or us < best[0]:
            best = us, backend, tuple(step.binding for step in known)
    assert best is not None  # `step` serves every size
    around = sum(_products_us(p, layer, N, device, found) for layer in range(p.layers))
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
