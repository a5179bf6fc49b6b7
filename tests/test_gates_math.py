"""The errors that kernels/gates.py states, measured in units in the last place; and the formulas against float64."""

import numpy as np
import torch
import triton
import triton.language as tl

from tritongru.kernels import gates
from tritongru.tools.emulator import emulate


@triton.jit
def apply_kernel(x_ptr, tanh_ptr, sigmoid_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size)
    tl.store(tanh_ptr + offs, gates.tanh(x), mask=offs < size)
    tl.store(sigmoid_ptr + offs, gates.sigmoid(x), mask=offs < size)


def activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    t, s = torch.empty_like(x), torch.empty_like(x)
    given = {"x_ptr": x, "tanh_ptr": t, "sigmoid_ptr": s, "size": len(x)}
    emulate(apply_kernel, (triton.cdiv(len(x), 4096), 1, 1), given, {"BLOCK": 4096}, together=False)
    return t, s


def ulps(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """|found - true| in ulps of the float32 nearest to true, for float64 true."""
    spacing = np.spacing(np.abs(true.numpy()).astype(np.float32)).astype(np.float64)
    return torch.from_numpy(np.abs(found.double().numpy() - true.numpy()) / spacing)


def test_tanh_and_sigmoid_are_within_what_they_state() -> None:
    tiny = torch.logspace(-30, 0, 60_000, dtype=torch.float64).float()
    x = torch.cat([torch.linspace(-12, 12, 400_001), tiny, -tiny, torch.linspace(0.62, 0.63, 20_001)])
    assert ulps(activations(x)[0], torch.tanh(x.double())).max() <= 2.0
    x = torch.linspace(-80, 80, 800_001)
    s = activations(x)[1]
    error = ulps(s, torch.sigmoid(x.double()))
    assert error[x >= -1].max() <= 2.5
    assert (error - 2.5 <= x.abs() / 2).all()


def test_at_infinities_nan_and_zero() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 200.0, -200.0])
    t, s = activations(x)
    torch.testing.assert_close(t, torch.tanh(x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(s, torch.sigmoid(x), rtol=0, atol=0, equal_nan=True)
