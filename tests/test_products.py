"""The library products around the recurrence, where a backend's dgates have more columns than hidden units."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tritongru.launch.products import bias_gradients, hidden_weight_gradient, input_gradient, input_weight_gradient

N, I, H = 11, 5, 6


def gradients(dgates: Tensor, x: Tensor, h: Tensor, w_ih: list[Tensor]) -> list[Tensor]:
    parts = [(slice(4, N), h[4:]), (slice(0, 4), h[:4])]
    found = [input_gradient(dgates, w_ih)]
    for dgate in dgates:
        found += [input_weight_gradient(dgate, x, H), hidden_weight_gradient(dgate, parts), *bias_gradients(dgate, H)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("P", [H, H + 1, 16])
def test_padding_columns_change_nothing(P: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dgates = torch.randn(2, N, 4, H, dtype=torch.float64).to(dtype)
    x, h = torch.randn(N, I).to(dtype), torch.randn(N, H).to(dtype)
    w_ih = [torch.randn(3 * H, I).to(dtype) for _ in range(2)]
    padded = torch.nn.functional.pad(dgates, (0, P - H)).flatten(-2)
    found = gradients(padded, x, h, w_ih)
    u = torch.finfo(dtype).eps / 2  # zeros may move the sums' order, no more
    for a, b in zip(found, gradients(dgates.flatten(-2), x, h, w_ih), strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        assert (a - b).norm() <= 4 * u * b.norm()


def test_gradients_are_in_the_order_of_pytorch() -> None:
    torch.manual_seed(0)
    dgates, x, h = torch.randn(1, N, 4 * H), torch.randn(N, I), torch.randn(N, H)
    w_ih = torch.randn(3 * H, I)
    dn, dr, dz, dq = dgates[0].chunk(4, -1)
    d_input, d_hidden = torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dq], -1)
    expected = [d_input @ w_ih, d_input.T @ x, d_hidden.T @ h, d_input.sum(0), d_hidden.sum(0)]
    for a, b in zip(gradients(dgates, x, h, [w_ih]), expected, strict=True):
        torch.testing.assert_close(a, b)
