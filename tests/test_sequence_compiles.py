"""Every form of the sequence kernels compiles within its device's limits, without spills, with the instructions that
its tiles promise and an exchange as strong as its source, under each Triton that serves it. No GPU is needed.

What this cannot see: whether the machine code computes the right thing, and how fast. `make compile-all` shows the
figures of all forms in a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kit.compile_all import DEVICES, Form, examine, forms, plans
from tests.kit.compile_elsewhere import examined, python_of
from tests.kit.lint import exchange_faults, small_faults, time_loop
from tests.kit.mutants import mutant
from tritongru.launch.sequence import specimen
from tritongru.planning import describe
from tritongru.planning.sequence import SequenceTiles, parse_overrides, sequence_tiles
from tritongru.planning.small import SmallTiles
from tritongru.tools.compile_report import CompileReport, compile_report

pytestmark = pytest.mark.compiled

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


def check(form: Form) -> None:
    found = examine(form)[1]
    assert not found, f"{form}: {'; '.join(found)}"


def tiles_of(
    kind: str, hidden_size: int, batch: int, dtype: str = "bf16", device: str = "h200"
) -> SequenceTiles | SmallTiles:
    tiles = sequence_tiles(kind, batch, hidden_size, 1, dtype, "tf32", describe(device))
    assert not isinstance(tiles, str), tiles
    return tiles


@pytest.mark.parametrize(("device", "kind", "dtype", "hidden_size", "batch"), SAMPLE)
def test_sample(device: str, kind: str, dtype: str, hidden_size: int, batch: int) -> None:
    check(Form(device, kind, dtype, "tf32", tiles_of(kind, hidden_size, batch, dtype, device)))


@pytest.mark.parametrize(("device", "kind", "dtype", "hidden_size", "batch"), [SAMPLE[i] for i in (1, 3, 6, 13)])
def test_sample_with_resets(device: str, kind: str, dtype: str, hidden_size: int, batch: int) -> None:
    check(Form(device, kind, dtype, "tf32", tiles_of(kind, hidden_size, batch, dtype, device), resets=True))


# What a measurement may ask for and no plan does: by device, pass, dtype, H, B, fields
CANDIDATES = [
    ("h200", "forward", "bf16", 512, 8, "block_b=8"), ("h200", "backward", "bf16", 256, 1, "block_b=8"),
    ("h200", "forward", "bf16", 512, 128, "tiles=2,early=1"), ("h200", "backward", "bf16", 512, 128, "tiles=2,early=1"),
    ("h200", "forward", "bf16", 256, 512, "programs_per_sm=2"),
    *(
        pytest.param(device, kind, dtype, H, B, fields, marks=pytest.mark.long)
        for device in ("h200", "a100", "rtx5090")
        for kind in ("forward", "backward")
        for dtype, H, B, fields in (
            ("bf16", 256, 8, "block_b=8"), ("bf16", 1024, 8, "block_b=8"), ("fp32", 512, 8, "block_b=8"),
            ("bf16", 512, 32, "tiles=2,early=1"), ("fp32", 256, 64, "tiles=2,early=1"),
            ("bf16", 256, 256, "programs_per_sm=2,num_warps=4"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("device", "kind", "dtype", "hidden_size", "batch", "fields"), CANDIDATES)
def test_candidates(device: str, kind: str, dtype: str, hidden_size: int, batch: int, fields: str) -> None:
    given = parse_overrides(fields)
    tiles = sequence_tiles(kind, batch, hidden_size, 1, dtype, "tf32", describe(device), given)
    assert not isinstance(tiles, str), tiles
    check(Form(device, kind, dtype, "tf32", tiles))


@pytest.mark.long
@pytest.mark.parametrize("form", forms(*DEVICES), ids=str)
def test_all(form: Form) -> None:
    check(form)


@pytest.mark.long
@pytest.mark.parametrize("form", [f for f in forms(*DEVICES) if f.dtype != "fp16"], ids=str)
def test_all_with_resets(form: Form) -> None:
    check(replace(form, resets=True))


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
    tiles = tiles_of(kind, hidden_size, 16)
    assert tiles.tiles == 1 and tiles.block_h == 16
    found = time_loop(compile_report(specimen(kind, tiles, "bf16", "tf32"), describe("h200")))
    assert STUDY[kind, hidden_size] / 2 < found <= 1.1 * STUDY[kind, hidden_size]


# The lint, on kernels broken on purpose. A fault has the words by which these tests know it.


def lint(
    kind: str, kernels: object = None, text: tuple[str, str] | None = None, num_stages: int = 1, **tiles: int
) -> tuple[CompileReport, list[str]]:
    """The faults of a kernel of H 256 in bfloat16: the real one, one of `kernels`, one with another text of its wait,
    or one compiled with other tiles than those that the lint is told."""
    meant = tiles_of(kind, 256, 16)
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
        "sequence.py", "sum_n.store(add_product(zeros, seen, w_n,",
        "w_n = load_weights(w_ptr, 2, first_unit, False, ROWS, UNITS, PARTS, PART, WARPS, PRECISION)\n"
        "            sum_n.store(add_product(zeros, seen, w_n,", "bytes of weak loads",
    ),
    "one buffer for all sums": (
        "sequence.py", "sum_z = gl.allocate_shared_memory(gl.float32, PARTS_OF_SUMS, sums)", "sum_z = sum_r",
        "barriers",
    ),
    "a product dropped": (
        "sequence.py", "sum_z.store(add_product(zeros, seen, w_z, 0, SHARED > 1, ROWS, PRECISION))",
        "sum_z.store(zeros)", "matrix instructions",
    ),
    "a gate not saved": ("sequence.py", "gl.store(rzn + H, z.to(dtype), mask=saves)", "pass", "bytes of weak stores"),
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
    tiles = tiles_of("backward", 512, 16, "fp32")
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
    faults = exchange_faults(replace(report, sass=change(report.sass)), tiles_of(kind, 256, 16), kind, "bf16")
    assert any(fault in found for found in faults), faults


SMALL = {
    "weights loaded in the time loop": (
        "        a_r = product(w_r, h_all,",
        "        w_r = load_weights(w_ptr, 0, H, False, FORM)\n        a_r = product(w_r, h_all,", "bytes loaded",
    ),
    "a product dropped": (
        "a_z = product(w_z, h_all,", "a_z = 0.0 * product(w_r, h_all,", "matrix instructions|multiply-adds",
    ),
    "h handed over twice": (
        "        h_all = received(h_shared,", "        h_all = received(h_shared, FORM)\n"
        "        hand_over(h_shared, h.to(dtype), FORM)\n        h_all = received(h_shared,", "barriers",
    ),
    "a gate not saved": ("        gl.store(rzn + H, z.to(dtype), mask=saves)\n", "", "bytes stored"),
    "units read one by one": ("H = H // VECTOR * VECTOR", "H = H + 0", "loads"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("mistake", SMALL)
def test_lint_finds_a_mistake_in_a_small_kernel(mistake: str, dtype: str, tmp_path: Path) -> None:
    old, new, fault = SMALL[mistake]
    tiles = tiles_of("forward", 64, 16, dtype)
    assert isinstance(tiles, SmallTiles)
    kernel = vars(mutant(tmp_path, "small.py", old, new, module="small"))["small_forward"]
    report = compile_report(replace(specimen("forward", tiles, dtype, "tf32"), kernel=kernel), describe("h200"))
    faults = small_faults(report, tiles, "forward", dtype)
    one_by_one = tiles.vector == 1 and fault == "loads"  # is right in float32
    assert any(re.search(fault, found) for found in faults) or one_by_one, faults
