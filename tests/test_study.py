"""The kernel study: its forms are right, and what kernels/README.md says of them is what the compiler makes of them."""

from pathlib import Path

import pytest
import torch
import triton

from benchmarks import run, study
from benchmarks.cases import Case, Entry
from benchmarks.generated import generated
from benchmarks.results import RESULTS
from benchmarks.timing import HostMeter
from tests.kit.modules import table
from tests.kit.mutants import mutant
from tritongru.launch import runtime

interpreted, compiled = pytest.mark.interpreted, pytest.mark.compiled
# Several programs in two groups and a last row tile that is not full; a single row, a single step
CASES = (Case(3, 18, 5, 40, "fp32"), Case(3, 3, 4, 24, "bf16"), Case(1, 1, 3, 16, "fp16"))


def status(name: str, case: Case) -> str:
    """What the rule by which a GPU's run lets a form be timed says of it."""
    entry = Entry(case, ("inference",), ("nn.GRU", name), rounds=0)
    return next(row.status for row in run.measure(entry, HostMeter()) if row.provider == name)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers allocate begins as NaN."""
    monkeypatch.setattr(runtime, "empty", lambda *shape, **how: torch.full(shape, float("nan"), **how))


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["unfused", "step-input"])
def test_a_form_is_right(name: str, case: Case) -> None:
    assert status(name, case) == "ok"


@interpreted
@table(
    "edit",
    {
        "r for z": "tl.load(a_ptrs{ + H=>},",
        "h not handed on": "{tl.store(state_ptrs, h, mask=mask)=>pass}",
        "the first row for all": "row = at.to(tl.int64){ + offs_b=>}",
    },
)
def test_a_mistake_in_the_unfused_form_is_found(edit: str, tmp_path: Path, monkeypatch) -> None:
    kernels = mutant(tmp_path, "study/unfused.py", edit, module="study.unfused")
    monkeypatch.setattr("tritongru.kernels.study.unfused", kernels, raising=False)  # not imported yet, maybe
    assert status("unfused", CASES[0]) == "wrong"


LOST = ("sequence-barrier", "sequence-in-triton")  # whose kernels are gone: their rows stay as they were


@compiled
@pytest.mark.parametrize("name", study.FORMS)
def test_committed_rows_are_what_this_version_compiles(name: str) -> None:
    """A form or the compiler's work has changed: `make study`."""
    committed = next(row for row in study.committed() if row["form"] == name)
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the row is of Triton {committed['triton']}, this is {triton.__version__}")
    assert study.row(name) == committed


def test_committed_rows_are_of_every_form_and_the_readme_s() -> None:
    """`make study` writes it again."""
    rows = study.committed()
    *first, last = study.FORMS
    assert [row["form"] for row in rows] == [*first, *LOST, last]
    assert [row["form"] for row in rows if row["commit"]] == list(LOST)
    assert generated(study.README, "study") == study.generated(RESULTS)


def test_what_the_figure_and_the_readme_say_holds() -> None:
    rows = {row["form"]: row for row in study.committed()}
    barrier, before, now = (rows[name] for name in (*LOST, "sequence"))
    assert study.of_a_step(before) > 2 * study.of_a_step(now)
    assert study.of_a_step(now) == min(study.of_a_step(row) for name, row in rows.items() if name != "unfused")
    assert (before["BAR"], now["BAR"]) == ("13", "2")
    assert int(before["HMMA"]) == 2 * int(now["HMMA"])  # of 16 units a program, and of 8
    assert int(now["shared_bytes"]) < int(before["shared_bytes"]) / 3
    assert int(barrier["MEMBAR"]) + int(barrier["ATOM"]) + int(barrier["RED"]) == 9
