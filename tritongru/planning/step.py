"""Tiles of the kernels of one launch per timestep (kernels/step.py)."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .devices import Device
from .problem import BYTES
from .sequence import Overrides, parse_overrides
from .tuned import winner

REGISTERS_PER_SM = 1 << 16
PDL_CAPABILITY = 90  # programmatic dependent launch
UP = 1 << 30  # of H
LAUNCHES = 2  # that are on the device at once: one that computes, one that loads


@dataclass(frozen=True)
class StepTiles:
    """Tile of one program of a step kernel: rows x hidden units, and the depth of one product."""

    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1  # parts of a chunk of K, one for each warp
    ahead: int = 0  # chunks of K whose weights are loaded before the wait for the launch before
    per_sm: int = 1  # programs that an SM is to hold at once
    pdl: bool = False  # programmatic dependent launch: a step begins while the one before it runs

    @property
    def max_registers(self) -> int | None:
        """Of a thread, for `per_sm` programs; None: the assembler's choice, which for 8 warps may spill for nothing."""
        limit = min(255, REGISTERS_PER_SM // (self.per_sm * 32 * self.num_warps))
        return limit if self.pdl or self.split > 1 else None

    @property
    def words(self) -> str:
        found = f"{self.block_b} rows x {self.block_h} units, K by {self.block_k}, {self.num_warps} warps"
        found += f", {self.num_stages} stages" + f", {self.split} parts of K" * (self.split > 1)
        found += f", {self.ahead} chunks of W_h first" * (self.ahead > 0)
        return found + ", beside the launch before it" * self.pdl


OVERRIDABLE = tuple(field.name for field in dataclasses.fields(StepTiles))


def kinds(T: int, training: bool) -> tuple[str, ...]:
    """Of the launches of a call."""
    if T == 1:
        return ("cell", "backward_first")[: 1 + training]
    return ("forward", "backward_first", "backward")[: 1 + 2 * training]


@lru_cache(maxsize=4096)
def step_tiles(
    kind: str, batch: int, hidden_size: int, directions: int, dtype: str, precision: str, device: Device,
    overrides: Overrides = (),
) -> StepTiles:  # fmt: skip
    """Tiles of `forward`, `cell` (forward with FUSE_INPUT), `backward` or `backward_first`. Never depends on T.

    With PDL: of `FORMS` the one whose step takes the least, by `least_us`, with as many weights loaded ahead as two
    launches side by side have room for. Without it two sizes a kernel: up to 32 rows in tiles of 16, where the launch
    is bound by latency and reading W_h; above that tiles of 64. None of this is timed yet (benchmarks/QUESTIONS.md).

    Raises:
        ValueError: another kind, or overrides that no kernel can have.
    """
    if kind not in ("forward", "cell", "backward", "backward_first"):
        raise ValueError(f"kind must be forward, cell, backward or backward_first, got {kind!r}")
    tiles = _planned(kind, batch, hidden_size, directions, dtype, precision, device)
    if (
        not overrides
        and precision == "tf32"
        and (fields := winner("step", kind, dtype, batch, hidden_size, UP, device))
    ):
        with suppress(ValueError):  # of another layer
            won = parse_overrides(fields, "step", OVERRIDABLE)
            return step_tiles(kind, batch, hidden_size, directions, dtype, precision, device, won)
    if not overrides or kind == "backward_first":
        return tiles
    given: dict[str, Any] = dict(overrides)
    if tiles.split > 1:  # a part for each warp
        given.setdefault("split", given.get("num_warps", tiles.num_warps))
    tiles = dataclasses.replace(tiles, **given)
    sizes = tiles.block_b, tiles.block_h, tiles.block_k, tiles.num_warps, tiles.split, tiles.per_sm
    if any(size < 1 or size & (size - 1) for size in sizes) or tiles.split not in (1, min(tiles.num_warps, 8)):
        raise ValueError(f"tiles of step must be powers of two, split 1 or the number of up to 8 warps, got {tiles}")
    chunks = -(-hidden_size // tiles.block_k)
    tiles = dataclasses.replace(tiles, ahead=min(tiles.ahead, chunks), pdl=bool(tiles.pdl and _pdl(device)))
    while "ahead" not in given and tiles.ahead and _shared_bytes(kind, tiles, dtype) > device.shared_per_program:
        tiles = dataclasses.replace(tiles, ahead=tiles.ahead - 1)
    if "num_stages" not in given and tiles.ahead < chunks:  # a pipeline for the others
        tiles = dataclasses.replace(tiles, num_stages=max(2, tiles.num_stages))
    if _shared_bytes(kind, tiles, dtype) > device.shared_per_program:
        raise ValueError(f"{device.name} has {device.shared_per_program} bytes of shared memory a program for {tiles}")
    return tiles


def _pdl(device: Device) -> bool:
    return device.vendor == "nvidia" and (device.capability or 0) >= PDL_CAPABILITY


def _planned(
    kind: str, batch: int, hidden_size: int, directions: int, dtype: str, precision: str, device: Device
) -> StepTiles:
    if device.vendor == "interpreter":  # which runs programs one after another, at a price per program
        return StepTiles(block_b=64 if batch > 16 else 16, block_h=64, block_k=64, num_warps=4, num_stages=1)
    vector = dtype == "fp32" and precision == "ieee"  # no matrix instructions, which 64 rows are for
    pdl = _pdl(device)
    if pdl and kind in ("forward", "backward") and not vector:
        rows = 2 * max(batch, 16)  # a tile has fewer: no half of it is padding
        forms = [form for form in FORMS[kind] if form.block_b < rows and _fits(kind, form, dtype, device)]
        return min(
            (_overlapping(kind, form, batch, hidden_size, directions, dtype, device) for form in forms),
            key=lambda tiles: least_us(kind, tiles, batch, hidden_size, directions, dtype, device),
        )
    large = device.shared_per_program > 128 * 1024
    if pdl and kind == "cell" and not vector and (batch <= 32 or (dtype == "fp32" and not large)):
        block_k = 512 // BYTES[dtype]
        ahead = min(2 if large else 1, -(-hidden_size // block_k))  # of W_h, while x W_i^T is multiplied
        return StepTiles(16, 16, block_k, num_warps=8, num_stages=3 if large else 2, split=8, ahead=ahead)
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
    else:
        num_stages = 3 if wide else 6
    tiles = StepTiles(
        64 if wide else 16, 16, 32 if shallow else 64, num_warps=4, num_stages=num_stages,
        pdl=pdl and kind in ("forward", "backward"),
    )  # fmt: skip
    while num_stages > 1 and _shared_bytes(kind, tiles, dtype) > device.shared_per_program:
        num_stages -= 1
        tiles = dataclasses.replace(tiles, num_stages=num_stages)
    return tiles


# Rows x units of a program, with PDL. 16 or 32 rows: each warp its part of K, with mma.sync. From 64 rows on wgmma, its
# tiles of K pipelined: where few SMs are idle, reading L2 and the products themselves take longer than the hand-over.
_SPLIT = tuple(StepTiles(b, h, 128, 8, 2, split=8, pdl=True) for b, h in ((16, 16), (16, 32), (32, 16), (32, 32)))
_WGMMA = {
    "forward": tuple(StepTiles(b, h, 64, 8, 3, pdl=True) for b, h in ((64, 32), (128, 32))),
    "backward": tuple(StepTiles(b, h, 64, 8, 3, pdl=True) for b, h in ((64, 32), (64, 64))),
}
FORMS = {kind: _SPLIT + wide for kind, wide in _WGMMA.items()}


def _fits(kind: str, form: StepTiles, dtype: str, device: Device) -> bool:
    """Whether registers suffice (tests/test_compiles.py), and for 64 rows and more whether there is wgmma."""
    if form.split > 1:
        return dtype != "fp32" or kind == "backward" or form.block_b * form.block_h < 32 * 32
    return device.shared_per_program > 128 * 1024 and (dtype != "fp32" or form.block_h <= 32)


def _overlapping(kind: str, form: StepTiles, B: int, H: int, D: int, dtype: str, device: Device) -> StepTiles:
    """The form with as much of W_h ahead as there is room for while another launch is on the device."""
    tiles = form if form.split > 1 else dataclasses.replace(form, block_k=form.block_k * 2 // BYTES[dtype])
    chunks, chunk = -(-H // tiles.block_k), _chunk_bytes(kind, tiles, dtype)
    if form.split == 1:
        return dataclasses.replace(tiles, ahead=1, num_stages=max(2, min(3, device.shared_per_program // chunk - 1)))
    full = kind == "forward" and form.block_b * form.block_h == 32 * 32  # its registers fill an SM
    per_sm = 1 if full or LAUNCHES * _programs(form, B, H, D) <= device.sms else LAUNCHES
    room = _room(per_sm, dtype, device)
    if room // chunk < min(chunks, 2):  # no room for a pipeline: one launch has the SM to itself
        per_sm, room = 1, _room(1, dtype, device)
    ahead = min(chunks, room // chunk)
    stages = 1 if ahead == chunks else max(2, min(4, ahead))
    return dataclasses.replace(tiles, ahead=ahead, num_stages=stages, per_sm=per_sm)


def _room(per_sm: int, dtype: str, device: Device) -> int:
    """Bytes that one of `per_sm` programs of 8 warps has for what it loads ahead: shared memory, of which the system
    keeps 1 KiB a program; for float32, which stays in registers until it is rounded, what 96 for other things leave."""
    shared = min(device.shared_per_program, device.shared_per_sm // per_sm - 1024)
    return min(shared, (min(255, REGISTERS_PER_SM // (per_sm * 256)) - 96) * 1024) if dtype == "fp32" else shared


def _programs(tiles: StepTiles, B: int, H: int, D: int) -> int:
    return D * -(-B // tiles.block_b) * -(-H // tiles.block_h)


# Of an H200, measured (benchmarks/results/nvidia-h200/ceilings.csv): bytes and flops in a microsecond.
L2_BYTES, L2_BYTES_OF_ONE, MATRIX_FLOPS_OF_ONE = 11.9e6, 92.3 * 1980, 881e6 / 132
MMA_SYNC = 0.71  # of the matrix peak


def least_us(kind: str, tiles: StepTiles, B: int, H: int, D: int, dtype: str, device: Device) -> float:
    """Least time of a step besides the hand-over, in an H200's microseconds: the reads of all programs over L2, or
    what an SM's programs do: read what was not loaded ahead, and multiply, which 64 rows and more do at once."""
    size, factors, half = BYTES[dtype], 1 if kind == "forward" else 3, dtype != "fp32"
    programs = _programs(tiles, B, H, D)
    turns = -(-programs // device.sms)
    weights, left = 3 * tiles.block_h * H, factors * min(B, tiles.block_b) * H  # elements that a program reads
    ahead = tiles.ahead * tiles.block_k if LAUNCHES * programs <= device.sms * tiles.per_sm else 0
    late = 3 * tiles.block_h * max(0, H - ahead)
    rate = MATRIX_FLOPS_OF_ONE * (1 if half else 0.5) * (MMA_SYNC if tiles.split > 1 else 1)
    products = 2 * tiles.block_b * weights / rate
    over_l2 = programs * (weights + left) * size / L2_BYTES * device.sms / 132
    reads = (late + left) * size / L2_BYTES_OF_ONE
    return max(over_l2, turns * (reads + products if tiles.split > 1 else max(reads, products)))


def _chunk_bytes(kind: str, tiles: StepTiles, dtype: str) -> int:
    """Of a chunk of K: the weights of three gates and the left factor."""
    lefts = {"forward": 1, "cell": 1, "backward": 3, "backward_first": 8}[kind]
    return tiles.block_k * (3 * tiles.block_h + lefts * tiles.block_b) * BYTES[dtype]


def _shared_bytes(kind: str, tiles: StepTiles, dtype: str) -> int:
    """An upper bound of a program's shared memory; the compile tests hold it against the compiler's."""
    # the epilogue's exchanges of layout take up to one float32 tile, of each part
    epilogue = 4 * tiles.split * tiles.block_b * max(tiles.block_h, tiles.block_k if tiles.split == 1 else 0)
    chunk = _chunk_bytes(kind, tiles, dtype)
    if tiles.split > 1 and kind != "cell":
        return max(max(tiles.ahead, tiles.num_stages) * chunk, epilogue)
    return (tiles.ahead + tiles.num_stages) * chunk + epilogue
