"""Launcher of kernels/step.py: one launch per timestep, each way. Before those of forward, with T > 1, the product
x_proj and the copy of h_0 into `h`; of backward one more if the gradient of h_0 is wanted. The library products over
all T are tritongru/products.py.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from ..batch import Visits
from ..kernels import step as kernels
from ..planning.step import BACKWARD, StepTiles, kinds, step_tiles
from ..products import project
from .protocol import LayerCall, LayerWeights, SavedGates, rzn_strides
from .runtime import Grid, Kernel, Launch, Steps, empty, once_more

Visited = Callable[[], Iterable[tuple[int, tuple[int, ...]]]]  # rows to reach and scalars of each launch


def _in_units(strides: Sequence[int], features: int) -> tuple[int, ...]:
    """(unit, *strides / unit): the largest unit known at compile time, `features` where it divides every stride."""
    unit = 1 if any([stride % features for stride in strides]) else features
    return (unit, *[stride // unit for stride in strides])


def forward(
    call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights, h_n: Tensor | None = None
) -> tuple[Tensor, Tensor, SavedGates | None]:
    """As protocol.py's Launcher has it."""
    visits, D, H, I = call.visits, call.directions, call.hidden_size, x.shape[-1]
    B, by_row, fused = visits.batch, x.shape[:-1], visits.time == 1
    new = partial(empty, dtype=x.dtype, device=x.device)
    y, h_n = visits.padded(new(*by_row, D * H)), new(D, B, H) if h_n is None else h_n
    q = new(*by_row, D, H) if call.save_gates else None
    if fused:
        rzn, h = new(*by_row, D, 3 * H) if call.save_gates else None, h_0
    else:  # the kernel does not read x
        rzn, h = project(x, weights.w_ih, weights.b_ih).view(*by_row, D, 3 * H), new(2, D, B, H)
        h.copy_(h_0)
    state = empty(D, B, H, dtype=torch.float32, device=x.device) if x.dtype != torch.float32 and not fused else None
    gates = None if rzn is None or q is None else SavedGates(rzn, q)
    kind = "cell" if fused else "forward"
    tensors = [t for t in (x if fused else None, h, state, y, h_n, rzn, q, *chain(*weights)) if t is not None]
    if call.again(kind, tensors):
        return y, h_n, gates
    unit, stride_x_b, stride_x_i = 1, 0, 1
    if fused:
        x, h = x.resolve_neg(), h.resolve_neg().contiguous()  # a kernel reads memory, where nothing is negated lazily
        unit, stride_x_b = _in_units((x.stride(-2),), I)
        stride_x_i = x.stride(-1)
    w_ih, w_hh = weights.w_ih, weights.w_hh
    b_ih, b_hh = (weights.b_ih, weights.b_hh) if weights.b_hh else (w_hh, w_hh)  # not read where there are none

    constants = dict(
        I=I if fused else 0, X_UNIT=unit, HAS_BIAS=bool(weights.b_hh), FUSE_INPUT=fused, KEEP_STATE=state is not None,
        SAVE_GATES=call.save_gates,
    )  # fmt: skip
    arguments = dict(
        x_ptr=x if fused else h, h_ptr=h, y_ptr=y, h_n_ptr=h_n, state_ptr=h if state is None else state,
        rzn_ptr=y if rzn is None else rzn, q_ptr=y if q is None else q,
        w_ih_ptr=w_ih[0], w_hh_ptr=w_hh[0], b_ih_ptr=b_ih[0], b_hh_ptr=b_hh[0], w_ih_reverse_ptr=w_ih[-1],
        w_hh_reverse_ptr=w_hh[-1], b_ih_reverse_ptr=b_ih[-1], b_hh_reverse_ptr=b_hh[-1],
        stride_x_b=stride_x_b, stride_x_i=stride_x_i, **rzn_strides(rzn),
    )  # fmt: skip
    launch = _launch(call, kind, constants, arguments, h, partial(visits.forward, D))
    if visits.plain:
        call.was_launched(kind, lambda: once_more(tensors, [launch]))
    return y, h_n, gates


