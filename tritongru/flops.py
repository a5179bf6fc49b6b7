"""What `torch.utils.flop_counter` counts for a layer's operators, as for torch.nn.GRU on the CPU: two operations for
each multiply-add of a matrix product; gates and biases count nothing."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .checks import Operands
from .registry import has_triton


def forward_flops(x: Tensor, h_0: Tensor, *_: Any, out_val: Any = None) -> int:
    """Of `tritongru::layer_forward`: x W_i^T and h W_h^T of each row and direction."""
    D, H = h_0.shape[0], h_0.shape[2]
    return D * 2 * math.prod(x.shape[:-1]) * 3 * H * (x.shape[-1] + H)


def backward_flops(dy: Any, dh_n: Any, y: Any, rzn: Any, q: Any, wanted: Sequence[bool], *of: Any, out_val: Any) -> int:
    """Of `tritongru::layer_backward`: the products of the gradients that are wanted, dh W_h of each step before h_0's,
    and those of forward once more where the gates are computed again."""
    x, h_0, weights, batch_sizes, *_ = operands = Operands(*of)
    (D, B, H), I, rows = h_0.shape, x.shape[-1], math.prod(x.shape[:-1])
    want_x, want_h_0, *want_weights = wanted
    each = len(weights) // D
    found = forward_flops(x, h_0) if operands.recompute else 0
    for direction in range(D):
        want_w_ih, want_w_hh, *_biases = want_weights[direction * each : (direction + 1) * each]
        first = B  # rows of a direction's first step; a fake tensor has no values
        if batch_sizes is not None and direction == 1 and not isinstance(batch_sizes, FakeTensor):
            first = int(batch_sizes[-1])
        carried = rows if want_h_0 else rows - first
        found += 2 * 3 * H * ((want_x + want_w_ih) * rows * I + want_w_hh * rows * H + carried * H)
    return found


def count() -> None:
    """Register both operators with `torch.utils.flop_counter`, and with counters that are on already. Not at import:
    that would import Triton, which then settles whether kernels are interpreted."""
    if "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules and has_triton():
        return
    import torch.utils.flop_counter as counter

    operators = torch.ops.tritongru
    formulas = {operators.layer_forward: forward_flops, operators.layer_backward: backward_flops}
    counter.flop_registry.update(formulas)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            mode.counter.flop_registry = formulas | mode.counter.flop_registry
