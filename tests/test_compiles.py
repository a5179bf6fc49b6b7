"""Every tile choice compiles within its device's limits, without spills, with matrix instructions. No GPU is needed.

What this cannot see: whether the machine code computes the right thing, and how fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.kit.lint import dependence_faults
from tests.kit.mutants import mutant
from tests.kit.versions import TRITON
from tritongru.launch.step import specimens
from tritongru.planning import Problem, describe
from tritongru.planning.step import StepTiles, _shared_bytes, step_tiles
from tritongru.tools.compile_report import compile_report

pytestmark = pytest.mark.compiled

TARGETS = ("a100", "l4", "h100", "b200", "rtx5090", "mi300x")  # sm_80, 89, 90, 100, 120 and gfx942
DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Choice:
    """Sizes that lead `step_tiles` to its choices, in even, odd and large forms."""

    batch: int
    hidden: int
    time: int = 3
    directions: int = 1
    padded: bool = False

    @property
    def name(self) -> str:
        return f"B{self.batch}-H{self.hidden}-T{self.time}-D{self.directions}{'-padded' * self.padded}"


# The assembler of Triton 3.6 stores and loads one register of these once, for few rows (kernels/README.md).
SPILL_A_WORD_ON_3_6 = {("step_backward", "a100"), ("step_backward", "l4")}

FEW, MANY, CELL, CELL_OF_MANY = Choice(8, 512), Choice(64, 512), Choice(8, 512, time=1), Choice(64, 512, time=1)
ODD, ODD_CELL = Choice(5, 67, directions=2), Choice(5, 67, time=1, directions=2)
KINDS = ("forward", "cell", "backward", "backward_first")
BATCHES = (1, 32, 64, 128, 512)
HIDDEN = (64, 512, 768, 1024, 2048, 2816, 4096)
# Bytes: the masks of lengths and resets take a few registers more, loaded again a few times at the most.
SPILLED_WHERE_PADDED = 24
PADDED, PADDED_ODD = Choice(8, 512, padded=True), Choice(5, 67, directions=2, padded=True)


def native(target: str) -> str:
    return "ieee" if target == "mi300x" else "tf32"


def forms(target: str, dtype: str, precision: str) -> dict[tuple[str, StepTiles], Choice]:
    """The tiles that `step_tiles` returns for these, each with sizes that lead there."""
    found: dict[tuple[str, StepTiles], Choice] = {}
    for kind in KINDS:
        for hidden in HIDDEN:
            for batch in BATCHES:
                tiles = step_tiles(kind, batch, hidden, 1, dtype, precision, describe(target))
                found.setdefault((kind, tiles), Choice(batch, hidden, 1 if kind == "cell" else 3))
    return found


def check(
    choice: Choice, target: str, dtype: str, precision: str, aligned: bool = True, kinds: Sequence[str] = KINDS
) -> None:
    device = describe(target)
    problem = Problem(
        batch=choice.batch, time=choice.time, input_size=48, hidden_size=choice.hidden,
        directions=choice.directions, dtype=dtype, precision=precision,
    )  # fmt: skip
    for specimen in specimens(problem, device, aligned, padded=choice.padded):
        if "FIRST" in specimen.constants:
            kind = "backward_first" if specimen.constants["FIRST"] else "backward"
        else:
            kind = "cell" if specimen.constants["FUSE_INPUT"] else "forward"
        if kind not in kinds:
            continue
        report = compile_report(specimen, device)
        where = f"{report.kernel} {dict(specimen.constants)} on {target}"
        known = TRITON == (3, 6) and (report.kernel, target) in SPILL_A_WORD_ON_3_6 and not report.loops
        assert report.spill_bytes <= 8 * known + SPILLED_WHERE_PADDED * choice.padded, (
            f"{where}: {report.registers} registers and {report.spill_bytes} bytes spilled"
        )
        assert report.shared_bytes <= device.shared_per_program, (
            f"{where}: {report.shared_bytes} bytes of shared memory"
        )
        tiles = step_tiles(kind, choice.batch, choice.hidden, choice.directions, dtype, precision, device)
        bound = _shared_bytes(kind, tiles, dtype)
        assert report.shared_bytes <= bound, f"{where}: {report.shared_bytes} bytes, above the planned {bound}"
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
    for _, tiles in forms(target, dtype, native(target)):
        assert tiles.block_b * tiles.block_h >= tiles.num_warps * device.target[2]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("choice", [FEW, MANY, CELL, CELL_OF_MANY, PADDED], ids=lambda choice: choice.name)
def test_bf16(choice: Choice, target: str) -> None:
    check(choice, target, "bf16", native(target))


@pytest.mark.parametrize("target", ["h100", "a100", "mi300x"])
@pytest.mark.parametrize("choice", [MANY, ODD_CELL], ids=lambda choice: choice.name)
def test_fp32(choice: Choice, target: str) -> None:
    check(choice, target, "fp32", native(target))


def every(*dtypes: str, precision: str = "") -> list[Any]:
    return [
        pytest.param(kind, choice, target, dtype, id=f"{target}-{dtype}-{kind}-{choice.name}")
        for target in TARGETS
        for dtype in dtypes
        for (kind, _), choice in forms(target, dtype, precision or native(target)).items()
    ]


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_of_odd_sizes(target: str, dtype: str) -> None:
    check(PADDED_ODD, target, dtype, native(target))


@pytest.mark.long
@pytest.mark.parametrize(("kind", "choice", "target", "dtype"), every("fp32", "bf16"))
def test_every_tile(kind: str, choice: Choice, target: str, dtype: str) -> None:
    check(choice, target, dtype, native(target), kinds=[kind])


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("choice", [FEW, MANY, CELL, CELL_OF_MANY, ODD, ODD_CELL], ids=lambda choice: choice.name)
def test_fp16(choice: Choice, target: str) -> None:
    check(choice, target, "fp16", native(target))


@pytest.mark.long
@pytest.mark.parametrize(("kind", "choice", "target", "dtype"), every("fp32", precision="ieee"))
def test_ieee_float32(kind: str, choice: Choice, target: str, dtype: str) -> None:
    check(choice, target, dtype, "ieee", kinds=[kind])


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("choice", [FEW, MANY, CELL, CELL_OF_MANY, ODD, ODD_CELL], ids=lambda choice: choice.name)
def test_unaligned(choice: Choice, target: str) -> None:
    """cuDNN's flattened weights may be aligned to their element only."""
    check(choice, target, "bf16", native(target), aligned=False)


