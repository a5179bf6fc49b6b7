"""Tiles of the kernels of one launch per timestep (kernels/step.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from .devices import Device
from .problem import BYTES


@dataclass(frozen=True)
class StepTiles:
    """Tile of one program of a step kernel: rows x hidden units, and the depth of one product."""

    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    num_stages: int


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
        num_stages = 3 if dtype == "fp32" else 2  # with 2, sm_89, 90 and 100 spill registers of tf32's or ieee's
    elif kind == "cell" and dtype == "fp32" and not wide and not vector and (device.capability or 0) < 89:
        num_stages = 4  # with more, sm_80 spills a register of odd sizes'
    elif kind == "backward" and dtype == "fp32" and (device.capability or 0) >= 100:
        num_stages = 2 if (device.capability or 0) >= 120 else 3  # with more, both spill a register of odd sizes' tf32
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
