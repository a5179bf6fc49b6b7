"""The peaks counted for the shapes whose memory an H200 measured."""

from __future__ import annotations

import pytest

from benchmarks.generated import generated
from tests.kit import peaks


@pytest.mark.compiled  # in the interpreter an H200's plans would need the scheduler
def test_the_peaks_beside_those_that_were_measured() -> None:
    """`python -m tests.kit.peaks` writes them again; none is above nn.GRU's."""
    said = generated(peaks.DOCUMENT, *peaks.MARK)
    assert said == peaks.text()
    for line in said.splitlines()[2:]:
        theirs, _, *ours = map(float, line.strip("| ").split(" | ")[1:])
        assert max(ours) < theirs