# Beside the launch before it: what is loaded before the wait.

WITH_PDL = ("h200", "b200", "rtx5090")


def beside(kind: str, target: str, dtype: str, B: int, H: int) -> list[str]:
    """What the lint finds in a step of that kind."""
    device = describe(target)
    problem = Problem(batch=B, time=3, input_size=48, hidden_size=H, dtype=dtype)
    specimen = specimens(problem, device)[0 if kind == "forward" else -1]
    tiles = step_tiles(kind, B, H, 1, dtype, "tf32", device)
    assert tiles.pdl and specimen.constants["PDL"]
    return dependence_faults(compile_report(specimen, device), tiles, kind, dtype)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("target", WITH_PDL)
def test_a_step_loads_what_no_step_makes_and_waits(target: str, kind: str) -> None:
    assert beside(kind, target, "bf16", 32, 512) == []


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(64, 1024), (64, 2048), (32, 2816), (256, 1024), (512, 4096)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("target", WITH_PDL)
def test_every_form_loads_what_no_step_makes_and_waits(target: str, kind: str, dtype: str, sizes: Any) -> None:
    assert beside(kind, target, dtype, *sizes) == []


@pytest.mark.parametrize("target", ["a100", "l4", "mi300x"])
def test_older_cards_and_others_have_the_same_kernel_without_a_wait(target: str) -> None:
    problem = Problem(batch=32, time=3, input_size=48, hidden_size=512, dtype="bf16")
    assert not any(specimen.constants["PDL"] for specimen in specimens(problem, describe(target)))


LET = "    if PDL:\n        tl.extra.cuda.gdc_launch_dependents()\n"
WAIT = "    if PDL:\n        tl.extra.cuda.gdc_wait()\n"
LOADS, LOADS_OF_BACKWARD = "    # load: what no step makes; it", "    # load: what no step makes; not"
MUTANTS = {  # pass, what is replaced, by what, before what it is put; what the lint says
    "h before the wait": ("forward", WAIT, "", "    h_prev = h_prev.to(tl.float32)\n", "bytes loaded"),
    "dgates before the wait": ("backward", WAIT, "", "    dh_prev = sum_of_parts(dh_prev", "bytes loaded"),
    "weights after the wait": ("forward", WAIT, "", LOADS, "bytes loaded"),
    "weights after the wait, backward": ("backward", WAIT, "", LOADS_OF_BACKWARD, "bytes loaded"),
    "no wait": ("forward", "gdc_wait()", "gdc_launch_dependents()", "", "0 ACQBULK"),
    "the next launch never let in": ("forward", "gdc_launch_dependents()", "gdc_wait()", "", "0 PREEXIT"),
    "no wait where no row runs": ("forward", WAIT, WAIT.replace("if PDL", "if rows > 3"), "", "without a wait"),
    "the next launch let in before the loads": ("forward", LET, "", LOADS, "a load between"),
}


@pytest.mark.parametrize(("kind", "old", "new", "moved", "found"), MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_that_does_not_wait_is_killed(
    kind: str, old: str, new: str, moved: str, found: str, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("tritongru.launch.step.kernels", mutant(tmp_path, "step.py", old, new, moved=moved))
    faults = beside(kind, "h200", "bf16", 32, 512)
    assert any(found in fault for fault in faults), faults
