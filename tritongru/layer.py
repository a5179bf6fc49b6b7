"""One layer of a GRU, forward and backward: as a `torch.autograd.Function` for eager calls, and as custom operators.

The operators `tritongru::layer_forward` and `layer_backward` stand in graphs of torch.compile, AOTAutograd and make_fx
in place of T unrolled steps; their fakes tell shapes alone, so graphs stay dynamic in T and B. They also serve vmap,
dispatch modes and, as layer_backward is differentiable, create_graph=True.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from . import flops, products, registry
from .batch import Visits, checked_lengths
from .beside import eager_beside_graphs
from .checks import Operands, check_operands, read_sizes
from .double_backward import keep_for_second, second_gradients
from .gradients import BackwardPass, in_chunks, steps_at_once, whole
from .latest import capturing, lasting
from .launch.protocol import Launcher, LayerCall, LayerWeights, SavedGates
from .parts import part
from .registry import DTYPES, Backend


@dataclass(frozen=True, eq=False)
class Layer:
    """What the two passes of a layer need besides tensors."""

    backend: Backend
    launcher: Launcher
    call: LayerCall
    forward_precision: str | None  # of float32 library products; None: forward has none
    backward_precision: str | None
    batch_first: bool = False  # x and y are [B, T, ...]
    cell: bool = False  # T = 1, and h_n is wanted as [B, H]
    recompute: bool = False
    weights_as_they_lie: bool = False  # a kernel can read them: contiguous, and not lazily negated

    @classmethod
    def of(cls, backend: Backend, call: LayerCall, **flags: bool) -> "Layer":
        launcher = backend.load()
        forward, backward = (launcher.product_precision(call, backward=of) for of in (False, True))
        return cls(backend, launcher, call, forward, backward, **flags)


def layer_of(
    backend: Backend, visits: Visits, where: torch.device, dtype: torch.dtype, D: int, H: int, training: bool,
    input_size: int, weights: Sequence[Tensor], copied: bool = False, **flags: bool,
) -> Layer:  # fmt: skip
    """A layer, of D directions and hidden size H, as a call needs it."""
    device = registry.device_of(where)
    precision = products.rnn_precision(device.vendor == "nvidia")
    call = LayerCall(visits, D, H, DTYPES[dtype], precision, device, training, backend.overrides)
    layer = Layer.of(backend, call, **flags)
    prepare(layer, input_size, weights, copied)
    return layer


def prepare(layer: Layer, input_size: int, weights: Sequence[Tensor], copied: bool) -> None:
    """Have what a layer will launch on a GPU compiled side by side. copied: whether copies of the weights go there."""
    if layer.backend.triton and weights[0].is_cuda:
        from .launch import first_call  # imports Triton

        with torch.cuda.device(weights[0].device):
            first_call.prepare(layer.launcher, layer.call, input_size, weights, layer.recompute, copied)


class GRULayer(torch.autograd.Function):
    """y, h_n = GRULayer.apply(layer, x, h_0, *weights)

    x: [T, B, I] ([B, T, I] with batch_first) or packed [N, I]; h_0: [D, B, H]; weights: (w_ih, w_hh[, b_ih, b_hh]) of
    each direction. y: x's shape with D * H features, h_n: [D, B, H]; both fresh, neither a view.
    """

    @staticmethod
    def forward(ctx: Any, layer: Layer, x: Tensor, h_0: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
        y, h_n, gates = forward_pass(layer, x, h_0, flat)
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
        dh_n = dh_n[None] if layer.cell and dh_n is not None else dh_n
        given = layer, x, h_0, y, gates, tuple(flat), dy, dh_n, ctx.needs_input_grad[1:]
        if _by_operator(dy, dh_n):
            return None, *_backward_by_operator(*given)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained; then nothing but the list holds the gates
        return None, *backward_pass(*given)


def _by_operator(dy: Tensor | None, dh_n: Tensor | None) -> bool:
    """Whether backward has to be one operator: somebody would record what it launches, look into it or map over it."""
    functorch = torch._C._functorch
    return (
        torch.compiler.is_compiling()  # compiled autograd, by Dynamo, which cannot trace the other questions
        or torch.is_grad_enabled()  # create_graph=True: the gradients may be differentiated again
        or torch._C._len_torch_dispatch_stack() > 0
        or functorch.peek_interpreter_stack() is not None  # torch.vmap
        or (dy is not None and functorch.is_legacy_batchedtensor(dy))  # is_grads_batched=True
        or (dh_n is not None and functorch.is_legacy_batchedtensor(dh_n))
    )


def forward_pass(
    layer: Layer, x: Tensor, h_0: Tensor, flat: tuple[Tensor, ...], h_n: Tensor | None = None
) -> tuple[Tensor, Tensor, SavedGates | None]:
    """y and h_n of `GRULayer`, h_n in the tensor given, if any; and the gates, if backward needs them (time-major)."""
    call = replace(layer.call, save_gates=False) if layer.recompute else layer.call
    run = layer.launcher.forward
    if profiler._is_profiler_enabled:  # else a frame less
        run = part("recurrence")(run)
    x = x.transpose(0, 1) if layer.batch_first else x
    with products.surroundings(x, layer.forward_precision):
        y, h_n, gates = run(call, x, h_0, LayerWeights.of(flat, call.directions, layer.weights_as_they_lie), h_n)
    if layer.batch_first:
        y = y.transpose_(0, 1)  # in place: a fresh tensor, not a view
    if layer.cell:
        h_n = h_n.squeeze_(0)
    return y, h_n, gates


def backward_pass(
    layer: Layer, x: Tensor, h_0: Tensor, y: Tensor, gates: list[SavedGates], flat: tuple[Tensor, ...],
    dy: Tensor | None, dh_n: Tensor | None, wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (x, h_0, *flat), None where not wanted; `gates` as in `BackwardPass`."""
    call = layer.call
    if layer.batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        dy = dy.transpose(0, 1) if dy is not None else None
    if dh_n is None and call.visits.time == call.directions == 1:  # y is h_n
        dy, dh_n = None, dy
    dy = zeros_like(y, (), "dy").expand_as(y) if dy is None else dy
    dh_n = zeros_like(h_0, h_0.shape, "dh_n") if dh_n is None else dh_n
    want_x, want_h_0, *want = wanted
    each, weights = len(flat) // call.directions, LayerWeights.of(flat, call.directions)
    given = BackwardPass(
        layer.launcher, call, weights, x, h_0, y, gates, dy, dh_n, want_x, h_0.dtype if want_h_0 else None,
        [want[at : at + each] for at in range(0, len(flat), each)],
    )  # fmt: skip
    steps = steps_at_once(call.visits.time, call.visits.batch) if layer.recompute and call.visits.plain else 0
    with products.surroundings(x, layer.backward_precision):
        dx, dh_0, d_weights = in_chunks(given, steps) if 0 < steps < call.visits.time else whole(given)
    return [dx.transpose(0, 1) if layer.batch_first and dx is not None else dx, dh_0, *d_weights]


