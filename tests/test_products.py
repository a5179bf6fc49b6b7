"""The library products around the recurrence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritongru.products import (
    bias_gradients,
    column_sums,
    hidden_weight_gradient,
    input_gradient,
    input_weight_gradient,
)

N, I, H = 11, 5, 6


def gradients(dgates: Tensor, x: Tensor, h: Tensor, w_ih: list[Tensor]) -> list[Tensor]:
    parts = [(slice(4, N), h[4:]), (slice(0, 4), h[:4])]
    found = [input_gradient(dgates, w_ih)]
    for dgate in dgates:
        found += [input_weight_gradient(dgate, x), hidden_weight_gradient(dgate, parts), *bias_gradients(dgate)]
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 128, 129, 256, 1000, 16384, 16385, 40000])
def test_column_sums(rows: int) -> None:
    """Of bfloat16 in float32, whose partial sums are not rounded: exact where they fit float32."""
    torch.manual_seed(0)
    values = torch.randint(-8, 9, (rows, 6)).to(torch.bfloat16)
    found = column_sums(values)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), values.double().sum(0))


@pytest.mark.parametrize("rows", [5, 255, 4097])
def test_no_sum_has_so_many_rows_that_pytorch_s_cuda_kernel_takes_a_buffer(rows: int) -> None:
    """From 256 values a thread on (aten/src/ATen/native/cuda/Reduce.cuh, max_values_per_thread) it may."""
    lengths = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "sum":
                lengths.append(args[0].shape[args[1][0]])
            return func(*args, **(kwargs or {}))

    with Sums():
        column_sums(torch.zeros(rows, 8))
    assert lengths and max(lengths) < 256


def test_gradients_are_in_the_order_of_pytorch() -> None:
    torch.manual_seed(0)
    dgates, x, h = torch.randn(1, N, 4 * H), torch.randn(N, I), torch.randn(N, H)
    w_ih = torch.randn(3 * H, I)
    dn, dr, dz, dq = dgates[0].chunk(4, -1)
    d_input, d_hidden = torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dq], -1)
    expected = [d_input @ w_ih, d_input.T @ x, d_hidden.T @ h, d_input.sum(0), d_hidden.sum(0)]
    for a, b in zip(gradients(dgates, x, h, [w_ih]), expected, strict=True):
        torch.testing.assert_close(a, b)
