"""Launcher of kernels/one_program.py, to which backend `sequence` hands layers whose W_h one program holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import one_program as kernels
from ..planning.sequence import SequenceTiles
from .interpreter import repair
from .layer import LayerCall, LayerWeights, SavedGates, rzn_strides
from .products import project
from .runtime import Launch, Specimen, empty, interpreted
from .weights import padded_weights


def forward(
    call: LayerCall, tiles: SequenceTiles, x: Tensor, h_0: Tensor, weights: LayerWeights
) -> tuple[Tensor, Tensor, SavedGates | None]:
    """As launch/step.py's forward."""
    D, H, B = call.directions, call.hidden_size, call.visits.batch
    device, dtype = x.device, x.dtype
    by_row = x.shape[:-1]
    rzn = project(x, weights.w_ih, weights.b_ih).view(*by_row, D, 3 * H)
    q = empty(*by_row, D, H, dtype=dtype, device=device) if call.save_gates else None
    y = empty(*by_row, D * H, dtype=dtype, device=device)
    h_n = empty(D, B, H, dtype=dtype, device=device)
    first, last = weights.direction(0), weights.direction(-1)
    stride_rzn_t, stride_rzn_b = rzn_strides(rzn)
    arguments = dict(
        rzn_ptr=rzn, q_ptr=y if q is None else q, y_ptr=y, h_0_ptr=h_0, h_n_ptr=h_n, b_ptr=first.b_hh,
        b_reverse_ptr=last.b_hh, **padded_weights(weights, tiles, transpose=False),
    )  # fmt: skip
    scalars = dict(
        stride_rzn_t=stride_rzn_t, stride_rzn_b=stride_rzn_b, save_gates=int(call.save_gates),
        has_bias=int(bool(weights.b_hh)),
    )  # fmt: skip
    _launch(kernels.one_program_forward, kernels.FORWARD_SCALARS, call, tiles, arguments, scalars)
    return y, h_n, None if q is None else SavedGates(rzn, q)


def backward(
    call: LayerCall, tiles: SequenceTiles, dy: Tensor, dh_n: Tensor, y: Tensor, h_0: Tensor, gates: SavedGates,
    weights: LayerWeights, dh_0_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As launch/step.py's backward; dh_n is float32."""
    visits, D, H = call.visits, call.directions, call.hidden_size
    rzn, q = gates
    dgates = empty(D, visits.size_rows, 4 * H, dtype=y.dtype, device=y.device)
    dh_0 = empty(D, visits.batch, H, dtype=torch.float32, device=y.device)
    stride_rzn_t, stride_rzn_b = rzn_strides(rzn)
    arguments = dict(
        dy_ptr=dy, dh_n_ptr=dh_n, rzn_ptr=rzn, q_ptr=q, y_ptr=y, h_0_ptr=h_0, dgates_ptr=dgates, dh_0_ptr=dh_0,
        **padded_weights(weights, tiles, transpose=True),
    )  # fmt: skip
    scalars = dict(
        stride_rzn_t=stride_rzn_t, stride_rzn_b=stride_rzn_b, size_rows=visits.size_rows, stride_dy_t=dy.stride(0),
        stride_dy_b=dy.stride(-2), stride_dy_h=dy.stride(-1), want_dh_0=int(dh_0_dtype is not None),
    )  # fmt: skip
    _launch(kernels.one_program_backward, kernels.BACKWARD_SCALARS, call, tiles, arguments, scalars)
    return dgates, dh_0.to(dh_0_dtype) if dh_0_dtype else None


def _launch(
    kernel: Any, names: tuple[str, ...], call: LayerCall, tiles: SequenceTiles, arguments: dict[str, Any],
    scalars: dict[str, int],
) -> None:  # fmt: skip
    visits = call.visits
    if interpreted(kernel):
        repair()
    sizes, starts = visits.tables(arguments["rzn_ptr"].device)
    values = dict(
        T=visits.time, B=visits.batch, H=call.hidden_size, D=call.directions, stride_row=visits.stride_row,
        packed=int(visits.batch_sizes is not None), **scalars,
    )  # fmt: skip
    given = dict(**arguments, sizes_ptr=sizes, starts_ptr=starts, **_constants(tiles, call.precision))
    launch = Launch(kernel, names, given, tiles.num_warps, num_stages=1)
    launch(tiles.grid, [values[name] for name in names])


def _constants(tiles: SequenceTiles, precision: str) -> dict[str, Any]:
    return dict(PRECISION=precision, BLOCK_B=tiles.block_b, K=tiles.units)


def specimen(kind: str, tiles: SequenceTiles, dtype: str, precision: str) -> Specimen:
    """The launch of one pass by its types. The caller's tensors may have any alignment: it makes no other kernel."""
    forward = kind == "forward"
    kernel = kernels.one_program_forward if forward else kernels.one_program_backward
    types = dict.fromkeys(kernels.FORWARD_SCALARS if forward else kernels.BACKWARD_SCALARS, "i32")
    types |= dict.fromkeys(("sizes_ptr", "starts_ptr"), "*i32") | dict.fromkeys(("dh_n_ptr", "dh_0_ptr"), "*fp32")
    given = {n: types.get(n, f"*{dtype}") for n in kernel.arg_names if n in types or n.endswith("_ptr")}
    return Specimen(kernel, given, _constants(tiles, precision), tiles.num_warps, num_stages=1)
