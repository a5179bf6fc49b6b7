"""One layer of a GRU as a `torch.autograd.Function`, whichever backend runs its recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launch import products
from .launch.layer import LayerCall, LayerWeights

if TYPE_CHECKING:
    from .registry import Backend


@dataclass(frozen=True)
class Layer:
    """What `GRULayer` is told besides tensors."""

    backend: Backend
    call: LayerCall
    batch_first: bool = False  # x and y are [B, T, ...]
    cell: bool = False  # T = 1, and h_n is wanted as [B, H]
    recompute: bool = False


def _device_guard(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


class _RefuseTwice(torch.autograd.Function):
    """First-order gradients on their way out of `backward`, tied to all that they depend on.

    Differentiating them once more must end here, with a clear error, and not in silence for want of a path to x.
    """

    @staticmethod
    def forward(ctx: Any, name: str, gradients: list[Tensor | None], *depends_on: Tensor | None) -> Any:
        ctx.backend_name = name
        ctx.set_materialize_grads(False)
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"double backward through tritongru's backend {ctx.backend_name!r} is not supported (nor is it through "
            "cuDNN's GRU): expected first-order gradients only. backend='aten' on the CPU and "
            "tritongru.reference.gru_layer can be differentiated twice."
        )


class GRULayer(torch.autograd.Function):
    """y, h_n = GRULayer.apply(layer, x, h_0, *weights)

    x: [T, B, I] ([B, T, I] with batch_first) or packed [N, I]; h_0: [D, B, H]; weights: (w_ih, w_hh[, b_ih, b_hh]) of
    each direction. y: x's shape with D * H features, h_n: [D, B, H]; both fresh, neither a view.
    """

    @staticmethod
    def forward(ctx: Any, layer: Layer, x: Tensor, h_0: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
        call = layer.call
        x_major = x.transpose(0, 1) if layer.batch_first else x
        with _device_guard(x), products.products(x, call.precision):
            inner = replace(call, save_gates=call.save_gates and not layer.recompute)
            weights = LayerWeights.of(flat, call.directions)
            y, h_n, gates = layer.backend.load().forward(inner, x_major, h_0, weights)
        if layer.batch_first:
            y = y.transpose_(0, 1)  # in place: a fresh tensor, not a view
        if layer.cell:
            h_n = h_n.squeeze_(0)
        if call.save_gates:
            ctx.layer = layer
            ctx.save_for_backward(x, h_0, y, gates, *flat)
            ctx.set_materialize_grads(False)
        return y, h_n

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None) -> Any:
        layer: Layer = ctx.layer
        x, h_0, y, gates, *flat = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        with torch.no_grad(), _device_guard(x), products.products(x, layer.call.precision):
            gradients = _gradients(layer, x, h_0, y, gates, tuple(flat), dy, dh_n, wanted)
        if torch.is_grad_enabled():  # create_graph=True: whoever differentiates these again must hear of it
            gradients = list(_RefuseTwice.apply(layer.backend.name, gradients, x, h_0, *flat, dy, dh_n))
        return None, *gradients


def _gradients(
    layer: Layer,
    x: Tensor,
    h_0: Tensor,
    y: Tensor,
    gates: Tensor | None,
    flat: tuple[Tensor, ...],
    dy: Tensor | None,
    dh_n: Tensor | None,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of (x, h_0, *flat), None where not wanted."""
    call = layer.call
    visits, D, H = call.visits, call.directions, call.hidden_size
    weights = LayerWeights.of(flat, D)
    if layer.batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        dy = dy.transpose(0, 1) if dy is not None else None
    if dy is None:
        dy = y.new_zeros(()).expand_as(y)
    dh_n = torch.zeros_like(h_0, memory_format=torch.contiguous_format) if dh_n is None else dh_n.view(h_0.shape)

    want_x, want_h_0, *want_flat = wanted
    each = len(flat) // D
    need_x = gates is None or any(want_flat[::each])
    rows = x.reshape(visits.size_rows, -1) if need_x else x  # copies a batch-first x
    y_rows = y.reshape(visits.size_rows, D, H)
    want_w_hh = any(want_flat[1::each])
    h_prev = [
        visits.h_prev(y_rows[:, direction], h_0[direction], direction) if gates is None or want_w_hh else []
        for direction in range(D)
    ]
    if gates is None:
        gates = x.new_empty(D, visits.size_rows, 4 * H)
        for direction in range(D):
            recompute_gates(gates[direction], rows, h_prev[direction], weights, direction)
    dgates, dh_0 = layer.backend.load().backward(call, dy, dh_n, y, h_0, gates, weights, want_h_0)

    dx = None
    if want_x:
        dx = products.input_gradient(dgates, weights.w_ih).view(x.shape)
        dx = dx.transpose(0, 1) if layer.batch_first else dx
    d_flat: list[Tensor | None] = []
    for direction in range(D):
        want = want_flat[direction * each : (direction + 1) * each]
        dgate = dgates[direction]
        d_flat.append(products.input_weight_gradient(dgate, rows) if want[0] else None)
        d_flat.append(products.hidden_weight_gradient(dgate, h_prev[direction]) if want[1] else None)
        if each == 4:
            db_ih, db_hh = products.bias_gradients(dgate) if want[2] or want[3] else (None, None)
            d_flat += [db_ih if want[2] else None, db_hh if want[3] else None]
    return [dx, dh_0, *d_flat]


def recompute_gates(
    gates: Tensor,
    x: Tensor,
    h_prev: Sequence[tuple[slice, Tensor]],
    weights: LayerWeights,
    direction: int,
    rows_at_once: int = 1 << 14,
) -> None:
    """Fill gates (r, z, n, q) [N, 4H] of one direction again from x [N, I] and h_{t-1}, a chunk of rows at a time."""
    H = gates.shape[-1] // 4
    w_ih, w_hh = weights.w_ih[direction], weights.w_hh[direction]
    b_ih, b_hh = (weights.b_ih[direction], weights.b_hh[direction]) if weights.b_hh else (None, None)
    for rows, h in h_prev:
        for x_part, h_part, out in zip(
            x[rows].split(rows_at_once), h.split(rows_at_once), gates[rows].split(rows_at_once), strict=True
        ):
            a_i = torch.nn.functional.linear(x_part, w_ih, b_ih)
            a_h = torch.nn.functional.linear(h_part, w_hh, b_hh)
            r, z = torch.sigmoid(a_i[:, : 2 * H] + a_h[:, : 2 * H]).chunk(2, -1)
            q = a_h[:, 2 * H :]
            n = torch.tanh(a_i[:, 2 * H :] + r * q)
            torch.cat([r, z, n, q], -1, out=out)
