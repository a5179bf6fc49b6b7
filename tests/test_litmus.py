"""The exchange on its own (tests/kit/litmus.py): under the scheduler here, over many rounds on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kit.litmus import wrong_elements

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_the_scheduler(dtype: torch.dtype) -> None:
    from tritongru.launch.concurrent import concurrent

    for seed in range(4):
        with concurrent(seed):
            assert wrong_elements(5, 4, 16, dtype, torch.device("cpu")) == 0


@pytest.mark.interpreted
def test_it_can_fail() -> None:
    """In a buffer that is not full of sentinels nobody waits."""
    from tritongru.launch.concurrent import concurrent

    with concurrent(1):
        assert wrong_elements(5, 4, 16, torch.float16, torch.device("cpu"), fill=0) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_on_a_gpu(dtype: torch.dtype, share: float) -> None:
    """20,000 rounds of all programs the device holds, half of them, a tenth."""
    device = torch.device("cuda", torch.cuda.current_device())
    programs = max(2, int(torch.cuda.get_device_properties(device).multi_processor_count * share))
    assert wrong_elements(programs, 20_000, 64, dtype, device) == 0
