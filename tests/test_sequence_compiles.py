"""Every form of the sequence kernels compiles within its device's limits, without spills, with matrix instructions in
the time loop, and with an exchange as strong as its source. No GPU is needed.

What this cannot see: whether the machine code computes the right thing, and how fast. `make compile-all` shows the
figures of all forms in a table.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.kit.compile_all import DEVICES, Form, examine, forms, plans
from tests.kit.lint import exchange_faults
from tests.kit.mutants import mutant
from tritongru.inspection.compile_report import CompileReport, compile_report
from tritongru.launch.sequence import specimen
from tritongru.planning import describe
from tritongru.planning.sequence import sequence_tiles, shared_bytes

pytestmark = pytest.mark.compiled

ARCHITECTURES = {arch: [d for d in DEVICES if describe(d).arch == arch] for arch in {describe(d).arch for d in DEVICES}}


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_at_most_60_kernels_per_target(arch: str) -> None:
    found = forms(*ARCHITECTURES[arch])
    assert 0 < len(found) <= 60


@pytest.mark.parametrize("device", DEVICES)
def test_all_programs_of_every_plan_are_on_the_device_at_once(device: str) -> None:
    """What exchanges, waits for each other; one such program fills an SM. Every program fits by itself."""
    limits = describe(device)
    for kind, dtype, _, tiles in plans(device):
        if limits.vendor == "nvidia":
            assert shared_bytes(tiles, kind, dtype) <= limits.shared_per_program, (kind, dtype, tiles)
        if tiles.exchange:
            assert limits.vendor == "nvidia", "L2s of several dies are not coherent"
            assert tiles.programs * tiles.groups * tiles.directions <= limits.sms, (kind, dtype, tiles)
            assert (tiles.max_registers or 255) * 32 * tiles.num_warps <= limits.registers_per_sm, tiles


# Both passes, all dtypes, one program and several, each target; small forms, which compile fast
SAMPLE = (
    ("h200", "forward", "bf16", 1024, 16), ("h200", "backward", "fp16", 256, 64), ("h200", "backward", "fp32", 512, 16),
    ("h200", "forward", "fp32", 650, 16), ("h200", "forward", "fp16", 100, 16), ("h200", "backward", "bf16", 64, 16),
    ("a100", "forward", "fp32", 128, 16), ("a100", "backward", "bf16", 512, 16),
    ("l4", "forward", "bf16", 512, 16), ("l4", "backward", "fp32", 256, 16),
    ("b200", "forward", "bf16", 256, 16), ("b200", "backward", "bf16", 128, 16),
    ("rtx5090", "forward", "fp16", 768, 16), ("rtx5090", "backward", "fp32", 128, 16),
    ("mi300x", "forward", "bf16", 128, 16), ("mi300x", "backward", "fp32", 64, 16),
)  # fmt: skip


def check(form: Form) -> None:
    found = examine(form)[1]
    assert not found, f"{form}: {'; '.join(found)}"


@pytest.mark.parametrize(("device", "kind", "dtype", "hidden_size", "batch"), SAMPLE)
def test_sample(device: str, kind: str, dtype: str, hidden_size: int, batch: int) -> None:
    tiles = sequence_tiles(kind, batch, hidden_size, 1, dtype, "tf32", describe(device))
    assert not isinstance(tiles, str), tiles
    check(Form(device, kind, dtype, "tf32", tiles))


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_ieee_float32(kind: str) -> None:
    tiles = sequence_tiles(kind, 16, 64, 1, "fp32", "ieee", describe("h200"))
    assert not isinstance(tiles, str), tiles
    check(Form("h200", kind, "fp32", "ieee", tiles))


@pytest.mark.long
@pytest.mark.parametrize("form", forms(*DEVICES), ids=str)
def test_all(form: Form) -> None:
    check(form)


# The lint, on kernels broken on purpose. A fault has the words by which these tests know it.


def lint(
    kind: str, device: str = "h200", kernels: object = None, num_stages: int = 1
) -> tuple[CompileReport, list[str]]:
    """The faults of a kernel of H 256 in bfloat16, the real one or one of `kernels`."""
    tiles = sequence_tiles(kind, 16, 256, 1, "bf16", "tf32", describe(device))
    assert not isinstance(tiles, str), tiles
    found = replace(specimen(kind, tiles, "bf16", "tf32"), num_stages=num_stages)
    if kernels is not None:
        found = replace(found, kernel=getattr(kernels, f"sequence_{kind}"))
    report = compile_report(found, describe(device))
    return report, exchange_faults(report, tiles, kind, "bf16")


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_lint_finds_nothing_in_the_kernels(kind: str) -> None:
    assert lint(kind)[1] == []


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_lint_finds_receiving_loads_that_are_not_volatile(kind: str, tmp_path: Path) -> None:
    broken = mutant(tmp_path, "exchange.py", "other=0, volatile=True)", "other=0)", module="sequence")
    _, faults = lint(kind, kernels=broken)
    assert any(fault.startswith("0 strong loads of 16 bytes") for fault in faults), faults


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_lint_finds_warps_that_part_when_a_wait_is_given_up(kind: str, tmp_path: Path) -> None:
    vote = "lost = tl.max(tl.zeros(found[0].shape, tl.int32) + late.to(tl.int32))"
    broken = mutant(tmp_path, "exchange.py", vote, "lost = late.to(tl.int32)", module="sequence")
    _, faults = lint(kind, kernels=broken)
    assert any(fault.endswith("without a vote warps may part") for fault in faults), faults


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_lint_finds_weak_publishing_stores(kind: str, tmp_path: Path) -> None:
    broken = mutant(tmp_path, "exchange.py", ', cache_modifier=".cg")', ")", module="sequence")
    _, faults = lint(kind, kernels=broken)
    assert any(fault.startswith("strong stores of 0 bytes") for fault in faults), faults
    assert any(fault.endswith("a weak store to the exchange buffer") for fault in faults), faults


@pytest.mark.parametrize("device", ["h200", "a100", "b200"])
def test_lint_finds_two_stages(device: str) -> None:
    """The machine code is that of one stage: nothing in these loops is pipelined, but nothing promises it either."""
    report, faults = lint("forward", device, num_stages=2)
    assert len(faults) == 1
    assert faults[0].startswith("num_stages is 2")
    assert report.sass == lint("forward", device)[0].sass


def test_lint_finds_asynchronous_copies() -> None:
    """As a pipeline makes them."""
    report, _ = lint("forward")
    tiles = sequence_tiles("forward", 16, 256, 1, "bf16", "tf32", describe("h200"))
    assert not isinstance(tiles, str)
    pipelined = replace(report, sass=report.sass.replace("LDG.E.128.STRONG.SYS", "LDGSTS.E.128"))
    faults = exchange_faults(pipelined, tiles, "forward", "bf16")
    assert any(fault.startswith("LDGSTS: an asynchronous copy") for fault in faults), faults


def test_lint_finds_weights_loaded_in_the_time_loop(tmp_path: Path) -> None:
    resident = "q = add_product(q, left, w_n, wait * PER_WAIT, PRECISION)"
    fetched = resident.replace("w_n", "load_slice(w_ptr, 2, U, offs_u, NUM_K, BLOCK_K, SPLIT, PRECISION)")
    _, faults = lint("forward", kernels=mutant(tmp_path, "sequence.py", resident, fetched, module="sequence"))
    assert len(faults) == 1
    assert faults[0].startswith("weak loads of")
    assert "weights" in faults[0]


def test_lint_finds_a_product_without_matrix_instructions() -> None:
    report, _ = lint("forward")
    tiles = sequence_tiles("forward", 16, 256, 1, "bf16", "tf32", describe("h200"))
    assert not isinstance(tiles, str)
    vector = replace(report, sass=report.sass.replace("HMMA.", "FFMA."))
    assert exchange_faults(vector, tiles, "forward", "bf16") == ["no matrix instruction in the time loop"]


def test_adding_parts_by_halves_computes_each_gate_once(tmp_path: Path) -> None:
    """With `tl.sum` every warp holds the whole sum: 8 warps compute the gates 8 times, behind more barriers."""
    named = "def sum_of_parts(x, SPLIT: tl.constexpr, SIZE: tl.constexpr):"
    plain = f"{named}\n    return tl.sum(tl.reshape(x, (SPLIT, SIZE)), 0)\n\n\n@triton.jit\n"
    other = mutant(tmp_path, "sequence.py", named, plain + named.replace("sum_of_parts", "unused"), module="sequence")
    by_halves, by_sum = (lint("forward", kernels=kernels)[0].loops[0].counts for kernels in (None, other))
    assert by_sum["MUFU"] == 8 * by_halves["MUFU"]
    assert by_sum["BAR"] > 2 * by_halves["BAR"]
