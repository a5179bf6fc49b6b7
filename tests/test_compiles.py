"""Every kernel that a plan may ask for compiles within its device's limits, without spills, with the instructions that
its tiles promise, and an exchange as strong as its source. Kernels broken on purpose show that the lint of
tests/kit/lint.py sees. Whether the machine code computes the right thing, and how fast, is not seen here."""

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import triton

from tests.kit.compile_elsewhere import examined, python_of
from tests.kit.forms import DEVICES, KINDS, Form, faults, forms, limits, plans
from tests.kit.lint import dependence_faults, faults_of
from tests.kit.mutants import edited, mutant, table
from tritongru.launch.protocol import LayerCall
from tritongru.launch.runtime import Kernel
from tritongru.launch.sequence import specimen
from tritongru.launch.step import specimens as of_call
from tritongru.planning import Problem, describe
from tritongru.planning.devices import REGISTERS, Device
from tritongru.planning.problem import Overrides, Recurrence
from tritongru.planning.sequence import SequenceTiles, sequence_tiles
from tritongru.planning.step import StepTiles, kinds, step_tiles
from tritongru.planning.tuned import parse_overrides
from tritongru.tools.compile_report import compile_report

pytestmark = pytest.mark.compiled
LONG = pytest.mark.long

TARGETS = ("a100", "l4", "h100", "b200", "rtx5090", "mi300x")  # sm_80, 89, 90, 100, 120 and gfx942
DTYPES = ("fp32", "fp16", "bf16")
BATCHES = (1, 32, 64, 128, 512)
HIDDEN = (64, 512, 768, 1024, 2048, 2816, 4096)
# The assembler of Triton 3.6 stores and loads one register of these once, for few rows (kernels/README.md).
SPILL_A_WORD = {("step_backward", "a100"), ("step_backward", "l4")}
# Bytes: the masks of lengths and resets take a few registers more, loaded again a few times at the most.
SPILLED_WHERE_PADDED = 24


def choice(target, dtype, B, H, T=3, D=1, precision="tf32", meant="", how="", marks=()) -> Any:
    """Sizes that lead `step_tiles` to one of its choices, and the kernel that is meant, or all. how: "padded", or
    "unaligned", as cuDNN's flattened weights may be aligned to their element only."""
    given = target, dtype, B, H, T, D, precision, meant, how
    return pytest.param(*given, marks=marks, id="-".join(str(field) for field in given if field))


FEW, MANY, CELL, CELL_OF_MANY = (8, 512), (64, 512), (8, 512, 1), (64, 512, 1)
ODD, ODD_CELL = (5, 67, 3, 2), (5, 67, 1, 2)


def native(target: str) -> str:
    return "ieee" if target == "mi300x" else "tf32"


def every(target: str, dtype: str, precision: str) -> dict[tuple[str, StepTiles], Any]:
    """The tiles that `step_tiles` returns for these, each with sizes that lead there."""
    found: dict[tuple[str, StepTiles], Any] = {}
    for kind, H, B in product(("forward", "cell", "backward", "backward_first"), HIDDEN, BATCHES):
        tiles, T = step_tiles(kind, Recurrence(B, H, 1, dtype, precision, describe(target))), 1 if kind == "cell" else 3
        found.setdefault((kind, tiles), choice(target, dtype, B, H, T, 1, precision, kind, marks=LONG))
    return found


def choices() -> Iterable[Any]:
    for target in TARGETS:
        yield from (choice(target, "bf16", *sizes) for sizes in (FEW, MANY, CELL, CELL_OF_MANY))
        yield choice(target, "bf16", *FEW, how="padded")
        yield from (choice(target, dtype, *ODD, how="padded", marks=LONG) for dtype in DTYPES)
        for sizes in (FEW, MANY, CELL, CELL_OF_MANY, ODD, ODD_CELL):
            yield choice(target, "fp16", *sizes, marks=LONG)
            yield choice(target, "bf16", *sizes, how="unaligned", marks=LONG)
        for dtype, precision in {("fp32", native(target)): 0, ("bf16", native(target)): 0, ("fp32", "ieee"): 0}:
            yield from every(target, dtype, precision).values()
    yield from (choice(t, "fp32", *sizes) for t in ("h100", "a100", "mi300x") for sizes in (MANY, ODD_CELL))


