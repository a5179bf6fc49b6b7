"""Choosing what runs: a pure function of the problem and a described device. Needs no GPU, no Triton, no tensors.

`choose(problem, device)` returns a `Plan`: backend, reason, tiles of each kernel, launches, bytes. `step_tiles` is the
part of it that a launcher asks for at every call.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from .cost import BYTES, Cost, Launches, step_cost, step_launches
from .devices import Device

KERNEL_DTYPES = ("fp32", "fp16", "bf16")  # what the Triton kernels take
MINIMUM_CAPABILITY = 80  # bfloat16 and TF32 matrix instructions, cp.async


@dataclass(frozen=True)
class Problem:
    """One call of a GRU. Sizes as in the notation; `directions` is 2 for a bidirectional layer."""

    batch: int
    time: int
    input_size: int
    hidden_size: int
    layers: int = 1
    directions: int = 1
    dtype: str = "fp32"
    training: bool = True
    packed: bool = False
    bias: bool = True
    recompute: bool = False
    precision: str = "tf32"  # of float32 products

    def __post_init__(self) -> None:
        for name in ("batch", "time", "input_size", "hidden_size", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.directions not in (1, 2):
            raise ValueError(f"directions must be 1 or 2, got {self.directions}")
        if self.dtype not in BYTES:
            raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got {self.dtype!r}")
        if self.precision not in ("tf32", "ieee"):
            raise ValueError(f"precision must be tf32 or ieee, got {self.precision!r}")


@dataclass(frozen=True)
class StepTiles:
    """Tile of one program of a step kernel: rows x hidden units, and the depth of one product."""

    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """What would run, and why."""

    problem: Problem
    device: str
    backend: str
    reason: str
    tiles: tuple[tuple[str, StepTiles], ...]  # (kind, tiles) of the recurrent launches
    launches: Launches
    cost: Cost

    def as_dict(self) -> dict[str, object]:
        """The plan as plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        p = self.problem
        shape = f"B {p.batch}, T {p.time}, I {p.input_size}, H {p.hidden_size}"
        lines = [
            f"backend   {self.backend} on {self.device}: {self.reason}",
            f"problem   {shape}, {p.layers} layer(s), {p.directions} direction(s), {p.dtype}"
            f"{' (' + p.precision + ' products)' if p.dtype == 'fp32' else ''}, "
            f"{'training' if p.training else 'inference'}{', packed' if p.packed else ''}",
        ]
        lines += [
            f"tiles     {kind}: {t.block_b} rows x {t.block_h} units, K by {t.block_k}, "
            f"{t.num_warps} warps, {t.num_stages} stages"
            for kind, t in self.tiles
        ]
        for label, counts in (("forward", self.launches.forward), ("backward", self.launches.backward)):
            if counts:
                lines.append(f"{label:<9} " + ", ".join(f"{n} x {name}" for name, n in counts))
        if self.backend == "step":
            lines.append(
                f"saved     {self.cost.saved_bytes / 2**20:.1f} MiB for backward beyond input, output and weights; "
                f"{self.cost.step_bytes / 1e6:.2f} MB read by the programs of one forward step, "
                f"{self.cost.step_flops / 1e6:.1f} Mflop in it (computed, not measured)"
            )
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def step_tiles(
    kind: str, batch: int, hidden_size: int, directions: int, dtype: str, precision: str, device: Device
) -> StepTiles:
    """Tiles of `forward`, `cell` (forward with FUSE_INPUT), `backward` or `backward_first`. Never depends on T.

    Two sizes per kernel, so that a model's many batch sizes compile at most two forms of it: up to 32 rows in tiles of
    16, where the launch is bound by latency and reading W_h; above that tiles of 64, which fill a warp group's matrix
    instruction. 16 hidden units a program: narrow slices, to spread a step over the device. None of this is timed yet:
    benchmarks/QUESTIONS.md asks for it.
    """
    if kind not in ("forward", "cell", "backward", "backward_first"):
        raise ValueError(f"kind must be forward, cell, backward or backward_first, got {kind!r}")
    if device.vendor == "interpreter":  # which runs programs one after another, at a price per program
        return StepTiles(block_b=64 if batch > 16 else 16, block_h=64, block_k=64, num_warps=4, num_stages=1)
    vector = dtype == "fp32" and precision == "ieee"  # no matrix instructions, which 64 rows are for
    wide = batch > 32 and kind != "backward_first" and not vector
    # Deeper tiles of K spill somewhere (tests/test_compiles.py): in the first launch of backward, which makes gate
    # gradients as it multiplies, on sm_80 and sm_89; in a cell of odd sizes on sm_90; in 64 rows of backward on sm_89.
    shallow = dtype == "fp32" or kind in ("backward_first", "cell") or (wide and kind == "backward")
    # Few rows: several tiles of K under way at once, for a program alone on its SM waits for L2 and little else.
    # AMD's LDS holds 64 KB and its compiler pipelines two; the first launch of backward has no registers for more.
    if device.vendor == "amd":
        num_stages = 2
    elif kind == "backward_first":
        num_stages = 3 if vector else 2  # with 2, sm_100 spills a register of ieee's
    elif kind == "backward" and dtype == "fp32" and (device.capability or 0) >= 120:
        num_stages = 2  # with more, sm_120 spills a register
    else:
        num_stages = 3 if wide else 6
    tiles = StepTiles(64 if wide else 16, 16, 32 if shallow else 64, num_warps=4, num_stages=num_stages)
    while num_stages > 1 and _shared_bytes(kind, tiles, dtype) > device.shared_per_program:
        num_stages -= 1
        tiles = dataclasses.replace(tiles, num_stages=num_stages)
    return tiles


