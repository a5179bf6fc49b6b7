"""The kernel study: its forms are right, and what kernels/README.md says of them is what the compiler makes of them."""

from __future__ import annotations

import contextlib
import re
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import forms, providers, study, work
from benchmarks.cases import Case
from benchmarks.generated import generated
from benchmarks.results import RESULTS
from tests.kit.lint import ASYNCHRONOUS, exchange_faults
from tests.kit.mutants import mutant
from tests.kit.versions import TRITON
from tritongru.inspection.compile_report import compile_report
from tritongru.planning import describe
from tritongru.registry import has_triton

if not has_triton():
    pytest.skip("needs Triton", allow_module_level=True)

from tritongru.launch import runtime, sequence
from tritongru.launch.concurrent import ConcurrencyError, concurrent

interpreted, compiled, long = pytest.mark.interpreted, pytest.mark.compiled, pytest.mark.long

# Several programs in two groups and a last row tile that is not full; a single row, a single step
CASES = (Case(3, 18, 5, 40, "fp32"), Case(3, 3, 4, 24, "bf16"), Case(1, 1, 3, 16, "fp16"))
CPU = torch.device("cpu")


def outcome(name: str, case: Case, seed: int | None = None, **options: int) -> dict[str, Tensor]:
    """Output and h_n of a provider in the case's dtype; with a seed, of programs that run at once."""
    module = providers.find(name).make(case, device=CPU, dtype=work.TORCH_DTYPES[case.dtype])
    module.load_state_dict(work.weights(case))
    with contextlib.nullcontext() if seed is None else concurrent(seed, **options):
        return work.outcome(module, work.Inputs.draw(case, CPU), trains=False)


def errors(found: dict[str, Tensor], case: Case) -> dict[str, float]:
    """Against nn.GRU in float64."""
    truth = providers.find("nn.GRU").make(case, device=CPU, dtype=torch.float64)
    truth.load_state_dict(work.weights(case))
    return work.errors(found, work.outcome(truth, work.Inputs.draw(case, CPU).double(), trains=False))