def specimens(problem: Problem, device: Device, how: str = "", overrides: Overrides = ()) -> list[Kernel]:
    call, some = LayerCall.of(problem, device, overrides), torch.empty(0) if how == "padded" else None
    call = replace(call, visits=replace(call.visits, lengths=some, resets=some))
    return of_call(call, problem.input_size, problem.bias, problem.recompute, how != "unaligned")


@pytest.mark.parametrize("target, dtype, B, H, T, D, precision, meant, how", [*choices()])
def test_a_choice_of_step_compiles(target, dtype, B, H, T, D, precision, meant, how) -> None:
    device, precision = describe(target), "ieee" if "ieee" in (precision, native(target)) else "tf32"
    problem = Problem(B, T, 48, H, 1, D, dtype, precision=precision)
    found = specimens(problem, device, how)
    for kind, launch in zip(kinds(T, True), found, strict=True):
        if meant not in ("", kind):
            continue
        report, tiles = compile_report(launch, device), step_tiles(kind, problem.on(device))
        known = triton.__version__.startswith("3.6.") and (report.kernel, target) in SPILL_A_WORD and not report.loops
        # of 128 rows, two programs an SM: an H200 measured them to be faster all the same
        won = 264 * ((tiles.block_b, tiles.per_sm) == (128, 2))
        spilled = 8 * known + SPILLED_WHERE_PADDED * (how == "padded") + won
        wrong = limits(report, device, tiles.shared_bytes(kind, dtype), spilled, tiles.per_sm)
        assert not wrong, f"{report.kernel} {dict(launch.constants)} on {target}: {wrong}"
        by_fma = kind == "backward_first" or (dtype == "fp32" and precision == "ieee" and device.vendor != "amd")
        assert report.matrix_instructions or by_fma


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_tile_is_smaller_than_the_threads_that_hold_it(target: str, dtype: str) -> None:
    """`state` and `dh` are read and written in place: nothing would order a store after another thread's read of
    the same element. Older cards and others have the same kernels without a wait for the launch before."""
    device = describe(target)
    for _, tiles in every(target, dtype, native(target)):
        assert tiles.block_b * tiles.block_h >= tiles.num_warps * device.target[2]
        assert not tiles.pdl or target in ("h100", "b200", "rtx5090")


def beside(target: str, kind: str, dtype: str, B: int, H: int) -> list[str]:
    device = describe(target)
    problem = Problem(batch=B, time=3, input_size=48, hidden_size=H, dtype=dtype)
    asked = (("pdl", 1),) if target == "h200" else ()  # whatever has won on it
    found = specimens(problem, device, overrides=asked)[0 if kind == "forward" else -1]
    tiles = step_tiles(kind, problem.on(device, asked))
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


