"""Every kernel that a plan may ask for compiles within its device's limits, without spills, with the instructions that
its tiles promise, and an exchange as strong as its source. `sequence` also under the other Tritons. No GPU is needed.

What this cannot see: whether the machine code computes the right thing, and how fast. Kernels broken on purpose show
that the lint of tests/kit/lint.py sees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.kit.compile_elsewhere import examined, python_of
from tests.kit.forms import DEVICES, Form, examine, forms, plans
from tests.kit.lint import dependence_faults, exchange_faults, small_faults, time_loop
from tests.kit.mutants import mutant
from tests.kit.versions import TRITON
from tritongru.launch.sequence import specimen
from tritongru.launch.step import specimens
from tritongru.planning import Problem, describe
from tritongru.planning.sequence import SequenceTiles, parse_overrides, sequence_tiles
from tritongru.planning.small import SmallTiles
from tritongru.planning.step import StepTiles, _shared_bytes, step_tiles
from tritongru.tools.compile_report import CompileReport, compile_report

pytestmark = pytest.mark.compiled


def params(quick: Iterable[Any], long: Iterable[Any] = ()) -> list[Any]:
    """What `make test` runs too, and what the long exploration adds."""
    return [*quick, *(pytest.param(*(p if isinstance(p, tuple) else (p,)), marks=pytest.mark.long) for p in long)]


# `step`

TARGETS = ("a100", "l4", "h100", "b200", "rtx5090", "mi300x")  # sm_80, 89, 90, 100, 120 and gfx942
DTYPES = ("fp32", "fp16", "bf16")
KINDS = ("forward", "cell", "backward", "backward_first")
BATCHES = (1, 32, 64, 128, 512)
HIDDEN = (64, 512, 768, 1024, 2048, 2816, 4096)
# The assembler of Triton 3.6 stores and loads one register of these once, for few rows (kernels/README.md).
SPILL_A_WORD_ON_3_6 = {("step_backward", "a100"), ("step_backward", "l4")}
# Bytes: the masks of lengths and resets take a few registers more, loaded again a few times at the most.
SPILLED_WHERE_PADDED = 24


@dataclass(frozen=True)
class Choice:
    """Sizes that lead `step_tiles` to its choices, in even, odd and large forms, and which of its kernels are meant."""

    batch: int
    hidden: int
    time: int = 3
    directions: int = 1
    padded: bool = False
    aligned: bool = True  # cuDNN's flattened weights may be aligned to their element only
    kinds: tuple[str, ...] = KINDS
    precision: str = "tf32"

    def __str__(self) -> str:
        marks = "-padded" * self.padded + "-unaligned" * (not self.aligned) + "-ieee" * (self.precision == "ieee")
        which = f"-{self.kinds[0]}" if len(self.kinds) == 1 else ""
        return f"B{self.batch}-H{self.hidden}-T{self.time}-D{self.directions}{marks}{which}"


FEW, MANY, CELL, CELL_OF_MANY = Choice(8, 512), Choice(64, 512), Choice(8, 512, time=1), Choice(64, 512, time=1)
ODD, ODD_CELL = Choice(5, 67, directions=2), Choice(5, 67, time=1, directions=2)
PADDED, PADDED_ODD = replace(FEW, padded=True), replace(ODD, padded=True)
ALL = (FEW, MANY, CELL, CELL_OF_MANY, ODD, ODD_CELL)


def native(target: str) -> str:
    return "ieee" if target == "mi300x" else "tf32"


def every(target: str, dtype: str, precision: str) -> dict[tuple[str, StepTiles], Choice]:
    """The tiles that `step_tiles` returns for these, each with sizes that lead there."""
    found: dict[tuple[str, StepTiles], Choice] = {}
    for kind in KINDS:
        for hidden in HIDDEN:
            for batch in BATCHES:
                tiles = step_tiles(kind, batch, hidden, 1, dtype, precision, describe(target))
                choice = Choice(batch, hidden, 1 if kind == "cell" else 3, kinds=(kind,), precision=precision)
                found.setdefault((kind, tiles), choice)
    return found


def long_choices() -> Iterable[tuple[str, str, Choice]]:
    for target in TARGETS:
        yield from ((target, dtype, PADDED_ODD) for dtype in DTYPES)
        yield from ((target, "fp16", choice) for choice in ALL)
        yield from ((target, "bf16", replace(choice, aligned=False)) for choice in ALL)
        for dtype, precision in {("fp32", native(target)): 0, ("bf16", native(target)): 0, ("fp32", "ieee"): 0}:
            yield from ((target, dtype, choice) for choice in every(target, dtype, precision).values())


QUICK_CHOICES = [
    *((target, "bf16", choice) for target in TARGETS for choice in (FEW, MANY, CELL, CELL_OF_MANY, PADDED)),
    *((target, "fp32", choice) for target in ("h100", "a100", "mi300x") for choice in (MANY, ODD_CELL)),
]


@pytest.mark.parametrize(("target", "dtype", "choice"), params(QUICK_CHOICES, long_choices()), ids=str)
def test_a_choice_of_step_compiles(target: str, dtype: str, choice: Choice) -> None:
    device = describe(target)
    precision = "ieee" if "ieee" in (choice.precision, native(target)) else "tf32"
    sizes = choice.batch, choice.time, 48, choice.hidden, 1, choice.directions
    problem = Problem(*sizes, dtype, precision=precision)
    for found in specimens(problem, device, aligned=choice.aligned, padded=choice.padded):
        if "FIRST" in found.constants:
            kind = "backward_first" if found.constants["FIRST"] else "backward"
        else:
            kind = "cell" if found.constants["FUSE_INPUT"] else "forward"
        if kind not in choice.kinds:
            continue
        report = compile_report(found, device)
        where = f"{report.kernel} {dict(found.constants)} on {target}"
        known = TRITON == (3, 6) and (report.kernel, target) in SPILL_A_WORD_ON_3_6 and not report.loops
        spilled = f"{where}: {report.registers} registers and {report.spill_bytes} bytes spilled"
        assert report.spill_bytes <= 8 * known + SPILLED_WHERE_PADDED * choice.padded, spilled
        tiles = step_tiles(kind, choice.batch, choice.hidden, choice.directions, dtype, precision, device)
        for bound in (device.shared_per_program, _shared_bytes(kind, tiles, dtype)):
            assert report.shared_bytes <= bound, f"{where}: {report.shared_bytes} bytes of shared memory, above {bound}"
        registers = report.registers * report.num_warps * device.target[2]
        assert tiles.per_sm * registers <= device.registers_per_sm, f"{where}: {report.registers} registers"
        if dtype != "fp32" or precision == "tf32" or device.vendor == "amd":
            assert report.matrix_instructions > 0, f"{where}: no matrix instruction"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_tile_is_smaller_than_the_threads_that_hold_it(target: str, dtype: str) -> None:
    """`state` and `dh` are read and written in place: a tile with fewer elements than threads would have one element
    read by several threads, with nothing that orders another's store after the last of the reads."""
    device = describe(target)
    for _, tiles in every(target, dtype, native(target)):
        assert tiles.block_b * tiles.block_h >= tiles.num_warps * device.target[2]


