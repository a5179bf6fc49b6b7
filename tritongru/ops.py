"""The two passes of a layer as operators of PyTorch, `tritongru::layer_forward` and `tritongru::layer_backward`.

What torch.compile, AOTAutograd and make_fx put into their graphs in place of T unrolled steps: opaque, with a fake that
tells shapes, so that neither T nor B is compiled in; and what torch.vmap maps over. Eager calls run the same passes by
autograd.py, without a dispatch, but for backward with create_graph=True: layer_backward has a derivative of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import registry
from .autograd import Layer, backward_pass, forward_pass
from .gradients import second_gradients
from .launch.layer import LayerCall, SavedGates
from .launch.products import rnn_precision
from .planning.choose import triton_backend
from .registry import DTYPES
from .visits import Visits

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, h_n, rzn, q


@torch.library.custom_op(
    "tritongru::layer_forward", mutates_args=(), tags=(torch.Tag.flexible_layout,),
    schema="(Tensor x, Tensor h_0, Tensor[] weights, Tensor? batch_sizes, str backend, bool batch_first, "
    "bool training, bool recompute) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def layer_forward(
    x: Tensor, h_0: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool,
    training: bool, recompute: bool,
) -> Outputs:  # fmt: skip
    """One layer forward.

    Args:
        x: [T, B, I], [B, T, I] with batch_first, or packed [N, I] with batch_sizes.
        h_0: [D, B, H].
        weights: w_ih [3H, I], w_hh [3H, H] and, if there are biases, b_ih, b_hh [3H]; of each direction.
        batch_sizes: [T] int64 on the CPU, never rising, adding up to N; or None.
        backend: "reference", "step" or "sequence"; "": step or sequence, as the plan has it.
        training: whether to keep what backward needs; recompute: nothing of it but the output.

    Returns:
        y, x's shape with D * H features; h_n [D, B, H]; and of a training layer without recompute rzn [..., D, 3H] in
        x's order of dimensions and q [..., D, H] in time-major order, else two tensors without elements.

    Raises:
        RuntimeError: an argument of a wrong shape, dtype or device, or a backend that cannot run. ValueError: an
        unknown backend.
    """
    _check(x, h_0, weights, batch_sizes, backend, batch_first)
    layer = _layer(backend, x, h_0, batch_sizes, batch_first, training, recompute)
    y, h_n, gates = forward_pass(layer, x.contiguous(), h_0, weights)
    if gates is None:
        return y, h_n, x.new_empty(0), x.new_empty(0)
    rzn = gates.rzn.transpose(0, 1) if batch_first else gates.rzn
    return y, h_n, rzn.contiguous(), gates.q


@layer_forward.register_fake
def _(
    x: Tensor, h_0: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool,
    training: bool, recompute: bool,
) -> Outputs:  # fmt: skip
    _check(x, h_0, weights, batch_sizes, backend, batch_first)
    (D, B, H), rows = h_0.shape, tuple(x.shape[:-1])
    time_major = (rows[1], rows[0]) if batch_first else rows
    y = x.new_empty((*time_major, D * H))
    gates = ((*rows, D, 3 * H), (*time_major, D, H)) if training and not recompute else ((0,), (0,))
    rzn, q = (x.new_empty(shape) for shape in gates)
    return y.transpose(0, 1) if batch_first else y, x.new_empty((D, B, H)), rzn, q


@torch.library.custom_op(
    "tritongru::layer_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,),
    schema="(Tensor? dy, Tensor? dh_n, Tensor x, Tensor h_0, Tensor y, Tensor rzn, Tensor q, Tensor[] weights, "
    "Tensor? batch_sizes, str backend, bool batch_first, bool[] wanted) -> Tensor[]",
)  # fmt: skip
def layer_backward(
    dy: Tensor | None, dh_n: Tensor | None, x: Tensor, h_0: Tensor, y: Tensor, rzn: Tensor, q: Tensor,
    weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of `layer_forward` that are wanted, of x, h_0 and each of the weights, in this order.

    Args:
        dy, dh_n: gradients of y and h_n; None: zero.
        y, rzn, q: what layer_forward returned; rzn and q without elements: the gates are computed again.
        wanted: 2 + len(weights) of them.
        The others as layer_forward got them.

    Raises:
        As layer_forward.
    """
    _check(x, h_0, weights, batch_sizes, backend, batch_first)
    _check_gradients(dy, dh_n, x, h_0, y, weights, wanted)
    layer = _layer(backend, x, h_0, batch_sizes, batch_first, training=True, recompute=not rzn.numel())
    gates = None if layer.recompute else SavedGates(rzn.transpose(0, 1) if batch_first else rzn, q)
    found = backward_pass(layer, x, h_0, y, gates, weights, dy, dh_n, wanted)
    return [gradient for gradient in found if gradient is not None]


