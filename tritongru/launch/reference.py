"""The equations of tritongru/reference.py as a backend: what a Triton backend computes, step by step in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import Step, direction_backward, direction_forward, rows_of
from .layer import LayerCall, LayerWeights
from .products import project


def forward(call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor, Tensor | None]:
    """As launch/step.py's forward."""
    x_proj = project(x, weights.w_ih, weights.b_ih).chunk(call.directions, -1)
    ys, h_ns, gates = [], [], []
    for direction in range(call.directions):
        b_hh = weights.b_hh[direction] if weights.b_hh else None
        y, h_n, steps = direction_forward(
            x_proj[direction], h_0[direction], weights.w_hh[direction], b_hh, call.visits, direction
        )
        ys.append(y)
        h_ns.append(h_n)
        in_time = steps if direction == 0 else steps[::-1]
        gates.append(torch.cat([torch.cat([s.r, s.z, s.n, s.q], -1) for s in in_time]))
    return torch.cat(ys, -1), torch.stack(h_ns), torch.stack(gates) if call.save_gates else None


def backward(
    call: LayerCall,
    dy: Tensor,
    dh_n: Tensor,
    y: Tensor,
    h_0: Tensor,
    gates: Tensor,
    weights: LayerWeights,
    want_dh_0: bool,
) -> tuple[Tensor, Tensor | None]:
    """As launch/step.py's backward."""
    visits, H = call.visits, call.hidden_size
    all_dgates, dh_0 = [], []
    for direction in range(call.directions):
        half = slice(direction * H, (direction + 1) * H)
        by_row = gates[direction].view(*y.shape[:-1], 4 * H)
        steps = [
            Step(
                rows_of(y[..., half], visits, direction, visit), *rows_of(by_row, visits, direction, visit).chunk(4, -1)
            )
            for visit in range(visits.time)
        ]
        dgates, dh = direction_backward(
            dy[..., half], dh_n[direction], h_0[direction], steps, weights.w_hh[direction], visits, direction
        )
        all_dgates.append(dgates.reshape(visits.size_rows, 4 * H))
        dh_0.append(dh)
    return torch.stack(all_dgates), torch.stack(dh_0) if want_dh_0 else None
