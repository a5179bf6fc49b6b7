"""The exchange on its own (tests/kit/litmus.py): in the emulator here, over many rounds on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kit.litmus import wrong_elements
from tritongru.tools.emulator import emulating

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_the_emulator(dtype: torch.dtype) -> None:
    for seed in range(4):
        with emulating(seed):
            assert wrong_elements(5, 4, dtype, torch.device("cpu"), warps=2) == 0


@pytest.mark.interpreted
def test_it_can_fail() -> None:
    """In a buffer that is not full of sentinels nobody waits."""
    with emulating(1):
        assert wrong_elements(5, 4, torch.float16, torch.device("cpu"), fill=0, warps=2) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_on_a_gpu(dtype: torch.dtype, share: float) -> None:
    """10,000 rounds of all programs the device holds, half of them, a tenth."""
    device = torch.device("cuda", torch.cuda.current_device())
    programs = max(2, int(torch.cuda.get_device_properties(device).multi_processor_count * share))
    assert wrong_elements(programs, 10_000, dtype, device) == 0
