"""Which arguments fit a GRU. Only shapes, dtypes and devices are read, so fake tensors fail as real ones do; sizes that
depend on data are checked when the graph runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Parameter

from . import registry

PLAIN = (Tensor, Parameter)
TRACED = (FakeTensor, FunctionalTensor)  # subclasses that stand for plain tensors while a graph is made
UNFIT = "the arguments do not fit a GRU"
OF_SIZES = 1, torch.int64, "cpu"  # the kind of batch_sizes
EMPTY = "a size is 0: there is nothing to launch a kernel for"


class Operands(NamedTuple):
    """What both operators of layer.py are told of a layer."""

    x: Tensor  # [T, B, I], [B, T, I] with batch_first, or packed [N, I] with batch_sizes
    h_0: Tensor  # [D, B, H]
    weights: Sequence[Tensor]  # w_ih [3H, I], w_hh [3H, H] and, if there are biases, b_ih, b_hh [3H]; by direction
    batch_sizes: Tensor | None  # [T] int64 on the CPU, never rising, adding up to N
    backend: str  # "reference", "step" or "sequence"; "": the faster of step and sequence, by size
    batch_first: bool
    training: bool  # whether to keep what backward needs
    recompute: bool  # of it nothing but the output
    lengths: Tensor | None  # [B] integers, of a batch without batch_sizes, on x's device: as `gru`
    resets: Tensor | None  # [T, B] bool, likewise


def check_operands(of: Operands) -> Operands:
    """Raise for operands of `layer_forward` that do not fit."""
    if torch.autograd.forward_ad._current_level >= 0:  # PyTorch would take the results for constants, silently
        raise RuntimeError(
            "tritongru::layer_forward has no forward-mode derivative: make the graph that calls it where forward-mode "
            "differentiation is on (PyTorch's own path is then in it), not before"
        )
    if of.backend and registry.find(of.backend).module is None:
        layers = ", ".join(repr(b.name) for b in registry.BACKENDS.values() if b.module)
        raise ValueError(f"backend must run a layer ({layers}, or '' for the plan's), got {of.backend!r}")
    x, D, packed, batch = of.x, of.h_0.shape[0], of.batch_sizes is not None, 0 if of.batch_first else 1
    has_biases = len(of.weights) == 4 * D
    reason = unfit_call(x, of.batch_sizes, of.h_0, of.weights, has_biases, 1, D, of.batch_first, True)
    if reason is None and not all(may(size != 0) for dim, size in enumerate(x.shape) if packed or dim != batch):
        reason = f"x must have elements, got {list(x.shape)}"  # but a batch may be empty, as nn.GRU's
    if reason is not None:
        raise RuntimeError(reason)
    if not packed:
        check_padding(of.lengths, of.resets, (x.shape[1 - batch], x.shape[batch]), False, x.device)
    return of


def check_padding(lengths: Any, resets: Any, sizes: Sequence[int], batch_first: bool, device: torch.device) -> None:
    """Raise for lengths and resets that do not fit input of these sizes, T and B; values are not looked at."""
    integers, cpu = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), torch.device("cpu")
    for name, given, shape, dtypes, kind, where in (
        ("lengths", lengths, (sizes[0 if batch_first else 1],), integers, "integers", dict.fromkeys((device, cpu))),
        ("resets", resets, sizes, (torch.bool,), "bool", {device: None}),
    ):
        expected = f"{name} must be a tensor {list(shape)} of {kind} on {' or '.join(map(str, where))}"
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{expected}, got {type(given).__name__}")
        if given is not None and not (given.dtype in dtypes and given.device in where and same(given.shape, shape)):
            raise RuntimeError(f"{expected}, got {list(given.shape)} of {given.dtype} on {given.device}")


def same(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether they are the same, or may be where only data tells."""
    return len(shape) == len(expected) and all(may(n == m) for n, m in zip(shape, expected, strict=True))