def wrong(found: dict[str, Tensor], case: Case) -> str:
    """What the rule by which a GPU's run lets a provider be timed finds wrong; empty if nothing."""
    return work.verdict(case, errors(found, case), errors(outcome("nn.GRU", case), case), False)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers allocate begins as NaN."""

    def full(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(runtime, "empty", full)


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["unfused", "step-input"])
def test_a_form_of_a_launch_for_each_step_is_right(name: str, case: Case) -> None:
    assert not wrong(outcome(name, case), case)


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", forms.SEQUENCE)
def test_a_form_of_one_launch_is_right_and_the_same_under_every_seed(name: str, case: Case) -> None:
    found = outcome(name, case, 0)
    assert not wrong(found, case)
    for seed in (1, 2):
        assert all(torch.equal(other, found[key]) for key, other in outcome(name, case, seed).items())


BARRIER, STACKED, REPEATED = "sequence-barrier", "sequence-stacked", "sequence-repeated"
STORE, ARRIVE = "tl.store(y_ptrs, h.to(dtype), mask=mask)", "arrive(counter_ptr)"
MUTANTS = {
    "loads before all have arrived": (BARRIER, "if t > 0:", "if t > T:"),
    "counts itself in before it has stored": (
        BARRIER, f"{STORE}\n            {ARRIVE}", f"{ARRIVE}\n            {STORE}",
    ),
    "waits for one less than all": (BARRIER, "(arrived < programs) & (lost == 0)", "(arrived < programs - 1)"),
    "one counter for all groups": (BARRIER, "counter_ptr += tl.program_id(1)", "counter_ptr += 0"),
    "stacked gates in another order": (STACKED, "a_r, q = tl.split(r_n)", "q, a_r = tl.split(r_n)"),
    "a stacked unit's neighbour": (STACKED, "offs % BLOCK_H).to", "(offs + 1) % BLOCK_H).to"),
    "the weights of r for z": (REPEATED, "a_z = tl.dot(h_prev, w[1]", "a_z = tl.dot(h_prev, w[0]"),
    "h_0 never multiplied": (REPEATED, "if t == 0:", "if t > T:"),
    "x_proj of the first step for all": (REPEATED, "x_r, x_z, x_n = next_x_r, next_x_z, next_x_n", "x_r = x_r"),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_in_a_form_is_found(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = MUTANTS[mistake]
    kernels = mutant(tmp_path, "study/sequence.py", old, new, module="study.sequence")
    monkeypatch.setattr("tritongru.kernels.study.sequence", kernels, raising=False)  # not imported yet, maybe

    def found(seed: int) -> bool:
        try:
            return bool(wrong(outcome(name, CASES[0], seed), CASES[0]))
        except ConcurrencyError:
            return True

    assert any(found(seed) for seed in range(6))


@interpreted
def test_a_barrier_that_is_never_met_gives_up_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = 'tl.atomic_add(counter_ptr, 1, sem="release")'
    kernels = mutant(tmp_path, "study/sequence.py", old, "pass", module="study.sequence")
    monkeypatch.setattr("tritongru.kernels.study.sequence", kernels, raising=False)  # not imported yet, maybe
    monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", "0.01")
    output = outcome(BARRIER, CASES[0], 0, nanoseconds_per_step=20_000)["output"]
    assert output[0].isfinite().all() and output[1:].isnan().all()
    with pytest.raises(RuntimeError, match="TRITONGRU_WAIT_SECONDS"):
        sequence.check_all()
    assert not wrong(outcome("sequence-split", CASES[0], 0), CASES[0])


def test_what_a_form_does_not_serve_is_refused_as_a_backend_is() -> None:
    case = Case(2, 2, 3, 16)
    module = providers.find("unfused").make(case, device=CPU, dtype=torch.float32)
    inputs = work.Inputs.draw(case, CPU)
    with pytest.raises(RuntimeError, match="backend 'unfused' cannot run here: it has no backward"):
        inputs.through(module)
    odd = providers.find(BARRIER).make(Case(2, 2, 3, 17), device=CPU, dtype=torch.float32)
    with torch.no_grad(), concurrent(), pytest.raises(RuntimeError, match=f"'{BARRIER}' cannot run here: .* H 17"):
        work.Inputs.draw(Case(2, 2, 3, 17), CPU).through(odd)


# What the compiler makes of them


def skip_other_versions() -> None:
    import triton

    versions = {row["triton"] for row in study.committed()}
    if versions != {triton.__version__}:
        pytest.skip(f"the rows are of Triton {', '.join(versions)}, this is {triton.__version__}")


@compiled
@pytest.mark.parametrize("name", [n if n in ("unfused", BARRIER) else pytest.param(n, marks=long) for n in study.FORMS])
def test_committed_rows_are_what_this_version_compiles(name: str) -> None:
    """A form or the compiler's work has changed: `make study`."""
    skip_other_versions()
    assert study.row(name) == next(row for row in study.committed() if row["form"] == name)


def test_committed_rows_are_of_every_form() -> None:
    assert [row["form"] for row in study.committed()] == list(study.FORMS)


def test_the_readme_is_what_the_rows_make() -> None:
    """`make study` writes it again."""
    assert generated(study.README, "study") == study.generated(RESULTS)


def test_what_the_figure_and_the_readme_say_holds() -> None:
    rows = {row["form"]: row for row in study.committed()}
    repeated, split, barrier = (rows[name] for name in (REPEATED, "sequence-split", BARRIER))
    assert study.of_a_step(repeated) > 2 * study.of_a_step(split)
    for name in ("HMMA", "MUFU"):
        assert int(repeated[name]) == 8 * int(split[name])
    assert int(rows[STACKED]["registers"]) > int(split["registers"])
    assert study.of_a_step(rows[STACKED]) > study.of_a_step(split)
    assert study.of_a_step(barrier) == min(study.of_a_step(row) for name, row in rows.items() if name != "unfused")


