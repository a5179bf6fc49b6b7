"""One layer of a GRU as a `torch.autograd.Function`, whichever backend runs its recurrence.

What eager calls run; for tracers, dispatch modes and vmap the same two passes are the operators of ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import products
from .beside import eager_beside_graphs
from .gradients import BackwardPass, Wanted, in_chunks, steps_at_once, whole
from .launch.protocol import LayerCall, LayerWeights, SavedGates
from .planning.sequence import exchanges

if TYPE_CHECKING:
    from .registry import Backend


@dataclass(frozen=True)
class Layer:
    """What a layer's passes are told besides tensors."""

    backend: Backend
    call: LayerCall
    batch_first: bool = False  # x and y are [B, T, ...]
    cell: bool = False  # T = 1, and h_n is wanted as [B, H]
    recompute: bool = False

    @property
    def precision(self) -> str:
        """Of the library products in float32. Around a small layer that one program holds they are by FMA as its own
        are (kernels/small.py), whatever the switch says."""
        call, backend = self.call, self.backend
        if backend.name.partition(":")[0] != "sequence":
            return call.precision
        return call.precision if exchanges(call.hidden_size, call.device, backend.overrides) else "ieee"


def device_guard(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


class GRULayer(torch.autograd.Function):
    """y, h_n = GRULayer.apply(layer, x, h_0, *weights)

    x: [T, B, I] ([B, T, I] with batch_first) or packed [N, I]; h_0: [D, B, H]; weights: (w_ih, w_hh[, b_ih, b_hh]) of
    each direction. y: x's shape with D * H features, h_n: [D, B, H]; both fresh, neither a view.
    """

    @staticmethod
    def forward(ctx: Any, layer: Layer, x: Tensor, h_0: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
        y, h_n, gates = forward_pass(layer, x, h_0, flat)
        if layer.call.save_gates:
            ctx.layer = layer
            ctx.save_for_backward(x, h_0, y, *(gates or (None, None)), *flat)
            ctx.set_materialize_grads(False)
        return y, h_n

    @staticmethod
    @eager_beside_graphs
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None) -> Any:
        layer: Layer = ctx.layer
        x, h_0, y, rzn, q, *flat = ctx.saved_tensors
        gates = [] if rzn is None else [SavedGates(rzn, q)]
        del rzn, q
        dh_n = None if dh_n is None else dh_n.view(h_0.shape)  # a cell's has one dimension less
        run = backward_pass
        if _by_operator(dy, dh_n):
            # Here, for ops.py is built on this file.
            from .ops import backward_by_operator as run
        else:
            ctx.maybe_clear_saved_tensors()  # unless the graph is retained; then nothing but the list holds the gates
        return None, *run(layer, x, h_0, y, gates, flat, dy, dh_n, ctx.needs_input_grad[1:])


def _by_operator(dy: Tensor | None, dh_n: Tensor | None) -> bool:
    """Whether backward has to be one operator: somebody would record what it launches, look into it or map over it."""
    functorch = torch._C._functorch
    return (
        torch.compiler.is_compiling()  # compiled autograd, by Dynamo, which cannot trace the other questions
        or torch.is_grad_enabled()  # create_graph=True: the gradients may be differentiated again
        or torch._C._len_torch_dispatch_stack() > 0
        or functorch.peek_interpreter_stack() is not None  # torch.vmap
        or any(t is not None and functorch.is_legacy_batchedtensor(t) for t in (dy, dh_n))  # is_grads_batched=True
    )


def forward_pass(
    layer: Layer, x: Tensor, h_0: Tensor, flat: Sequence[Tensor]
) -> tuple[Tensor, Tensor, SavedGates | None]:
    """y and h_n as `GRULayer` gives them, and the gates (time-major) if call.save_gates without recompute."""
    call = layer.call
    x_major = x.transpose(0, 1) if layer.batch_first else x
    with device_guard(x), products.products(x, layer.precision):
        inner = replace(call, save_gates=call.save_gates and not layer.recompute)
        weights = LayerWeights.of(tuple(flat), call.directions)
        module = layer.backend.load()
        if layer.backend.triton and x.is_cuda:
            from .launch.first_call import prepare  # imports Triton

            prepare(module, call, x_major, flat, layer.recompute)
        y, h_n, gates = module.forward(inner, x_major, h_0, weights)
    if layer.batch_first:
        y = y.transpose_(0, 1)  # in place: a fresh tensor, not a view
    if layer.cell:
        h_n = h_n.squeeze_(0)
    return y, h_n, gates


def backward_pass(
    layer: Layer,
    x: Tensor,
    h_0: Tensor,
    y: Tensor,
    gates: list[SavedGates],
    flat: Sequence[Tensor],
    dy: Tensor | None,
    dh_n: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of (x, h_0, *flat), None where not wanted; `gates` as in `BackwardPass`."""
    call = layer.call
    if layer.batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        dy = dy.transpose(0, 1) if dy is not None else None
    if dy is None:
        dy = y.new_zeros(()).expand_as(y)
    dh_n = torch.zeros_like(h_0, memory_format=torch.contiguous_format) if dh_n is None else dh_n
    want_x, want_h_0, *want = wanted
    each = len(flat) // call.directions
    by_direction = tuple(tuple(want[at : at + each]) for at in range(0, len(flat), each))
    with torch.no_grad(), device_guard(x), products.products(x, layer.precision):
        given = BackwardPass(
            layer.backend.load(), call, LayerWeights.of(tuple(flat), call.directions), x, h_0, y, gates, dy, dh_n,
            Wanted(want_x, h_0.dtype if want_h_0 else None, by_direction),
        )  # fmt: skip
        steps = steps_at_once(call.visits.time, call.visits.batch)
        chunks = layer.recompute and call.visits.plain and steps < call.visits.time
        dx, dh_0, d_weights = in_chunks(given, steps) if chunks else whole(given)
    return [dx.transpose(0, 1) if layer.batch_first and dx is not None else dx, dh_0, *d_weights]
