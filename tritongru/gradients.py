"""The gradients of one layer: gates again if they were not kept, a backend's backward, then the library products. All T
at once; with recompute and many rows in chunks of time, so that the gates of one chunk alone are there at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler

from . import products
from .batch import Visits
from .launch.protocol import Launcher, LayerCall, LayerWeights, SavedGates
from .parts import part

ROWS_AT_ONCE = 1 << 14  # with recompute: rows whose gates, and then gate gradients, are there at once


def steps_at_once(T: int, B: int) -> int:
    """Timesteps of a chunk of backward with recompute."""
    return min(T, max(1, ROWS_AT_ONCE // B))


Gradients = tuple[Tensor | None, Tensor | None, list[Tensor | None]]  # of x, of h_0, of the weights in PyTorch's order


class BackwardPass(NamedTuple):
    """What a layer's backward starts from; x, y, dy are time-major or packed."""

    launcher: Launcher
    call: LayerCall
    weights: LayerWeights
    x: Tensor  # [T, B, I] or [N, I]
    h_0: Tensor  # [D, B, H]
    y: Tensor  # [T, B, D * H] or [N, D * H]
    gates: list[SavedGates]  # taken out by who reads them, to be gone thereafter; none: to be computed again
    dy: Tensor  # as y
    dh_n: Tensor  # [D, B, H]
    want_x: bool
    dh_0_dtype: torch.dtype | None  # None: dh_0 is not wanted
    wanted: Sequence[Sequence[bool]]  # gradients of (w_ih, w_hh[, b_ih, b_hh]) of each direction


@part("gradient products")
def whole(p: BackwardPass) -> Gradients:
    """All T at once."""
    gates = p.gates.pop() if p.gates else recompute_gates(p)
    run = p.launcher.backward
    if profiler._is_profiler_enabled:  # else a frame less
        run = part("recurrence")(run)
    dgates, dh_0 = run(p.call, p.dy, p.dh_n, p.y, p.h_0, gates, p.weights, p.dh_0_dtype)
    del gates  # unless the graph is retained they are gone before anything else comes
    H, of_directions = p.call.hidden_size, dgates.unbind(0)
    dx = products.input_gradient(of_directions, p.weights.w_ih).view(p.x.shape) if p.want_x else None
    # Copies a batch-first x, and a padded one: what lies past a row's length may be NaN.
    x: Any = p.call.visits.only_running(p.x).reshape(-1, p.x.shape[-1]) if any([w[0] for w in p.wanted]) else None
    d_weights: list[Tensor | None] = []
    for direction, (dgate, want) in enumerate(zip(of_directions, p.wanted, strict=True)):
        by_gate, visits = dgate.t(), p.call.visits
        d_w_ih = by_gate[H:].mm(x) if want[0] else None  # dr dz dn
        d_w_hh = products.hidden_weight_gradient(by_gate, visits.h_prev(p.y, p.h_0, direction)) if want[1] else None
        d_biases = products.bias_gradients(dgate) if any(want[2:]) else (None, None)
        d_weights += [d_w_ih, d_w_hh, *[db if asked else None for db, asked in zip(d_biases, want[2:], strict=False)]]
    return dx, dh_0, d_weights


@part("gradient products")
def in_chunks(p: BackwardPass, steps: int) -> Gradients:
    """`whole` of a dense batch with recompute, in chunks of `steps` timesteps, the last visited first. Each chunk is a
    layer of one forward direction; the reverse direction flips time. dh between chunks and the sums of weight gradients
    are float32 or wider."""
    (T, B), H, wide = p.y.shape[:2], p.call.hidden_size, torch.promote_types(p.y.dtype, torch.float32)
    dx = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device) if p.want_x else None
    dh_0s: list[Tensor] = []
    d_weights: list[Tensor | None] = []
    for direction, want in enumerate(p.wanted):
        half = slice(direction * H, (direction + 1) * H)
        dh: Tensor | None = p.dh_n[direction : direction + 1]
        sums: list[Tensor | None] = [None] * len(want)
        for stop in range(T, 0, -steps):
            start = max(stop - steps, 0)
            time, before = (slice(T - stop, T - start), T - start) if direction else (slice(start, stop), start - 1)
            x, y, dy = (t[time].flip(0) if direction else t[time] for t in (p.x, p.y[..., half], p.dy[..., half]))
            h_0 = p.h_0[direction] if start == 0 else p.y[before, :, half]
            settled = p.call.settled.setdefault(("chunk", stop - start), {})
            call = replace(p.call, visits=Visits(stop - start, B), directions=1, settled=settled)
            weights = p.weights.only(direction)
            wanted = p.want_x, p.dh_0_dtype if start == 0 else wide, [want]
            assert dh is not None
            of_x, dh, of_weights = whole(
                BackwardPass(p.launcher, call, weights, x, h_0[None], y.contiguous(), [], dy, dh, *wanted)
            )
            if dx is not None and of_x is not None:
                dx[time].add_(of_x.flip(0)) if direction else dx[time].copy_(of_x)
            sums = [
                of if of is None else of.to(wide) if total is None else total.add_(of)
                for total, of in zip(sums, of_weights, strict=True)
            ]
            del x, y, dy, of_x, of_weights  # before there are others
        d_weights += [None if total is None else total.to(p.y.dtype) for total in sums]
        if dh is not None:
            dh_0s.append(dh)
    return dx, torch.cat(dh_0s) if dh_0s else None, d_weights


@part("recompute")
def recompute_gates(p: BackwardPass) -> SavedGates:
    """The gates again, from x and h_{t-1}. As in forward, r, z, n take the place of x_proj."""
    N, D, H, shape = p.call.visits.size_rows, p.call.directions, p.call.hidden_size, p.y.shape[:-1]
    x_proj = products.project(p.x.reshape(N, -1), p.weights.w_ih, p.weights.b_ih).view(N, D, 3 * H)
    q = p.x.new_empty(N, D, H)
    for direction in range(D):
        w_hh, b_hh = p.weights.w_hh[direction], p.weights.b_hh[direction] if p.weights.b_hh else None
        for rows, h in p.call.visits.h_prev(p.y, p.h_0, direction):
            few = (t.split(ROWS_AT_ONCE) for t in (h, x_proj[rows, direction], q[rows, direction]))
            for h_part, out, out_q in zip(*few, strict=True):
                a_h = torch.nn.functional.linear(h_part, w_hh, b_hh)
                r_z, n = out.tensor_split([2 * H], -1)
                r_z.add_(a_h[:, : 2 * H]).sigmoid_()
                out_q.copy_(a_h[:, 2 * H :])
                n.addcmul_(r_z[:, :H], out_q).tanh_()
                del a_h  # before there is another
    return SavedGates(x_proj.view(*shape, D, 3 * H), q.view(*shape, D, H))
