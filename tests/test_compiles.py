"""Every tile choice compiles within its device's limits, without spills, with matrix instructions. No GPU is needed.

What this cannot see: whether the machine code computes the right thing, and how fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.kit.versions import TRITON
from tritongru.inspection.compile_report import compile_report
from tritongru.launch.step import specimens
from tritongru.planning import Problem, describe
from tritongru.planning.step import _shared_bytes, step_tiles

pytestmark = pytest.mark.compiled

TARGETS = ("a100", "l4", "h100", "b200", "rtx5090", "mi300x")  # sm_80, 89, 90, 100, 120 and gfx942
DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Choice:
    """Sizes that lead `step_tiles` to its choices, in even, odd and large forms."""

    name: str
    batch: int
    hidden: int
    time: int = 3
    directions: int = 1


# The assembler of Triton 3.6 stores and loads one register of these once, for few rows (kernels/README.md).
SPILL_A_WORD_ON_3_6 = {("step_backward", "a100"), ("step_backward", "l4")}

CHOICES = (
    Choice("few-rows", batch=8, hidden=512),
    Choice("many-rows", batch=64, hidden=512),
    Choice("cell", batch=8, hidden=512, time=1),
    Choice("cell-many-rows", batch=64, hidden=512, time=1),
    Choice("large", batch=64, hidden=5120),
    Choice("odd", batch=5, hidden=67, directions=2),
    Choice("odd-cell", batch=5, hidden=67, time=1, directions=2),
)


def check(choice: Choice, target: str, dtype: str, precision: str, aligned: bool = True) -> None:
    device = describe(target)
    problem = Problem(
        batch=choice.batch, time=choice.time, input_size=48, hidden_size=choice.hidden,
        directions=choice.directions, dtype=dtype, precision=precision,
    )  # fmt: skip
    for specimen in specimens(problem, device, aligned):
        report = compile_report(specimen, device)
        where = f"{report.kernel} {dict(specimen.constants)} on {target}"
        known = TRITON == (3, 6) and (report.kernel, target) in SPILL_A_WORD_ON_3_6 and not report.loops
        assert report.spill_bytes <= 8 * known, (
            f"{where}: {report.registers} registers and {report.spill_bytes} bytes spilled"
        )
        assert report.shared_bytes <= device.shared_per_program, (
            f"{where}: {report.shared_bytes} bytes of shared memory"
        )
        if "FIRST" in specimen.constants:
            kind = "backward_first" if specimen.constants["FIRST"] else "backward"
        else:
            kind = "cell" if specimen.constants["FUSE_INPUT"] else "forward"
        tiles = step_tiles(kind, choice.batch, choice.hidden, choice.directions, dtype, precision, device)
        bound = _shared_bytes(kind, tiles, dtype)
        assert report.shared_bytes <= bound, f"{where}: {report.shared_bytes} bytes, above the planned {bound}"
        if dtype != "fp32" or precision == "tf32" or device.vendor == "amd":
            assert report.matrix_instructions > 0, f"{where}: no matrix instruction"


def native(target: str) -> str:
    return "ieee" if target == "mi300x" else "tf32"


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_choices_cover_every_tile(target: str, dtype: str, precision: str) -> None:
    """All tiles that `step_tiles` ever returns for these devices are compiled below."""
    device = describe(target)
    for kind in ("forward", "cell", "backward", "backward_first"):
        possible = {
            step_tiles(kind, batch, hidden, D, dtype, precision, device)
            for batch in (1, 16, 32, 33, 64, 512)
            for hidden in (1, 64, 512, 1024, 2048, 4096, 8192)
            for D in (1, 2)
        }
        chosen = [c for c in CHOICES if (c.time == 1) == (kind == "cell") or kind == "backward_first"]
        covered = {step_tiles(kind, c.batch, c.hidden, c.directions, dtype, precision, device) for c in chosen}
        assert possible <= covered, kind


@pytest.mark.parametrize("target", TARGETS)
def test_no_tile_is_smaller_than_the_threads_that_hold_it(target: str) -> None:
    """`state` and `dh` are read and written in place: a tile with fewer elements than threads would have one element
    read by several threads, with nothing that orders another's store after the last of the reads."""
    device = describe(target)
    for kind in ("forward", "cell", "backward", "backward_first"):
        for choice in CHOICES:
            tiles = step_tiles(kind, choice.batch, choice.hidden, choice.directions, "bf16", "tf32", device)
            assert tiles.block_b * tiles.block_h >= tiles.num_warps * device.target[2]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("choice", CHOICES[:4], ids=lambda choice: choice.name)
def test_bf16(choice: Choice, target: str) -> None:
    check(choice, target, "bf16", native(target))


@pytest.mark.parametrize("target", ["h100", "a100", "mi300x"])
@pytest.mark.parametrize("choice", [CHOICES[1], CHOICES[-1]], ids=lambda choice: choice.name)
def test_fp32(choice: Choice, target: str) -> None:
    check(choice, target, "fp32", native(target))


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
def test_all(choice: Choice, target: str, dtype: str) -> None:
    check(choice, target, dtype, native(target))


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
def test_ieee_float32(choice: Choice, target: str) -> None:
    check(choice, target, "fp32", "ieee")


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
def test_unaligned(choice: Choice, target: str) -> None:
    """cuDNN's flattened weights may be aligned to their element only."""
    check(choice, target, "bf16", native(target), aligned=False)
