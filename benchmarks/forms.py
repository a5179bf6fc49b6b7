"""The forms that `step` and `sequence` are compared with (kernels/study), as modules with nn.GRU's parameters.

Inference of one dense layer of one direction. What a form does not serve is refused as a backend would refuse it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import tritongru
from tritongru.registry import device_of

from .cases import Case

if TYPE_CHECKING:
    from tritongru.launch.runtime import Kernel

BLOCK = 256  # elements of a program of the unfused form's kernel


def unserved(case: Case) -> str | None:
    """Why no form takes a case."""
    if case.layers > 1 or case.bidirectional or case.packed or case.cell or case.padded or case.resets:
        return "it takes one dense layer of one direction"
    return None


class Unfused(nn.GRU):
    """A library product and a pointwise kernel for each timestep."""

    def forward(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        """input [T, B, I], hx [1, B, H]: output [T, B, H] and h_n [1, B, H].

        Raises:
            RuntimeError: gradients are wanted.
        """
        from tritongru.products import project, rnn_precision, surroundings

        if torch.is_grad_enabled():
            raise RuntimeError("backend 'unfused' cannot run here: it has no backward")
        w_ih, w_hh, b_ih, b_hh = (weight.contiguous() for weight in self.all_weights[0])
        precision = rnn_precision(device_of(input.device).vendor == "nvidia")
        with surroundings(input, precision):
            x_proj = project(input.contiguous(), (w_ih,), (b_ih,))
            y = _unfused(x_proj, hx[0].contiguous(), w_hh, b_hh)
        return y, y[-1:].clone()


def _unfused(x_proj: Tensor, h_0: Tensor, w_hh: Tensor, b_hh: Tensor) -> Tensor:
    """A library product and a launch of kernels/study/unfused.py for each timestep."""
    from tritongru.launch.runtime import empty, one_step

    T, B, gates = x_proj.shape
    H = gates // 3
    dtype, device = x_proj.dtype, x_proj.device
    a = empty(B, gates, dtype=dtype, device=device)
    y = empty(T, B, H, dtype=dtype, device=device)
    state = h_0.to(torch.float32, copy=True)
    arguments = dict(a_ptr=a, x_ptr=x_proj, b_ptr=b_hh, state_ptr=state, y_ptr=y)
    launch = _unfused_kernel(H).launch(arguments)
    h_prev, w_t = h_0, w_hh.t()
    for t in range(T):
        torch.mm(h_prev, w_t, out=a)
        launch(one_step((-(-B * H // BLOCK), 1, 1), (t * B, B)))
        h_prev = y[t]
    return y


def _unfused_kernel(H: int) -> "Kernel":
    from tritongru.kernels.study import unfused as kernels
    from tritongru.launch.runtime import Kernel

    return Kernel(kernels.unfused_forward, {"H": H, "BLOCK": BLOCK}, num_warps=4)


def unfused_specimen(H: int, dtype: str) -> "Kernel":
    """The pointwise launch by its types, for compiling."""
    return _unfused_kernel(H).of_types({"state_ptr": "*fp32"}, f"*{dtype}")


class StepWithInput(nn.GRU):
    """A launch of kernels/step.py for each timestep with x_t W_i^T in it: a loop over cells."""

    def forward(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        h, hs = hx[0], []
        for x in input:
            h = tritongru.gru_cell(x, h, *self.all_weights[0], backend="step")
            hs.append(h)
        return torch.stack(hs), h[None]


FORMS: dict[str, Callable[..., nn.Module]] = {
    "unfused": lambda case, **place: Unfused(case.I, case.H, **place),
    "step-input": lambda case, **place: StepWithInput(case.I, case.H, **place),
}
