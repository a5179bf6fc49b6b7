"""A call of a GRU, resolved once: which backend runs, with which settings. The result is kept under a key of everything
that decides it, so that the next call like it goes straight to its layers."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import flops, registry
from .batch import Rows, Visits
from .checks import PLAIN, unfit_call
from .latest import Latest
from .layer import GRULayer, Layer, forward_pass, layer_forward, layer_of
from .products import rnn_precision
from .registry import Backend, constant_in_graphs

TENSORS, FLAGS = {*PLAIN}, {bool, int, float, str}  # types of the arguments of a call that is kept
DEVICES = ("cuda",)  # on which calls are kept
ATEN = registry.ATEN.name


@dataclass(frozen=True, eq=False)
class Call:
    """What runs: one layer of ours after another, or PyTorch's own path."""

    layers: Sequence[Layer | Callable[..., tuple[Tensor, Tensor]]] = ()  # a function takes x, h_0, the weights and rows
    directions: int = 1
    dropout: float = 0.0  # between layers
    together: bool = False  # in inference: every layer writes its h_n into one tensor
    dtype: torch.dtype | None = None  # autocast's, to which arguments are cast
    aten: tuple[Any, ...] | None = None  # PyTorch's own path in their place: torch.gru's flags; (): torch.gru_cell

    def __call__(
        self, x: Tensor, hx: Tensor, params: Sequence[Tensor], rows: Rows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and h_n. rows: of a packed or padded batch."""
        if self.aten is not None:
            of_batch: list[Any] = [] if rows is None else [rows.batch_sizes]
            return torch.gru(*[x, *of_batch, hx.contiguous(), list(params), *self.aten])  # cuDNN takes no other h_0
        if self.dtype is not None:
            x, hx, params = x.to(self.dtype), hx.to(self.dtype), [p.to(self.dtype) for p in params]
        D, count, h_ns, h_n, visits = self.directions, len(self.layers), [], None, None
        h_n_of_all = torch.empty_like(hx, memory_format=torch.contiguous_format) if self.together else None
        each = len(params) // count
        for i, layer in enumerate(self.layers):
            h_0 = hx if count == 1 else hx[i * D : (i + 1) * D]
            weights = params[i * each : (i + 1) * each]
            if not isinstance(layer, Layer):
                x, h_n = layer(x, h_0, weights, rows)
            else:
                if rows is not None:
                    visits = visits or rows.visits(x, layer.batch_first)
                    layer = replace(layer, call=replace(layer.call, visits=visits))
                if layer.call.save_gates:
                    x, h_n = GRULayer.apply(layer, x, h_0, *weights)
                else:
                    h_n = None if h_n_of_all is None else h_n_of_all[i * D : (i + 1) * D]
                    x, h_n, _ = forward_pass(layer, x, h_0, tuple(weights), h_n)
            if count == 1:
                return x, h_n
            h_ns.append(h_n)
            if self.dropout and i < count - 1:
                x = torch.dropout(x, self.dropout, True)
        return x, torch.cat(h_ns) if h_n_of_all is None else h_n_of_all


Key = tuple[Any, ...]
_known: Latest[Key, Call] = Latest(1024)  # kinds of calls


def may_know(x: Any) -> bool:
    """Whether a call on this is kept: an eager one, on a GPU, that no tracer, transform or dispatch mode sees."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and x.device.type in DEVICES
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def known(
    backend: str | None, x: Tensor, hx: Any, params: Sequence[Tensor], packed: bool, *flags: Any
) -> tuple[Key | None, Call | None]:
    """Where `may_know(x)`: the key of a call, the same for any number of packed rows; and the `Call` kept under it, if
    any. ValueError for an unknown backend."""
    kind, asked_for, tensors = x.device.type, registry.asked_for(backend), (x, hx, *params)
    if not (set(map(type, tensors)) <= TENSORS and set(map(type, flags)) <= FLAGS):
        return None, None
    kinds = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_neg()) for t in tensors]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key = (
        asked_for,
        dtype,
        rnn_precision(nvidia=True) if (dtype or x.dtype) is torch.float32 else None,
        torch.backends.cudnn.enabled if asked_for is None else None,
        torch.is_grad_enabled(),
        *flags,
        (x.shape[1:], *kinds[0][1:]) if packed else kinds[0],
        *kinds[1:],
    )
    return key, _known.get(key)