def backward(
    call: LayerCall, dy: Tensor, dh_n: Tensor, y: Tensor, h_0: Tensor, gates: SavedGates, weights: LayerWeights,
    dh_0_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As protocol.py's Launcher has it."""
    visits, D, H = call.visits, call.directions, call.hidden_size
    B, N, new = visits.batch, visits.size_rows, partial(empty, device=y.device)
    dgates, want_dh_0 = visits.padded(new(D, N, 4 * H, dtype=y.dtype)), dh_0_dtype is not None
    dh, dh_0 = new(D, B, H, dtype=torch.float32), new(D, B, H, dtype=dh_0_dtype or y.dtype)
    tensors = dy, dh_n, y, h_0, *gates, *weights.w_hh, dgates, dh, dh_0
    laid_out = [(t.stride(), t.dtype) for t in tensors[:6]]  # hooks on saved tensors may have changed it
    pass_ = "backward", dh_0_dtype, dy.is_neg(), dh_n.is_neg(), *laid_out
    if call.again(pass_, tensors):
        return dgates, dh_0 if want_dh_0 else None
    dy, dh_n, h_0 = dy.resolve_neg(), dh_n.resolve_neg().contiguous(), h_0.resolve_neg().contiguous()
    y, (rzn, q) = y.contiguous(), gates.laid_out()
    unit, stride_dy_t, stride_dy_b = _in_units((dy.stride(0), dy.stride(-2)), D * H)
    arguments = dict(
        dy_ptr=dy, dh_n_ptr=dh_n, w_hh_ptr=weights.w_hh[0], w_hh_reverse_ptr=weights.w_hh[-1], h_0_ptr=h_0, y_ptr=y,
        rzn_ptr=rzn, q_ptr=q, dgates_ptr=dgates, dh_ptr=dh, dh_0_ptr=dh_0, size_rows=N, stride_dy_t=stride_dy_t,
        stride_dy_b=stride_dy_b, stride_dy_h=dy.stride(-1), **rzn_strides(rzn),
    )  # fmt: skip
    launches = []
    for kind in BACKWARD[: visits.time + want_dh_0]:
        first = kind == "backward_first"
        visited, constants = partial(_part, visits, D, want_dh_0, first), dict(DY_UNIT=unit, FIRST=first)
        launches.append(_launch(call, kind, constants, arguments, h_0, visited, want_dh_0))
    if visits.plain:
        call.was_launched(pass_, lambda: once_more(tensors, launches))
    return dgates, dh_0 if want_dh_0 else None


def _part(visits: Visits, D: int, want_dh_0: bool, first: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Of backward's launches the first or the others."""
    return islice(visits.backward(D, want_dh_0), *((1,) if first else (1, None)))


def product_precision(call: LayerCall, backward: bool = True) -> str | None:
    """As protocol.py's Launcher has it: a single step takes x itself."""
    return call.precision if backward or call.visits.time > 1 else None


def _launch(
    call: LayerCall, kind: str, constants: dict[str, Any], arguments: dict[str, Any], unread: Tensor, visited: Visited,
    want_dh_0: bool = False,
) -> tuple[Launch, Steps, Hashable]:  # fmt: skip
    """Launch once per step; what was launched, as `once_more` takes it. unread: stands for the lengths and resets that
    a batch does not have."""
    v, key = call.visits, (kind, *constants.values())
    if key not in call.settled:
        call.settled[key] = _kernel(kind, call, constants)
    kernel, tiles = call.settled[key]
    arguments |= dict(
        B=v.batch, stride_row=v.stride_row, lengths_ptr=unread if v.lengths is None else v.lengths,
        resets_ptr=unread if v.resets is None else v.resets.view(torch.int8),
    )  # fmt: skip
    launch, columns = kernel.launch(arguments, tiles.pdl, v.time * v.batch), -(-call.hidden_size // tiles.block_h)
    same = None if v.time == 1 else (v.time, v.batch, v.batch_sizes, want_dh_0)

    def steps() -> Iterator[tuple[Grid, tuple[int, ...]]]:
        return (((-(-rows // tiles.block_b), columns, call.directions), scalars) for rows, scalars in visited())

    launch(steps, same)
    return launch, steps, same


def _kernel(kind: str, call: LayerCall, constants: dict[str, Any]) -> tuple[Kernel, StepTiles]:
    """The kernel of one of `step_tiles`' kinds with these constants, the call's and those of its tiles; and these."""
    tiles = step_tiles(kind, call.recurrence)
    constants |= dict(
        H=call.hidden_size, D=call.directions, PRECISION=call.precision, PADDED=call.visits.lengths is not None,
        RESETS=call.visits.resets is not None, BLOCK_B=tiles.block_b, BLOCK_H=tiles.block_h, BLOCK_K=tiles.block_k,
        SPLIT=tiles.split, AHEAD=tiles.ahead, PDL=tiles.pdl,
    )  # fmt: skip
    kernel = kernels.step_backward if kind.startswith("backward") else kernels.step_forward
    return Kernel(kernel, constants, tiles.num_warps, tiles.num_stages, max_registers=tiles.max_registers), tiles


def specimens(call: LayerCall, input_size: int, bias: bool, recompute: bool, aligned: bool = True) -> list[Kernel]:
    """As protocol.py's Launcher has it. The caller's tensors and the weights, as cuDNN's flattened ones, may be aligned
    to their elements alone."""
    v, fused, own, fp32 = call.visits, call.visits.time == 1, f"*{call.dtype}", call.dtype == "fp32"
    theirs = own if aligned else f"{own}:{4 if fp32 else 2}"
    weights = [f"{name}{way}_ptr" for name in ("w_ih", "w_hh", "b_ih", "b_hh") for way in ("", "_reverse")]
    types = dict.fromkeys((*weights, "dy_ptr"), theirs) | dict.fromkeys(("stride_x_i", "stride_dy_h"), "i32:1")
    types |= dict(x_ptr=theirs if fused else own, dh_ptr="*fp32", state_ptr=own if fused or fp32 else "*fp32")
    types |= {"lengths_ptr": own if v.lengths is None else "*i32", "resets_ptr": own if v.resets is None else "*i8"}
    found = []
    for kind in kinds(v.time, call.save_gates):
        if kind.startswith("backward"):
            constants = dict(DY_UNIT=call.directions * call.hidden_size, FIRST=kind == "backward_first")
        else:
            constants = dict(
                I=input_size if fused else 0, X_UNIT=input_size if fused else 1, HAS_BIAS=bias, FUSE_INPUT=fused,
                KEEP_STATE=not fused and not fp32, SAVE_GATES=call.save_gates and not recompute,
            )  # fmt: skip
        kernel, _ = _kernel(kind, call, constants)
        found.append(kernel.of_types(types, own))
    return found
