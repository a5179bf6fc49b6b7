"""Tiles that a measurement tries in place of the planned ones; `python -m benchmarks --suite tune` times them.

A candidate is the text that a backend's name takes behind a colon ("sequence:block_h=8"). A new one is a line below.
"""

from contextlib import suppress
from itertools import product
from typing import Any

from tritongru.planning import Device, Problem, choose

LARGEST = 1 << 30
# By backend: fields, and the batches that they are meant for.
CANDIDATES: dict[str, tuple[tuple[str, int, int], ...]] = {
    "sequence": (
        ("programs_per_sm=2,num_warps=4", 64, LARGEST),
        ("programs_per_sm=2,num_warps=4,delay=400", 64, LARGEST),
        ("programs_per_sm=2,num_warps=4,block_b=32", 128, LARGEST),
        ("delay=100", 1, LARGEST),
        ("delay=400", 1, LARGEST),
        ("block_b=8", 1, 8),
        ("block_b=8,delay=400", 1, 8),
        ("block_h=8", 1, 64),
        ("block_h=8,delay=400", 1, 64),
        ("tiles=2", 32, 64),
        ("block_b=32", 32, LARGEST),
        ("block_b=32,delay=400", 32, LARGEST),
        ("block_b=32,tiles=2", 128, LARGEST),
        # of layers that one program holds
        ("lanes=2", 1, LARGEST),
        ("ahead=1", 1, LARGEST),
    ),
    "step": (
        ("pdl=0", 1, LARGEST),
        ("ahead=0", 1, LARGEST),
        ("block_b=16", 17, 64),
        ("block_h=32", 1, LARGEST),
        ("per_sm=2", 1, LARGEST),
    ),
}
# The classes that are timed: dtypes, H, B. bf16 speaks for fp16, whose kernels are the same; H is the largest of its
# class of K (`step`: and of those between it and the next smaller one), B of the batches up to it.
CLASSES: dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = {
    "sequence": (("bf16", "fp32"), (512, 1024, 256, 2048, 128, 64), (64, 256, 8, 128, 32)),
    "step": (("bf16",), (2816, 1024, 2048), (32, 192, 512)),
}
TILED = tuple((backend, *of_size) for backend, sizes in CLASSES.items() for of_size in product(*sizes))


def candidates(backend: str, problem: Problem, device: Device) -> tuple[str, ...]:
    """Those of a backend that the device can run and that are no tiles it would take anyhow, in the form of its kernels
    that it would take; () where it cannot run."""

    def tiles_of(name: str) -> Any:
        with suppress(ValueError):
            return choose(problem, device, name).tiles

    def form_of(tiles: Any) -> list[type]:
        return [type(of_pass) for _, of_pass in tiles]

    found = {"": tiles_of(backend)}  # and the tiles of each
    for fields, least, most in CANDIDATES[backend] if found[""] else ():
        tiles = tiles_of(f"{backend}:{fields}") if least <= problem.batch <= most else None
        if tiles and tiles not in found.values() and form_of(tiles) == form_of(found[""]):
            found[fields] = tiles
    return tuple(found)[1:]
