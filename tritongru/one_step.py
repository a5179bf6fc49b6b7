"""One step in inference (GRUCell, or a GRU with T = 1: streaming): after the first call of its kind one launch a layer,
nothing looked at twice.

The first call goes the long way and is remembered by all that decides what it launches: shapes, strides, dtypes and
devices of its tensors, and what asks for a backend. A call that has the same hands over addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import parts, registry
from .batch import Visits
from .launch.protocol import LayerCall, LayerWeights
from .products import rnn_precision
from .registry import DTYPES

if TYPE_CHECKING:
    from .launch.step import OneStep

Key = tuple[Any, ...]
LIMIT = 256  # kinds of calls that are remembered
PLAIN = (Tensor, Parameter)
DEVICES = ("cuda",)


@dataclass(frozen=True)
class Layers:
    """What a call of one kind launches."""

    steps: tuple[OneStep, ...]  # of each layer
    each: int  # tensors of a layer's weights: 4, or 2 without biases


_known: dict[Key, Layers] = {}


def may_know(x: Any) -> bool:
    """Whether calls on such a tensor are remembered at all."""
    return type(x) in PLAIN and x.device.type in DEVICES


def key_of(backend: str | None, tensors: Sequence[Tensor], *flags: Any) -> Key | None:
    """What tells calls apart that have no more than one step; None: this one has to go the long way.

    tensors: x [B, I] or [1, B, I], h_0, and every layer's weights.
    """
    if (
        torch.compiler.is_compiling()
        or any(type(t) not in PLAIN for t in tensors)
        or (device := tensors[0].device).type not in DEVICES
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        or torch.is_autocast_enabled(device.type)
        or (device.type == "cuda" and torch.cuda.current_device() != device.index)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or parts.profiled()
    ):
        return None
    precision = rnn_precision(nvidia=True) if tensors[0].dtype == torch.float32 else ""
    told = [(t.shape, t.stride(), t.dtype, t.device, t.is_neg()) for t in tensors]
    return registry.asked_for(backend), precision, flags, *told


def cell(
    backend: str | None, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Key | None, Tensor | None]:
    """What tells such calls of a cell apart, and where they are known its new state [B, H] from x [B, I], h [B, H]."""
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    key = key_of(backend, (x, h, *weights), b_ih is None, b_hh is None)
    layers = _known.get(key) if key is not None else None
    if layers is None:
        return key, None
    h_n = torch.empty_like(h)
    return key, h_n if layers.steps[0](x, h, *weights, h_n, h_n) else None


def gru(key: Key | None, x: Tensor, h_0: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Output [1, B, H] (or [B, 1, H], as x) and h_n [layers, B, H], where calls of its kind are known."""
    layers = _known.get(key) if key is not None else None
    if layers is None:
        return None
    h_n, y = torch.empty_like(h_0), x
    before, after = (h_0.unbind(0), h_n.unbind(0)) if len(layers.steps) > 1 else ((h_0,), (h_n,))
    for i, step in enumerate(layers.steps):
        given, y = y, x.new_empty((*x.shape[:2], h_0.shape[-1]))
        if not step(given, before[i], *weights[i * layers.each : (i + 1) * layers.each], y, after[i]):
            return None
    return y, h_n


def remember(key: Key | None, chosen: Any, x: Tensor, h_0: Tensor, weights: Sequence[Tensor], layers: int) -> None:
    """What a call launched that went the long way, one of `layers` layers: x [1, B, I], h_0 [layers, B, H]."""
    if key is None or chosen != registry.BACKENDS["step"]:  # nor one with fields set
        return
    device = registry.device_of(x.device)
    each, H = len(weights) // layers, h_0.shape[-1]
    call = LayerCall(
        visits=Visits.of(x, None), directions=1, hidden_size=H, dtype=DTYPES[x.dtype],
        precision=rnn_precision(device.vendor == "nvidia"), device=device, save_gates=False,
    )  # fmt: skip
    steps = []
    for layer in range(layers):
        of_layer = weights[layer * each : (layer + 1) * each]
        if not all(t.is_contiguous() and not t.is_neg() for t in (h_0, *of_layer)) or x.is_neg():
            return  # copied, the long way
        step = chosen.load().one_step(call, x, h_0[layer : layer + 1], LayerWeights.of(tuple(of_layer), 1))
        if step is None:
            return
        steps.append(step)
        x = x.new_empty(1, h_0.shape[1], H)  # as what goes into the next layer
    if len(_known) >= LIMIT:
        _known.clear()
    _known[key] = Layers(tuple(steps), each)
