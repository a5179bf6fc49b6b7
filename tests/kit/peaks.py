"""`python -m tests.kit.peaks`: what a training call holds, as an H200 measured it and as it is counted.

Counted, not measured: on meta tensors, which have sizes and no memory, with an H200's plans and no kernel launched. Not
in it is what libraries allocate on their own inside an operator, nor the allocator's rounding.
"""

import pytest
import torch

from benchmarks import work
from benchmarks.cases import Case
from benchmarks.generated import generate, table
from benchmarks.providers import find
from benchmarks.results import RESULTS, read_rows
from benchmarks.suites import SUITES
from tritongru import registry
from tritongru.launch import runtime
from tritongru.planning import describe
from tritongru.tools.counted import Watch

from .counting import looked_into

FOLDER = RESULTS / "nvidia-h200"
DOCUMENT, MARK = FOLDER / "README.md", ("tests.kit.peaks", "python -m")


def peak(case: Case, backend: str) -> float:
    """MiB beyond input, weights and cotangents, as benchmarks/run.py measures it: x and the weights want gradients."""
    meta = torch.device("meta")
    module = find(backend).make(case, device=meta, dtype=work.TORCH_DTYPES[case.dtype])
    inputs = work.Inputs.draw(case, meta)
    with pytest.MonkeyPatch.context() as patch:  # meta tensors take the plans of an H200
        patch.setattr(registry, "device_of", lambda device: describe("h200"))
        patch.setattr(registry.Backend, "why_not", lambda self, device, dtype: None)
        with looked_into(patch), runtime.recording(), Watch() as found:
            results = inputs.through(module)
            torch.autograd.grad(results, [inputs.x, *module.parameters()], inputs.cotangents)
            return found.peak() / 2**20


def text() -> str:
    """The table: every shape of suite `long`."""
    found = [row for row in read_rows(FOLDER) if row["peak_mib"]]
    measured = {(row["case"], row["provider"]): f"{float(row['peak_mib']):.1f}" for row in found}
    rows = []
    for case in (entry.case for entry in SUITES["long"](describe("h200"))):
        cells = [(measured[case.name, who], f"{peak(case, who):.1f}") for who in ("step", "sequence")]
        rows.append([case.name, measured[case.name, "nn.GRU"], *cells[0], *cells[1]])
    return table(("MiB at the peak", "`nn.GRU`", "`step`", "counted", "`sequence`", "counted"), rows)


if __name__ == "__main__":
    generate(DOCUMENT, MARK[0], text(), MARK[1])
