"""Tiles of the kernels of one launch per timestep (kernels/step.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from .devices import Device, registers
from .problem import BYTES, Recurrence
from .tuned import check, or_winner

LAUNCHES = 2  # that are on the device at once: one that computes, one that loads
ANY = 1 << 63  # rows of a batch
LARGE = 128 * 1024  # bytes of shared memory of a program: above it there is wgmma


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
        """Of a thread, for `per_sm` programs; None: the assembler's choice, which may spill for nothing."""
        return registers(self.num_warps, self.per_sm) if self.pdl or self.split > 1 or self.per_sm > 1 else None

    @property
    def words(self) -> str:
        found = f"{self.block_b} rows x {self.block_h} units" + f", K by {self.block_k}" * (self.block_k > 0)
        found += f", {self.num_warps} warps"
        found += f", {self.num_stages} stages" + f", {self.split} parts of K" * (self.split > 1)
        found += f", {self.ahead} chunks of W_h first" * (self.ahead > 0)
        return found + ", beside the launch before it" * self.pdl

    def chunk_bytes(self, kind: str, dtype: str) -> int:
        """Of a chunk of K: the weights of three gates and the left factor."""
        lefts = 3 if kind == "backward" else 1
        return self.block_k * (3 * self.block_h + lefts * self.block_b) * BYTES[dtype]

    def shared_bytes(self, kind: str, dtype: str) -> int:
        """An upper bound of a program's shared memory; the compile tests hold it against the compiler's."""
        # the epilogue's exchanges of layout take up to one float32 tile, of each part
        epilogue = 4 * self.split * self.block_b * max(self.block_h, self.block_k if self.split == 1 else 0)
        chunk = self.chunk_bytes(kind, dtype)
        if self.split > 1 and kind != "cell":
            return max(max(self.ahead, self.num_stages) * chunk, epilogue)
        return (self.ahead + self.num_stages) * chunk + epilogue


OVERRIDABLE = tuple(field.name for field in fields(StepTiles))


class Form(NamedTuple):
    """Rows x units of a program with PDL. shares: of a device's SMs, that the programs may take, by the batch: the
    first of (rows up to, share) that it is no larger than."""

    rows: int
    units: int
    shares: Sequence[tuple[int, float]] = ((ANY, 1.0),)


# By kind and bytes of an element. The first is taken that fits a batch and a device, or else the last. Larger tiles
# read less over L2, smaller ones keep more SMs busy. The shares agree with what an H200 measured at eight sizes
# (benchmarks/results/nvidia-h200, step_forms.csv); between these they are estimates.
FORMS = {
    ("forward", 2): (
        Form(16, 16, ((16, 0.75), (ANY, 0.5))), Form(16, 32, ((16, 1.0), (ANY, 0.4))), Form(32, 16),
        Form(32, 32, ((ANY, 0.5),)), Form(64, 32), Form(128, 32),
    ),
    ("forward", 4): (
        Form(16, 16, ((16, 1.0), (32, 0.75), (ANY, 0.5))), Form(16, 32, ((16, 1.0), (ANY, 0.4))), Form(32, 16),
        Form(64, 32), Form(128, 32),
    ),
    ("backward", 2): (
        Form(16, 16, ((16, 0.75), (ANY, 0.5))), Form(16, 32, ((32, 1.0), (ANY, 0.75))), Form(32, 32, ((ANY, 0.5),)),
        Form(64, 32, ((ANY, 0.5),)), Form(64, 64),
    ),
    ("backward", 4): (
        Form(16, 16, ((16, 1.0), (32, 0.75), (ANY, 0.5))), Form(16, 32, ((64, 1.0), (ANY, 0.75))),
        Form(32, 32, ((ANY, 0.5),)), Form(64, 32),
    ),
}  # fmt: skip
BACKWARD = "backward_first", "backward"


def kinds(T: int, training: bool) -> tuple[str, ...]:
    """Of the launches of a call."""
    return "cell" if T == 1 else "forward", *(BACKWARD if training else ())


def step_tiles(kind: str, of: Recurrence) -> StepTiles:
    """Tiles of `forward`, `cell` (forward with FUSE_INPUT), `backward` or `backward_first`.

    With PDL: one of `FORMS`, with as many weights loaded ahead as two launches side by side have room for. Without it
    two sizes a kernel: up to 32 rows in tiles of 16, where the launch is bound by latency and reading W_h; above that
    tiles of 64. What won over these on a GPU is in planning/tiles.

    Raises:
        ValueError: overrides that no kernel can have.
    """
    if of.precision != "tf32":  # which winners were measured with
        return _with_overrides(kind, of)
    tiles: StepTiles = or_winner(_with_overrides, "step", kind, of)
    return tiles


