"""Launcher of kernels/step.py: one launch per timestep, each way.

forward    T x step_forward, around it: the product x_proj (unless T = 1, when the kernel takes x itself) and with
           T > 1 the copy of h_0 into `h`
backward   T x step_backward (T - 1 where T > 1 and nobody wants the gradient of h_0); the library products over
           all T are tritongru/products.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..batch import Visits
from ..kernels import step as kernels
from ..planning.devices import Device
from ..planning.problem import Overrides, Problem
from ..planning.step import StepTiles, kinds, step_tiles
from ..products import project
from .protocol import LayerCall, LayerWeights, SavedGates, rzn_strides
from .protocol import product_precision as product_precision
from .runtime import Grid, Kernel, empty


def _in_units(strides: Sequence[int], features: int) -> tuple[int, ...]:
    """(unit, *strides / unit): the largest unit known at compile time, `features` where it divides every stride."""
    unit = 1 if any([stride % features for stride in strides]) else features
    return (unit, *[stride // unit for stride in strides])


def forward(
    call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights, h_n: Tensor | None = None
) -> tuple[Tensor, Tensor, SavedGates | None]:
    """As protocol.py's Launcher has it."""
    visits, D, H, I = call.visits, call.directions, call.hidden_size, x.shape[-1]
    T, B, by_row, fused = visits.time, visits.batch, x.shape[:-1], visits.time == 1
    dtype, new = x.dtype, partial(empty, dtype=x.dtype, device=x.device)
    direct = call.settled.get("direct")
    if direct is not None:
        y, h_n = new(*by_row, D * H), new(D, B, H) if h_n is None else h_n
        if direct((x, h_0, *[w[0] for w in weights if w], y, h_n)):
            return y, h_n, None
    theirs = x, h_0
    x, h_0 = x.resolve_neg(), h_0.resolve_neg()  # a kernel reads memory, where a lazily negated tensor is not negated
    unit, stride_x_b, stride_x_i = 1, 0, 1
    if fused:
        unit, stride_x_b = _in_units((x.stride(-2),), I)
        stride_x_i = x.stride(-1)
        rzn = new(*by_row, D, 3 * H) if call.save_gates else None
        h = h_0.contiguous()
    else:  # the kernel does not read x
        rzn = project(x, weights.w_ih, weights.b_ih).view(*by_row, D, 3 * H)
        h = new(2, D, B, H)
        h.copy_(h_0)
    q = new(*by_row, D, H) if call.save_gates else None
    keep_state = dtype != torch.float32 and T > 1
    state = empty(D, B, H, dtype=torch.float32, device=x.device) if keep_state else h
    y = visits.padded(new(*by_row, D * H))
    h_n = new(D, B, H) if h_n is None else h_n
    w_ih, w_hh = weights.w_ih, weights.w_hh
    b_ih, b_hh = (weights.b_ih, weights.b_hh) if weights.b_hh else (w_hh, w_hh)  # not read where there are none

    kernel, tiles = _settled(
        "cell" if fused else "forward", call, I=I if fused else 0, X_UNIT=unit, HAS_BIAS=bool(weights.b_hh),
        FUSE_INPUT=fused, KEEP_STATE=keep_state, SAVE_GATES=call.save_gates,
    )  # fmt: skip
    launch = kernel.launch(
        dict(
            x_ptr=x if fused else h, h_ptr=h, y_ptr=y, h_n_ptr=h_n, state_ptr=state,
            rzn_ptr=y if rzn is None else rzn, q_ptr=y if q is None else q,
            w_ih_ptr=w_ih[0], w_hh_ptr=w_hh[0], b_ih_ptr=b_ih[0], b_hh_ptr=b_hh[0], w_ih_reverse_ptr=w_ih[-1],
            w_hh_reverse_ptr=w_hh[-1], b_ih_reverse_ptr=b_ih[-1], b_hh_reverse_ptr=b_hh[-1],
            B=B, stride_row=visits.stride_row, stride_x_b=stride_x_b, stride_x_i=stride_x_i,
            **rzn_strides(rzn), **_padding(visits, h),
        ),
        tiles.pdl,
    )  # fmt: skip
    steps = _with_grids(visits.forward(D), tiles, call)
    if not fused:
        launch.each(steps, (T, B, visits.batch_sizes))
    else:
        grid, scalars = next(steps)
        launch(grid, scalars)
        if D == 1 and visits.plain and not call.save_gates:  # streaming: the next such call hands over addresses
            given = *theirs, *[w[0] for w in weights if w], y, h_n
            call.settled["direct"] = launch.with_others(grid, scalars, given)
    return y, h_n, SavedGates(rzn, q) if rzn is not None and q is not None else None


