"""The equations of tritongru/reference.py as a backend: what a Triton backend computes, step by step in PyTorch."""

import torch
from torch import Tensor

from ..products import project
from ..reference import Step, direction_backward, direction_forward
from .protocol import LayerCall, LayerWeights, SavedGates


def forward(
    call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights, h_n: Tensor | None = None
) -> tuple[Tensor, Tensor, SavedGates | None]:
    """As protocol.py's Launcher has it."""
    x_proj = project(x, weights.w_ih, weights.b_ih).chunk(call.directions, -1)
    ys, h_ns, rzn, q = [], [], [], []
    join = torch.stack if call.visits.batch_sizes is None else torch.cat
    for direction, of_x in enumerate(x_proj):
        b_hh = weights.b_hh[direction] if weights.b_hh else None
        y, last, steps = direction_forward(of_x, h_0[direction], weights.w_hh[direction], b_hh, call.visits, direction)
        ys.append(y)
        h_ns.append(last)
        in_time = steps if direction == 0 else steps[::-1]
        rzn.append(join([torch.cat([s.r, s.z, s.n], -1) for s in in_time]))
        q.append(join([s.q for s in in_time]))
    gates = SavedGates(torch.stack(rzn, -2), torch.stack(q, -2)) if call.save_gates else None
    return torch.cat(ys, -1), torch.stack(h_ns, out=h_n), gates


def product_precision(call: LayerCall, backward: bool = True) -> str | None:
    """As protocol.py's Launcher has it."""
    return call.precision


def backward(
    call: LayerCall, dy: Tensor, dh_n: Tensor, y: Tensor, h_0: Tensor, gates: SavedGates, weights: LayerWeights,
    dh_0_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As protocol.py's Launcher has it."""
    visits, D, dh_n = call.visits, call.directions, dh_n.to(y.dtype)
    all_dgates, dh_0 = [], []
    for direction, (of_y, of_dy) in enumerate(zip(y.chunk(D, -1), dy.chunk(D, -1), strict=True)):
        kept = of_y, *gates.rzn[..., direction, :].chunk(3, -1), gates.q[..., direction, :]
        steps = [Step(*of) for of in zip(*(visits.steps(t, direction) for t in kept), strict=True)]
        h_prev = y.new_empty(visits.size_rows, call.hidden_size)
        for rows, h in visits.h_prev(y, h_0, direction):
            h_prev[rows] = h
        given = of_dy, dh_n[direction], h_prev.view(of_y.shape), steps, weights.w_hh[direction]
        dgates, dh = direction_backward(*given, visits, direction)
        all_dgates.append(dgates.reshape(visits.size_rows, -1))
        dh_0.append(dh)
    return torch.stack(all_dgates), torch.stack(dh_0).to(dh_0_dtype) if dh_0_dtype else None
