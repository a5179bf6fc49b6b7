"""The two passes of a layer as operators of PyTorch, `tritongru::layer_forward` and `tritongru::layer_backward`.

What torch.compile, AOTAutograd and make_fx put into their graphs in place of T unrolled steps: opaque, with a fake that
tells shapes, so that neither T nor B is compiled in; what vmap maps over; and all that a dispatch mode sees of a layer.
Eager calls run the same passes by autograd.py, without a dispatch, but for backward with create_graph=True:
layer_backward has a derivative of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import flops, registry
from .autograd import Layer, backward_pass, forward_pass
from .batch import Visits, checked_lengths
from .gradients import second_gradients
from .launch.protocol import LayerCall, SavedGates
from .planning.choose import fastest_backend
from .products import rnn_precision
from .registry import DTYPES

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, h_n, rzn, q


@torch.library.custom_op(
    "tritongru::layer_forward", mutates_args=(), tags=(torch.Tag.flexible_layout,),
    schema="(Tensor x, Tensor h_0, Tensor[] weights, Tensor? batch_sizes, str backend, bool batch_first, "
    "bool training, bool recompute, Tensor? lengths, Tensor? resets) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def layer_forward(
    x: Tensor, h_0: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool,
    training: bool, recompute: bool, lengths: Tensor | None, resets: Tensor | None,
) -> Outputs:  # fmt: skip
    """One layer forward.

    Args:
        x: [T, B, I], [B, T, I] with batch_first, or packed [N, I] with batch_sizes.
        h_0: [D, B, H].
        weights: w_ih [3H, I], w_hh [3H, H] and, if there are biases, b_ih, b_hh [3H]; of each direction.
        batch_sizes: [T] int64 on the CPU, never rising, adding up to N; or None.
        backend: "reference", "step" or "sequence"; "": the faster of step and sequence, by size.
        training: whether to keep what backward needs; recompute: nothing of it but the output.
        lengths: [B] integers, resets: [T, B] bool, both of a batch without batch_sizes, on x's device: as `gru`.

    Returns:
        y, x's shape with D * H features; h_n [D, B, H]; and of a training layer without recompute rzn [..., D, 3H] in
        x's order of dimensions and q [..., D, H] in time-major order, else two tensors without elements.

    Raises:
        RuntimeError: an argument of a wrong shape, dtype or device, a backend that cannot run, or forward-mode
        differentiation. ValueError: an unknown backend.
    """
    _refuse_tangents()
    _check(x, h_0, weights, batch_sizes, backend, batch_first, lengths, resets)
    if not h_0.shape[1]:
        return _outputs(x, h_0, batch_first, training and not recompute)
    layer = _layer(backend, x, h_0, (batch_sizes, lengths, resets), batch_first, training, recompute)
    y, h_n, gates = forward_pass(layer, x.contiguous(), h_0, weights)
    if gates is None:
        return y, h_n, x.new_empty(0), x.new_empty(0)
    if (runs := layer.call.visits.runs()) is not None:  # rows that do not run save nothing
        gates.q.masked_fill_(~runs[..., None, None], 0)
    rzn = gates.rzn.transpose(0, 1) if batch_first else gates.rzn
    return y, h_n, rzn.contiguous(), gates.q


@layer_forward.register_fake
def _(
    x: Tensor, h_0: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool,
    training: bool, recompute: bool, lengths: Tensor | None, resets: Tensor | None,
) -> Outputs:  # fmt: skip
    flops.count()  # a graph calls the operator where no Python of ours could tell a counter
    _refuse_tangents()
    _check(x, h_0, weights, batch_sizes, backend, batch_first, lengths, resets)
    return _outputs(x, h_0, batch_first, training and not recompute)


def _outputs(x: Tensor, h_0: Tensor, batch_first: bool, save_gates: bool) -> Outputs:
    """As `layer_forward` returns them, but for the values: all of a fake, and of an empty batch."""
    (D, B, H), rows = h_0.shape, tuple(x.shape[:-1])
    time_major = (rows[1], rows[0]) if batch_first else rows
    y = x.new_empty((*time_major, D * H))
    gates = ((*rows, D, 3 * H), (*time_major, D, H)) if save_gates else ((0,), (0,))
    rzn, q = (x.new_empty(shape) for shape in gates)
    return y.transpose(0, 1) if batch_first else y, x.new_empty((D, B, H)), rzn, q


@torch.library.custom_op(
    "tritongru::layer_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,),
    schema="(Tensor? dy, Tensor? dh_n, Tensor x, Tensor h_0, Tensor y, Tensor rzn, Tensor q, Tensor[] weights, "
    "Tensor? batch_sizes, str backend, bool batch_first, bool[] wanted, Tensor? lengths, Tensor? resets) "
    "-> Tensor[]",
)  # fmt: skip
def layer_backward(
    dy: Tensor | None, dh_n: Tensor | None, x: Tensor, h_0: Tensor, y: Tensor, rzn: Tensor, q: Tensor,
    weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool, wanted: Sequence[bool],
    lengths: Tensor | None, resets: Tensor | None,
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
    _check(x, h_0, weights, batch_sizes, backend, batch_first, lengths, resets)
    _check_gradients(dy, dh_n, x, h_0, y, weights, wanted)
    if not h_0.shape[1]:
        return _zero_gradients(x, h_0, weights, batch_first, wanted)
    batch = batch_sizes, lengths, resets
    layer = _layer(backend, x, h_0, batch, batch_first, training=True, recompute=not rzn.numel())
    gates = [] if layer.recompute else [SavedGates(rzn.transpose(0, 1) if batch_first else rzn, q)]
    found = backward_pass(layer, x, h_0, y, gates, weights, dy, dh_n, wanted)
    return [gradient for gradient in found if gradient is not None]


@layer_backward.register_fake
def _(
    dy: Tensor | None, dh_n: Tensor | None, x: Tensor, h_0: Tensor, y: Tensor, rzn: Tensor, q: Tensor,
    weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool, wanted: Sequence[bool],
    lengths: Tensor | None, resets: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    _check(x, h_0, weights, batch_sizes, backend, batch_first, lengths, resets)
    _check_gradients(dy, dh_n, x, h_0, y, weights, wanted)
    return _zero_gradients(x, h_0, weights, batch_first, wanted)


def _zero_gradients(
    x: Tensor, h_0: Tensor, weights: Sequence[Tensor], batch_first: bool, wanted: Sequence[bool]
) -> list[Tensor]:
    """As `layer_backward` returns them: the shapes of a fake, and the gradients of an empty batch."""
    dx = x.new_zeros((x.shape[1], x.shape[0], x.shape[2])).transpose(0, 1) if batch_first else x.new_zeros(x.shape)
    every = [dx, *(x.new_zeros(t.shape) for t in (h_0, *weights))]
    return [gradient for gradient, want in zip(every, wanted, strict=True) if want]


def seen_by_a_mode() -> bool:
    """Whether a torch_dispatch mode is on: it would see, and might keep, the projection's result, over which kernels
    write r, z, n without raising its version. To look costs a tenth of a microsecond."""
    seen: bool = torch._C._len_torch_dispatch_stack() > 0
    if seen:
        flops.count()
    return seen


Batch = tuple[Tensor | None, Tensor | None, Tensor | None]  # batch_sizes, lengths, resets


def _layer(
    name: str, x: Tensor, h_0: Tensor, batch: Batch, batch_first: bool, training: bool, recompute: bool
) -> Layer:
    """What the passes are told; of an empty name `step` or `sequence`: PyTorch's own path runs no layer here."""
    visits = _visits(x, h_0, batch, batch_first)
    (D, B, H), device, dtype = h_0.shape, registry.device_of(x.device), DTYPES[x.dtype]
    precision = rnn_precision(device.vendor == "nvidia")
    if not name:
        name = fastest_backend(B, visits.time, H, D, dtype, precision, training, device, aten=False).backend
    backend = registry.find(name)
    if (why_not := backend.why_not(x.device, x.dtype)) is not None:
        raise registry.refuse(backend, why_not, x.device, x.dtype)
    return Layer(backend, LayerCall(visits, D, H, dtype, precision, device, training), batch_first, recompute=recompute)


