"""`gru` and `gru_cell`: torch.gru and torch.gru_cell with a choice of backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Parameter

from . import one_step, ops, registry
from .autograd import GRULayer, Layer
from .batch import Segments, Visits, checked_lengths
from .beside import eager_beside_graphs
from .launch.protocol import LayerCall
from .ops import check_padding
from .planning.choose import fastest_backend, off_chip
from .products import rnn_precision
from .reference import gru_layer
from .registry import DTYPES, Backend, constant_in_graphs

_DENSE = (
    "input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first",
)  # fmt: skip
_PACKED = (
    "data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional",
)  # fmt: skip


_TRACED = (FakeTensor, FunctionalTensor)  # subclasses that stand for plain tensors while a graph is made
EMPTY = "a size is 0: there is nothing to launch a kernel for"


@eager_beside_graphs
def gru(
    *args: Any,
    backend: str | None = None,
    recompute: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """A GRU as torch.gru has it, in both its forms.

        gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        gru(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

    Args:
        input: [T, B, I], or [B, T, I] with batch_first. data: packed rows [N, I]; batch_sizes: [T] int64 on the CPU.
        hx: [num_layers * D, B, H].
        params: w_ih [3H, I], w_hh [3H, H] and, with has_biases, b_ih, b_hh [3H] of every layer and direction.
        dropout: probability between layers, applied when `train`.
        backend: "aten", "reference", "step" or "sequence"; None: what `use_backend`, TRITONGRU_BACKEND or else the plan
            says.
        recompute: keep the output alone for backward and compute the gates again there.
        lengths: [B] integers, 1 .. T, on any device: how many time steps each row of `input` has, in any order. Past
            them output is zero and input is not looked at, be it NaN; h_n is the state after a row's last step, at
            which the reverse direction begins.
        resets: bool [T, B], or [B, T] with batch_first: the steps that begin a new sequence. Neither direction carries
            state or gradient over the boundary to the step before; a reset of step 0 clears h_0 of the forward
            direction; one past a row's length is none.

    Dtypes: the kernels take float32, float16 and bfloat16 (one for all arguments, or autocast's); `reference` float64
    too; PyTorch's own path what torch.gru takes.

    Returns:
        output [T, B, D * H] (or [B, T, D * H], or [N, D * H]) and h_n [num_layers * D, B, H].

    Raises:
        What torch.gru raises on the same input. ValueError: unknown backend. RuntimeError: a backend that cannot run,
        and lengths or resets of another shape, dtype or device, or of packed rows (TypeError: not a tensor). A length
        outside 1 .. T is a RuntimeError too: on CUDA, for which nobody waits, at the next call that has lengths or runs
        `sequence`, or at `tritongru.synchronize()`.

    Example:
        >>> import torch, tritongru
        >>> module = torch.nn.GRU(3, 4)
        >>> params = list(module.parameters())
        >>> input, hx = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
        >>> output, h_n = tritongru.gru(input, hx, params, True, 1, 0.0, False, False, False)
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """
    third = args[2] if len(args) > 2 else kwargs.get("hx") if "data" in kwargs or "batch_sizes" in kwargs else None
    packed = isinstance(third, Tensor)
    names = _PACKED if packed else _DENSE
    if len(args) + len(kwargs) != len(names) or set(names[len(args) :]) != set(kwargs):
        return torch.gru(*args, **kwargs)  # its own error for a wrong signature
    if packed and (lengths is not None or resets is not None):
        name = "resets" if lengths is None else "lengths"
        raise RuntimeError(f"{name} must be None with packed input, whose batch_sizes tell its lengths, got a tensor")
    given = dict(zip(names, args, strict=False)) | kwargs
    return _gru(
        given["data" if packed else "input"],
        given.get("batch_sizes"),
        given["hx"],
        given["params"],
        given["has_biases"],
        given["num_layers"],
        given["dropout"],
        given["train"],
        given["bidirectional"],
        given.get("batch_first", False),
        backend,
        recompute,
        lengths,
        resets,
    )


@eager_beside_graphs
def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a GRU as torch.gru_cell has it; on a Triton backend the whole cell is one launch.

    Args:
        input: [B, I]. hx: [B, H]. w_ih: [3H, I], w_hh: [3H, H], b_ih, b_hh: [3H] or None, both or neither. All of one
            dtype and on one device, as in `gru`.
        backend: as in `gru`.

    Returns:
        h [B, H].

    Raises:
        What torch.gru_cell raises on the same input. ValueError: unknown backend. RuntimeError: a backend that cannot
        run.

    Example:
        >>> import torch, tritongru
        >>> w_ih, w_hh = torch.randn(12, 3), torch.randn(12, 4)
        >>> tritongru.gru_cell(torch.randn(2, 3), torch.zeros(2, 4), w_ih, w_hh).shape
        torch.Size([2, 4])
    """
    with_aten = (input, hx, w_ih, w_hh, b_ih, b_hh)
    key, known = one_step.cell(backend, *with_aten)
    if known is not None:
        return known
    if uses_aten(backend, input) or (into_a_graph() and _stands_in(backend, input)):  # a cell is traced as it stands
        return torch.gru_cell(*with_aten)
    params = [p for p in (w_ih, w_hh, b_ih, b_hh) if p is not None]
    reason: str | None = "the arguments do not fit a GRU cell"
    if (b_ih is None) == (b_hh is None) and input.dim() == 2 and hx.dim() == 2:
        reason = _unfit(input, 1, len(input), hx[None], params, len(params) == 4, 1, 1)
    chosen = reason or _settle(backend, input, 1, len(input), hx.shape[-1], 1, (hx, *params), cell=True)
    if isinstance(chosen, str):
        result = torch.gru_cell(*with_aten)  # raises its own error where the input is at fault
        return _or_refuse(backend, chosen, input, result)
    x, h_0, params = _autocast(chosen, input, hx, params)
    h = _layer(chosen, x[None], h_0[None], params, None, 1, cell=True)[1]
    one_step.remember(key, chosen, x[None], h_0[None], params, layers=1)
    return h


def _gru(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    backend: str | None,
    recompute: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    padded, key = lengths is not None or resets is not None, None
    one = not padded and _is_one_step(input, batch_sizes, batch_first)
    if one and type(params) is list and not (bidirectional or dropout):
        key = one_step.key_of(backend, (input, hx, *params), has_biases, num_layers, batch_first)
        if (known := one_step.gru(key, input, hx, params)) is not None:
            return known

    def plain() -> tuple[Tensor, Tensor]:
        if batch_sizes is None:
            return torch.gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        return torch.gru(input, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

    by_aten = uses_aten(backend, input)
    if by_aten and not padded:
        return plain()
    D = 2 if bidirectional else 1
    reason = _unfit_call(input, batch_sizes, hx, params, has_biases, num_layers, D, batch_first)
    if padded:
        if reason is not None:
            result = plain()  # raises its own error where an argument is at fault
            if hx.shape[1] == 0:
                return result
        lengths, resets = _time_major(input, lengths, resets, batch_first)

    def layers(run: Callable[..., tuple[Tensor, Tensor]], x: Tensor, hx: Tensor, params: list[Tensor]) -> Any:
        each = len(params) // num_layers
        h_ns = []
        for layer in range(num_layers):
            h_0 = hx if num_layers == 1 else hx[layer * D : (layer + 1) * D]
            x, h_n = run(x, h_0, params[layer * each : (layer + 1) * each])
            h_ns.append(h_n)
            if train and dropout != 0 and layer < num_layers - 1:
                x = torch.dropout(x, dropout, True)
        return x, h_ns[0] if num_layers == 1 else torch.cat(h_ns)

    def aten() -> tuple[Tensor, Tensor]:
        if not padded:
            return plain()
        x = input.transpose(0, 1) if batch_first else input
        if torch.compiler.is_compiling() or into_a_graph() or tracing():  # of what segments there are only values tell
            within = None if lengths is None else lengths.clamp(1, len(x))
            visits = Visits.of(x, None, within, resets)
            y, h_n = layers(lambda x, h_0, weights: gru_layer(x, h_0, weights, has_biases, visits, D), x, hx, params)
        else:
            visits = Visits.of(x, None, None if lengths is None else checked_lengths(lengths, len(x)), resets)
            y, h_n = _by_segments(x, visits, hx, D, params, has_biases, num_layers, dropout, train, bidirectional)
        return y.transpose(0, 1) if batch_first else y, h_n

    chosen: Backend | InGraph | str
    if by_aten:
        return aten()
    if reason is not None:
        chosen = reason
    else:
        T = input.shape[1 if batch_first else 0] if batch_sizes is None else len(batch_sizes)
        chosen = _settle(
            backend, input, T, hx.shape[1], hx.shape[2], D, (hx, *params), recompute=recompute, padded=padded
        )
    if isinstance(chosen, str):  # aten raises its own error where the input is at fault
        return _or_refuse(backend, chosen, input, aten())
    if isinstance(chosen, Backend) and chosen.module is None:
        hx = hx.contiguous()  # cuDNN takes no other, and has no backward of what did not train: the kernels do
        if not train and torch.is_grad_enabled() and any(t.requires_grad for t in (input, hx, *params)):
            dropout, train = 0.0, True
        return aten()
    x, hx, params = _autocast(chosen, input, hx, params)
    sizes = batch_sizes if batch_sizes is None or isinstance(chosen, InGraph) else tuple(batch_sizes.tolist())
    if padded and not isinstance(chosen, InGraph):  # copies: who changes his own tensors changes no gradient
        lengths = None if lengths is None else checked_lengths(lengths, T)
        resets = None if resets is None else resets.clone(memory_format=torch.contiguous_format)
    run = partial(
        _layer, chosen, sizes=sizes, lengths=lengths, resets=resets, D=D, batch_first=batch_first, recompute=recompute
    )
    found = layers(run, x, hx, params)
    if key is not None:
        one_step.remember(key, chosen, input.transpose(0, 1) if batch_first else input, hx, params, num_layers)
    return found


def _time_major(
    input: Tensor, lengths: Tensor | None, resets: Tensor | None, batch_first: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Both on input's device, resets as [T, B].

    Raises:
        TypeError, RuntimeError: what does not fit input; values are not looked at.
    """
    if not torch.compiler.is_compiling():  # there the operator looks
        check_padding(lengths, resets, input.shape[:2], batch_first, input.device)
    if resets is not None and batch_first:
        resets = resets.transpose(0, 1)
    if lengths is not None and lengths.device != input.device:
        lengths = checked_lengths(lengths, input.shape[1 if batch_first else 0]).to(input.device)
    return lengths, resets


def _by_segments(
    x: Tensor, visits: Visits, hx: Tensor, D: int, params: list[Tensor], has_biases: bool, num_layers: int, *how: Any
) -> tuple[Tensor, Tensor]:
    """A padded batch by torch.gru: the sequences between its resets are the rows of a packed batch."""
    cut = Segments.of(visits, x.device)
    states = torch.arange(len(hx), device=x.device)[:, None]
    begins, ends = (torch.stack(of[:D]).repeat(num_layers, 1) for of in (cut.ends, cut.ends[::-1]))
    if visits.resets is not None:
        forward = torch.zeros_like(begins, dtype=torch.bool)
        forward[::D] = visits.resets[0]
        hx = hx.masked_fill(forward[..., None], 0)
    h_0 = hx.new_zeros(len(hx), int(cut.batch_sizes[0]), hx.shape[-1]).index_put((states, begins), hx)
    t, b = cut.rows // visits.batch, cut.rows % visits.batch
    y, h_n = torch.gru(x[t, b], cut.batch_sizes, h_0, params, has_biases, num_layers, *how)
    return y.new_zeros(visits.time, visits.batch, y.shape[-1]).index_put((t, b), y), h_n[states, ends]


def _is_one_step(input: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> bool:
    """Whether T is 1, of a dense batch. Not asked in a graph, where T may be what only data tells."""
    if batch_sizes is not None or torch.compiler.is_compiling() or not isinstance(input, Tensor):
        return False
    return input.dim() == 3 and type(input) is Tensor and input.shape[1 if batch_first else 0] == 1


def uses_aten(backend: str | None, input: Tensor) -> bool:
    """Whether PyTorch's own path is meant, before any look at shapes: asked for, on the CPU by default, or exported.

    Raises:
        ValueError: unknown backend.
    """
    if not isinstance(input, Tensor):  # PyTorch says what is wrong with it
        return True
    if torch.compiler.is_compiling():  # before anything that Dynamo cannot trace
        return _traced_backend(backend, input) == "aten"
    found = registry.asked_for(backend)
    if tracing():
        registry.log_once(logging.INFO, "under export, tracing or a functional transform: aten")
        return True
    if into_a_graph():
        return _traced_backend(backend, input) == "aten"
    if found is None and not input.is_cuda:
        registry.log_once(logging.INFO, f"{registry.ON_THE_CPU} (aten)")
        return True
    return found is not None and found.name == "aten"


def tracing() -> bool:
    """Under jit tracing (ONNX's too), torch.func's derivatives or forward-mode differentiation: PyTorch's own path."""
    return (
        torch.jit.is_tracing()
        or torch.autograd.forward_ad._current_level >= 0
        or (torch._C._functorch.peek_interpreter_stack() is not None and not _mapping())
    )


def into_a_graph() -> bool:
    """Under torch.compile, AOTAutograd, make_fx, fake tensors or vmap: a layer is an operator, see ops.py."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _mapping()
    if torch._C._len_torch_dispatch_stack() == 0:  # as in every eager call: it costs a tenth of a microsecond to know
        return False
    mode = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (mode.PROXY, mode.FAKE, mode.FUNCTIONAL))


def _mapping() -> bool:
    """Under torch.vmap, and under no other of torch.func's transforms."""
    stack = torch._C._functorch.get_interpreter_stack()
    return stack is not None and all(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def _traced_backend(backend: str | None, input: Tensor) -> str:
    return backend_of_graph(backend, input.device, registry.computing_dtype(input))


def _stands_in(backend: str | None, input: Tensor) -> bool:
    """Whether `reference` runs in a graph in place of aten."""
    return input.device.type == "cpu" and backend_asked_for(backend) is None


@constant_in_graphs
def backend_asked_for(backend: str | None) -> str | None:
    """Its name, or None where nobody asks for one; read when the graph is made."""
    found = registry.asked_for(backend)
    return None if found is None else found.name


@constant_in_graphs
def backend_of_graph(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """What a graph that is being made calls: "aten", a backend's name, or "" where the plan decides at each run.

    On the CPU `reference` stands in for aten, which would be traced as T times a dozen operations.

    Raises:
        ValueError: unknown backend. RuntimeError: a backend that cannot run.
    """
    # Asked here, where Python runs: Dynamo of torch 2.11 takes every graph for an export, and cannot trace the others.
    if torch.compiler.is_exporting() or tracing():
        return "aten"
    found = registry.asked_for(backend)
    if found is None:
        stand_in = registry.BACKENDS["reference" if device.type == "cpu" else "step"]
        if stand_in.why_not(device, dtype) is not None:
            return "aten"
        return stand_in.name if device.type == "cpu" else ""
    if found.module is not None and (why_not := found.why_not(device, dtype)) is not None:
        raise registry.refuse(found, why_not, device, dtype)
    return found.name


@dataclass(frozen=True)
class InGraph:
    """The operator of ops.py, told this backend: in a graph, and wherever a dispatch mode looks on."""

    name: str
    autocast: bool  # not where it stands in for aten on the CPU, which autocast leaves alone


def _settle(
    backend: str | None, input: Tensor, T: int, B: int, H: int, D: int, others: Sequence[Tensor],
    *, recompute: bool = False, cell: bool = False, padded: bool = False,
) -> Backend | InGraph | str:  # fmt: skip
    """The backend that runs a call that fits a GRU, or the reason why PyTorch's own path does."""
    if into_a_graph():
        name = _traced_backend(backend, input)
        stands_in = _stands_in(backend, input)
        if stands_in and any(t.dtype != input.dtype for t in others):
            return "the arguments have several dtypes"
        return InGraph(name, autocast=not stands_in)
    dtype, device = registry.computing_dtype(input), registry.device_of(input.device)
    found = registry.asked_for(backend)
    why_not = (found or registry.BACKENDS["step"]).why_not(input.device, dtype)
    if why_not is not None:
        return why_not
    reason = "asked for"
    if found is None or found.keeps_weights_on_chip:
        training = torch.is_grad_enabled() and any(t.requires_grad for t in (input, *others))
        shape = (H, D, DTYPES[dtype], rnn_precision(device.vendor == "nvidia"), training, device)
        if found is None:
            # PyTorch's path keeps more than the output, its cell was not timed, and to cut a padded batch waits.
            aten = not (cell or padded or (recompute and training)) and registry.aten_as_measured(input.device, dtype)
            choice = fastest_backend(B, T, *shape, aten)
            found, reason = registry.BACKENDS[choice.backend], choice.reason
        elif (why_not := off_chip(B, *shape, found.overrides)) is not None:
            return why_not
    registry.log_once(logging.INFO, f"tensors on {input.device} in {dtype} take backend {found.name!r}: {reason}")
    return InGraph(found.name, autocast=True) if ops.seen_by_a_mode() else found


def _or_refuse(backend: str | None, reason: str, input: Tensor, result: Any) -> Any:
    """PyTorch's result in place of ours, with a warning; or the error, where a backend was forced."""
    if into_a_graph():
        if backend is None or reason == EMPTY:
            return result
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    found = registry.asked_for(backend)
    if reason == EMPTY:
        return result
    if found is not None:
        raise registry.refuse(found, reason, input.device, registry.computing_dtype(input))
    registry.log_once(logging.WARNING, f"PyTorch's own path (aten) runs on {input.device}: {reason}")
    return result


def _autocast(
    chosen: Backend | InGraph, x: Tensor, hx: Tensor, params: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All of them in autocast's dtype, if it is on for their device; cuDNN's GRU takes float16 whichever that is."""
    if isinstance(chosen, InGraph) and not chosen.autocast:
        return x, hx, params
    dtype = registry.computing_dtype(x)
    return x.to(dtype), hx.to(dtype), [p.to(dtype) for p in params]


def _unfit_call(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    D: int,
    batch_first: bool,
) -> str | None:
    """Why these arguments are no GRU call that the layer backends take; PyTorch then says it in its own words."""
    tensors = [input, hx, *params] if batch_sizes is None else [input, hx, batch_sizes, *params]
    if not all(isinstance(t, Tensor) for t in tensors):
        return "an argument is not a tensor"
    if batch_sizes is None:
        if input.dim() != 3:
            return "input is not 3-D"
        T, B = input.shape[:2] if not batch_first else (input.shape[1], input.shape[0])
    else:
        if input.dim() != 2 or batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
            return "data is not 2-D or batch_sizes not 1-D on the CPU"
        if into_a_graph():  # their values are there when the graph runs: the operator looks at them
            B = hx.shape[1] if hx.dim() == 3 else 0
            return _unfit(input, len(batch_sizes), B, hx, params, has_biases, num_layers, D)
        sizes = batch_sizes.tolist()
        if not sizes or sum(sizes) != len(input) or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1:
            return "batch_sizes do not add up to data, or rise"
        T, B = len(sizes), sizes[0]
    return _unfit(input, T, B, hx, params, has_biases, num_layers, D)


def _unfit(
    input: Tensor, T: int, B: int, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int, D: int
) -> str | None:
    # In a graph T and B may be what only data tells: the operator looks when it runs.
    if 0 in (input.shape[-1], hx.shape[-1]) or (not into_a_graph() and min(T, B) == 0):
        return EMPTY
    every = [input, hx, *params]
    if any(type(t) not in (Tensor, Parameter, *_TRACED) for t in every):
        return "an argument is a tensor subclass"
    if any(t.device != input.device for t in every):
        return "the arguments lie on several devices"
    autocast = registry.autocasting(input.device)
    dtypes = {t.dtype for t in every}
    if len(dtypes) > 1 and not (autocast and torch.float64 not in dtypes and all(d.is_floating_point for d in dtypes)):
        return "the arguments have several dtypes"
    if input.layout != torch.strided or hx.dim() != 3 or hx.shape[:2] != (num_layers * D, B):
        return "hx does not fit"
    H = hx.shape[-1]
    each = 4 if has_biases else 2
    if len(params) != num_layers * D * each:
        return "the number of parameters does not fit"
    I = input.shape[-1]
    for layer in range(num_layers):
        inner = I if layer == 0 else D * H
        expected = [(3 * H, inner), (3 * H, H), (3 * H,), (3 * H,)][:each] * D
        if any(tuple(p.shape) != e for p, e in zip(params[layer * each * D :], expected, strict=False)):
            return "a parameter's shape does not fit"
    return None


def _layer(
    backend: Backend | InGraph,
    x: Tensor,
    h_0: Tensor,
    weights: Sequence[Tensor],
    sizes: Any,
    D: int,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    batch_first: bool = False,
    recompute: bool = False,
    cell: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer; `sizes` of a packed batch are a tensor for the operator, else a tuple of integers."""
    batch_first = batch_first and sizes is None
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h_0, *weights))
    if isinstance(backend, InGraph):
        y, h_n, _, _ = ops.layer_forward(
            x, h_0, list(weights), sizes, backend.name, batch_first, training, training and recompute, lengths, resets
        )
        return y, h_n[0] if cell else h_n
    device = registry.device_of(x.device)
    call = LayerCall(
        visits=Visits.of(x.transpose(0, 1) if batch_first else x, sizes, lengths, resets),
        directions=D,
        hidden_size=h_0.shape[-1],
        dtype=DTYPES[x.dtype],
        precision=rnn_precision(device.vendor == "nvidia"),
        device=device,
        save_gates=training,
    )
    y, h_n = GRULayer.apply(Layer(backend, call, batch_first, cell, recompute), x, h_0, *weights)
    return y, h_n