def keep(key: Key | None, call: Call) -> Call:
    """`call`, kept under its key, if it has one."""
    if key is not None:
        _known.keep(key, call)
    return call


def forget() -> None:
    """Resolve every call anew."""
    _known.clear()


@dataclass(frozen=True)
class InGraph:
    """The operator of layer.py with this backend: for a graph, and under any dispatch mode."""

    name: str  # "aten": PyTorch's own path; "": the plan's choice at each run
    stands_in: bool = False  # for aten on the CPU, which autocast leaves alone


Requested = Backend | InGraph | None


def requested(backend: str | None, input: Any) -> Requested:
    """What a call asks for, before any look at shapes; None: the plan's choice. ValueError for an unknown backend."""
    if not isinstance(input, Tensor):  # PyTorch says what is wrong with it
        return registry.ATEN
    if not torch.compiler.is_compiling():  # Dynamo cannot trace the questions
        found = registry.asked_for(backend)
        if tracing():
            registry.log_once(logging.INFO, "under export, tracing or a functional transform: aten")
            return registry.ATEN
        if not _into_a_graph():
            if found is None and not input.is_cuda:
                registry.log_once(logging.INFO, f"{registry.ON_THE_CPU} (aten)")
                return registry.ATEN
            return found
    return InGraph(*_of_graph(backend, input.device, registry.computing_dtype(input)))


def is_aten(found: Requested) -> bool:
    """Whether it is PyTorch's own path."""
    return found is not None and found.name == ATEN


def tracing() -> bool:
    """Under jit tracing (ONNX's too), forward-mode differentiation or one of torch.func's transforms but vmap."""
    functorch = torch._C._functorch
    return (
        torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or any(level.key() != functorch.TransformType.Vmap for level in functorch.get_interpreter_stack() or ())
    )