def _visits(x: Tensor, h_0: Tensor, batch: Batch, batch_first: bool) -> Visits:
    batch_sizes, lengths, resets = batch
    x = x.transpose(0, 1) if batch_first else x
    lengths = None if lengths is None else checked_lengths(lengths, len(x))
    return Visits.of(x, _read(batch_sizes, x, h_0), lengths, None if resets is None else resets.contiguous())


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, h_0, weights, batch_sizes, ctx.backend, ctx.batch_first, ctx.training, _, lengths, resets = inputs
    y, _, rzn, q = output
    ctx.mark_non_differentiable(rzn, q)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h_0, y, rzn, q, batch_sizes, lengths, resets, *weights)


def _gradients(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, *_: None) -> tuple[Any, ...]:
    if not ctx.training:
        raise RuntimeError("training must be True where a gradient of tritongru::layer_forward is wanted, got False")
    x, h_0, y, rzn, q, batch_sizes, lengths, resets, *weights = ctx.saved_tensors
    want_x, want_h_0, want_weights, *_others = ctx.needs_input_grad
    wanted = [want_x, want_h_0, *want_weights]
    y = y.detach()  # as below
    found = iter(
        layer_backward(
            dy, dh_n, x, h_0, y, rzn, q, weights, batch_sizes, ctx.backend, ctx.batch_first, wanted, lengths, resets
        )
    )
    dx, dh_0, *d_weights = (next(found) if want else None for want in wanted)
    return dx, dh_0, list(d_weights), *[None] * 7  # compiled autograd of torch 2.11 has a tuple there