def _shared_bytes(kind: str, tiles: StepTiles, dtype: str) -> int:
    """An upper bound of what the pipeline keeps in shared memory; the compile tests hold it against the compiler's."""
    weights = 3 * tiles.block_h * tiles.block_k
    rows = tiles.block_b * tiles.block_k
    left = {"forward": rows, "cell": rows, "backward": 3 * rows, "backward_first": 8 * rows}[kind]
    # the epilogue's exchanges of layout take up to one float32 tile
    epilogue = 4 * tiles.block_b * max(tiles.block_h, tiles.block_k)
    return tiles.num_stages * (weights + left) * BYTES[dtype] + epilogue


def unserved(dtype: str, device: Device) -> str | None:
    """Why no Triton kernel serves this dtype on this device; None if one does."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take {', '.join(KERNEL_DTYPES)}, not {dtype}"
    if device.vendor == "nvidia" and (device.capability or 0) < MINIMUM_CAPABILITY:
        have = (device.capability or 0) / 10
        return f"the kernels need compute capability {MINIMUM_CAPABILITY / 10}, {device.name} has {have}"
    return None


@lru_cache(maxsize=1024)
def choose(problem: Problem, device: Device, backend: str | None = None) -> Plan:
    """What would run for `problem` on `device`; `backend` forces one, as the layer's argument does.

    Raises:
        ValueError: a forced backend is unknown, or cannot serve the problem.
    """
    why_not = unserved(problem.dtype, device)
    if backend is None:
        chosen = "aten" if why_not else "step"
        reason = why_not or "one fused launch per timestep; the one Triton backend there is"
    elif backend in ("aten", "reference"):
        chosen, reason = backend, "asked for"
    elif backend == "step":
        if why_not:
            raise ValueError(f"backend 'step' cannot run here: {why_not}; aten and reference can")
        chosen, reason = backend, "asked for"
    else:
        raise ValueError(f"unknown backend {backend!r}: expected aten, reference or step")
    if chosen != "step":
        return Plan(problem, device.name, chosen, reason, (), Launches((), ()), Cost(0, 0, 0))
    p = problem
    kinds = ["cell" if p.time == 1 else "forward"]
    if p.training:
        kinds += ["backward_first"] if p.time == 1 else ["backward_first", "backward"]
    tiles = tuple(
        (kind, step_tiles(kind, p.batch, p.hidden_size, p.directions, p.dtype, p.precision, device)) for kind in kinds
    )
    return Plan(
        problem, device.name, chosen, reason, tiles,
        step_launches(p.time, p.layers, p.directions, p.dtype, p.training, p.bias, p.packed, p.recompute),
        step_cost(p.batch, p.time, p.input_size, p.hidden_size, p.layers, p.directions, p.dtype, p.recompute,
                  tiles[0][1].block_b, tiles[0][1].block_h),
    )  # fmt: skip