def backward(
    call: LayerCall, dy: Tensor, dh_n: Tensor, y: Tensor, h_0: Tensor, gates: SavedGates, weights: LayerWeights,
    dh_0_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As protocol.py's Launcher has it."""
    visits, D, H = call.visits, call.directions, call.hidden_size
    B, N, new = visits.batch, visits.size_rows, partial(empty, device=y.device)
    dy, dh_n, h_0 = dy.resolve_neg(), dh_n.resolve_neg().contiguous(), h_0.resolve_neg().contiguous()
    y, (rzn, q) = y.contiguous(), gates.laid_out()  # as forward made them, unless a hook on saved tensors re-laid them
    unit, stride_dy_t, stride_dy_b = _in_units((dy.stride(0), dy.stride(-2)), D * H)
    dgates = visits.padded(new(D, N, 4 * H, dtype=y.dtype))
    dh, dh_0 = new(D, B, H, dtype=torch.float32), new(D, B, H, dtype=dh_0_dtype or y.dtype)
    arguments = dict(
        dy_ptr=dy, dh_n_ptr=dh_n, w_hh_ptr=weights.w_hh[0], w_hh_reverse_ptr=weights.w_hh[-1], h_0_ptr=h_0, y_ptr=y,
        rzn_ptr=rzn, q_ptr=q, dgates_ptr=dgates, dh_ptr=dh, dh_0_ptr=dh_0, B=B, stride_row=visits.stride_row,
        size_rows=N, stride_dy_t=stride_dy_t, stride_dy_b=stride_dy_b, stride_dy_h=dy.stride(-1),
        **rzn_strides(rzn), **_padding(visits, h_0),
    )  # fmt: skip
    want_dh_0 = dh_0_dtype is not None
    visited = visits.backward(D, want_dh_0)
    for kind in kinds(visits.time, training=True)[1:]:
        first = kind == "backward_first"
        kernel, tiles = _settled(kind, call, DY_UNIT=unit, FIRST=first)
        steps = _with_grids([next(visited)] if first else visited, tiles, call)
        kernel.launch(arguments, tiles.pdl).each(steps, (visits.time, B, visits.batch_sizes, want_dh_0))
    return dgates, dh_0 if want_dh_0 else None


def _with_grids(
    visited: Iterable[tuple[int, tuple[int, ...]]], tiles: StepTiles, call: LayerCall
) -> Iterator[tuple[Grid, tuple[int, ...]]]:
    """Grids and scalars of launches that reach so many rows, with such scalars."""
    block_b, columns, D = tiles.block_b, -(-call.hidden_size // tiles.block_h), call.directions
    return (((-(-rows // block_b), columns, D), scalars) for rows, scalars in visited)


def _settled(kind: str, call: LayerCall, **constants: Any) -> tuple[Kernel, StepTiles]:
    """The kernel and its tiles, the same in every call of a kind."""
    key = (kind, *constants.values())
    found: tuple[Kernel, StepTiles] | None = call.settled.get(key)
    if found is None:
        v, H, D = call.visits, call.hidden_size, call.directions
        tiles = step_tiles(kind, call.recurrence)
        constants |= dict(H=H, D=D, PRECISION=call.precision, PADDED=v.lengths is not None, RESETS=v.resets is not None)
        found = call.settled[key] = _kernel(kind, tiles, constants), tiles
    return found


def _kernel(kind: str, tiles: StepTiles, constants: dict[str, Any]) -> Kernel:
    """The kernel of one of `step_tiles`' kinds with these constants and those of its tiles."""
    blocks = dict(
        BLOCK_B=tiles.block_b, BLOCK_H=tiles.block_h, BLOCK_K=tiles.block_k, SPLIT=tiles.split, AHEAD=tiles.ahead,
        PDL=tiles.pdl,
    )  # fmt: skip
    kernel = kernels.step_backward if kind.startswith("backward") else kernels.step_forward
    return Kernel(kernel, constants | blocks, tiles.num_warps, tiles.num_stages, max_registers=tiles.max_registers)


def _padding(visits: Visits, unread: Tensor) -> dict[str, Tensor]:
    """What tells a kernel which rows of a padded batch run and begin anew."""
    lengths, resets = visits.lengths, visits.resets
    return dict(
        lengths_ptr=unread if lengths is None else lengths,
        resets_ptr=unread if resets is None else resets.view(torch.int8),
    )


def specimens(
    problem: Problem, device: Device, *, aligned: bool = True, overrides: Overrides = (), padded: bool = False
) -> list[Kernel]:
    """As protocol.py's Launcher has it, of the first layer; `padded` has lengths and resets. The caller's tensors and
    the weights, as cuDNN's flattened ones, may be aligned to their elements alone."""
    p, H, D, fused, own = problem, problem.hidden_size, problem.directions, problem.time == 1, f"*{problem.dtype}"
    theirs = own if aligned else f"{own}:{4 if p.dtype == 'fp32' else 2}"
    weights = [f"{name}{way}_ptr" for name in ("w_ih", "w_hh", "b_ih", "b_hh") for way in ("", "_reverse")]
    types = dict.fromkeys((*weights, "dy_ptr"), theirs) | dict.fromkeys(("stride_x_i", "stride_dy_h"), "i32:1")
    types |= dict(x_ptr=theirs if fused else own, dh_ptr="*fp32")
    types["state_ptr"] = own if fused or p.dtype == "fp32" else "*fp32"
    types |= dict(lengths_ptr="*i32", resets_ptr="*i8") if padded else {}
    found = []
    for kind in kinds(p.time, p.training):
        constants = dict(H=H, D=D, PRECISION=p.precision, PADDED=padded, RESETS=padded)
        if kind.startswith("backward"):
            constants |= dict(DY_UNIT=D * H, FIRST=kind == "backward_first")
        else:
            constants |= dict(
                I=p.input_size if fused else 0, X_UNIT=p.input_size if fused else 1, HAS_BIAS=p.bias, FUSE_INPUT=fused,
                KEEP_STATE=p.dtype != "fp32" and not fused, SAVE_GATES=p.training and not p.recompute,
            )  # fmt: skip
        tiles = step_tiles(kind, p.on(device, overrides))
        found.append(_kernel(kind, tiles, constants).of_types(types, own))
    return found
