"""The GRU in plain PyTorch, to be read: forward, and backward written out. Needs torch alone.

    r_t = sigmoid(x_t W_ir^T + b_ir + h_{t-1} W_hr^T + b_hr)    reset gate: the fraction of the past the candidate sees
    z_t = sigmoid(x_t W_iz^T + b_iz + h_{t-1} W_hz^T + b_hz)    update gate: the fraction of the past that is retained
    q_t = h_{t-1} W_hn^T + b_hn                                 hidden part of the candidate
    n_t = tanh(x_t W_in^T + b_in + r_t * q_t)                   candidate
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}

The reset comes after the product, as in cuDNN and PyTorch; Cho et al. 2014 put it before: n = tanh(x W + (r * h) U).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Visits


class Step(NamedTuple):
    """One step of one direction, each [B, H]."""

    h: Tensor
    r: Tensor
    z: Tensor
    n: Tensor
    q: Tensor


def gru_step(x_proj: Tensor, h_prev: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Step:
    """One step: x_proj = x_t W_i^T + b_i [B, 3H], h_prev [B, H], w_hh [3H, H], b_hh [3H] or None."""
    x_r, x_z, x_n = x_proj.chunk(3, -1)
    h_r, h_z, q = torch.nn.functional.linear(h_prev, w_hh, b_hh).chunk(3, -1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * q)
    h = n + z * (h_prev - n)  # = (1 - z) * n + z * h_prev
    return Step(h, r, z, n, q)


def gru_step_backward(dh: Tensor, step: Step, h_prev: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    """Backward of `gru_step`: dh, the gradient arriving at h_t, to dgates (dq, dr, dz, dn) [B, 4H] and dh_{t-1}."""
    _, r, z, n, q = step
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h_prev - n) * z * (1 - z)
    dq = dn * r
    dr = dn * q * r * (1 - r)
    dh_prev = dh * z + torch.cat([dr, dz, dq], -1) @ w_hh
    return torch.cat([dq, dr, dz, dn], -1), dh_prev


def _masks(visits: Visits, direction: int) -> list[Sequence[Tensor] | None]:
    """[B, 1] at each visit: rows that run, and rows whose incoming state a reset clears; None: all, and none."""
    masks = visits.runs(), visits.cleared(direction)
    return [None if mask is None else visits.steps(mask[..., None], direction) for mask in masks]


def direction_forward(
    x_proj: Tensor, h_0: Tensor, w_hh: Tensor, b_hh: Tensor | None, visits: Visits, direction: int
) -> tuple[Tensor, Tensor, list[Step]]:
    """One direction over a sequence: x_proj [T, B, 3H] or packed, h_0 [B, H]; returns y in x's rows, h_n, the steps."""
    h = h_0  # rows that have not started keep h_0, rows that have ended keep h_n
    runs, cleared = _masks(visits, direction)
    steps = []
    for visit, x in enumerate(visits.steps(x_proj, direction)):
        rows = len(x)
        h_prev = h[:rows] if cleared is None else h.masked_fill(cleared[visit], 0)
        step = gru_step(x, h_prev, w_hh, b_hh)
        h = torch.cat([step.h, h[rows:]]) if rows < len(h) else step.h
        if runs is not None:
            h = torch.where(runs[visit], h, h_prev)
            step = step._replace(h=h.masked_fill(~runs[visit], 0))
        steps.append(step)
    in_time = steps if direction == 0 else steps[::-1]
    y = torch.stack([s.h for s in in_time]) if visits.batch_sizes is None else torch.cat([s.h for s in in_time])
    return y, h, steps


def direction_backward(
    dy: Tensor, dh_n: Tensor, h_prev: Tensor, steps: Sequence[Step], w_hh: Tensor, visits: Visits, direction: int
) -> tuple[Tensor, Tensor]:
    """Backward of `direction_forward`: dgates (dq, dr, dz, dn) in dy's rows, [..., 4H], and dh_0 [B, H]. h_prev: the
    state that entered each step, in dy's rows."""
    dh, found = dh_n, []
    runs, cleared = _masks(visits, direction)
    given = zip(steps, visits.steps(dy, direction), visits.steps(h_prev, direction), strict=True)
    for visit, (step, of_y, before) in reversed([*enumerate(given)]):
        rows = len(of_y)
        dgates, dh_prev = gru_step_backward(dh[:rows] + of_y, step, before, w_hh)
        if runs is not None:
            dgates = dgates.masked_fill(~runs[visit], 0)
            dh_prev = torch.where(runs[visit], dh_prev, dh)
        if cleared is not None:
            dh_prev = dh_prev.masked_fill(cleared[visit], 0)
        dh = torch.cat([dh_prev, dh[rows:]])
        found.append(dgates)
    in_time = found[::-1] if direction == 0 else found
    return (torch.stack(in_time) if visits.batch_sizes is None else torch.cat(in_time)), dh


def gru_layer(
    x: Tensor, h_0: Tensor, params: Sequence[Tensor], visits: Visits
) -> tuple[Tensor, Tensor, list[list[Step]]]:
    """One layer by the equations alone, differentiable to any order: y [..., D * H], h_n [D, B, H], and each
    direction's steps as it visits them. x time-major or packed; params (w_ih, w_hh[, b_ih, b_hh]) per direction."""
    D, x = len(h_0), visits.only_running(x)  # of a NaN where no row runs the derivative too has to be 0
    each, ys, h_ns, every = len(params) // D, [], [], []
    for direction in range(D):
        w_ih, w_hh, *biases = params[direction * each : (direction + 1) * each]
        b_ih, b_hh = biases or (None, None)
        x_proj = torch.nn.functional.linear(x, w_ih, b_ih)
        y, h_n, steps = direction_forward(x_proj, h_0[direction], w_hh, b_hh, visits, direction)
        ys.append(y)
        h_ns.append(h_n)
        every.append(steps)
    return torch.cat(ys, -1), torch.stack(h_ns), every