layer_forward.register_autograd(_gradients, setup_context=_keep_for_backward)


def backward_by_operator(
    layer: Layer, x: Tensor, h_0: Tensor, y: Tensor, gates: list[SavedGates], flat: Sequence[Tensor],
    dy: Tensor | None, dh_n: Tensor | None, wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """`autograd.backward_pass` as one operator, whose results can be differentiated once more."""
    visits = layer.call.visits
    batch_sizes = None if visits.batch_sizes is None else torch.tensor(visits.batch_sizes, device="cpu")
    rzn, q = gates[0] if gates else (x.new_empty(0), x.new_empty(0))
    if layer.batch_first and gates:
        rzn = rzn.transpose(0, 1)
    y = (
        y.detach()
    )  # a second derivative goes by what y is made of; compiled autograd cannot add the None that y would get
    found = iter(
        layer_backward(
            dy,
            dh_n,
            x,
            h_0,
            y,
            rzn,
            q,
            list(flat),
            batch_sizes,
            layer.backend.name,
            layer.batch_first,
            list(wanted),
            visits.lengths,
            visits.resets,
        )
    )
    return [next(found) if want else None for want in wanted]


def _keep_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    dy, dh_n, x, h_0, _, _, _, weights, batch_sizes, _, ctx.batch_first, ctx.wanted, lengths, resets = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(batch_sizes, lengths, resets, dy, dh_n, x, h_0, *weights)


def _second_gradients(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    batch_sizes, lengths, resets, *tensors = ctx.saved_tensors
    _, _, x, h_0, *_weights = tensors
    x = x.transpose(0, 1) if ctx.batch_first else x
    lengths = None if lengths is None else lengths.clamp(1, len(x))  # looked at before, and now maybe traced
    visits = Visits.of(x, _read(batch_sizes, x, h_0), lengths, resets)
    need_dy, need_dh_n, need_x, need_h_0, _, _, _, need_weights, *_others = ctx.needs_input_grad
    found = second_gradients(
        tensors, visits, ctx.batch_first, ctx.wanted, cotangents,
        [need_dy, need_dh_n, need_x, need_h_0, *need_weights],
    )  # fmt: skip
    return *found[:4], None, None, None, found[4:], *[None] * 6


layer_backward.register_autograd(_second_gradients, setup_context=_keep_for_double_backward)


@layer_forward.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, h_0: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None,
    backend: str, batch_first: bool, training: bool, recompute: bool, lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Outputs, tuple[int | None, ...]]:  # fmt: skip
    """One layer for all where the weights are the same: what is mapped over joins the batch. Else a layer for each."""
    x_dim, h_0_dim, w_dims, sizes_dim, *_others, lengths_dim, resets_dim = in_dims
    others = backend, batch_first, training, recompute
    each = info.batch_size
    _refuse_mapped_sizes(sizes_dim is not None)

    def mapped_first(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.expand(each, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    x, h_0 = mapped_first(x, x_dim), mapped_first(h_0, h_0_dim)
    lengths = None if lengths is None else mapped_first(lengths, lengths_dim)
    resets = None if resets is None else mapped_first(resets, resets_dim)
    if batch_sizes is None and all(dim is None for dim in w_dims):
        at = 0 if batch_first else 1  # of B in x
        y, h_n, rzn, q = layer_forward(
            x.movedim(0, at).flatten(at, at + 1),
            h_0.movedim(0, 1).flatten(1, 2),
            weights,
            None,
            *others,
            None if lengths is None else lengths.flatten(),
            None if resets is None else resets.movedim(0, 1).flatten(1),
        )
        return (y.unflatten(at, (each, -1)), h_n.unflatten(1, (each, -1)), rzn, q), (at, 1, None, None)
    stacked = [mapped_first(w, dim) for w, dim in zip(weights, w_dims, strict=True)]
    runs = [
        layer_forward(
            x[i], h_0[i], [w[i] for w in stacked], batch_sizes, *others,
            None if lengths is None else lengths[i], None if resets is None else resets[i],
        )
        for i in range(each)
    ]  # fmt: skip
    y, h_n, rzn, q = (torch.stack(parts) for parts in zip(*runs, strict=True))
    return (y, h_n, rzn, q), (0, 0, 0, 0)


@layer_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[list[Tensor], list[int]]:
    *dims, w_dims, sizes_dim, _, _, _, lengths_dim, resets_dim = in_dims
    *states, weights, batch_sizes, backend, batch_first, wanted, lengths, resets = given
    _refuse_mapped_sizes(sizes_dim is not None)
    stacked = [
        t if t is None else t[None] if dim is None else t.movedim(dim, 0)
        for t, dim in zip((lengths, resets, *states, *weights), (lengths_dim, resets_dim, *dims, *w_dims), strict=True)
    ]
    found = _backward_of_each([info.batch_size], stacked, len(states), batch_sizes, backend, batch_first, wanted)
    return found, [0] * len(found)


@torch.library.impl("tritongru::layer_backward", "Batched")
def _(*given: Any) -> list[Tensor]:
    """Under the older vmap, that of torch.autograd.grad(is_grads_batched=True) and so of jacobian(vectorize=True).

    Its tensors carry a hidden dimension for each level that maps them and tell nobody for which: level by level the
    dimensions come to the front, where a tensor that is not mapped gets one of size 1.
    """
    is_mapped = torch._C._functorch.is_legacy_batchedtensor
    *states, weights, batch_sizes, backend, batch_first, wanted, lengths, resets = given
    _refuse_mapped_sizes(batch_sizes is not None and is_mapped(batch_sizes))
    stacked, levels = [lengths, resets, *states, *weights], 0
    while any(t is not None and is_mapped(t) for t in stacked):
        levels += 1
        stacked = [
            t if t is None else torch._remove_batch_dim(t, levels, 1, 0) if is_mapped(t) else t[None] for t in stacked
        ]
    sizes = [max(t.shape[level] for t in stacked if t is not None) for level in range(levels)]  # the innermost first
    found = _backward_of_each(sizes, stacked, len(states), batch_sizes, backend, batch_first, wanted)
    for level, size in enumerate(reversed(sizes), 1):
        dim = levels - level
        found = [torch._add_batch_dim(t, dim, level) if size > 1 else t.select(dim, 0) for t in found]
    return found


def _refuse_mapped_sizes(mapped: bool) -> None:
    if mapped:
        raise RuntimeError("batch_sizes must be the same for all that vmap maps over, got a dimension of it mapped")


def _backward_of_each(sizes: list[int], stacked: Sequence[Tensor | None], states: int, *others: Any) -> list[Tensor]:
    """A pass for each, for each has weight gradients of its own; what is not mapped stays in memory once.

    stacked: the tensors of `layer_backward`: lengths, resets, `states` of them before the weights, and these, with as
    many dimensions in front as `sizes` has entries: of that size, or 1 where it is not mapped over. The results have
    them all.
    """
    runs = []
    for index in product(*map(range, sizes)):
        lengths, resets, *one = [
            None if t is None else t[tuple(map(min, index, (n - 1 for n in t.shape)))] for t in stacked
        ]
        runs.append(layer_backward(*one[:states], one[states:], *others, lengths, resets))
    return [torch.stack(parts).view(*sizes, *parts[0].shape) for parts in zip(*runs, strict=True)]


def _refuse_tangents() -> None:
    """An operator of Python has no rule for forward mode: PyTorch would take its results for constants, in silence."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(
            "tritongru::layer_forward has no forward-mode derivative: make the graph that calls it where forward-mode "
            "differentiation is on (PyTorch's own path is then in it), not before"
        )


def _check(
    x: Tensor, h_0: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool,
    lengths: Tensor | None, resets: Tensor | None,
) -> None:  # fmt: skip
    """Raise for what does not fit. Reads shapes, dtypes and devices alone: fake tensors fail as real ones do, but for
    sizes that only data tells, which are looked at when the graph runs."""
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
    D, B, H = h_0.shape
    batch = 0 if batch_first else 1  # x's dimension of it
    for dim, size in enumerate(x.shape):
        if batch_sizes is not None or dim != batch:  # a batch may be empty, as nn.GRU's
            _require(size != 0, lambda: f"x must have elements, got {_shape(x)}")
    _require(H != 0, lambda: f"h_0 must have a hidden size above 0, got {_shape(h_0)}")
    if batch_sizes is None:
        _require(x.shape[batch] == B, lambda: f"h_0 must have x's batch size, {x.shape[batch]}, got {_shape(h_0)}")
    if len(weights) not in (2 * D, 4 * D):
        raise RuntimeError(f"weights must be {2 * D} or {4 * D} tensors for {D} direction(s), got {len(weights)}")
    each = len(weights) // D
    shapes = ((3 * H, x.shape[-1]), (3 * H, H), (3 * H,), (3 * H,))[:each]
    for index, weight in enumerate(weights):
        name = ("w_ih", "w_hh", "b_ih", "b_hh")[index % each]
        _check_like(f"{name} of direction {index // each}", weight, shapes[index % each], x)
    _check_like("h_0", h_0, h_0.shape, x)
    if batch_sizes is None:
        check_padding(lengths, resets, (x.shape[1 - batch], B), False, x.device)
    elif lengths is not None or resets is not None:
        raise RuntimeError("lengths and resets must be None with batch_sizes")


def check_padding(lengths: Any, resets: Any, sizes: Sequence[int], batch_first: bool, device: torch.device) -> None:
    """Raise for lengths and resets that do not fit input of these sizes, T and B; values are not looked at."""
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    B = sizes[0 if batch_first else 1]
    for name, given, shape, dtypes, kind in (
        ("lengths", lengths, (B,), integers, "integers"),
        ("resets", resets, tuple(sizes), (torch.bool,), "bool"),
    ):
        if given is None:
            continue
        where = f"{device} or the CPU" if name == "lengths" and device.type != "cpu" else device
        expected = f"{name} must be a tensor {list(shape)} of {kind} on {where}"
        if not isinstance(given, Tensor):
            raise TypeError(f"{expected}, got {type(given).__name__}")
        got = f"{expected}, got {_shape(given)} of {given.dtype} on {given.device}"
        elsewhere = given.device != device and not (name == "lengths" and given.device.type == "cpu")
        if given.dtype not in dtypes or elsewhere:
            raise RuntimeError(got)
        for same in (given.dim() == len(shape), *(n == size for n, size in zip(given.shape, shape, strict=False))):
            _require(same, partial(str, got))


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
    sizes = zip(tensor.shape, shape, strict=False)
    for same in (tensor.dim() == len(shape), *(size == expected for size, expected in sizes)):
        _require(same, lambda: f"{name} must be {list(shape)}, got {_shape(tensor)}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise RuntimeError(f"{name} must be {x.dtype} on {x.device}, as x is, got {tensor.dtype} on {tensor.device}")


def _require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """RuntimeError, unless it holds, or may hold for sizes that only data tells."""
    if not isinstance(condition, bool):
        from torch.fx.experimental.symbolic_shapes import guard_or_true  # here: it loads sympy

        condition = guard_or_true(condition)
    if not condition:
        raise RuntimeError(message())


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
