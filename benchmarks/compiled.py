"""Command `compiled`: what the compiler makes of the kernels, for GPUs that need not be present. Nothing is timed.

A row is one kernel that a call of these sizes would launch, I = H, with the launchers' own constants and tiles and its
tensors aligned to 16 bytes. A kernel that several sizes share is there once, with the first of them. No date and no
commit: rows depend on code and compiler alone.

    form               the plan's tiles, in words
    registers          of a thread, 32 bits each; on AMD vector and accumulation registers
    spill_bytes        of a thread, as `tritongru.tools.compile_report` counts them
    shared_bytes       of a program, as it is launched
    instructions       of the whole kernel's text, as one warp runs it; a loop's are there once
    loop_instructions  of the largest loop: over time in `sequence`, over K (units of h) in `step`; empty without one
    counted            what the columns after it count instructions of: "loop", the largest, or where there is none
                       (unrolled) or none is told apart (AMD) "kernel"
    HGMMA ...          instructions by class (`SASS_CLASSES`, `AMDGCN_CLASSES`); empty: a class of the other vendor
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from tritongru.planning import Problem, choose, describe
from tritongru.planning.choose import TRITON_BACKENDS, _in_words, unserved_by
from tritongru.registry import find
from tritongru.tools.compile_report import AMDGCN_CLASSES, SASS_CLASSES, compile_report
from tritongru.tools.files import write_rows

from .results import SCHEMA

if TYPE_CHECKING:
    from tritongru.launch.runtime import Specimen

FILE = "compiled.csv"  # in benchmarks/results
DEVICES = ("h200", "a100", "rtx4090", "mi300x")  # one of each architecture that is widely there
DTYPES = ("bf16", "fp32")
HIDDEN = (64, 128, 256, 512, 1024, 1536, 2048)
BATCHES = (32, 128)  # `step` has other tiles above 32 rows
TIMES = (512, 1)  # T of one: the cell, with the input product in it
CLASSES = (*SASS_CLASSES, *AMDGCN_CLASSES)
COLUMNS = (
    "schema", "triton", "device", "target", "backend", "kernel", "kind", "dtype", "products", "B", "H", "form", "warps",
    "stages", "registers", "spill_bytes", "shared_bytes", "instructions", "loop_instructions", "counted", *CLASSES,
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One kernel of a plan; `kind` as in `Plan.tiles`."""

    device: str
    backend: str
    kind: str
    problem: Problem

    def __str__(self) -> str:
        p = self.problem
        return f"{self.device}-{self.backend}-{self.kind}-{p.dtype}-B{p.batch}-H{p.hidden_size}"

    @property
    def words(self) -> str:
        """The plan's tiles, in words."""
        return _in_words(dict(choose(self.problem, describe(self.device), self.backend).tiles)[self.kind])


def forms(*devices: str) -> tuple[Form, ...]:
    """The kernels of these devices' plans, each once."""
    found: dict[object, Form] = {}
    for form in _plans(*devices):
        s = _specimens(form.device, form.backend, form.problem)[form.kind]
        same = describe(form.device).arch, s.name, *map(str, (s.arguments, s.constants)), s.num_warps, s.num_stages
        found.setdefault(same, form)
    return tuple(found.values())


def _plans(*devices: str) -> Iterator[Form]:
    for device in devices:
        for backend in TRITON_BACKENDS:
            for dtype in DTYPES:
                for T in TIMES if backend == "step" else TIMES[:1]:
                    for B in BATCHES:
                        for H in HIDDEN:
                            p = Problem(batch=B, time=T, input_size=H, hidden_size=H, dtype=dtype)
                            if unserved_by(backend, p, describe(device)) is None:
                                for kind, _ in choose(p, describe(device), backend).tiles:
                                    yield Form(device, backend, kind, p)


@cache
def _specimens(device: str, backend: str, problem: Problem) -> dict[str, Specimen]:
    """The launches of a plan by kind; a launcher gives them in the order of the plan's tiles."""
    kinds = [kind for kind, _ in choose(problem, describe(device), backend).tiles]
    return dict(zip(kinds, find(backend).load().specimens(problem, describe(device)), strict=True))


def compiled(form: Form) -> dict[str, str]:
    """Compile a kernel: its row."""
    import triton

    p, device = form.problem, describe(form.device)
    report = compile_report(_specimens(form.device, form.backend, p)[form.kind], device)
    loop = report.loops[0] if report.loops else None
    counts = loop.counts if loop else report.counts
    row = {
        "schema": SCHEMA, "triton": triton.__version__, "device": form.device, "target": report.target,
        "backend": form.backend, "kernel": report.kernel, "kind": form.kind, "dtype": p.dtype,
        "products": p.precision if p.dtype == "fp32" else "", "B": p.batch, "H": p.hidden_size,
        "form": form.words, "warps": report.num_warps,
        "stages": report.num_stages, "registers": report.registers, "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes, "instructions": report.instructions,
        "loop_instructions": loop.instructions if loop else "", "counted": "loop" if loop else "kernel",
        **dict.fromkeys(CLASSES, ""),
        **{name: counts.get(name, 0) for name in (SASS_CLASSES if device.vendor == "nvidia" else AMDGCN_CLASSES)},
    }  # fmt: skip
    return {name: str(row[name]) for name in COLUMNS}


def _no_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets what is under way end


def main(out: Path) -> int:
    """Compile all of them into `out`/compiled.csv, which a run that does not end leaves as it was.

    Returns:
        0; 1 if a kernel does not compile, or cannot here; 130 if interrupted.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from tritongru.registry import has_triton, interpreting

    if not has_triton() or interpreting():
        need = "a process without TRITON_INTERPRET" if has_triton() else "Triton (pip install 'tritongru[triton]')"
        print(f"python -m benchmarks compiled: compiling needs {need}", file=sys.stderr)
        return 1
    path, wanted = out / FILE, forms(*DEVICES)
    rows: dict[Form, dict[str, str]] = {}
    console = Console()
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeElapsedColumn())
    # a fresh process for each core: Triton and the progress bar's thread do not survive a fork
    with (
        ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=_no_interrupt) as pool,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("compiling", total=len(wanted))
        pending = {pool.submit(compiled, form): form for form in wanted}
        form = wanted[0]
        try:
            for done in as_completed(pending):
                form = pending[done]
                rows[form] = done.result()
                progress.update(task, advance=1, description=str(form))
        except (Exception, KeyboardInterrupt) as error:
            pool.shutdown(wait=False, cancel_futures=True)
            interrupted = isinstance(error, KeyboardInterrupt)
            what = "interrupted" if interrupted else f"{form}: {error!r:.500}"
            console.print(f"{what}; {path} is as it was", markup=False, soft_wrap=True)
            return 130 if interrupted else 1
    write_rows(path, COLUMNS, ([rows[form][name] for name in COLUMNS] for form in wanted))
    spilling = sum(row["spill_bytes"] != "0" for row in rows.values())
    console.print(f"{len(rows)} kernels in {path}, {spilling} of them spill", soft_wrap=True)
    return 0