# Beside the launch before it: what is loaded before the wait.

WITH_PDL = ("h200", "b200", "rtx5090")


def beside(target: str, kind: str, dtype: str, B: int, H: int) -> list[str]:
    """What the lint finds in a step of that kind."""
    device = describe(target)
    problem = Problem(batch=B, time=3, input_size=48, hidden_size=H, dtype=dtype)
    found = specimens(problem, device)[0 if kind == "forward" else -1]
    tiles = step_tiles(kind, B, H, 1, dtype, "tf32", device)
    assert tiles.pdl and found.constants["PDL"]
    return dependence_faults(compile_report(found, device), tiles, kind, dtype)


def long_steps() -> Iterable[tuple[Any, ...]]:
    for target in WITH_PDL:
        for kind in ("forward", "backward"):
            for dtype in ("fp32", "bf16"):
                for B, H in ((64, 1024), (64, 2048), (32, 2816), (256, 1024), (512, 4096)):
                    yield target, kind, dtype, B, H


QUICK_STEPS = [(target, kind, "bf16", 32, 512) for target in WITH_PDL for kind in ("forward", "backward")]


@pytest.mark.parametrize(("target", "kind", "dtype", "B", "H"), params(QUICK_STEPS, long_steps()))
def test_a_step_loads_what_no_step_makes_and_waits(target: str, kind: str, dtype: str, B: int, H: int) -> None:
    assert beside(target, kind, dtype, B, H) == []