def _with_overrides(kind: str, of: Recurrence) -> StepTiles:
    tiles, given = _planned(kind, of), dict[str, Any](of.overrides)
    if not given or kind == "backward_first":
        return tiles
    if tiles.split > 1:  # a part for each warp
        given.setdefault("split", given.get("num_warps", tiles.num_warps))
    tiles = replace(tiles, **given)
    sizes = dict.fromkeys(("block_b", "block_h", "block_k", "num_warps", "per_sm"), tuple(1 << n for n in range(13)))
    check("step", vars(tiles), {**sizes, "split": (1, min(tiles.num_warps, 8))})
    chunks, shared = -(-of.hidden_size // tiles.block_k), of.device.shared_per_program
    tiles = replace(tiles, ahead=min(tiles.ahead, chunks), pdl=bool(tiles.pdl and _pdl(of.device)))
    while "ahead" not in given and tiles.ahead and tiles.shared_bytes(kind, of.dtype) > shared:
        tiles = replace(tiles, ahead=tiles.ahead - 1)
    if "num_stages" not in given and tiles.ahead < chunks:  # a pipeline for the others
        tiles = replace(tiles, num_stages=max(2, tiles.num_stages))
    if tiles.shared_bytes(kind, of.dtype) > shared:
        raise ValueError(f"{of.device.name} has {shared} bytes of shared memory a program for {tiles}")
    return tiles


def _pdl(device: Device) -> bool:
    return device.vendor == "nvidia" and (device.capability or 0) >= 90


def _planned(kind: str, of: Recurrence) -> StepTiles:
    device, fp32 = of.device, of.dtype == "fp32"
    if kind == "backward_first":
        return StepTiles(block_b=8, block_h=64, block_k=0, num_warps=4, num_stages=1)  # it multiplies nothing
    if device.vendor == "interpreter":  # which runs programs one after another, at a price per program
        return StepTiles(block_b=64 if of.batch > 16 else 16, block_h=64, block_k=64, num_warps=4, num_stages=1)
    matrix = not fp32 or of.precision != "ieee"  # instructions, which 64 rows are for
    pdl, steps, large = _pdl(device), kind != "cell", device.shared_per_program > LARGE
    if pdl and matrix and steps:
        return _with_pdl(kind, of)
    if pdl and matrix and (of.batch <= 32 or (fp32 and not large)):
        block_k = 512 // of.size
        ahead = min(2 if large else 1, -(-of.hidden_size // block_k))  # of W_h, while x W_i^T is multiplied
        return StepTiles(16, 16, block_k, num_warps=8, num_stages=3 if large else 2, split=8, ahead=ahead)
    wide = of.batch > 32 and matrix
    # Deeper tiles of K spill somewhere (tests/test_compiles.py): in a cell of odd sizes on sm_90; in 64 rows of
    # backward on sm_89.
    shallow = fp32 or kind == "cell" or (wide and kind == "backward")
    # Few rows: several tiles of K under way at once, for a program alone on its SM waits for L2 and little else.
    # AMD's LDS holds 64 KB and its compiler pipelines two.
    if device.vendor == "amd":
        num_stages = 2
    elif kind == "cell" and fp32 and not wide and matrix and (device.capability or 0) < 89:
        num_stages = 4  # with more, sm_80 spills a register of odd sizes'
    else:
        num_stages = 3 if wide else 6
    # 2 programs an SM may have 255 registers a thread. Told so, ptxas takes 96; else it takes 72, and spills on sm_89.
    per_sm = 2 if kind == "backward" and not shallow and device.vendor == "nvidia" else 1
    block_b, block_k = 64 if wide else 16, 32 if shallow else 64
    tiles = StepTiles(block_b, 16, block_k, 4, num_stages, per_sm=per_sm, pdl=pdl and steps)
    while tiles.num_stages > 1 and tiles.shared_bytes(kind, of.dtype) > device.shared_per_program:
        tiles = replace(tiles, num_stages=tiles.num_stages - 1)
    return tiles


def _with_pdl(kind: str, of: Recurrence) -> StepTiles:
    """One of `FORMS`. 16 or 32 rows: each warp its part of K, with mma.sync, and as much of W_h ahead as there is room
    for while another launch is on the device. More rows: wgmma, its tiles of K pipelined, since there reading L2 and
    the products themselves take longer than the hand-over."""
    device, fp32 = of.device, of.dtype == "fp32"
    able = [form for form in FORMS[kind, of.size] if form.rows < 2 * max(of.batch, 16)]  # no half of it is padding
    for rows, units, shares in [form for form in able if form.rows <= 32 or device.shared_per_program > LARGE]:
        programs = of.directions * -(-of.batch // rows) * -(-of.hidden_size // units)
        if programs <= device.sms * next(share for most, share in shares if of.batch <= most):
            break
    if rows > 32:
        return StepTiles(rows, units, 128 // of.size, 8, 3, ahead=1, pdl=True)
    tiles = StepTiles(rows, units, 128, 8, 1, split=8, pdl=True)
    chunks, chunk = -(-of.hidden_size // tiles.block_k), tiles.chunk_bytes(kind, of.dtype)
    full = kind == "forward" and rows * units == 32 * 32  # its registers fill an SM
    for per_sm in (1,) if full or LAUNCHES * programs <= device.sms else (LAUNCHES, 1):
        # the system keeps 1 KiB a program; float32 stays in registers until it is rounded, which leave 96 for the rest
        room = min(device.shared_per_program, device.shared_per_sm // per_sm - 1024)
        ahead = min(chunks, (min(room, (registers(8, per_sm) - 96) * 1024) if fp32 else room) // chunk)
        if ahead >= min(chunks, 2):  # a pipeline
            break
    return replace(tiles, ahead=ahead, num_stages=1 if ahead == chunks else max(2, min(4, ahead)), per_sm=per_sm)
