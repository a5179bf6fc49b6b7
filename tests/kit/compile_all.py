"""Every form of backend `sequence`'s kernels that a plan may ask for, compiled and examined. No GPU is needed.

    python -m tests.kit.compile_all [device ...]

compiles all of them, one process per core, and prints a table per target. It exits with 1 if anything is wrong. Triton
keeps what it compiled (~/.triton/cache), so a second run takes a fraction.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

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
IN_LOOP = ("HMMA", "FFMA", "MUFU", "LDSM", "LDS", "STS", "LDG", "STG", "BAR")  # what the table shows of the time loop


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


def figures(report: CompileReport | None) -> tuple[object, ...]:
    """A row of the table: of a program, then of one warp in the time loop."""
    if report is None:
        return ("does not compile",)
    program = (report.num_warps, report.registers, report.spill_bytes, report.shared_bytes)
    loop = report.loops[0]
    return *program, loop.instructions, *(loop.counts.get(name, 0) for name in IN_LOOP)


def main(arguments: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m tests.kit.compile_all", description=__doc__.split("\n")[0])
    parser.add_argument("devices", nargs="*", default=DEVICES, metavar="device", help=f"some of {', '.join(DEVICES)}")
    devices = parser.parse_args(arguments).devices
    console = Console(width=None if sys.stdout.isatty() else 160)
    results: dict[Form, tuple[CompileReport | None, list[str]]] = {}
    # a fresh process for each core: Triton and the progress bar's thread do not survive a fork
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool, Progress(console=console) as bar:
        pending = {pool.submit(examine, form): form for form in forms(*devices)}
        task = bar.add_task("compiling", total=len(pending))
        for done in as_completed(pending):
            form = pending[done]
            try:
                results[form] = done.result()
            except Exception as error:  # the compiler's: the other forms are still of interest
                results[form] = None, [f"does not compile: {error!r:.300}"]
            for fault in results[form][1]:
                bar.console.print(f"[red]{form}[/]: {fault}")
            bar.advance(task)

    by_target: dict[str, list[Form]] = {}
    for form in forms(*devices):
        by_target.setdefault(describe(form.device).arch, []).append(form)
    for target, compiled in by_target.items():
        table = Table("kernel", title=f"{target}: {len(compiled)} kernels", title_justify="left")
        for name in ("warps", "registers", "spilled", "shared", "loop", *IN_LOOP):
            table.add_column(name, justify="right")
        for form in compiled:
            table.add_row(str(form), *map(str, figures(results[form][0])))
        console.print(table)
    wrong = sum(bool(found) for _, found in results.values())
    for target, compiled in by_target.items():
        spilled = sum(bool(report and report.spill_bytes) for report, _ in (results[form] for form in compiled))
        console.print(f"{target}: {len(compiled)} kernels, {spilled} spilled")
    console.print(f"{len(results)} kernels compiled, something is wrong with {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
