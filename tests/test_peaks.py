"""The peaks counted for the shapes whose memory an H200 measured."""

from __future__ import annotations

import pytest

from benchmarks.generated import generated
from tests.kit import peaks


@pytest.mark.compiled  # in the interpreter an H200's plans would need the scheduler
def test_the_peaks_beside_those_that_were_measured() -> None:
    """`python -m tests.kit.peaks` writes them again. None is above nn.GRU's, and what was measured is what was counted
    but for the allocator's rounding (512 bytes a tensor, 2 MiB for a large one) and what a library takes for itself."""
    said = generated(peaks.DOCUMENT, *peaks.MARK)
    assert said == peaks.text()
    for line in said.splitlines()[2:]:
        theirs, step, step_counted, sequence, sequence_counted = map(float, line.strip("| ").split(" | ")[1:])
        assert max(step, sequence) < theirs
        for measured, counted in ((step, step_counted), (sequence, sequence_counted)):
            assert abs(measured - counted) <= 2.0
