"""Every form of backend `sequence`'s kernels that a plan may ask for, and what is wrong with one that is compiled."""

from collections.abc import Iterable
from functools import cache
from itertools import chain, product
from typing import NamedTuple

from tritongru.planning.devices import REGISTERS, Device, describe
from tritongru.planning.problem import Recurrence
from tritongru.planning.sequence import SequenceTiles, sequence_tiles
from tritongru.planning.small import SmallTiles
from tritongru.tools.compile_report import CompileReport

from .lint import faults_of, spilled_in_loop

DEVICES = ("h200", "h100", "a100", "b200", "rtx4090", "l4", "rtx5090")  # those that the kernels serve
KINDS = ("forward", "backward")
DTYPES = (("fp16", "tf32"), ("bf16", "tf32"), ("fp32", "tf32"), ("fp32", "ieee"))  # precision: of float32 products
HIDDEN = (32, 37, 64, 100, 127, 128, 192, 200, 256, 384, 512, 650, 768, 1024, 1280, 1536, 2048, 2560, 2816)
BATCHES = (1, 4, 16, 32, 64, 128, 512, 2048)
# Bytes that spill, outside the time loop, where no other form is known: by pass, dtype, K, rows of a tile
SPILLS = {("forward", "fp16", 512, 64): 16, ("forward", "bf16", 512, 64): 16}
SPILLS_OF_WINNERS = 256  # besides, of those that may spill inside it too (lint.py)
SMALL_SPILLS = {("forward", "fp32", 128, 1): 24}  # by Triton 3.9 alone


class Form(NamedTuple):
    """One compiled kernel: `tiles` are those of the first sizes that lead to it."""

    device: str
    kind: str
    tiles: SequenceTiles | SmallTiles
    dtype: str
    precision: str = "tf32"
    resets: bool = False

    def __str__(self) -> str:
        t = self.tiles
        if isinstance(t, SmallTiles):
            how = f"small-rows{t.rows}-warps{t.num_warps}-lanes{t.lanes}-vector{t.vector}-ahead{t.ahead}"
        else:
            how = f"units{t.block_h}-rows{t.block_b}x{t.tiles}-warps{t.num_warps}-shared{t.shared_gates}-waits{t.waits}"
        return f"{self.device}-{self.kind}-{self.dtype}-K{t.units}-{how}{'-resets' * self.resets}"


def plans(device: str) -> Iterable[Form]:
    """Every plan on a device, over the whole range of sizes."""
    for kind, (dtype, precision), H, B, D in product(KINDS, DTYPES, HIDDEN, BATCHES, (1, 2)):
        tiles = sequence_tiles(kind, Recurrence(B, H, D, dtype, precision, describe(device)))
        if not isinstance(tiles, str):
            yield Form(device, kind, tiles, dtype, precision)


@cache
def forms(*devices: str) -> tuple[Form, ...]:
    """What is compiled for these devices: a kernel that several devices of one architecture share is there once."""
    found: dict[object, Form] = {}
    for form in chain.from_iterable(map(plans, devices)):
        constants = list(vars(form.tiles).values())[3:]  # but for the fields of OnChip
        found.setdefault((describe(form.device).arch, form.kind, form.dtype, *constants), form)
    return tuple(found.values())


def limits(report: CompileReport, device: Device, shared: int, spilled: int = 0, per_sm: int = 1) -> list[str]:
    """What a kernel takes beyond the device, beyond the planned bytes of shared memory, or beyond what may spill."""
    registers = per_sm * report.registers * report.num_warps * device.target[2]
    taken = {
        "bytes spilled": (report.spill_bytes, spilled),
        "bytes of shared memory": (report.shared_bytes, min(shared, device.shared_per_program)),
        "registers on an SM": (registers, REGISTERS * (1 if device.capability else 2)),
    }
    return [f"{found} {what}, above {limit}" for what, (found, limit) in taken.items() if found > limit]


def faults(form: Form, report: CompileReport) -> list[str]:
    device, kind, t, dtype, _, resets = form
    if isinstance(t, SmallTiles):
        spilled = SMALL_SPILLS.get((kind, dtype, t.units, t.rows), 0)
    else:
        spilled = SPILLS.get((kind, dtype, t.units, t.block_b), 0) * (1 + resets)  # twice on sm_89
        if in_loop := spilled_in_loop(t, kind):
            spilled = SPILLS_OF_WINNERS + in_loop
    wrong = limits(report, describe(device), t.shared_bytes(kind, dtype), spilled)
    return wrong if isinstance(t, SmallTiles) and resets else wrong + faults_of(report, t, kind, dtype, resets)
