"""Launcher of kernels/step.py: one launch per timestep, each way.

forward    T x step_forward, around it: the product x_proj (unless T = 1, when the kernel takes x itself) and with
           T > 1 the copy of h_0 into `h`
backward   T x step_backward (T - 1 where T > 1 and nobody wants the gradient of h_0); the library products over
           all T are tritongru/products.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..batch import Visits
from ..kernels import step as kernels
from ..parts import part
from ..planning.devices import Device
from ..planning.problem import Problem
from ..planning.sequence import Overrides
from ..planning.step import StepTiles, step_tiles
from ..products import project
from .protocol import LayerCall, LayerWeights, SavedGates, rzn_strides
from .runtime import Grid, Launch, OneStep, Specimen, empty, interpreted


def _in_units(strides: Sequence[int], features: int) -> tuple[int, ...]:
    """(unit, *strides / unit): the largest unit known at compile time, `features` where it divides every stride."""
    unit = features if all(stride % features == 0 for stride in strides) else 1
    return (unit, *(stride // unit for stride in strides))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def overridden(overrides: Overrides) -> SimpleNamespace:
    """This backend with fields of its tiles set."""
    return SimpleNamespace(
        __name__=f"{__name__}:{overrides}", forward=partial(forward, overrides=overrides),
        backward=partial(backward, overrides=overrides), specimens=partial(specimens, overrides=overrides),
    )  # fmt: skip


@part("recurrence")
def forward(
    call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights, overrides: Overrides = ()
) -> tuple[Tensor, Tensor, SavedGates | None]:
    """One layer forward.

    Args:
        call: what does not depend on values: visits, directions, what to save, precision, device.
        x: input, time-major [T, B, I] or packed [N, I]; any strides.
        h_0: [D, B, H], any strides.
        weights: of each direction, contiguous.
        overrides: fields of the tiles, set for a measurement.

    Returns:
        y [T, B, D * H] or [N, D * H], h_n [D, B, H], and the gates if call.save_gates.
    """
    launch, grids, y, h_n, gates = _forward(call, x, h_0, weights, overrides)
    launch.each(grids, call.visits)
    return y, h_n, gates


def one_step(call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights) -> OneStep | None:
    """The launch of such a call with T = 1, one direction and no gates to keep, for other addresses; None: of a kind
    that is not compiled yet. All tensors contiguous but x."""
    launch, grids, y, h_n, _ = _forward(call, x, h_0, weights)
    given = (x, h_0, *weights.direction(0)[: 4 if weights.b_hh else 2], y, h_n)
    return OneStep.of(launch, next(grids), given)


Grids = Iterator[tuple[Grid, Sequence[int]]]


def _forward(
    call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights, overrides: Overrides = ()
) -> tuple[Launch, Grids, Tensor, Tensor, SavedGates | None]:
    """What `forward` launches, with which grids and scalars, and what it returns."""
    visits, D, H, I = call.visits, call.directions, call.hidden_size, x.shape[-1]
    T, B = visits.time, visits.batch
    fuse_input = T == 1
    tiles = step_tiles("cell" if fuse_input else "forward", B, H, D, call.dtype, call.precision, call.device, overrides)
    device, dtype = x.device, x.dtype
    x, h_0 = x.resolve_neg(), h_0.resolve_neg()  # a kernel reads memory, where a lazily negated tensor is not negated
    by_row = x.shape[:-1]
    if fuse_input:
        unit, stride_x_b = _in_units((x.stride(-2),), I)
        stride_x_i = x.stride(-1)
        rzn = empty(*by_row, D, 3 * H, dtype=dtype, device=device) if call.save_gates else None
    else:  # the kernel does not read x
        unit, stride_x_b, stride_x_i = 1, 0, 1
        rzn = project(x, weights.w_ih, weights.b_ih).view(*by_row, D, 3 * H)
    q = empty(*by_row, D, H, dtype=dtype, device=device) if call.save_gates else None
    stride_rzn_t, stride_rzn_b = (0, 0) if rzn is None else rzn_strides(rzn)
    if T == 1:
        h = h_0.contiguous()
    else:
        h = empty(2, D, B, H, dtype=dtype, device=device)
        h.copy_(h_0)
    keep_state = dtype != torch.float32 and T > 1
    state = empty(D, B, H, dtype=torch.float32, device=device) if keep_state else h
    y = visits.padded(empty(*by_row, D * H, dtype=dtype, device=device))
    h_n = empty(D, B, H, dtype=dtype, device=device)

    first, last = weights.direction(0), weights.direction(-1)
    launch = _launch(
        kernels.step_forward,
        kernels.FORWARD_SCALARS,
        dict(
            x_ptr=x if fuse_input else h, h_ptr=h, y_ptr=y, h_n_ptr=h_n, state_ptr=state,
            rzn_ptr=y if rzn is None else rzn, q_ptr=y if q is None else q,
            w_ih_ptr=first.w_ih, w_hh_ptr=first.w_hh, b_ih_ptr=first.b_ih, b_hh_ptr=first.b_hh,
            w_ih_reverse_ptr=last.w_ih, w_hh_reverse_ptr=last.w_hh,
            b_ih_reverse_ptr=last.b_ih, b_hh_reverse_ptr=last.b_hh,
            B=B, stride_row=visits.stride_row, stride_x_b=stride_x_b, stride_x_i=stride_x_i,
            stride_rzn_t=stride_rzn_t, stride_rzn_b=stride_rzn_b,
            I=I if fuse_input else 0, H=H, D=D, X_UNIT=unit, HAS_BIAS=bool(weights.b_hh), FUSE_INPUT=fuse_input,
            KEEP_STATE=keep_state, SAVE_GATES=call.save_gates, PRECISION=call.precision, **_padding(visits, h),
        ),
        tiles,
    )  # fmt: skip
    columns, block_b = _ceil(H, tiles.block_h), tiles.block_b
    grids = (((-(-rows // block_b), columns, D), scalars) for rows, scalars in visits.forward(D))
    return launch, grids, y, h_n, SavedGates(rzn, q) if rzn is not None and q is not None else None


@part("recurrence")
def backward(
    call: LayerCall,
    dy: Tensor,
    dh_n: Tensor,
    y: Tensor,
    h_0: Tensor,
    gates: SavedGates,
    weights: LayerWeights,
    dh_0_dtype: torch.dtype | None,
    overrides: Overrides = (),
) -> tuple[Tensor, Tensor | None]:
    """One layer backward.

    Args:
        dy: gradient of y, time-major, any strides.
        dh_n: gradient of h_n, [D, B, H], in y's dtype or float32.
        y, h_0, gates: what forward took and made.
        dh_0_dtype: y's dtype, or float32, in which dh_0 is not rounded; None: dh_0 is not wanted.
        overrides: as in forward.

    Returns:
        dgates [D, rows, 4H] (dn, dr, dz, dq) and, if wanted, dh_0 [D, B, H].
    """
    visits, D, H = call.visits, call.directions, call.hidden_size
    B, N = visits.batch, visits.size_rows
    device, dtype = y.device, y.dtype
    dy, dh_n, h_0 = dy.resolve_neg(), dh_n.resolve_neg().contiguous(), h_0.resolve_neg().contiguous()
    y, (rzn, q) = y.contiguous(), gates.laid_out()  # as forward made them, unless a hook on saved tensors re-laid them
    stride_rzn_t, stride_rzn_b = rzn_strides(rzn)
    unit, stride_dy_t, stride_dy_b = _in_units((dy.stride(0), dy.stride(-2)), D * H)
    dgates = visits.padded(empty(D, N, 4 * H, dtype=dtype, device=device))
    dh = empty(D, B, H, dtype=torch.float32, device=device)
    dh_0 = empty(D, B, H, dtype=dh_0_dtype or dtype, device=device)

    def bound(kind: str) -> tuple[Launch, StepTiles]:
        tiles = step_tiles(kind, B, H, D, call.dtype, call.precision, call.device, overrides)
        arguments = dict(
            dy_ptr=dy, dh_n_ptr=dh_n, w_hh_ptr=weights.w_hh[0], w_hh_reverse_ptr=weights.w_hh[-1], h_0_ptr=h_0, y_ptr=y,
            rzn_ptr=rzn, q_ptr=q, dgates_ptr=dgates, dh_ptr=dh, dh_0_ptr=dh_0,
            B=B, stride_row=visits.stride_row, size_rows=N, stride_rzn_t=stride_rzn_t, stride_rzn_b=stride_rzn_b,
            stride_dy_t=stride_dy_t, stride_dy_b=stride_dy_b, stride_dy_h=dy.stride(-1),
            H=H, D=D, DY_UNIT=unit, FIRST=kind == "backward_first", PRECISION=call.precision, **_padding(visits, h_0),
        )  # fmt: skip
        return _launch(kernels.step_backward, kernels.BACKWARD_SCALARS, arguments, tiles), tiles

    want_dh_0 = dh_0_dtype is not None
    for kind, steps in (("backward_first", slice(1)), ("backward", slice(1, None)))[: min(visits.time, 2)]:
        launch, tiles = bound(kind)
        columns, block_b = _ceil(H, tiles.block_h), tiles.block_b
        visited = islice(visits.backward(D, want_dh_0), steps.start, steps.stop)
        launch.each((((-(-rows // block_b), columns, D), scalars) for rows, scalars in visited), (visits, want_dh_0))
    return dgates, dh_0 if dh_0_dtype else None


def _padding(visits: Visits, unread: Tensor) -> dict[str, Any]:
    """What tells a kernel which rows of a padded batch run and begin anew."""
    lengths, resets = visits.lengths, visits.resets
    return dict(
        lengths_ptr=unread if lengths is None else lengths, PADDED=lengths is not None,
        resets_ptr=unread if resets is None else resets.view(torch.int8), RESETS=resets is not None,
    )  # fmt: skip


def _launch(kernel: Any, scalars: Sequence[str], arguments: dict[str, Any], tiles: StepTiles) -> Launch:
    if interpreted(kernel):
        from ..tools.interpreter import repair

        repair()
    return Launch(
        kernel, scalars, {**arguments, **_blocks(tiles)}, tiles.num_warps, tiles.num_stages,
        max_registers=tiles.max_registers, pdl=tiles.pdl,
    )  # fmt: skip


def _blocks(tiles: StepTiles) -> dict[str, int | bool]:
    return {
        "BLOCK_B": tiles.block_b, "BLOCK_H": tiles.block_h, "BLOCK_K": tiles.block_k,
        "SPLIT": tiles.split, "AHEAD": tiles.ahead, "PDL": tiles.pdl,
    }  # fmt: skip


def specimens(
    problem: Problem, device: Device, aligned: bool = True, overrides: Overrides = (), padded: bool = False
) -> list[Specimen]:
    """What a call of the first layer would launch, by its types, with the launchers' own constants: for compiling.

    `aligned=False` takes weights and caller's tensors at the element's own alignment, as cuDNN's flattened ones may be;
    `padded` has lengths and resets.
    """
    B, I, H, D = problem.batch, problem.input_size, problem.hidden_size, problem.directions
    dtype, fused = problem.dtype, problem.time == 1
    own = f"*{dtype}"
    theirs = own if aligned else f"{own}:{4 if dtype == 'fp32' else 2}"
    sizes = dict.fromkeys(kernels.SIZES, "i32")

    def specimen(kernel: Any, kind: str, arguments: dict[str, str], constants: dict[str, Any]) -> Specimen:
        tiles = step_tiles(kind, B, H, D, dtype, problem.precision, device, overrides)
        arguments |= {"lengths_ptr": "*i32", "resets_ptr": "*i8"} if padded else {"lengths_ptr": own, "resets_ptr": own}
        given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        constants |= dict(PADDED=padded, RESETS=padded, **_blocks(tiles))
        return Specimen(kernel, given, constants, tiles.num_warps, tiles.num_stages, tiles.max_registers)

    weights = [f"{name}{suffix}_ptr" for name in ("w_ih", "w_hh", "b_ih", "b_hh") for suffix in ("", "_reverse")]
    found = [
        specimen(
            kernels.step_forward,
            "cell" if fused else "forward",
            {
                **dict.fromkeys(kernels.FORWARD_SCALARS, "i32"),
                **dict.fromkeys(weights, theirs),
                **dict.fromkeys(("h_ptr", "y_ptr", "h_n_ptr", "rzn_ptr", "q_ptr"), own),
                "x_ptr": theirs if fused else own,
                "state_ptr": own if fused or dtype == "fp32" else "*fp32",
                **sizes,
                "stride_x_i": "i32:1",
            },
            dict(
                I=I if fused else 0, H=H, D=D, X_UNIT=I if fused else 1, HAS_BIAS=problem.bias,
                FUSE_INPUT=fused, KEEP_STATE=dtype != "fp32" and not fused,
                SAVE_GATES=problem.training and not problem.recompute, PRECISION=problem.precision,
            ),
        )
    ]  # fmt: skip
    if not problem.training:
        return found
    for kind in ("backward_first", "backward"):
        if kind == "backward" and fused:
            continue
        found.append(
            specimen(
                kernels.step_backward,
                kind,
                {
                    **dict.fromkeys(kernels.BACKWARD_SCALARS, "i32"),
                    **dict.fromkeys(("h_0_ptr", "y_ptr", "rzn_ptr", "q_ptr"), own),
                    **dict.fromkeys(("dgates_ptr", "dh_0_ptr", "dh_n_ptr"), own),
                    **dict.fromkeys(("dy_ptr", "w_hh_ptr", "w_hh_reverse_ptr"), theirs),
                    "dh_ptr": "*fp32",
                    **sizes,
                    "stride_dy_h": "i32:1",
                },
                dict(H=H, D=D, DY_UNIT=D * H, FIRST=kind == "backward_first", PRECISION=problem.precision),
            )
        )
    return found
