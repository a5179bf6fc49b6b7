"""Every form of backend `sequence`'s kernels that a plan may ask for, and what is wrong with one that is compiled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from tritongru.planning.devices import Device, describe
from tritongru.planning.sequence import SequenceTiles, sequence_tiles
from tritongru.planning.small import SmallTiles
from tritongru.tools.compile_report import CompileReport, compile_report

from .lint import exchange_faults, small_faults

DEVICES = ("h200", "h100", "a100", "b200", "rtx4090", "l4", "rtx5090")  # those that the kernels serve
KINDS = ("forward", "backward")
DTYPES = (("fp16", "tf32"), ("bf16", "tf32"), ("fp32", "tf32"), ("fp32", "ieee"))  # precision: of float32 products
HIDDEN = (32, 37, 64, 100, 127, 128, 192, 200, 256, 384, 512, 650, 768, 1024, 1280, 1536, 2048, 2560, 2816)
BATCHES = (1, 4, 16, 32, 64, 128, 512, 2048)
# What is spilled, in all and in the time loop, where no other form is known: by pass, dtype, precision, K, rows of a
# tile and gates in shared memory
SPILLS = {
    ("forward", "fp16", "tf32", 512, 64, 0): (16, 0), ("forward", "bf16", "tf32", 512, 64, 0): (16, 0),
    ("forward", "fp32", "tf32", 128, 1, 0): (24, 0),  # one program that holds W_h, by Triton 3.9 alone
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One compiled kernel: `tiles` are those of the first sizes that lead to it."""

    device: str
    kind: str
    dtype: str
    precision: str
    tiles: SequenceTiles | SmallTiles
    resets: bool = False

    def __str__(self) -> str:
        t = self.tiles
        if isinstance(t, SmallTiles):
            how = f"small-rows{t.rows}-warps{t.num_warps}-lanes{t.lanes}-vector{t.vector}-ahead{t.ahead}"
        else:
            how = f"units{t.block_h}-rows{t.block_b}x{t.tiles}-warps{t.num_warps}-shared{t.shared_gates}-waits{t.waits}"
        return f"{self.device}-{self.kind}-{self.dtype}-K{t.units}-{how}{'-resets' * self.resets}"


def plans(device: str) -> Iterable[tuple[str, str, str, SequenceTiles | SmallTiles]]:
    """Kind, dtype, precision and tiles of every plan on a device, over the whole range of sizes."""
    for kind in KINDS:
        for dtype, precision in DTYPES:
            for hidden_size in HIDDEN:
                for batch in BATCHES:
                    for directions in (1, 2):
                        tiles = sequence_tiles(kind, batch, hidden_size, directions, dtype, precision, describe(device))
                        if not isinstance(tiles, str):
                            yield kind, dtype, precision, tiles


@cache
def forms(*devices: str) -> tuple[Form, ...]:
    """What is compiled for these devices: a kernel that several devices of one architecture share is there once."""
    found: dict[object, Form] = {}
    for device in devices:
        for kind, dtype, precision, tiles in plans(device):
            same = describe(device).arch, kind, dtype, tiles.form
            found.setdefault(same, Form(device, kind, dtype, precision, tiles))
    return tuple(found.values())


def examine(form: Form) -> tuple[CompileReport, list[str]]:
    """Compile a form: the report, and what is wrong with it."""
    from tritongru.launch.sequence import specimen  # imports Triton

    device = describe(form.device)
    report = compile_report(specimen(form.kind, form.tiles, form.dtype, form.precision, form.resets), device)
    return report, faults(form, report, device)


def faults(form: Form, report: CompileReport, device: Device) -> list[str]:
    """What is wrong with a compiled form; [] if nothing."""
    t, found = form.tiles, []
    if isinstance(t, SmallTiles):
        spilled, _ = SPILLS.get((form.kind, form.dtype, "tf32", t.units, t.rows, 0), (0, 0))
        found += [] if form.resets else small_faults(report, t, form.kind, form.dtype)
    else:
        same = form.kind, form.dtype, form.precision, t.units, t.block_b, t.shared_gates
        spilled, in_loop = SPILLS.get(same, (0, 0))
        spilled *= 1 + form.resets  # on sm_89
        found += exchange_faults(report, t, form.kind, form.dtype, in_loop, form.resets)
    if report.spill_bytes > spilled:
        found.append(f"{report.spill_bytes} bytes spilled, with {report.registers} registers")
    if report.shared_bytes > device.shared_per_program:
        found.append(f"{report.shared_bytes} bytes of shared memory, above the device's {device.shared_per_program}")
    bound = t.shared_bytes(form.kind, form.dtype)
    if report.shared_bytes > bound:
        found.append(f"{report.shared_bytes} bytes of shared memory, above the planned {bound}")
    registers = report.registers * report.num_warps * device.target[2]
    if registers > device.registers_per_sm:
        found.append(f"{registers} registers, above the {device.registers_per_sm} of an SM")
    return found