_zeros: dict[tuple[Any, ...], Tensor] = {}


def zeros_like(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Read-only zeros of its dtype and device, a few of them cached to save the launch that fills them. Each name has
    its own: a repeated launch tells its arguments apart by their addresses."""
    device, dtype = tensor.device, tensor.dtype
    key = name, device, dtype, shape
    if (found := _zeros.get(key)) is not None:
        return found
    if capturing(device) or math.prod(shape) > 1 << 16 or len(_zeros) == 64:
        return torch.zeros(shape, dtype=dtype, device=device)
    return _zeros.setdefault(key, lasting(lambda: torch.zeros(shape, dtype=dtype, device=device), device))


Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, h_n, rzn, q
_OPERANDS = (
    "Tensor x, Tensor h_0, Tensor[] weights, Tensor? batch_sizes, str backend, bool batch_first, bool training, "
    "bool recompute, Tensor? lengths, Tensor? resets"
)
_operator = partial(torch.library.custom_op, mutates_args=(), tags=(torch.Tag.flexible_layout,))


@_operator("tritongru::layer_forward", schema=f"({_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)")
def layer_forward(*operands: Any) -> Outputs:
    """One layer forward, of `Operands`: y, x's shape with D * H features; h_n [D, B, H]; and of a training layer
    without recompute rzn [..., D, 3H] in x's order of dimensions and q [..., D, H] in time-major order, else two empty
    tensors. Raises ValueError for an unknown backend; RuntimeError for an argument of a wrong shape, dtype or device, a
    backend that cannot run, and forward-mode differentiation."""
    of = check_operands(Operands(*operands))
    if not of.h_0.shape[1]:
        return _outputs(of)
    layer = _of_operator(of)
    y, h_n, gates = forward_pass(layer, of.x.contiguous(), of.h_0, tuple(of.weights))
    if gates is None:
        return y, h_n, y.new_empty(0), y.new_empty(0)
    if (runs := layer.call.visits.runs()) is not None:  # rows that do not run save nothing
        gates.q.masked_fill_(~runs[..., None, None], 0)
    rzn = gates.rzn.transpose(0, 1) if of.batch_first else gates.rzn
    return y, h_n, rzn.contiguous(), gates.q


@layer_forward.register_fake
def _(*operands: Any) -> Outputs:
    flops.count()  # a graph calls the operator where no Python of ours could tell a counter
    return _outputs(check_operands(Operands(*operands)))


def _outputs(of: Operands) -> Outputs:
    """Those of `layer_forward` without values: for a fake, and for an empty batch."""
    (D, B, H), rows = of.h_0.shape, tuple(of.x.shape[:-1])
    time_major = (rows[1], rows[0]) if of.batch_first else rows
    y = of.x.new_empty((*time_major, D * H))
    gates = ((*rows, D, 3 * H), (*time_major, D, H)) if of.training and not of.recompute else ((0,), (0,))
    rzn, q = (of.x.new_empty(shape) for shape in gates)
    return y.transpose(0, 1) if of.batch_first else y, of.x.new_empty((D, B, H)), rzn, q


@_operator(
    "tritongru::layer_backward",
    schema=f"(Tensor? dy, Tensor? dh_n, Tensor y, Tensor rzn, Tensor q, bool[] wanted, {_OPERANDS}) -> Tensor[]",
)
def layer_backward(
    dy: Tensor | None, dh_n: Tensor | None, y: Tensor, rzn: Tensor, q: Tensor, wanted: Sequence[bool], *operands: Any
) -> list[Tensor]:
    """The gradients that are `wanted` of x, h_0 and each of the weights, in this order, from those of y and h_n (None:
    zero). y, rzn, q, operands: of a call of layer_forward, which has looked at them; with recompute gates are computed
    again."""
    of = Operands(*operands)
    if not of.h_0.shape[1]:
        return _zero_gradients(of, wanted)
    gates = [] if of.recompute else [SavedGates(rzn.transpose(0, 1) if of.batch_first else rzn, q)]
    with torch.no_grad():
        found = backward_pass(_of_operator(of), of.x, of.h_0, y, gates, tuple(of.weights), dy, dh_n, wanted)
    # each at the beginning of its memory, as the fake has it
    return [g.clone() if g.storage_offset() else g for g in found if g is not None]


@layer_backward.register_fake
def _(dy: Any, dh_n: Any, y: Any, rzn: Any, q: Any, wanted: Sequence[bool], *operands: Any) -> list[Tensor]:
    return _zero_gradients(Operands(*operands), wanted)


def _zero_gradients(of: Operands, wanted: Sequence[bool]) -> list[Tensor]:
    """Those of `layer_backward`, of zeros: for a fake, and for an empty batch."""
    x = of.x.transpose(0, 1) if of.batch_first else of.x
    dx, *others = (x.new_zeros(t.shape) for t in (x, of.h_0, *of.weights))
    every = [dx.transpose(0, 1) if of.batch_first else dx, *others]
    return [gradient for gradient, want in zip(every, wanted, strict=True) if want]


def _of_operator(of: Operands) -> Layer:
    """The layer that an operator runs: of the backend named, or else of the fastest that runs layers."""
    x, (D, _, H) = of.x, of.h_0.shape
    if of.batch_sizes is not None and capturing(x.device):
        raise RuntimeError(
            "a packed batch in a compiled graph cannot be part of a CUDA graph, which would run these batch_sizes for "
            "ever: compile without CUDA graphs (mode 'default' or 'max-autotune-no-cudagraphs')"
        )
    lengths = None if of.lengths is None else checked_lengths(of.lengths, x.shape[1 if of.batch_first else 0])
    resets = None if of.resets is None else of.resets.contiguous()
    visits = Visits.of(x, read_sizes(of.batch_sizes, x, of.h_0), lengths, resets, of.batch_first)
    if of.backend:
        backend = registry.find(of.backend)
    else:
        backend, _ = registry.fastest(x, visits.time, visits.batch, H, D, of.training, aten=False)
    if (why_not := backend.why_not(x.device, x.dtype)) is not None:
        raise registry.refuse(backend, why_not, x.device, x.dtype)
    given = backend, visits, x.device, x.dtype, D, H, of.training, x.shape[-1], of.weights
    return layer_of(*given, batch_first=of.batch_first, recompute=of.recompute)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, h_0, weights, batch_sizes, ctx.backend, ctx.batch_first, ctx.training, ctx.recompute, lengths, resets = inputs
    y, _, rzn, q = output
    ctx.mark_non_differentiable(rzn, q)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, rzn, q, x, h_0, batch_sizes, lengths, resets, *weights)


def _gradients(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, *_: None) -> tuple[Any, ...]:
    if not ctx.training:
        raise RuntimeError("training must be True where a gradient of tritongru::layer_forward is wanted, got False")
    y, rzn, q, x, h_0, batch_sizes, lengths, resets, *weights = ctx.saved_tensors
    want_x, want_h_0, want_weights, *_others = ctx.needs_input_grad
    how = ctx.backend, ctx.batch_first, ctx.training, ctx.recompute
    of = Operands(x, h_0, weights, batch_sizes, *how, lengths, resets)
    dx, dh_0, *d_weights = _each(dy, dh_n, y, rzn, q, [want_x, want_h_0, *want_weights], of)
    return dx, dh_0, list(d_weights), *[None] * 7  # compiled autograd of torch 2.11 has a tuple there


layer_forward.register_autograd(_gradients, setup_context=_keep_for_backward)


def _each(
    dy: Tensor | None, dh_n: Tensor | None, y: Tensor, rzn: Tensor, q: Tensor, wanted: list[bool], of: Operands
) -> list[Tensor | None]:
    """All gradients by `layer_backward`, None for those that are not wanted."""
    # y detached: a second derivative goes by what y is made of; compiled autograd cannot add the None y would get.
    gradients = iter(layer_backward(dy, dh_n, y.detach(), rzn, q, wanted, *of))
    return [next(gradients) if want else None for want in wanted]


def _backward_by_operator(
    layer: Layer, x: Tensor, h_0: Tensor, y: Tensor, gates: list[SavedGates], flat: tuple[Tensor, ...],
    dy: Tensor | None, dh_n: Tensor | None, wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """`backward_pass` as one operator, whose results can be differentiated once more."""
    visits = layer.call.visits
    batch_sizes = None if visits.batch_sizes is None else torch.tensor(visits.batch_sizes, device="cpu")
    rzn, q = gates[0] if gates else (x.new_empty(0), x.new_empty(0))
    rzn = rzn.transpose(0, 1) if layer.batch_first and gates else rzn
    how = layer.backend.name, layer.batch_first, True, layer.recompute
    of = Operands(x, h_0, list(flat), batch_sizes, *how, visits.lengths, visits.resets)
    return _each(dy, dh_n, y, rzn, q, list(wanted), of)


layer_backward.register_autograd(second_gradients, setup_context=keep_for_second)


@layer_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Outputs, tuple[int | None, ...]]:
    """One layer for all where the weights are the same: what is mapped over joins the batch. Else a layer for each."""
    of, first, each = Operands(*operands), Operands(*_mapped_first(operands, in_dims)), info.batch_size
    if of.batch_sizes is not None or any(dim is not None for dim in in_dims[2]):
        y, h_n, rzn, q = _one_by_one(layer_forward, [each], first)
        return (y, h_n, rzn, q), (0, 0, 0, 0)

    def joined(t: Any, at: int) -> Any:
        return None if t is None else t.expand(each, *t.shape[1:]).movedim(0, at).flatten(at, at + 1)

    at = 0 if of.batch_first else 1  # of B in x
    padding = dict(lengths=joined(first.lengths, 0), resets=joined(first.resets, 1))
    y, h_n, rzn, q = layer_forward(*of._replace(x=joined(first.x, at), h_0=joined(first.h_0, 1), **padding))
    return (y.unflatten(at, (each, -1)), h_n.unflatten(1, (each, -1)), rzn, q), (at, 1, None, None)


@layer_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[list[Tensor], list[int]]:
    found = _one_by_one(layer_backward, [info.batch_size], _mapped_first(given, in_dims))
    return found, [0] * len(found)


@torch.library.impl("tritongru::layer_backward", "Batched")
def _(*given: Any) -> list[Tensor]:
    """The rule of the older vmap, which torch.autograd.grad(is_grads_batched=True) still uses. Its tensors hide a batch
    dimension for each level of vmap: each is moved to the front, with size 1 where a level does not map the tensor."""
    is_mapped, levels = torch._C._functorch.is_legacy_batchedtensor, 0

    def first(t: Tensor) -> Tensor:
        return torch._remove_batch_dim(t, levels, 1, 0) if is_mapped(t) else t[None]

    while any(isinstance(t, Tensor) and is_mapped(t) for t in tree_leaves(given)):
        levels += 1
        given = tree_map_only(Tensor, first, given)
    tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    sizes = [max(t.shape[level] for t in tensors) for level in range(levels)]  # the innermost first
    found = _one_by_one(layer_backward, sizes, given)
    for level, size in enumerate(reversed(sizes), 1):
        dim = levels - level
        found = [torch._add_batch_dim(t, dim, level) if size > 1 else t.select(dim, 0) for t in found]
    return found


def _mapped_first(given: tuple[Any, ...], dims: tuple[Any, ...]) -> Any:
    """`given` with the dimension that is mapped over in front, of size 1 in tensors that are not mapped."""

    def first(t: Any, dim: int | None) -> Any:
        return t if not isinstance(t, Tensor) else t[None] if dim is None else t.movedim(dim, 0)

    return tree_map(first, given, dims)


def _one_by_one(operator: Any, sizes: list[int], stacked: Any) -> list[Tensor]:
    """The operator once for each element, as each has its own weight gradients. Tensors in `stacked`, its arguments,
    begin with a dimension for each of `sizes`, of size 1 where they are not mapped; the results begin with all."""

    def at(index: tuple[int, ...]) -> Any:
        return tree_map_only(Tensor, lambda t: t[tuple(map(min, index, (n - 1 for n in t.shape)))], stacked)

    runs = [operator(*at(index)) for index in product(*map(range, sizes))]
    return [torch.stack(parts).view(*sizes, *parts[0].shape) for parts in zip(*runs, strict=True)]
