"""Launcher of kernels/small.py, to which backend `sequence` hands layers whose W_h one program holds: one launch each
way, and no other around it but the library products.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..kernels import small as kernels
from ..planning.small import SmallTiles
from ..products import project
from .protocol import LayerCall, LayerWeights, SavedGates, rzn_strides
from .runtime import Launch, Specimen, empty, interpreted


def forward(
    call: LayerCall, tiles: SmallTiles, x: Tensor, h_0: Tensor, weights: LayerWeights
) -> tuple[Tensor, Tensor, SavedGates | None]:
    """As launch/step.py's forward."""
    D, H, B = call.directions, call.hidden_size, call.visits.batch
    device, dtype = x.device, x.dtype
    by_row = x.shape[:-1]
    rzn = project(x, weights.w_ih, weights.b_ih).view(*by_row, D, 3 * H)
    q = empty(*by_row, D, H, dtype=dtype, device=device) if call.save_gates else None
    y = call.visits.padded(empty(*by_row, D * H, dtype=dtype, device=device))
    h_n = empty(D, B, H, dtype=dtype, device=device)
    first, last = weights.direction(0), weights.direction(-1)
    stride_rzn_t, stride_rzn_b = rzn_strides(rzn)
    arguments = dict(
        rzn_ptr=rzn, q_ptr=y if q is None else q, y_ptr=y, h_0_ptr=h_0, h_n_ptr=h_n, b_ptr=first.b_hh,
        b_reverse_ptr=last.b_hh,
    )  # fmt: skip
    scalars = dict(
        stride_rzn_t=stride_rzn_t, stride_rzn_b=stride_rzn_b, save_gates=int(call.save_gates),
        has_bias=int(bool(weights.b_hh)),
    )  # fmt: skip
    _launch("forward", call, tiles, weights, arguments, scalars)
    return y, h_n, None if q is None else SavedGates(rzn, q)


def backward(
    call: LayerCall, tiles: SmallTiles, dy: Tensor, dh_n: Tensor, y: Tensor, h_0: Tensor, gates: SavedGates,
    weights: LayerWeights, dh_0_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As launch/step.py's backward; dh_n is float32."""
    visits, D, H = call.visits, call.directions, call.hidden_size
    dy, y, rzn, q = (_as_read(tensor, tiles.vector) for tensor in (dy, y, *gates))
    dgates = visits.padded(empty(D, visits.size_rows, 4 * H, dtype=y.dtype, device=y.device))
    dh_0 = empty(D, visits.batch, H, dtype=torch.float32, device=y.device)
    stride_rzn_t, stride_rzn_b = rzn_strides(rzn)
    arguments = dict(
        dy_ptr=dy, dh_n_ptr=dh_n, rzn_ptr=rzn, q_ptr=q, y_ptr=y, h_0_ptr=h_0, dgates_ptr=dgates, dh_0_ptr=dh_0
    )
    scalars = dict(
        stride_rzn_t=stride_rzn_t, stride_rzn_b=stride_rzn_b, size_rows=visits.size_rows, stride_dy_t=dy.stride(0),
        stride_dy_b=dy.stride(-2), stride_dy_h=dy.stride(-1), want_dh=int(dh_0_dtype is not None),
    )  # fmt: skip
    _launch("backward", call, tiles, weights, arguments, scalars)
    return dgates, dh_0.to(dh_0_dtype) if dh_0_dtype else None


def _as_read(tensor: Tensor, vector: int) -> Tensor:
    """Itself, or a copy where its rows are not dense and aligned and units are read several at a time: an expanded dy,
    or what a hook on saved tensors has made."""
    *strides, stride_h = tensor.stride()
    if vector == 1 or (stride_h == 1 and tensor.data_ptr() % 16 == 0 and all(s % vector == 0 for s in strides)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _launch(
    kind: str, call: LayerCall, tiles: SmallTiles, weights: LayerWeights, arguments: dict[str, Any],
    scalars: dict[str, int],
) -> None:  # fmt: skip
    visits = call.visits
    kernel, names = _kernel(kind)
    if interpreted(kernel):
        import_module("..tools.emulator.twins", __package__)  # where the emulator finds what the inline PTX does
    lengths, starts = visits.lengths_and_starts(arguments["rzn_ptr"].device)
    packed = visits.batch_sizes is not None
    values = dict(
        T=visits.time, B=visits.batch, H=call.hidden_size, D=call.directions, stride_row=visits.stride_row,
        packed=int(packed), has_lengths=int(packed or visits.lengths is not None), **scalars,
    )  # fmt: skip
    given = dict(
        **arguments, w_ptr=weights.w_hh[0], w_reverse_ptr=weights.w_hh[-1], lengths_ptr=lengths, starts_ptr=starts,
        resets_ptr=(lengths if visits.resets is None else visits.resets).view(torch.int8),
        **_constants(tiles, visits.resets is not None),
    )  # fmt: skip
    launch = Launch(kernel, names, given, tiles.num_warps, num_stages=1)
    launch(tiles.grid, [values[name] for name in names])


def _kernel(kind: str) -> tuple[Any, tuple[str, ...]]:
    if kind == "forward":
        return kernels.small_forward, kernels.FORWARD_SCALARS
    return kernels.small_backward, kernels.BACKWARD_SCALARS


def _constants(tiles: SmallTiles, resets: bool) -> dict[str, int]:
    return dict(
        ROWS=tiles.rows, UNITS=tiles.units, WARPS=tiles.num_warps, LANES=tiles.lanes, VECTOR=tiles.vector,
        AHEAD=tiles.ahead, RESETS=resets,
    )  # fmt: skip


def specimen(kind: str, tiles: SmallTiles, dtype: str, resets: bool = False) -> Specimen:
    """The launch of one pass by its types."""
    kernel, scalars = _kernel(kind)
    types = dict.fromkeys(scalars, "i32") | dict.fromkeys(("lengths_ptr", "starts_ptr"), "*i32")
    types["resets_ptr"] = "*i8"
    types |= dict.fromkeys(("dh_n_ptr", "dh_0_ptr"), "*fp32")
    given = {n: types.get(n, f"*{dtype}") for n in kernel.arg_names if n in types or n.endswith("_ptr")}
    return Specimen(kernel, given, _constants(tiles, resets), tiles.num_warps, num_stages=1)