def test_a_measured_time_is_shown_beside_the_form() -> None:
    rows = study.committed()
    assert "no GPU has measured" in study.text(rows, [])
    case = Case(study.STUDY_T, 32, int(rows[0]["H"]), int(rows[0]["H"]), "bf16")
    row = {"case": case.name, "pass": "inference", "l2": "warm", "status": "ok", "device": "NVIDIA H200"}
    measured = [{**row, "provider": "step", "us_per_step": "3.25"}, {**row, "case": "other", "us_per_step": "9"}]
    assert "| form | NVIDIA H200 |" in study.text(rows, measured[:1])
    assert "| `step` | 3.25 |" in study.text(rows, measured[:1])
    assert "no GPU has measured" in study.text(rows, [{**measured[1], "provider": "step"}])


def report_of(name: str, kernels: object = None):
    form, device = forms.SEQUENCE[name], describe("h200")
    tiles = form.tiles(16, 256, "bf16", "tf32", device)
    specimen = form.specimen(tiles, "bf16", "tf32")
    if kernels is not None:
        specimen = specimen.__class__(**{**vars(specimen), "kernel": kernels.study_forward})
    return compile_report(specimen, device), tiles


@compiled
@pytest.mark.parametrize("name", [name for name, form in forms.SEQUENCE.items() if not form.barrier])
def test_the_exchange_is_as_strong_as_that_of_sequence(name: str) -> None:
    report, tiles = report_of(name)
    assert exchange_faults(report, tiles, "forward", "bf16") == []
    assert report.spill_bytes == 0


def barrier_faults(sass: str) -> list[str]:
    """What is wrong with the order of a counter barrier in the machine code."""
    # of the time loop and what is around it, in the order of the text: what orders memory, and what is ordered
    names = r"BAR\.SYNC|MEMBAR|CCTL|REDG|STG|LDG\.E\.STRONG\.GPU"
    order = [name for name, _ in groupby(re.findall(rf"\s({names})\b", sass))]
    found = [f"{name}: an asynchronous copy" for name in re.findall(ASYNCHRONOUS, sass)]
    at = order.index("REDG") if "REDG" in order else 0
    if order[max(0, at - 3) : at + 1] != ["STG", "BAR.SYNC", "MEMBAR", "REDG"]:
        found.append(f"the count follows {order[max(0, at - 3) : at]}, not a store, a barrier and a fence")
    looks = [after for name, after in pairwise(order) if name == "LDG.E.STRONG.GPU"]
    if looks != ["CCTL", "CCTL"]:
        found.append(f"a look at the counter is followed by {looks}, not each by what drops stale lines of L1")
    return found


@compiled
@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("", "", ""),
        ('1, sem="release"', '1, sem="relaxed"', "the count follows"),
        ('0, sem="acquire"', '0, sem="relaxed"', "a look at the counter"),
        pytest.param(
            "    tl.debug_barrier()\n    tl.atomic_add(counter_ptr, 1,",
            "    tl.atomic_add(counter_ptr, 1,",
            "the count",
            marks=pytest.mark.skipif(TRITON >= (3, 9), reason="Triton 3.9 puts a barrier before every atomic itself"),
        ),
    ],
    ids=["as it is", "relaxed count", "relaxed look", "no barrier before the count"],
)
def test_the_counter_barrier_orders_what_it_has_to(old: str, new: str, fault: str, tmp_path: Path) -> None:
    kernels = mutant(tmp_path, "study/sequence.py", old, new, module="study.sequence") if old else None
    found = barrier_faults(report_of(BARRIER, kernels)[0].sass)
    assert found == [] if not fault else found and found[0].startswith(fault)
