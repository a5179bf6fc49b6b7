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

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from tritongru.planning import Problem, choose, describe
from tritongru.planning.choose import TRITON_BACKENDS, unserved_by
from tritongru.registry import find, has_triton, interpreting
from tritongru.tools.compile_report import AMDGCN_CLASSES, SASS_CLASSES, CompileReport, compile_report
from tritongru.tools.files import write_rows

from .results import SCHEMA

if TYPE_CHECKING:
    from tritongru.launch.runtime import Kernel

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
        return dict(choose(self.problem, describe(self.device), self.backend).tiles)[self.kind].words


def forms(*devices: str) -> tuple[Form, ...]:
    """The kernels of these devices' plans, each once."""
    found: dict[object, Form] = {}
    for form in _plans(*devices):
        s = _specimens(form.device, form.backend, form.problem)[form.kind]
        same = describe(form.device).arch, s.name, *map(str, (s.arguments, s.constants)), s.num_warps, s.num_stages
        found.setdefault(same, form)
    return tuple(found.values())


def _plans(*devices: str) -> Iterator[Form]:
    for device, backend, dtype, T, B, H in product(devices, TRITON_BACKENDS, DTYPES, TIMES, BATCHES, HIDDEN):
        p = Problem(batch=B, time=T, input_size=H, hidden_size=H, dtype=dtype)
        if (backend == "step" or T > 1) and unserved_by(backend, p, describe(device)) is None:
            for kind, _ in choose(p, describe(device), backend).tiles:
                yield Form(device, backend, kind, p)


@cache
def _specimens(device: str, backend: str, problem: Problem) -> "dict[str, Kernel]":
    """The launches of a plan by kind; a launcher gives them in the order of the plan's tiles."""
    kinds = [kind for kind, _ in choose(problem, describe(device), backend).tiles]
    return dict(zip(kinds, find(backend).specimens(problem, describe(device)), strict=True))


def figures(report: CompileReport) -> dict[str, object]:
    """The columns that every table of compiled kernels has."""
    return {
        "warps": report.num_warps, "registers": report.registers, "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes, "instructions": report.instructions,
        "loop_instructions": report.loops[0].instructions if report.loops else "",
    }  # fmt: skip


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
        "form": form.words, "stages": report.num_stages, **figures(report), "counted": "loop" if loop else "kernel",
        **dict.fromkeys(CLASSES, ""),
        **{name: counts.get(name, 0) for name in (SASS_CLASSES if device.vendor == "nvidia" else AMDGCN_CLASSES)},
    }  # fmt: skip
    return {name: str(row[name]) for name in COLUMNS}


def no_compiler() -> str | None:
    """Why nothing can be compiled in this process."""
    if not has_triton():
        return "compiling needs Triton (pip install 'tritongru[triton]')"
    return "compiling needs a process without TRITON_INTERPRET" if interpreting() else None


def main(out: Path) -> int:
    """Compile all of them into `out`/compiled.csv, which a run that does not end leaves as it was.

    Returns:
        0; 1 if a kernel cannot be compiled here. An error of the compiler is raised.
    """
    from rich.progress import track

    if why_not := no_compiler():
        print(f"python -m benchmarks compiled: {why_not}", file=sys.stderr)
        return 1
    wanted = forms(*DEVICES)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:  # Triton does not survive a fork
        rows = list(track(pool.map(compiled, wanted), description="compiling", total=len(wanted)))
    write_rows(out / FILE, COLUMNS, ([row[name] for name in COLUMNS] for row in rows))
    spilling = sum(row["spill_bytes"] != "0" for row in rows)
    print(f"{len(rows)} kernels in {out / FILE}, {spilling} of them spill")
    return 0
