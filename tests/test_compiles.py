"""Every kernel that a plan may ask for compiles within its device's limits, without spills, with the instructions that
its tiles promise, and an exchange as strong as its source. `sequence` also under the other Tritons. No GPU is needed.

What this cannot see: whether the machine code computes the right thing, and how fast. Kernels broken on purpose show
that the lint of tests/kit/lint.py sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kit.compile_elsewhere import examined, python_of
from tests.kit.forms import DEVICES, KINDS, Form, examine, forms, limits, plans
from tests.kit.lint import dependence_faults, faults_of, time_loop
from tests.kit.mutants import mutant
from tests.kit.versions import TRITON
from tritongru.launch.sequence import specimen
from tritongru.launch.step import specimens
from tritongru.planning import Problem, describe
from tritongru.planning.problem import Recurrence
from tritongru.planning.sequence import SequenceTiles, sequence_tiles
from tritongru.planning.step import StepTiles, step_tiles
from tritongru.planning.tuned import parse_overrides
from tritongru.tools.compile_report import compile_report

pytestmark = pytest.mark.compiled
LONG = pytest.mark.long

# `step`

TARGETS = ("a100", "l4", "h100", "b200", "rtx5090", "mi300x")  # sm_80, 89, 90, 100, 120 and gfx942
DTYPES = ("fp32", "fp16", "bf16")
BATCHES = (1, 32, 64, 128, 512)
HIDDEN = (64, 512, 768, 1024, 2048, 2816, 4096)
# The assembler of Triton 3.6 stores and loads one register of these once, for few rows (kernels/README.md).
SPILL_A_WORD_ON_3_6 = {("step_backward", "a100"), ("step_backward", "l4")}
# Bytes: the masks of lengths and resets take a few registers more, loaded again a few times at the most.
SPILLED_WHERE_PADDED = 24


class Choice(NamedTuple):
    """Sizes that lead `step_tiles` to its choices, in even, odd and large forms, and which of its kernels are meant."""

    target: str
    dtype: str
    batch: int
    hidden: int
    time: int = 3
    directions: int = 1
    precision: str = "tf32"
    kind: str = ""  # the one that is meant
    how: str = ""  # "padded", or "unaligned": cuDNN's flattened weights may be aligned to their element only

    def __str__(self) -> str:
        return "-".join(str(field) for field in self if field)


FEW, MANY, CELL, CELL_OF_MANY = (8, 512), (64, 512), (8, 512, 1), (64, 512, 1)
ODD, ODD_CELL = (5, 67, 3, 2), (5, 67, 1, 2)


def native(target: str) -> str:
    return "ieee" if target == "mi300x" else "tf32"


def every(target: str, dtype: str, precision: str) -> dict[tuple[str, StepTiles], Choice]:
    """The tiles that `step_tiles` returns for these, each with sizes that lead there."""
    found: dict[tuple[str, StepTiles], Choice] = {}
    for kind, H, B in product(("forward", "cell", "backward", "backward_first"), HIDDEN, BATCHES):
        tiles = step_tiles(kind, Recurrence(B, H, 1, dtype, precision, describe(target)))
        found.setdefault((kind, tiles), Choice(target, dtype, B, H, 1 if kind == "cell" else 3, 1, precision, kind))
    return found


def choices() -> Iterable[Any]:
    for target in TARGETS:
        yield from (Choice(target, "bf16", *sizes) for sizes in (FEW, MANY, CELL, CELL_OF_MANY))
        yield Choice(target, "bf16", *FEW, how="padded")
    yield from (Choice(t, "fp32", *sizes) for t in ("h100", "a100", "mi300x") for sizes in (MANY, ODD_CELL))
    for target in TARGETS:
        rest = [Choice(target, dtype, *ODD, how="padded") for dtype in DTYPES]
        for sizes in (FEW, MANY, CELL, CELL_OF_MANY, ODD, ODD_CELL):
            rest += [Choice(target, "fp16", *sizes), Choice(target, "bf16", *sizes, how="unaligned")]
        for dtype, precision in {("fp32", native(target)): 0, ("bf16", native(target)): 0, ("fp32", "ieee"): 0}:
            rest += every(target, dtype, precision).values()
        yield from (pytest.param(choice, marks=LONG) for choice in rest)


@pytest.mark.parametrize("choice", choices(), ids=str)
def test_a_choice_of_step_compiles(choice: Choice) -> None:
    target, dtype, B, H, T, D, precision, meant, how = choice
    device, precision = describe(target), "ieee" if "ieee" in (precision, native(target)) else "tf32"
    problem = Problem(B, T, 48, H, 1, D, dtype, precision=precision)
    found = specimens(problem, device, aligned=how != "unaligned", padded=how == "padded")
    for kind, launch in zip(("cell" if T == 1 else "forward", "backward_first", "backward"), found, strict=False):
        if meant not in ("", kind):
            continue
        report, tiles = compile_report(launch, device), step_tiles(kind, problem.on(device))
        known = TRITON == (3, 6) and (report.kernel, target) in SPILL_A_WORD_ON_3_6 and not report.loops
        spilled = 8 * known + SPILLED_WHERE_PADDED * (how == "padded")
        wrong = limits(report, device, tiles.shared_bytes(kind, dtype), spilled, tiles.per_sm)
        if dtype != "fp32" or precision == "tf32" or device.vendor == "amd":
            wrong += [] if report.matrix_instructions > 0 else ["no matrix instruction"]
        assert not wrong, f"{report.kernel} {dict(launch.constants)} on {target}: {wrong}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_tile_is_smaller_than_the_threads_that_hold_it(target: str, dtype: str) -> None:
    """`state` and `dh` are read and written in place: a tile with fewer elements than threads would have one element
    read by several threads, with nothing that orders another's store after the last of the reads. Older cards and
    others have the same kernels without a wait for the launch before."""
    device = describe(target)
    for _, tiles in every(target, dtype, native(target)):
        assert tiles.block_b * tiles.block_h >= tiles.num_warps * device.target[2]
        assert not tiles.pdl or target in ("h100", "b200", "rtx5090")


# Beside the launch before it: what is loaded before the wait.


def beside(target: str, kind: str, dtype: str, B: int, H: int) -> list[str]:
    """What the lint finds in a step of that kind."""
    device = describe(target)
    problem = Problem(batch=B, time=3, input_size=48, hidden_size=H, dtype=dtype)
    found = specimens(problem, device)[0 if kind == "forward" else -1]
    tiles = step_tiles(kind, problem.on(device))
    assert tiles.pdl and found.constants["PDL"]
    return dependence_faults(compile_report(found, device), tiles, kind, dtype)


STEPS = [("bf16", 32, 512)]
MORE_STEPS = product(("fp32", "bf16"), ((64, 1024), (64, 2048), (32, 2816), (256, 1024), (512, 4096)))
STEPS += [pytest.param(dtype, *sizes, marks=LONG) for dtype, sizes in MORE_STEPS]


@pytest.mark.parametrize(("dtype", "B", "H"), STEPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["h200", "b200", "rtx5090"])
def test_a_step_loads_what_no_step_makes_and_waits(target: str, kind: str, dtype: str, B: int, H: int) -> None:
    assert beside(target, kind, dtype, B, H) == []


def moved(text: str, before: str) -> tuple[str, str]:
    return f"{{{text}=>}}", f"{{=>{text}}}{before}"


LET = "    if PDL:\n        tl.extra.cuda.gdc_launch_dependents()\n"
WAIT = "    if PDL:\n        tl.extra.cuda.gdc_wait()\n"
LOADS = "    ahead = load_ahead(w_hh_ptr, offs_h, AHEAD, "
MUTANTS = {  # pass, what the lint says, edits
    "h before the wait": ("forward", "bytes loaded", *moved(WAIT, "    h_prev = h_prev.to(tl.float32)\n")),
    "dgates before the wait": ("backward", "bytes loaded", *moved(WAIT, "    dh_prev += dh_src * z_src")),
    "weights after the wait": ("forward", "bytes loaded", *moved(WAIT, LOADS + "False")),
    "weights after the wait, backward": ("backward", "bytes loaded", *moved(WAIT, LOADS + "True")),
    "no wait": ("forward", "0 ACQBULK", "{gdc_wait=>gdc_launch_dependents}()"),
    "the next launch never let in": ("forward", "0 PREEXIT", "{gdc_launch_dependents=>gdc_wait}()"),
    "no wait where no row runs": ("forward", "without a wait", WAIT.replace("PDL", "{PDL=>rows > 3}")),
    "the next launch let in before the loads": ("forward", "a load between", *moved(LET, LOADS + "False")),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_that_does_not_wait_is_killed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, found, *edits = MUTANTS[name]
    monkeypatch.setattr("tritongru.launch.step.kernels", mutant(tmp_path, "step.py", *edits))
    faults = beside("h200", kind, "bf16", 32, 512)
    assert any(found in fault for fault in faults), faults


# `sequence`

ARCHITECTURES = {arch: [d for d in DEVICES if describe(d).arch == arch] for arch in {describe(d).arch for d in DEVICES}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_at_most_40_kernels_per_dtype_and_target(arch: str, dtype: str) -> None:
    found = [form for form in forms(*ARCHITECTURES[arch]) if form.dtype == dtype]
    assert 0 < len(found) <= 40


@pytest.mark.parametrize("device", DEVICES)
def test_all_programs_of_every_plan_are_on_the_device_at_once(device: str) -> None:
    """What exchanges, waits for each other. Every program fits by itself."""
    has = describe(device)
    for form in plans(device):
        t, shared = form.tiles, form.tiles.shared_bytes(form.kind, form.dtype)
        assert shared <= has.shared_per_program, form
        if isinstance(t, SequenceTiles):
            assert t.programs * t.groups * t.directions <= has.sms * t.programs_per_sm, form
            assert t.max_registers * 32 * t.num_warps * t.programs_per_sm <= has.registers_per_sm, form
            # the system keeps 1 KiB of each program's
            assert (shared + 1024) * t.programs_per_sm <= has.shared_per_sm, form


def form_of(device: str, kind: str, dtype: str, hidden_size: int, batch: int, fields: str = "") -> Form:
    given = parse_overrides(fields) if fields else ()
    tiles = sequence_tiles(kind, Recurrence(batch, hidden_size, 1, dtype, "tf32", describe(device), given))
    assert not isinstance(tiles, str), tiles
    return Form(device, kind, tiles, dtype)


# What a measurement may ask for and no plan does: dtype, H, B, fields
CANDIDATES = (
    ("bf16", 256, 8, "block_b=8"), ("bf16", 1024, 8, "block_b=8"), ("fp32", 512, 8, "block_b=8"),
    ("bf16", 512, 32, "tiles=2,early=1"), ("fp32", 256, 64, "tiles=2,early=1"),
    ("bf16", 256, 256, "programs_per_sm=2,num_warps=4"),
)  # fmt: skip


def every_form() -> Iterable[Any]:
    """Of all devices, passes, dtypes, classes of K and ways of keeping weights by default one of 28."""
    found = [*forms(*DEVICES), *(form._replace(resets=True) for form in forms(*DEVICES) if form.dtype != "fp16")]
    found += [form_of(*of, *fields) for of in product(("h200", "a100", "rtx5090"), KINDS) for fields in CANDIDATES]
    found.append(form_of("h200", "forward", "bf16", 512, 8, "block_b=8"))
    found.append(form_of("h200", "forward", "bf16", 256, 512, "programs_per_sm=2"))
    found.append(form_of("h200", "backward", "fp16", 256, 64)._replace(resets=True))
    return (pytest.param(form, marks=LONG if i % 28 else ()) for i, form in enumerate(found))


@pytest.mark.parametrize("form", every_form(), ids=str)
def test_a_form_of_sequence_compiles(form: Form) -> None:
    found = examine(form)
    assert not found, f"{form}: {'; '.join(found)}"


@LONG
@pytest.mark.parametrize("arch", [arch for arch in sorted(ARCHITECTURES) if arch.startswith("sm_")])
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_under_another_triton(version: str, arch: str) -> None:
    """In float16 the machine code is bfloat16's but for the names of types."""
    if not python_of(version).exists():
        pytest.skip(f"no environment with Triton {version}: `make long` makes it")
    meant = [form for form in forms(*ARCHITECTURES[arch]) if form.dtype != "fp16"]
    found = examined(version, meant)
    assert {compiled_by for compiled_by, _ in found} == {version}
    wrong = {str(form): faults for form, (_, faults) in zip(meant, found, strict=True) if faults}
    assert not wrong, wrong


