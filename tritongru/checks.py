"""What fits a GRU: the arguments of an operator, of a call, lengths and resets, batch sizes.

Shapes, dtypes and devices alone are read, so that fake tensors fail as real ones do, but for sizes that only data
tells, which are looked at when the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Parameter

from . import registry
from .registry import DTYPES

TRACED = (FakeTensor, FunctionalTensor)  # subclasses that stand for plain tensors while a graph is made
UNFIT = "the arguments do not fit a GRU"
EMPTY = "a size is 0: there is nothing to launch a kernel for"


def check_operands(
    x: Tensor, h_0: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None, backend: str, batch_first: bool,
    lengths: Tensor | None, resets: Tensor | None,
) -> None:  # fmt: skip
    """Raise for what does not fit `tritongru::layer_forward`."""
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
            require(size != 0, lambda: f"x must have elements, got {_shape(x)}")
    require(H != 0, lambda: f"h_0 must have a hidden size above 0, got {_shape(h_0)}")
    if batch_sizes is None:
        require(x.shape[batch] == B, lambda: f"h_0 must have x's batch size, {x.shape[batch]}, got {_shape(h_0)}")
    if len(weights) not in (2 * D, 4 * D):
        raise RuntimeError(f"weights must be {2 * D} or {4 * D} tensors for {D} direction(s), got {len(weights)}")
    each = len(weights) // D
    shapes = ((3 * H, x.shape[-1]), (3 * H, H), (3 * H,), (3 * H,))[:each]
    for index, weight in enumerate(weights):
        name = ("w_ih", "w_hh", "b_ih", "b_hh")[index % each]
        check_like(f"{name} of direction {index // each}", weight, shapes[index % each], x)
    check_like("h_0", h_0, h_0.shape, x)
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
            require(same, partial(str, got))


def check_gradients(
    dy: Tensor | None, dh_n: Tensor | None, x: Tensor, h_0: Tensor, y: Tensor, weights: Sequence[Tensor],
    wanted: Sequence[bool],
) -> None:  # fmt: skip
    rows = (*x.shape[:-1], h_0.shape[0] * h_0.shape[2])
    for name, tensor, shape in (("y", y, rows), ("dy", dy, rows), ("dh_n", dh_n, h_0.shape)):
        if tensor is not None:
            check_like(name, tensor, shape, x)
    if len(wanted) != 2 + len(weights):
        raise RuntimeError(f"wanted must have {2 + len(weights)} entries, got {len(wanted)}")


def check_like(name: str, tensor: Tensor, shape: Sequence[int], x: Tensor) -> None:
    sizes = zip(tensor.shape, shape, strict=False)
    for same in (tensor.dim() == len(shape), *(size == expected for size, expected in sizes)):
        require(same, lambda: f"{name} must be {list(shape)}, got {_shape(tensor)}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise RuntimeError(f"{name} must be {x.dtype} on {x.device}, as x is, got {tensor.dtype} on {tensor.device}")


def require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """RuntimeError, unless it holds, or may hold for sizes that only data tells."""
    if not isinstance(condition, bool):
        from torch.fx.experimental.symbolic_shapes import guard_or_true  # here: it loads sympy

        condition = guard_or_true(condition)
    if not condition:
        raise RuntimeError(message())


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def add_up(batch_sizes: Tensor, data: Tensor, B: int) -> bool:
    """Whether they begin with B, never rise, stay above 0 and add up to the rows of data."""
    sizes = batch_sizes.tolist()
    return bool(sizes) and sizes[0] == B and sum(sizes) == len(data) and sizes[-1] > 0 and sizes == sorted(sizes)[::-1]


def read_sizes(batch_sizes: Tensor | None, x: Tensor, h_0: Tensor) -> tuple[int, ...] | None:
    """The values of batch_sizes, which a fake tensor does not have."""
    if batch_sizes is None:
        return None
    sizes: list[int] = batch_sizes.tolist()
    if not add_up(batch_sizes, x, h_0.shape[1]):
        raise RuntimeError(
            f"batch_sizes must begin with h_0's batch size, {h_0.shape[1]}, never rise, stay above 0 and add up to the "
            f"{len(x)} rows of x, got {sizes}"
        )
    return tuple(sizes)


def unfit_call(
    input: Tensor, batch_sizes: Tensor | None, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    D: int, batch_first: bool, traced: bool,
) -> str | None:  # fmt: skip
    """Why these arguments are no GRU call that the layer backends take; PyTorch then says it in its own words.

    traced: in a graph, whose sizes may be what only data tells: the operator looks when it runs.
    """
    tensors = [input, hx, *params] if batch_sizes is None else [input, hx, batch_sizes, *params]
    if not all(isinstance(t, Tensor) for t in tensors):
        return "an argument is not a tensor"
    if batch_sizes is None:
        if input.dim() != 3:
            return UNFIT
        T, B = input.shape[:2] if not batch_first else (input.shape[1], input.shape[0])
    else:
        if input.dim() != 2 or batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
            return UNFIT
        T, B = len(batch_sizes), hx.shape[1] if hx.dim() == 3 else 0
        if not traced and not add_up(batch_sizes, input, B) and len(batch_sizes):
            return UNFIT
    return unfit(input, T, B, hx, params, has_biases, num_layers, D, traced)


def unfit(
    input: Tensor, T: int, B: int, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int, D: int,
    traced: bool,
) -> str | None:  # fmt: skip
    """Why these tensors are no call of T steps and B rows; None: they are."""
    if 0 in (input.shape[-1], hx.shape[-1]) or (not traced and min(T, B) == 0):
        return EMPTY
    every = [input, hx, *params]
    if any(type(t) not in (Tensor, Parameter, *TRACED) for t in every):
        return "an argument is a tensor subclass"
    if any(t.device != input.device for t in every):
        return "the arguments lie on several devices"
    autocast = registry.autocasting(input.device)
    dtypes = {t.dtype for t in every}
    if len(dtypes) > 1 and not (autocast and torch.float64 not in dtypes and all(d.is_floating_point for d in dtypes)):
        return "the arguments have several dtypes"
    H = hx.shape[-1]
    shapes: list[tuple[int, ...]] = []
    for inner in [input.shape[-1]] + [D * H] * (num_layers - 1):
        shapes += [(3 * H, inner), (3 * H, H), (3 * H,), (3 * H,)][: 4 if has_biases else 2] * D
    if input.layout != torch.strided or tuple(hx.shape) != (num_layers * D, B, H) or len(params) != len(shapes):
        return UNFIT
    return None if all(tuple(p.shape) == shape for p, shape in zip(params, shapes, strict=True)) else UNFIT