ARCHITECTURES = {arch: [d for d in DEVICES if describe(d).arch == arch] for arch in {describe(d).arch for d in DEVICES}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_few_kernels_per_dtype_and_target(arch: str, dtype: str) -> None:
    """The planned ones; on sm_90 those that won on an H200 too."""
    found = [form for form in forms(*ARCHITECTURES[arch]) if form.dtype == dtype]
    assert 0 < len(found) <= (64 if arch == "sm_90" else 40)


@pytest.mark.parametrize("device", DEVICES)
def test_all_programs_of_every_plan_are_on_the_device_at_once(device: str) -> None:
    """What exchanges, waits for each other. Every program fits by itself."""
    has = describe(device)
    for form in plans(device):
        t, shared = form.tiles, form.tiles.shared_bytes(form.kind, form.dtype)
        assert shared <= has.shared_per_program, form
        if isinstance(t, SequenceTiles):
            assert t.programs * t.groups * t.directions <= has.sms * t.programs_per_sm, form
            assert t.max_registers * 32 * t.num_warps * t.programs_per_sm <= REGISTERS, form
            # the system keeps 1 KiB of each program's
            assert (shared + 1024) * t.programs_per_sm <= has.shared_per_sm, form


def form_of(device: str, kind: str, dtype: str, H: int, B: int, fields: str = "") -> Form:
    given = parse_overrides(fields) if fields else ()
    return Form(device, kind, sequence_tiles(kind, Recurrence(B, H, 1, dtype, "tf32", describe(device), given)), dtype)


# What a measurement may ask for and no plan does: dtype, H, B, fields
CANDIDATES = (
    ("bf16", 256, 8, "block_b=8"), ("bf16", 1024, 8, "block_b=8"), ("fp32", 512, 8, "block_b=8"),
    ("bf16", 512, 32, "tiles=2"), ("fp32", 256, 64, "tiles=2"),
    ("bf16", 256, 256, "programs_per_sm=2,num_warps=4"),
)  # fmt: skip


def every_form() -> Iterable[Any]:
    """Of all devices, passes, dtypes, classes of K and ways of keeping weights by default one of 28."""
    found = [*forms(*DEVICES), *(form._replace(resets=True) for form in forms(*DEVICES) if form.dtype != "fp16")]
    found += [form_of(*of, *fields) for of in product(("h200", "a100", "rtx5090"), KINDS) for fields in CANDIDATES]
    found += [
        form_of("h200", "forward", "bf16", *of) for of in ((512, 8, "block_b=8"), (256, 512, "programs_per_sm=2"))
    ]
    found.append(form_of("h200", "backward", "fp16", 256, 64)._replace(resets=True))
    return (pytest.param(form, marks=LONG if i % 28 else ()) for i, form in enumerate(found))


@pytest.mark.parametrize("form", [*every_form()], ids=str)
def test_a_form_of_sequence_compiles(form: Form) -> None:
    assert faults(form, compile_report(specimen(*form[1:]), describe(form.device))) == []


@LONG
@pytest.mark.parametrize("arch", [arch for arch in sorted(ARCHITECTURES) if arch.startswith("sm_")])
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_under_another_triton(version: str, arch: str) -> None:
    """In float16 the machine code is bfloat16's but for the names of types."""
    if not python_of(version).exists():
        pytest.skip(f"no environment with Triton {version}: `make long` makes it")
    meant = [form for form in forms(*ARCHITECTURES[arch]) if form.dtype != "fp16"]
    compiled_by, wrong = examined(version, meant)
    assert (compiled_by, wrong) == (version, {})


def lint(kind: str, H=256, dtype="bf16", change: Any = replace, binary: Any = str, **tiles: int) -> list[str]:
    """The faults after a change of launch or binary, or with other tiles than the lint is told."""
    meant = form_of("h200", kind, dtype, H, 16).tiles
    report = compile_report(change(specimen(kind, replace(meant, **tiles), dtype, "tf32")), describe("h200"))
    return faults_of(replace(report, sass=binary(report.sass)), meant, kind, dtype)


def with_constants(found: Kernel, **constants: str) -> Kernel:
    return replace(found, constants={**found.constants, **constants})


@pytest.mark.parametrize("kind", KINDS)
def test_lint_finds_nothing_in_the_kernels(kind: str) -> None:
    assert lint(kind) == []


def test_lint_finds_other_tiles_stages_and_sleeps() -> None:
    """Where one gate is awaited after another, the first look alone may come too early."""
    assert any("bytes from shared memory" in fault for fault in lint("forward", shared_gates=1))
    (fault,) = lint("forward", change=lambda found: replace(found, num_stages=2))
    assert fault.startswith("num_stages is 2")
    (fault,) = lint("backward", 512, "fp32", lambda found: with_constants(found, WAIT_NEXT=found.constants["WAIT"]))
    assert fault.startswith("3 sleeps")


# By module, what is changed (a file, the text of a wait, the binary), and passes or, of small layers, dtypes: name, the
# words of the fault, and what becomes what
MISTAKES = r"""
sequence, wait: forward backward
    weak loads | ^0 strong loads of 16 bytes | ld{.relaxed.gpu=>}.global.v4
    no loop | ^loops that load \[\] vectors again | {@p =>}bra found; add
    no sleep | ^0 sleeps | {nanosleep.u32 250;=>}
    a weak look at the status word | ^0 bytes of other strong loads | ld{.relaxed.gpu=>}.global.u32 bits
sequence, binary: forward backward
    lanes that part | no WARPSYNC after a wait | {WARPSYNC=>NOP}
    an asynchronous copy | LDGSTS: an asynchronous copy | {LDG.E.U16=>LDGSTS.E.128}
    a product without matrix instructions | 0 matrix instructions | {HMMA=>FFMA}.
    spills | bytes spilled | {STS=>STL}.64
sequence, exchange.py: forward
    weak publishing stores | bytes of strong stores | {, cache_modifier=".cg"=>})
sequence, sequence.py: forward
    weights loaded in the time loop | bytes of weak loads | \
        {=>weights = load_weights(w_ptr, FORM)\n            }a_r, a_z, q = three_products(h_all,
    one buffer for all sums | barriers | (buffer_of_sums(FORM){, buffer_of_sums(FORM), buffer_of_sums(FORM))=>,) * 3}
    a product dropped | matrix instructions | sums[1].store({add_product(zeros, h, weights, 1, 0, FORM)=>zeros})
sequence, gates.py: forward
    a gate not saved | bytes of weak stores | {tl.store(ptrs + H, z.to(dtype), mask=mask)=>pass}
small, small.py: bf16 fp32
    weights loaded in the time loop | bytes loaded | \
        {=>w_r, _, _ = load_weights(w_ptr, H, False, FORM)\n        }a_r = product(w_r, h_all,
    a product dropped | matrix instructions|multiply-adds | a_z = {product(w_z=>0.0 * product(w_r}, h_all,
    h handed over twice | barriers | \
        {=>h_all = received(h_shared, FORM)\n        hand_over(h_shared, h.to(dtype), FORM)\n        }h_all = received(
small, gates.py: bf16 fp32
    a gate not saved | bytes stored | {tl.store(ptrs + H, z.to(dtype), mask=mask)=>pass}
small, small.py: bf16
    units read one by one | loads | H = {H // VECTOR * VECTOR=>H + 0}
step, step.py: forward
    h before the wait | bytes loaded | {WAIT=>} | {=>WAIT}    h_prev = h_prev.to(tl.float32)
    weights after the wait | bytes loaded | {WAIT=>} | {=>WAIT}    ahead = load_ahead(w_hh_ptr, offs_h, AHEAD, False
    no wait | 0 ACQBULK | {gdc_wait=>gdc_launch_dependents}()
    the next launch never let in | 0 PREEXIT | {gdc_launch_dependents=>gdc_wait}()
    no wait where no row runs | without a wait | if {PDL=>rows > 3}:\n        tl.extra.cuda.gdc_wait()
    the next launch let in before the loads | a load between | {LET=>} | \
        {=>LET}    ahead = load_ahead(w_hh_ptr, offs_h, AHEAD, False
step, step.py: backward
    dgates before the wait | bytes loaded | {WAIT=>} | {=>WAIT}        dh_prev += dh_src * z_src
    weights after the wait | bytes loaded | {WAIT=>} | {=>WAIT}    ahead = load_ahead(w_hh_ptr, offs_h, AHEAD, True
"""
for name, text in {"LET": "gdc_launch_dependents()", "WAIT": "gdc_wait()"}.items():
    MISTAKES = MISTAKES.replace(name, rf"    if PDL:\n        tl.extra.cuda.{text}\n")
ALL = [
    pytest.param(module, file, on, fault, edits, id=f"{module} {on}: {name}")
    for (module, file, each), (name, fault, *edits) in table(MISTAKES, 4)
    for on in each.split()
]


@pytest.mark.parametrize(("module", "file", "on", "fault", "edits"), ALL)
def test_lint_finds_a_mistake(module, file, on, fault, edits, tmp_path, monkeypatch) -> None:
    def wait(found: Kernel) -> Kernel:
        return with_constants(found, WAIT=edited(found.constants["WAIT"], *edits))

    def kernel(found: Kernel) -> Kernel:
        return replace(found, kernel=getattr(mutant(tmp_path, file, *edits, module=module), found.name))

    if module == "step":
        monkeypatch.setattr("tritongru.launch.step.kernels", mutant(tmp_path, file, *edits))
        faults = beside("h200", on, "bf16", 32, 512)
    elif module == "small":
        faults = lint("forward", 64, on, kernel)
    elif file == "binary":
        faults = lint(on, binary=lambda sass: edited(sass, *edits))
    else:
        faults = lint(on, change=wait if file == "wait" else kernel)
    assert any(re.search(fault, found) for found in faults), faults