# Instructions of the time loop of the study's kernels, those that were fast on an H200 (prototypes.csv in
# benchmarks/results/nvidia-h200), compiled by Triton 3.7.1 for sm_90 in bfloat16; forward saves r, z, n, q. They are
# dense, in one direction, of an H known to the compiler, and their waits end by a count, without clock or status word.
STUDY = {
    ("forward", 256): 322, ("forward", 512): 236, ("forward", 1024): 304, ("forward", 2048): 531,
    ("backward", 512): 286, ("backward", 1024): 443,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "hidden_size"), STUDY)
def test_the_time_loop_is_at_most_a_tenth_longer_than_the_studys(kind: str, hidden_size: int) -> None:
    """Without what runs only once a wait looks at the clock."""
    tiles: Any = form_of("h200", kind, "bf16", hidden_size, 16).tiles
    assert tiles.tiles == 1 and tiles.block_h == 16
    found = time_loop(compile_report(specimen(kind, tiles, "bf16", "tf32"), describe("h200")))
    assert STUDY[kind, hidden_size] / 2 < found <= 1.1 * STUDY[kind, hidden_size]


# The lint, on kernels broken on purpose: what is changed of one of H 256 in bfloat16, and the words of its fault.


def lint(
    kind: str, folder: Path, *, H: int = 256, dtype: str = "bf16", kernel: tuple[str, ...] = (), num_stages: int = 1,
    sass: tuple[str, str] = ("", ""), wait: tuple[str, str] = ("", ""), next_wait: str = "WAIT_NEXT", **tiles: int,
) -> list[str]:  # fmt: skip
    """The faults of a kernel with an edit, with another text of its wait or of its binary, or compiled with other tiles
    than those that the lint is told."""
    meant = form_of("h200", kind, dtype, H, 16).tiles
    found = replace(specimen(kind, replace(meant, **tiles), dtype, "tf32"), num_stages=num_stages)
    if kernel:
        module = "sequence" if isinstance(meant, SequenceTiles) else "small"
        found = replace(found, kernel=vars(mutant(folder, *kernel, module=module))[f"{module}_{kind}"])
    if "WAIT" in found.constants:
        waits = dict(WAIT=found.constants["WAIT"].replace(*wait))
        if kind == "backward":
            waits |= dict(WAIT_NEXT=found.constants[next_wait])
        found = replace(found, constants={**found.constants, **waits})
    report = compile_report(found, describe("h200"))
    return faults_of(replace(report, sass=report.sass.replace(*sass)), meant, kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_lint_finds_nothing_in_the_kernels(kind: str, tmp_path: Path) -> None:
    assert lint(kind, tmp_path) == []


MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "weak loads": ("^0 strong loads of 16 bytes", dict(wait=("ld.relaxed.gpu.global.v4", "ld.global.v4"))),
    "no loop": (r"^loops that load \[\] vectors again", dict(wait=("@p bra found; add", "bra found; add"))),
    "no sleep": ("^0 sleeps", dict(wait=("nanosleep.u32 250;", ""))),
    "a weak look at the status word": (
        "^0 bytes of other strong loads", dict(wait=("ld.relaxed.gpu.global.u32 bits", "ld.global.u32 bits")),
    ),
    "lanes that part": ("no WARPSYNC after a wait", dict(sass=("WARPSYNC", "NOP"))),
    "an asynchronous copy": ("LDGSTS: an asynchronous copy", dict(sass=("LDG.E.U16 ", "LDGSTS.E.128 "))),
    "a product without matrix instructions": ("0 matrix instructions", dict(sass=("HMMA.", "FFMA."))),
    "spills": ("bytes spilled", dict(sass=("STS.64", "STL.64"))),
}  # fmt: skip
OF_FORWARD = {
    "weights in shared memory that should be in registers": ("bytes from shared memory", dict(shared_gates=1)),
    "two stages": ("^num_stages is 2", dict(num_stages=2)),
    "weak publishing stores": (
        "bytes of strong stores", dict(kernel=("exchange.py", '{, cache_modifier=".cg")=>)}')),
    ),
    "weights loaded in the time loop": ("bytes of weak loads", dict(kernel=(
        "sequence.py", "{=>weights = load_weights(w_ptr, FORM)\n            }a_r, a_z, q = three_products(h_all,",
    ))),
    "one buffer for all sums": ("barriers", dict(kernel=(
        "sequence.py", "sums = (buffer_of_sums(FORM){, buffer_of_sums(FORM), buffer_of_sums(FORM))=>,) * 3}",
    ))),
    "a product dropped": ("matrix instructions", dict(kernel=(
        "sequence.py", "sums[1].store({add_product(zeros, h, weights, 1, 0, FORM)=>zeros})",
    ))),
    "a gate not saved": ("bytes of weak stores", dict(kernel=(
        "gates.py", "{tl.store(ptrs + H, z.to(dtype), mask=mask)=>pass}",
    ))),
}  # fmt: skip
# Where one gate is awaited after another, the first look alone may come too early.
OF_BACKWARD = {"a sleep before every gate": ("^3 sleeps", dict(H=512, dtype="fp32", next_wait="WAIT"))}
OF_SMALL = {
    "weights loaded in the time loop": (
        "bytes loaded", "small.py",
        "{=>w_r, _, _ = load_weights(w_ptr, H, False, FORM)\n        }a_r = product(w_r, h_all,",
    ),
    "a product dropped": (
        "matrix instructions|multiply-adds", "small.py", "a_z = {product(w_z=>0.0 * product(w_r}, h_all,",
    ),
    "h handed over twice": (
        "barriers", "small.py",
        "{=>h_all = received(h_shared, FORM)\n        hand_over(h_shared, h.to(dtype), FORM)\n        }"
        "h_all = received(h_shared,",
    ),
    "a gate not saved": ("bytes stored", "gates.py", "{    tl.store(ptrs + H, z.to(dtype), mask=mask)\n=>}"),
    "units read one by one": ("loads", "small.py", "H = {H // VECTOR * VECTOR=>H + 0}"),  # is right in float32
}  # fmt: skip
ALL = [(kind, name, *of) for kind in KINDS for name, of in MISTAKES.items()]
ALL += [("forward", name, *of) for name, of in OF_FORWARD.items()]
ALL += [("backward", name, *of) for name, of in OF_BACKWARD.items()]
ALL += [
    ("forward", f"{name} of a small kernel", fault, dict(H=64, dtype=dtype, kernel=edit))
    for dtype in ("bf16", "fp32")
    for name, (fault, *edit) in OF_SMALL.items()
    if (name, dtype) != ("units read one by one", "fp32")
]


@pytest.mark.parametrize(("kind", "name", "fault", "how"), ALL)
def test_lint_finds_a_mistake(kind: str, name: str, fault: str, how: dict[str, Any], tmp_path: Path) -> None:
    faults = lint(kind, tmp_path, **how)
    assert any(re.search(fault, found) for found in faults), faults