def _into_a_graph() -> bool:
    """Under vmap, AOTAutograd, make_fx or fake tensors: a layer is an operator, see layer.py."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() == 0:  # as in every eager call: it costs a tenth of a microsecond to know
        return False
    mode = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (mode.PROXY, mode.FAKE, mode.FUNCTIONAL))


def seen_by_a_mode() -> bool:
    """Whether a torch_dispatch mode is on, which could keep the projection's result: kernels write r, z, n over it
    without raising its version."""
    seen: bool = torch._C._len_torch_dispatch_stack() > 0
    if seen:
        flops.count()
    return seen


@constant_in_graphs
def _of_graph(backend: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, bool]:
    """The fields of `InGraph` for a graph that is being made. On the CPU `reference` stands in for aten, which would be
    traced as T times a dozen operations. RuntimeError: a backend that was asked for cannot run."""
    # Asked here, where Python runs: Dynamo of torch 2.11 takes every graph for an export, and cannot trace the others.
    if torch.compiler.is_exporting() or tracing():
        return ATEN, False
    found, on_the_cpu = registry.asked_for(backend), device.type == "cpu"
    if found is None:
        stand_in = registry.IN_GRAPHS_ON_THE_CPU if on_the_cpu else registry.ANY_SIZE
        able = stand_in.why_not(device, dtype) is None
        return (stand_in.name if on_the_cpu else "") if able else ATEN, on_the_cpu
    if found.module is not None and (why_not := found.why_not(device, dtype)) is not None:
        raise registry.refuse(found, why_not, device, dtype)
    return found.name, False


def settle(
    found: Requested, input: Tensor, T: int, B: int, H: int, D: int, others: Sequence[Tensor],
    *, recompute: bool = False, cell: bool = False, padded: bool = False,
) -> Backend | InGraph | str:  # fmt: skip
    """The backend of a call whose arguments fit a GRU, or the reason why none of ours can run it."""
    if isinstance(found, InGraph):
        several = found.stands_in and any(t.dtype != input.dtype for t in others)
        return "the arguments have several dtypes" if several else found
    dtype, reason = registry.computing_dtype(input), "asked for"
    if (why_not := (found or registry.ANY_SIZE).why_not(input.device, dtype)) is not None:
        return why_not
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (input, *others))
    if found is None:
        # PyTorch's path keeps more than the output, and to cut a padded batch waits.
        aten = not (padded or (recompute and training)) and registry.aten_as_measured(input.device, dtype)
        found, reason = registry.fastest(input, T, B, H, D, training, aten, cell)
    elif (why_not := found.too_large(input, B, H, D, training)) is not None:
        return why_not
    registry.log_once(logging.INFO, f"tensors on {input.device} in {dtype} take backend {found.name!r}: {reason}")
    return InGraph(found.name) if seen_by_a_mode() else found


def resolve(
    meant: Requested, x: Tensor, batch_sizes: Tensor | None, hx: Tensor, params: Sequence[Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool, *,
    recompute: bool = False, cell: bool = False, padded: bool = False,
) -> Call | str:  # fmt: skip
    """The call to run, or the reason why none of our backends can. Arguments as in torch.gru."""
    D, tensors, grad = 2 if bidirectional else 1, (x, hx, *params), torch.is_grad_enabled()
    fits = x, batch_sizes, hx, params, has_biases, num_layers, D, batch_first
    if (reason := unfit_call(*fits, isinstance(meant, InGraph))) is not None:
        return reason
    T, B, H = x.shape[1 if batch_first else 0] if batch_sizes is None else batch_sizes.shape[0], *hx.shape[1:]
    how = dict(recompute=recompute, cell=cell, padded=padded)
    chosen = registry.ATEN if is_aten(meant) else settle(meant, x, T, B, H, D, tensors[1:], **how)
    if isinstance(chosen, str):
        return chosen
    if chosen is registry.ATEN:
        if not train and grad and any(t.requires_grad for t in tensors):
            dropout, train = 0.0, True  # cuDNN has no backward of what did not train
        flags = has_biases, num_layers, dropout, train, bidirectional
        return Call(aten=() if cell else flags if batch_sizes is not None else (*flags, batch_first))
    dtype, dropout = registry.computing_dtype(x), dropout if train else 0.0
    cast = dtype if any([t.dtype != dtype for t in tensors]) else None
    if isinstance(chosen, InGraph):

        def operator(x: Tensor, h_0: Tensor, weights: Sequence[Tensor], rows: Rows | None) -> tuple[Tensor, Tensor]:
            training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h_0, *weights))
            batch_sizes, *padding = rows or (None, None, None)
            how = batch_sizes, chosen.name, batch_first, training, training and recompute
            y, h_n, _, _ = layer_forward(x, h_0, list(weights), *how, *padding)
            return y, h_n[0] if cell else h_n

        return Call([operator] * num_layers, D, dropout, dtype=None if chosen.stands_in else cast)
    trains, each, layers = x.requires_grad, len(params) // num_layers, []
    for i in range(num_layers):
        weights = params[i * each : (i + 1) * each]
        trains = grad and (trains or hx.requires_grad or any([w.requires_grad for w in weights]))
        layer = layer_of(
            chosen, Visits(T, B), x.device, dtype, D, H, trains, D * H if i else x.shape[-1], weights,
            copied=cast is not None, batch_first=batch_first, recompute=recompute, cell=cell,
            weights_as_they_lie=all([w.is_contiguous() and not w.is_neg() for w in weights]),
        )  # fmt: skip
        layers.append(layer)
    return Call(layers, D, dropout, num_layers > 1 and not trains, cast)