@pytest.mark.parametrize("target", ["a100", "l4", "mi300x"])
def test_older_cards_and_others_have_the_same_kernel_without_a_wait(target: str) -> None:
    problem = Problem(batch=32, time=3, input_size=48, hidden_size=512, dtype="bf16")
    assert not any(found.constants["PDL"] for found in specimens(problem, describe(target)))


LET = "    if PDL:\n        tl.extra.cuda.gdc_launch_dependents()\n"
WAIT = "    if PDL:\n        tl.extra.cuda.gdc_wait()\n"
LOADS, LOADS_OF_BACKWARD = "    # load: what no step makes; it", "    # load: what no step makes; not"
MUTANTS = {  # pass, what is replaced, by what, before what it is put; what the lint says
    "h before the wait": ("forward", WAIT, "", "    h_prev = h_prev.to(tl.float32)\n", "bytes loaded"),
    "dgates before the wait": ("backward", WAIT, "", "    # + dh * z of src", "bytes loaded"),
    "weights after the wait": ("forward", WAIT, "", LOADS, "bytes loaded"),
    "weights after the wait, backward": ("backward", WAIT, "", LOADS_OF_BACKWARD, "bytes loaded"),
    "no wait": ("forward", "gdc_wait()", "gdc_launch_dependents()", "", "0 ACQBULK"),
    "the next launch never let in": ("forward", "gdc_launch_dependents()", "gdc_wait()", "", "0 PREEXIT"),
    "no wait where no row runs": ("forward", WAIT, WAIT.replace("if PDL", "if rows > 3"), "", "without a wait"),
    "the next launch let in before the loads": ("forward", LET, "", LOADS, "a load between"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_that_does_not_wait_is_killed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, old, new, moved, found = MUTANTS[name]
    monkeypatch.setattr("tritongru.launch.step.kernels", mutant(tmp_path, "step.py", old, new, moved=moved))
    faults = beside("h200", kind, "bf16", 32, 512)
    assert any(found in fault for fault in faults), faults


# `sequence`

ARCHITECTURES = {arch: [d for d in DEVICES if describe(d).arch == arch] for arch in {describe(d).arch for d in DEVICES}}
OTHER_TRITONS = ("3.6.0", "3.9.0")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_at_most_40_kernels_per_dtype_and_target(arch: str, dtype: str) -> None:
    found = [form for form in forms(*ARCHITECTURES[arch]) if form.dtype == dtype]
    assert 0 < len(found) <= 40


@pytest.mark.parametrize("device", DEVICES)
def test_all_programs_of_every_plan_are_on_the_device_at_once(device: str) -> None:
    """What exchanges, waits for each other. Every program fits by itself."""
    limits = describe(device)
    for kind, dtype, _, tiles in plans(device):
        shared = tiles.shared_bytes(kind, dtype)
        assert shared <= limits.shared_per_program, (kind, dtype, tiles)
        if isinstance(tiles, SequenceTiles):
            per_sm = tiles.programs_per_sm
            assert tiles.programs * tiles.groups * tiles.directions <= limits.sms * per_sm, (kind, dtype, tiles)
            assert tiles.max_registers * 32 * tiles.num_warps * per_sm <= limits.registers_per_sm, tiles
            assert (shared + 1024) * per_sm <= limits.shared_per_sm, tiles  # the system keeps 1 KiB of each program's


# Both passes, all dtypes, programs that exchange and that hold all of W_h, each target, each way of keeping weights
SAMPLE = (
    ("h200", "forward", "bf16", 2048, 16), ("h200", "forward", "fp32", 650, 16), ("h200", "forward", "fp16", 200, 16),
    ("h200", "backward", "fp16", 256, 64), ("h200", "backward", "fp32", 512, 16), ("a100", "forward", "fp16", 64, 4096),
    ("a100", "forward", "fp32", 1024, 16), ("a100", "backward", "bf16", 512, 128),
    ("l4", "forward", "bf16", 512, 16), ("l4", "backward", "fp32", 256, 16),
    ("b200", "forward", "bf16", 256, 512), ("b200", "backward", "bf16", 1536, 16),
    ("rtx5090", "forward", "fp16", 768, 16), ("rtx5090", "backward", "bf16", 1024, 16),
    ("h200", "forward", "bf16", 128, 1024), ("h200", "backward", "bf16", 128, 1024),
    ("h200", "backward", "fp16", 127, 9), ("rtx4090", "backward", "fp32", 128, 512),
    ("h200", "forward", "fp32", 128, 16), ("h200", "backward", "fp32", 128, 16),
    ("b200", "forward", "fp32", 64, 9), ("rtx5090", "backward", "bf16", 64, 16), ("a100", "backward", "bf16", 128, 600),
)  # fmt: skip


# What a measurement may ask for and no plan does: by device, pass, dtype, H, B, fields
CANDIDATES = (
    ("h200", "forward", "bf16", 512, 8, "block_b=8"), ("h200", "backward", "bf16", 256, 1, "block_b=8"),
    ("h200", "forward", "bf16", 512, 128, "tiles=2,early=1"), ("h200", "backward", "bf16", 512, 128, "tiles=2,early=1"),
    ("h200", "forward", "bf16", 256, 512, "programs_per_sm=2"),
)  # fmt: skip
MORE_CANDIDATES = (
    ("bf16", 256, 8, "block_b=8"), ("bf16", 1024, 8, "block_b=8"), ("fp32", 512, 8, "block_b=8"),
    ("bf16", 512, 32, "tiles=2,early=1"), ("fp32", 256, 64, "tiles=2,early=1"),
    ("bf16", 256, 256, "programs_per_sm=2,num_warps=4"),
)  # fmt: skip


def form_of(device: str, kind: str, dtype: str, hidden_size: int, batch: int, fields: str = "") -> Form:
    given = parse_overrides(fields) if fields else ()
    tiles = sequence_tiles(kind, batch, hidden_size, 1, dtype, "tf32", describe(device), given)
    assert not isinstance(tiles, str), tiles
    return Form(device, kind, dtype, "tf32", tiles)


def long_forms() -> Iterable[Form]:
    """Those that are not among the quick ones."""

    def kernel(form: Form) -> tuple[object, ...]:
        return describe(form.device).arch, form.kind, form.dtype, form.tiles.form, form.resets

    found = [*forms(*DEVICES), *(replace(form, resets=True) for form in forms(*DEVICES) if form.dtype != "fp16")]
    for device in ("h200", "a100", "rtx5090"):
        for kind in ("forward", "backward"):
            found += [form_of(device, kind, *candidate) for candidate in MORE_CANDIDATES]
    quick = {kernel(form) for form in QUICK_FORMS}
    return {kernel(form): form for form in found if kernel(form) not in quick}.values()


QUICK_FORMS = [
    *(form_of(*sample) for sample in SAMPLE),
    *(replace(form_of(*SAMPLE[i]), resets=True) for i in (1, 3, 6, 13)),
    *(form_of(*candidate) for candidate in CANDIDATES),
]


@pytest.mark.parametrize("form", params(QUICK_FORMS, long_forms()), ids=str)
def test_a_form_of_sequence_compiles(form: Form) -> None:
    found = examine(form)[1]
    assert not found, f"{form}: {'; '.join(found)}"


@pytest.mark.long
@pytest.mark.parametrize("arch", [arch for arch in sorted(ARCHITECTURES) if arch.startswith("sm_")])
@pytest.mark.parametrize("version", OTHER_TRITONS)
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
    tiles = tiles_of(kind, hidden_size)
    assert tiles.tiles == 1 and tiles.block_h == 16
    found = time_loop(compile_report(specimen(kind, tiles, "bf16", "tf32"), describe("h200")))
    assert STUDY[kind, hidden_size] / 2 < found <= 1.1 * STUDY[kind, hidden_size]


# The lint, on kernels broken on purpose. A fault has the words by which these tests know it.


def tiles_of(kind: str, hidden_size: int, dtype: str = "bf16") -> SequenceTiles | SmallTiles:
    return form_of("h200", kind, dtype, hidden_size, 16).tiles


def lint(
    kind: str, kernels: object = None, text: tuple[str, str] | None = None, num_stages: int = 1, **tiles: int
) -> tuple[CompileReport, list[str]]:
    """The faults of a kernel of H 256 in bfloat16: the real one, one of `kernels`, one with another text of its wait,
    or one compiled with other tiles than those that the lint is told."""
    meant = tiles_of(kind, 256)
    found = replace(specimen(kind, replace(meant, **tiles), "bf16", "tf32"), num_stages=num_stages)
    if kernels is not None:
        found = replace(found, kernel=getattr(kernels, f"sequence_{kind}"))
    if text is not None:
        assert text[0] in found.constants["WAIT"], f"the wait no longer holds {text[0]!r}"
        found = replace(found, constants={**found.constants, "WAIT": found.constants["WAIT"].replace(*text)})
    report = compile_report(found, describe("h200"))
    return report, exchange_faults(report, meant, kind, "bf16")


PASSES = pytest.mark.parametrize("kind", ["forward", "backward"])


@PASSES
def test_lint_finds_nothing_in_the_kernels(kind: str) -> None:
    assert lint(kind)[1] == []


@PASSES
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("ld.relaxed.gpu.global.v4", "ld.global.v4", "0 strong loads of 16 bytes"),
        ("@p bra found; add", "bra found; add", "loops that load [] vectors again"),
        ("nanosleep.u32 250;", "", "0 sleeps"),
        ("ld.relaxed.gpu.global.u32 bits", "ld.global.u32 bits", "0 bytes of other strong loads"),
    ],
    ids=["weak loads", "no loop", "no sleep", "a weak look at the status word"],
)
def test_lint_finds_a_wait_that_is_none(kind: str, old: str, new: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in lint(kind, text=(old, new))[1])