def may(condition: bool | torch.SymBool) -> bool:
    """Whether it holds, or may hold for sizes that only data tells."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # here: it loads sympy

    return bool(guard_or_true(condition))


def sizes_of(batch_sizes: Tensor, data: Tensor, hx: Tensor) -> tuple[int, ...] | None:
    """The values of batch_sizes, where they begin with B, never rise, stay above 0 and add up to the rows of data."""
    sizes = tuple(batch_sizes.tolist()) if _kind(batch_sizes) == OF_SIZES else ()
    falling = sizes == tuple(sorted(sizes, reverse=True)) and min(sizes, default=0) > 0
    return sizes if falling and sizes[:1] == tuple(hx.shape[1:2]) and sum(sizes) == len(data) else None


def read_sizes(batch_sizes: Tensor | None, x: Tensor, h_0: Tensor) -> tuple[int, ...] | None:
    """`sizes_of`, which a fake tensor does not have; RuntimeError where they do not fit."""
    if batch_sizes is None or (sizes := sizes_of(batch_sizes, x, h_0)) is not None:
        return None if batch_sizes is None else sizes
    raise RuntimeError(
        f"batch_sizes must begin with h_0's batch size, {h_0.shape[1]}, never rise, stay above 0 and add up to the "
        f"{len(x)} rows of x, got {batch_sizes.tolist()}"
    )


def unfit_call(
    input: Tensor, batch_sizes: Tensor | None, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    D: int, batch_first: bool, traced: bool,
) -> str | None:  # fmt: skip
    """Why the layer backends cannot take these arguments of torch.gru; None if they can. traced: into a graph, where
    sizes may depend on data: the operator checks them when it runs."""
    every, packed = [input, hx, *params], batch_sizes is not None
    if not all(isinstance(t, Tensor) for t in every) or hx.dim() != 3 or input.dim() != (2 if packed else 3):
        return UNFIT
    T, B = input.shape[:2] if not batch_first else (input.shape[1], input.shape[0])
    if batch_sizes is not None:
        if batch_first or _kind(batch_sizes) != OF_SIZES:
            return "batch_sizes must be [T], int64, on the CPU, without batch_first"
        T, B = batch_sizes.shape[0], hx.shape[1]  # len would ask for what only data tells
        if not traced and len(batch_sizes) and sizes_of(batch_sizes, input, hx) is None:
            return UNFIT
    if 0 in (input.shape[-1], hx.shape[-1]) or (not traced and min(T, B) == 0):
        return EMPTY
    if any(type(t) not in (*PLAIN, *TRACED) for t in every):
        return "an argument is a tensor subclass"
    devices, dtypes = {t.device for t in every}, {t.dtype for t in every}
    if len(devices) > 1:
        return "the arguments lie on several devices"
    cast = registry.autocasting(input.device) and torch.float64 not in dtypes
    if len(dtypes) > 1 and not (cast and all(d.is_floating_point for d in dtypes)):
        return "the arguments have several dtypes"
    H, expected = hx.shape[-1], [("h_0", (num_layers * D, B, hx.shape[-1]))]
    for i in range(num_layers * D):
        shapes: list[Any] = [(3 * H, input.shape[-1] if i < D else D * H), (3 * H, H), (3 * H,), (3 * H,)]
        names = ("w_ih", "w_hh", "b_ih", "b_hh")[: 4 if has_biases else 2]
        expected += [(f"{name} number {i}", shape) for name, shape in zip(names, shapes, strict=False)]
    if input.layout != torch.strided or len(every) != 1 + len(expected):
        return UNFIT
    for (name, shape), tensor in zip(expected, every[1:], strict=True):
        if not same(tensor.shape, shape):
            return f"{name} must be {list(shape)}, got {list(tensor.shape)}"
    return None


def _kind(of: Any) -> tuple[int, torch.dtype, str] | None:
    return (of.dim(), of.dtype, of.device.type) if isinstance(of, Tensor) else None