@layer_backward.register_fake
def _(
    dy: Tensor | None, dh_n: Tensor | None, x: Tensor, h_0: Tensor, y: Tensor, rzn: Tensor, q: Tensor,
    weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    _check(x, h_0, weights, batch_sizes, backend, batch_first)
    _check_gradients(dy, dh_n, x, h_0, y, weights, wanted)
    dx = x.new_empty((x.shape[1], x.shape[0], x.shape[2])).transpose(0, 1) if batch_first else x.new_empty(x.shape)
    every = [dx, *(x.new_empty(t.shape) for t in (h_0, *weights))]
    return [gradient for gradient, want in zip(every, wanted, strict=True) if want]


def _layer(
    name: str, x: Tensor, h_0: Tensor, batch_sizes: Tensor | None, batch_first: bool, training: bool, recompute: bool
) -> Layer:
    """What the passes are told; of an empty name the backend of the plan."""
    visits = Visits.of(x.transpose(0, 1) if batch_first else x, _read(batch_sizes, x, h_0))
    (D, B, H), device, dtype = h_0.shape, registry.device_of(x.device), DTYPES[x.dtype]
    precision = rnn_precision(device.vendor == "nvidia")
    if not name:
        name, _ = triton_backend(B, visits.time, H, D, dtype, precision, training, device)
    backend = registry.find(name)
    if (why_not := backend.why_not(x.device, x.dtype)) is not None:
        raise registry.refuse(backend, why_not, x.device, x.dtype)
    return Layer(backend, LayerCall(visits, D, H, dtype, precision, device, training), batch_first, recompute=recompute)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, h_0, weights, batch_sizes, ctx.backend, ctx.batch_first, ctx.training, _ = inputs
    y, _, rzn, q = output
    ctx.mark_non_differentiable(rzn, q)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h_0, y, rzn, q, batch_sizes, *weights)


def _gradients(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, *_: None) -> tuple[Any, ...]:
    if not ctx.training:
        raise RuntimeError("training must be True where a gradient of tritongru::layer_forward is wanted, got False")
    x, h_0, y, rzn, q, batch_sizes, *weights = ctx.saved_tensors
    want_x, want_h_0, want_weights, *_others = ctx.needs_input_grad
    wanted = [want_x, want_h_0, *want_weights]
    found = iter(
        layer_backward(dy, dh_n, x, h_0, y, rzn, q, weights, batch_sizes, ctx.backend, ctx.batch_first, wanted)
    )
    dx, dh_0, *d_weights = (next(found) if want else None for want in wanted)
    return dx, dh_0, d_weights, None, None, None, None, None


layer_forward.register_autograd(_gradients, setup_context=_keep_for_backward)


