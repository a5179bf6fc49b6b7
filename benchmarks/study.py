"""Command `study`: the forms of kernels/README.md, one after the other, by what the compiler makes of each.

Every form is compiled for one call: forward without gates saved, one layer, I = H. `text` makes the generated part of
kernels/README.md of the rows; a time is there once a GPU has measured it (results/<gpu>/gru.csv).

    commit             the last one with the form, where its kernel is gone: such rows stay as they are; else empty
    launches           of the recurrence, in a call of T timesteps
    read_bytes         that all programs of a timestep load, most of which L2 delivers: h_{t-1} once in each program
                       that needs it, W_h where it is not kept, x_proj; of a library product each factor once, its least
    flops              of a timestep's products
    counted            what the instructions are counted in: "time loop", or "launch" where each timestep is one
    shared_bytes ...   as in compiled.csv (compiled.py)
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritongru.planning import Problem, choose, describe
from tritongru.planning.problem import BYTES
from tritongru.registry import find
from tritongru.tools.compile_report import SASS_CLASSES, compile_report
from tritongru.tools.files import write_rows

from . import forms
from .cases import Case
from .compiled import figures, no_compiler
from .generated import generate, table
from .results import RESULTS, SCHEMA, read, read_rows
from .suites import STUDY_T
from .traffic import step_traffic

if TYPE_CHECKING:
    from tritongru.launch.runtime import Kernel

FILE = "study.csv"  # in benchmarks/results
README = Path(__file__).parents[1] / "kernels" / "README.md"
DEVICE, B, H, DTYPE, PRECISION = "h200", 32, 512, "bf16", "tf32"
COLUMNS = (
    "schema", "commit", "triton", "target", "form", "kernel", "dtype", "B", "H", "launches", "read_bytes", "flops",
    "warps", "registers", "spill_bytes", "shared_bytes", "instructions", "loop_instructions", "counted", *SASS_CLASSES,
)  # fmt: skip
# The columns of the table: instruction classes by what they do.
MIX = {
    "matrix": ("HMMA", "HGMMA", "UTCMMA"),
    "shared memory": ("LDS", "LDSM", "STS", "STSM", "LDTM", "STTM"),
    "global memory": ("LDG", "LDGSTS", "STG", "UTMALDG", "UTMASTG"),
    "MUFU": ("MUFU",),
    "barriers": ("BAR", "WARPGROUP"),
    "fences, atomics": ("MEMBAR", "ATOM", "RED"),
}


@dataclass(frozen=True)
class Made:
    """One form as it is compiled: its launch, launches of a call, and what a step of all programs reads."""

    specimen: "Kernel"
    launches: str
    read_bytes: int
    flops: int = 2 * B * 3 * H * H
    in_time_loop: bool = False


def _problem(T: int) -> Problem:
    return Problem(batch=B, time=T, input_size=H, hidden_size=H, dtype=DTYPE, training=False, precision=PRECISION)


def _unfused() -> Made:
    size = BYTES[DTYPE]
    product, pointwise = size * (3 * H * H + B * H), size * 2 * B * 3 * H + 4 * B * H
    return Made(forms.unfused_specimen(H, DTYPE), "2 T", product + pointwise)


def _planned(backend: str, T: int) -> Made:
    plan = choose(_problem(T), describe(DEVICE), backend)
    specimen, *_ = find(backend).specimens(_problem(T), describe(DEVICE))
    launches = "1" if backend == "sequence" else "T"
    return Made(specimen, launches, *step_traffic(plan), backend == "sequence")


FORMS: dict[str, Callable[[], Made]] = {
    "unfused": _unfused,
    "step": lambda: _planned("step", STUDY_T),
    "step-input": lambda: _planned("step", 1),
    "sequence": lambda: _planned("sequence", STUDY_T),
}


def row(name: str) -> dict[str, str]:
    """Compile a form: its row."""
    import triton

    made = FORMS[name]()
    report = compile_report(made.specimen, describe(DEVICE))
    loop = report.loops[0] if report.loops else None
    counts = loop.counts if loop and made.in_time_loop else report.counts
    cells = {
        "schema": SCHEMA, "commit": "", "triton": triton.__version__, "target": report.target, "form": name,
        "kernel": report.kernel, "dtype": DTYPE, "B": B, "H": H, "launches": made.launches,
        "read_bytes": made.read_bytes, "flops": made.flops, **figures(report),
        "counted": "time loop" if made.in_time_loop else "launch",
        **{name: counts.get(name, 0) for name in SASS_CLASSES},
    }  # fmt: skip
    return {name: str(cells[name]) for name in COLUMNS}


def of_a_step(row: Mapping[str, str]) -> int:
    """The instructions that the classes of a row are a part of."""
    return int(row["loop_instructions" if row["counted"] == "time loop" else "instructions"])


def text(rows: Sequence[Mapping[str, str]], measured: Sequence[Mapping[str, str]]) -> str:
    """The generated part of kernels/README.md.

    Args:
        rows: of study.csv.
        measured: rows of gru.csv, by GPUs; those of other shapes, passes and providers are left out.
    """
    cells = [
        [
            f"`{r['form']}`", r["launches"], f"{int(r['read_bytes']) / 1e6:.2f}", f"{int(r['flops']) / 1e6:.0f}",
            r["warps"], r["registers"], r["spill_bytes"], f"{int(r['shared_bytes']) / 1024:.0f}", of_a_step(r),
            *(sum(int(r[name]) for name in classes) for classes in MIX.values()),
        ]
        for r in rows
    ]  # fmt: skip
    header = (
        "form", "launches", "MB read", "Mflop", "warps", "registers", "bytes spilled", "shared, KiB", "instructions",
        *MIX,
    )  # fmt: skip
    first = rows[0]
    gone = (f"`{r['form']}`, whose kernel is gone, is that of commit {r['commit']}." for r in rows if r["commit"])
    told = (
        f"Compiled with Triton {first['triton']} for {first['target']}, {first['dtype']}, B {first['B']}, "
        f"H {first['H']}, I = H; no GPU, nothing timed. MB (all programs' loads) and Mflop are those of a timestep. "
        "Instructions are the text of the time loop, as one warp runs it, or of a launch where each timestep is one; "
        "those of `unfused` are of the pointwise kernel, its MB and Mflop include the library product at its least. "
        f"{' '.join(gone)}"
    )
    return "\n\n".join([told, table(header, cells), _times(rows, measured)])


def _times(rows: Sequence[Mapping[str, str]], measured: Sequence[Mapping[str, str]]) -> str:
    case = Case(STUDY_T, B, H, H, DTYPE)
    found = {
        (r["device"], r["provider"]): f"{float(r['device_us']) / STUDY_T:.3g}"
        for r in measured
        if (r["case"], r["pass"], r["l2"], r["status"]) == (case.name, "inference", "warm", "ok") and r["device_us"]
    }
    gpus = sorted({gpu for gpu, _ in found})
    if not gpus:
        return f"Time: these forms have not been timed beside each other yet. Suite study does it, as case {case.name}."
    times = [[f"`{r['form']}`", *(found.get((gpu, r["form"]), "") for gpu in gpus)] for r in rows]
    return f"us a timestep in a CUDA graph, case {case.name} in benchmarks/results/:\n\n" + table(
        ("form", *gpus), times
    )


def committed(folder: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of study.csv."""
    return read(folder / FILE, COLUMNS)


def generated(folder: Path = RESULTS) -> str:
    """The generated part as the committed rows make it."""
    return text(committed(folder), [r for r in read_rows(folder) if r["driver"]])


def main() -> int:
    """Compile all forms into results/study.csv, and write the generated part of kernels/README.md.

    Returns:
        0; 1 if a kernel cannot be compiled here.
    """
    if why_not := no_compiler():
        print(f"python -m benchmarks study: {why_not}", file=sys.stderr)
        return 1
    *made, last = [row(name) for name in FORMS]
    rows = [*made, *(old for old in committed() if old["commit"]), last]
    write_rows(RESULTS / FILE, COLUMNS, ([r[name] for name in COLUMNS] for r in rows))
    generate(README, "study", generated())
    print(f"{len(rows)} forms in {RESULTS / FILE} and {README}")
    return 0