KERNELS = {
    "weak publishing stores": ("exchange.py", ', cache_modifier=".cg")', ")", "bytes of strong stores"),
    "weights loaded in the time loop": (
        "sequence.py", "            a_r, a_z, q = three_products(h_all,",
        "            weights = load_weights(w_ptr, FORM)\n            a_r, a_z, q = three_products(h_all,",
        "bytes of weak loads",
    ),
    "one buffer for all sums": (
        "sequence.py", "sums = (buffer_of_sums(FORM), buffer_of_sums(FORM), buffer_of_sums(FORM))",
        "sums = (buffer_of_sums(FORM),) * 3", "barriers",
    ),
    "a product dropped": (
        "sequence.py", "sums[1].store(add_product(zeros, h, weights, 1, 0, FORM))", "sums[1].store(zeros)",
        "matrix instructions",
    ),
    "a gate not saved": ("gates.py", "tl.store(ptrs + H, z.to(dtype), mask=mask)", "pass", "bytes of weak stores"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", KERNELS)
def test_lint_finds_a_mistake_in_a_kernel(mistake: str, tmp_path: Path) -> None:
    *change, fault = KERNELS[mistake]
    faults = lint("forward", mutant(tmp_path, *change, module="sequence"))[1]
    assert any(fault in found for found in faults), faults


def test_lint_finds_weights_in_shared_memory_that_the_tiles_have_in_registers() -> None:
    assert any("bytes from shared memory" in fault for fault in lint("forward", shared_gates=1)[1])


def test_lint_finds_a_sleep_before_every_gate() -> None:
    """Where one is awaited after another, the first alone may come too early."""
    tiles = tiles_of("backward", 512, "fp32")
    assert tiles.waits == 3 and tiles.delay
    found = specimen("backward", tiles, "fp32", "tf32")
    sleepy = replace(found, constants={**found.constants, "WAIT_NEXT": found.constants["WAIT"]})
    faults = [exchange_faults(compile_report(s, describe("h200")), tiles, "backward", "fp32") for s in (found, sleepy)]
    assert faults[0] == [] and [fault[:8] for fault in faults[1]] == ["3 sleeps"]


def test_lint_finds_two_stages() -> None:
    """Nothing in these loops is pipelined, but nothing promises it either."""
    assert [fault[:15] for fault in lint("forward", num_stages=2)[1]] == ["num_stages is 2"]


BINARIES: dict[str, tuple[Callable[[str], str], str]] = {
    "lanes that part": (lambda sass: sass.replace("WARPSYNC", "NOP"), "no WARPSYNC after a wait"),
    "an asynchronous copy": (lambda sass: sass.replace("LDG.E.U16 ", "LDGSTS.E.128 "), "LDGSTS: an asynchronous copy"),
    "a product without matrix instructions": (lambda sass: sass.replace("HMMA.", "FFMA."), "0 matrix instructions"),
    "spills": (lambda sass: sass.replace("STS.64", "STL.64"), "bytes spilled"),
}


@PASSES
@pytest.mark.parametrize("mistake", BINARIES)
def test_lint_finds_what_a_compiler_could_make(kind: str, mistake: str) -> None:
    report, _ = lint(kind)
    change, fault = BINARIES[mistake]
    faults = exchange_faults(replace(report, sass=change(report.sass)), tiles_of(kind, 256), kind, "bf16")
    assert any(fault in found for found in faults), faults


SMALL = {
    "weights loaded in the time loop": (
        "small.py", "        a_r = product(w_r, h_all,",
        "        w_r, _, _ = load_weights(w_ptr, H, False, FORM)\n        a_r = product(w_r, h_all,", "bytes loaded",
    ),
    "a product dropped": (
        "small.py", "a_z = product(w_z, h_all,", "a_z = 0.0 * product(w_r, h_all,",
        "matrix instructions|multiply-adds",
    ),
    "h handed over twice": (
        "small.py", "        h_all = received(h_shared,", "        h_all = received(h_shared, FORM)\n"
        "        hand_over(h_shared, h.to(dtype), FORM)\n        h_all = received(h_shared,", "barriers",
    ),
    "a gate not saved": ("gates.py", "    tl.store(ptrs + H, z.to(dtype), mask=mask)\n", "", "bytes stored"),
    "units read one by one": ("small.py", "H = H // VECTOR * VECTOR", "H = H + 0", "loads"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("mistake", SMALL)
def test_lint_finds_a_mistake_in_a_small_kernel(mistake: str, dtype: str, tmp_path: Path) -> None:
    *change, fault = SMALL[mistake]
    tiles = tiles_of("forward", 64, dtype)
    assert isinstance(tiles, SmallTiles)
    kernel = vars(mutant(tmp_path, *change, module="small"))["small_forward"]
    report = compile_report(replace(specimen("forward", tiles, dtype, "tf32"), kernel=kernel), describe("h200"))
    faults = small_faults(report, tiles, "forward", dtype)
    one_by_one = tiles.vector == 1 and fault == "loads"  # is right in float32
    assert any(re.search(fault, found) for found in faults) or one_by_one, faults