def differentiable_gradients(
    layer: Layer, x: Tensor, h_0: Tensor, y: Tensor, gates: SavedGates | None, flat: Sequence[Tensor],
    dy: Tensor | None, dh_n: Tensor | None, wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """`autograd.backward_pass` by the operator, whose results can be differentiated once more."""
    sizes = layer.call.visits.batch_sizes
    rzn, q = gates or (x.new_empty(0), x.new_empty(0))
    if layer.batch_first and gates:
        rzn = rzn.transpose(0, 1)
    found = iter(
        layer_backward(
            dy, dh_n, x, h_0, y, rzn, q, list(flat), None if sizes is None else torch.tensor(sizes), layer.backend.name,
            layer.batch_first, list(wanted),
        )
    )  # fmt: skip
    return [next(found) if want else None for want in wanted]


def _keep_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    dy, dh_n, x, h_0, _, _, _, weights, batch_sizes, _, ctx.batch_first, ctx.wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(batch_sizes, dy, dh_n, x, h_0, *weights)


def _second_gradients(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    batch_sizes, *tensors = ctx.saved_tensors
    need_dy, need_dh_n, need_x, need_h_0, _, _, _, need_weights, *_others = ctx.needs_input_grad
    found = second_gradients(
        tensors, None if batch_sizes is None else tuple(batch_sizes.tolist()), ctx.batch_first, ctx.wanted, cotangents,
        [need_dy, need_dh_n, need_x, need_h_0, *need_weights],
    )  # fmt: skip
    return *found[:4], None, None, None, found[4:], None, None, None, None


layer_backward.register_autograd(_second_gradients, setup_context=_keep_for_double_backward)


@layer_forward.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, h_0: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None,
    *others: Any,
) -> tuple[Outputs, tuple[int | None, ...]]:  # fmt: skip
    """One layer for all where the weights are the same: what is mapped over joins the batch. Else a layer for each."""
    x_dim, h_0_dim, w_dims, sizes_dim, *_others = in_dims
    _, batch_first, *_others = others
    each = info.batch_size
    if sizes_dim is not None:
        raise RuntimeError("batch_sizes must be the same for all that vmap maps over, got a dimension of it mapped")

    def mapped_first(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.expand(each, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    x, h_0 = mapped_first(x, x_dim), mapped_first(h_0, h_0_dim)
    if batch_sizes is None and all(dim is None for dim in w_dims):
        at = 0 if batch_first else 1  # of B in x
        y, h_n, rzn, q = layer_forward(
            x.movedim(0, at).flatten(at, at + 1), h_0.movedim(0, 1).flatten(1, 2), weights, None, *others
        )
        return (y.unflatten(at, (each, -1)), h_n.unflatten(1, (each, -1)), rzn, q), (at, 1, None, None)
    stacked = [mapped_first(w, dim) for w, dim in zip(weights, w_dims, strict=True)]
    runs = [layer_forward(x[i], h_0[i], [w[i] for w in stacked], batch_sizes, *others) for i in range(each)]
    y, h_n, rzn, q = (torch.stack(parts) for parts in zip(*runs, strict=True))
    return (y, h_n, rzn, q), (0, 0, 0, 0)


def _check(
    x: Tensor, h_0: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool
) -> None:
    """Raise for what does not fit. Reads shapes, dtypes and devices alone: fake tensors fail as real ones do."""
    if backend and registry.find(backend).module is None:
        layers = ", ".join(repr(b.name) for b in registry.BACKENDS.values() if b.module)
        raise ValueError(f"backend must run a layer ({layers}, or '' for the plan's), got {backend!r}")
    if x.dtype not in DTYPES:
        raise RuntimeError(f"x must be of dtype {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if batch_sizes is None:
        if x.dim() != 3:
            raise RuntimeError(f"x must have 3 dimensions without batch_sizes, got {_shape(x)}")
    else:
        if x.dim() != 2:
            raise RuntimeError(f"x must have 2 dimensions with batch_sizes, got {_shape(x)}")
        if batch_first:
            raise RuntimeError("batch_first must be False with batch_sizes, got True")
        if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
            raise RuntimeError(
                f"batch_sizes must be [T], int64, on the CPU, got {_shape(batch_sizes)}, {batch_sizes.dtype}, on "
                f"{batch_sizes.device}"
            )
    if h_0.dim() != 3 or h_0.shape[0] not in (1, 2):
        raise RuntimeError(f"h_0 must be [D, B, H] with 1 or 2 directions, got {_shape(h_0)}")
    if any(size == 0 for size in (*x.shape, *h_0.shape)):
        raise RuntimeError(f"x and h_0 must have elements, got {_shape(x)} and {_shape(h_0)}")
    D, B, H = h_0.shape
    if batch_sizes is None and x.shape[0 if batch_first else 1] != B:
        raise RuntimeError(f"h_0 must have x's batch size, {x.shape[0 if batch_first else 1]}, got {_shape(h_0)}")
    if len(weights) not in (2 * D, 4 * D):
        raise RuntimeError(f"weights must be {2 * D} or {4 * D} tensors for {D} direction(s), got {len(weights)}")
    each = len(weights) // D
    shapes = ((3 * H, x.shape[-1]), (3 * H, H), (3 * H,), (3 * H,))[:each]
    for index, weight in enumerate(weights):
        name = ("w_ih", "w_hh", "b_ih", "b_hh")[index % each]
        _check_like(f"{name} of direction {index // each}", weight, shapes[index % each], x)
    _check_like("h_0", h_0, h_0.shape, x)


def _check_gradients(
    dy: Tensor | None, dh_n: Tensor | None, x: Tensor, h_0: Tensor, y: Tensor, weights: Sequence[Tensor],
    wanted: Sequence[bool],
) -> None:  # fmt: skip
    rows = (*x.shape[:-1], h_0.shape[0] * h_0.shape[2])
    for name, tensor, shape in (("y", y, rows), ("dy", dy, rows), ("dh_n", dh_n, h_0.shape)):
        if tensor is not None:
            _check_like(name, tensor, shape, x)
    if len(wanted) != 2 + len(weights):
        raise RuntimeError(f"wanted must have {2 + len(weights)} entries, got {len(wanted)}")


def _check_like(name: str, tensor: Tensor, shape: Sequence[int], x: Tensor) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"{name} must be {list(shape)}, got {_shape(tensor)}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise RuntimeError(f"{name} must be {x.dtype} on {x.device}, as x is, got {tensor.dtype} on {tensor.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _read(batch_sizes: Tensor | None, x: Tensor, h_0: Tensor) -> tuple[int, ...] | None:
    """The values of batch_sizes, which a fake tensor does not have."""
    if batch_sizes is None:
        return None
    sizes: list[int] = batch_sizes.tolist()
    N, B = len(x), h_0.shape[1]
    if not sizes or sizes[0] != B or sum(sizes) != N or sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(
            f"batch_sizes must begin with h_0's batch size, {B}, never rise, stay above 0 and add up to the {N} rows "
            f"of x, got {sizes}"
        )
    return tuple(sizes)
