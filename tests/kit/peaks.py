"""`python -m tests.kit.peaks`: what a training call holds now, beside what an H200 measured of an earlier commit.

Counted, not measured: on meta tensors, which have sizes and no memory, with an H200's plans and no kernel launched. Not
in it is what libraries allocate on their own inside an operator, nor the allocator's rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import tritongru
from benchmarks import work
from benchmarks.cases import Case
from benchmarks.generated import generate, table
from benchmarks.results import RESULTS, ROWS, read
from tritongru import registry
from tritongru.launch import runtime
from tritongru.planning import describe
from tritongru.tools.counted import Watch

from .counting import looked_into

FOLDER = RESULTS / "nvidia-h200"
DOCUMENT, MARK = FOLDER / "README.md", ("tests.kit.peaks", "python -m")
MIB = 2**20


@contextmanager
def _launching_nothing() -> Iterator[None]:
    """Meta tensors take the plans of an H200."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "device_of", lambda device: describe("h200"))
        patch.setattr(registry.Backend, "why_not", lambda self, device, dtype: None)
        with looked_into(patch), runtime.recording():
            yield


def peak(case: Case, backend: str) -> float:
    """MiB beyond input, weights and cotangents, as benchmarks/run.py measures it: x and the weights want gradients."""
    meta = torch.device("meta")
    module = tritongru.GRU(
        case.I, case.H, case.layers, bidirectional=case.bidirectional, backend=backend, device=meta,
        dtype=work.TORCH_DTYPES[case.dtype],
    )  # fmt: skip
    inputs = work.Inputs.draw(case, meta)
    with _launching_nothing(), Watch() as found:
        results = inputs.through(module)
        torch.autograd.grad(results, [inputs.x, *module.parameters()], inputs.cotangents)
        return found.peak() / MIB


def text() -> str:
    """The table: every shape of the harness whose memory was measured."""
    found = [row for row in read(FOLDER / ROWS) if row["peak_mib"]]
    measured = {(row["case"], row["provider"]): float(row["peak_mib"]) for row in found}
    cases = {
        row["case"]: Case(
            *(int(row[name]) for name in "TBIH"), row["dtype"], layers=int(row["layers"]),
            bidirectional=row["directions"] == "2", packed=row["packed"] == "yes",
        )
        for row in found
    }  # fmt: skip
    rows = []
    for name in dict.fromkeys(case for case, _ in measured):
        counted = [peak(cases[name], backend) for backend in ("step", "sequence")]
        of = [measured[name, who] for who in ("nn.GRU", "sequence")]
        rows.append([name, *(f"{mib:.1f}" for mib in (*of, *counted))])
    header = ("MiB at the peak", "`nn.GRU`, measured", "`sequence` at 23040e0, measured", "`step` now, counted",
              "`sequence` now, counted")  # fmt: skip
    return table(header, rows)


if __name__ == "__main__":
    generate(DOCUMENT, MARK[0], text(), MARK[1])
