"""`gru` and `gru_cell`: torch.gru and torch.gru_cell with a choice of backend."""

import logging
from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from . import call, registry
from .batch import Rows, Visits, checked_lengths, segments
from .beside import eager_beside_graphs
from .call import Call, InGraph, Requested, is_aten, requested, resolve, tracing
from .checks import EMPTY, UNFIT, check_padding, sizes_of
from .reference import gru_layer

_BOTH = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
_DENSE, _PACKED = ("input", *_BOTH, "batch_first"), ("data", "batch_sizes", *_BOTH)


@eager_beside_graphs
def gru(
    *args: Any,
    backend: str | None = None,
    recompute: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """torch.gru in both its forms, dense and packed, with a choice of backend.

        gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        gru(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

    Args:
        input: [T, B, I], or [B, T, I] with batch_first. data: packed rows [N, I]; batch_sizes: [T] int64 on the CPU.
        hx: [num_layers * D, B, H].
        params: w_ih [3H, I], w_hh [3H, H] and, with has_biases, b_ih, b_hh [3H] of every layer and direction.
        dropout: probability between layers, applied when `train`.
        backend: "aten", "reference", "step" or "sequence"; None: that of `use_backend` or TRITONGRU_BACKEND, or else
            the one that `plan` names.
        recompute: keep only the output for backward, which computes the gates again.
        lengths: [B] integers, 1 .. T, on any device: how many time steps each row of `input` has, in any order. Past
            them output is zero, and what input holds there is ignored, even NaN; h_n is the state after a row's last
            step, where the reverse direction begins.
        resets: bool [T, B], or [B, T] with batch_first: the steps that begin a new sequence. Neither direction carries
            state or gradient over the boundary to the step before; a reset of step 0 clears h_0 of the forward
            direction; one past a row's length is ignored.

    Dtypes: the kernels take float32, float16 and bfloat16 (one for all arguments, or autocast's), `reference` also
    float64, PyTorch's own path whatever torch.gru takes.

    Returns:
        output [T, B, D * H] (or [B, T, D * H], or [N, D * H]) and h_n [num_layers * D, B, H].

    Raises:
        What torch.gru raises on the same input. ValueError: unknown backend. TypeError: lengths or resets that are no
        tensors. RuntimeError: a backend that cannot run; lengths or resets of a wrong shape, dtype or device, or given
        with packed rows; and a length outside 1 .. T, on CUDA, where the check is asynchronous, at the next call that
        has lengths or runs `sequence`, or at `tritongru.synchronize()`.

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
    packed, padded = isinstance(third, Tensor), lengths is not None or resets is not None
    names = _PACKED if packed else _DENSE
    named = dict(zip(names, args, strict=False)) | kwargs
    if len(args) + len(kwargs) != len(names) or named.keys() != set(names):
        return torch.gru(*args, **kwargs)  # its own error for a wrong signature
    if packed and padded:
        name = "resets" if lengths is None else "lengths"
        raise RuntimeError(f"{name} must be None with packed input, which has lengths of its own, got a tensor")
    given = [named[name] for name in names]
    if any(isinstance(flag, (list, tuple, str, NoneType)) for flag in given[names.index("params") + 1 :]):
        return torch.gru(*args, **kwargs)  # likewise for a wrong type
    input, batch_sizes, hx, params, *flags = [*given, False] if packed else [given[0], None, *given[1:]]
    batch_first, key, run = flags[-1], None, None
    if call.may_know(input) and (not packed or sizes_of(batch_sizes, input, hx) is not None):
        of_batch = (len(batch_sizes),) if packed else (lengths is None, resets is None)
        key, run = call.known(backend, input, hx, params, packed, *flags, recompute, *of_batch)
    if run is None:
        meant = requested(backend, input)
        if is_aten(meant) and not padded:
            return torch.gru(*args, **kwargs)
        found = resolve(meant, input, batch_sizes, hx, params, *flags, recompute=recompute, padded=padded)
        if (misfit := isinstance(found, str)) or is_aten(meant):
            # PyTorch's own error, where an argument is at fault.
            result = torch.gru(*args, **kwargs) if misfit else None
            if padded and not (misfit and hx.shape[1] == 0):
                rows, in_graph = _rows(input, None, lengths, resets, batch_first), isinstance(meant, InGraph)
                result = _padded_by_aten(in_graph or tracing(), input, rows, hx, params, *flags)
            return _or_refuse(backend, meant, found, input, result)
        run = call.keep(key, found)
    return run(input, hx, params, _rows(input, batch_sizes, lengths, resets, batch_first) if packed or padded else None)


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
    """torch.gru_cell, one step of a GRU, with a choice of backend; on a Triton backend it is one launch.

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
    return cell(backend, input, hx, w_ih, w_hh, b_ih, b_hh)


def cell(
    backend: str | None, input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> Tensor:
    """`gru_cell`, for a caller that runs without Dynamo already."""
    given = input, hx, w_ih, w_hh, b_ih, b_hh
    params: list[Any] = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
    key = run = None
    if call.may_know(input):
        key, run = call.known(backend, input, hx, params, False, "cell", b_ih is None, b_hh is None)
    if run is None:
        meant = requested(backend, input)
        if is_aten(meant) or (isinstance(meant, InGraph) and meant.stands_in):
            return torch.gru_cell(*given)  # traced as it stands
        found: Any = UNFIT
        if (b_ih is None) == (b_hh is None) and input.dim() == 2 and hx.dim() == 2:
            flags = b_ih is not None, 1, 0.0, False, False, False
            found = resolve(meant, input[None], None, hx[None], params, *flags, cell=True)
        if isinstance(found, str):
            return _or_refuse(backend, meant, found, input, torch.gru_cell(*given))  # its own error, if at fault
        run = call.keep(key, found)
    return run(input[None], hx[None], params)[1] if run.aten is None else torch.gru_cell(*given)


def _rows(
    input: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None, batch_first: bool
) -> Rows:
    """On input's device, resets as [T, B]. TypeError or RuntimeError for lengths and resets that do not fit input."""
    if not torch.compiler.is_compiling():  # there the operator looks
        check_padding(lengths, resets, input.shape[:2], batch_first, input.device)
    if lengths is not None and lengths.device != input.device:
        lengths = checked_lengths(lengths, input.shape[1 if batch_first else 0]).to(input.device)
    return Rows(batch_sizes, lengths, resets.transpose(0, 1) if resets is not None and batch_first else resets)


def _padded_by_aten(
    by_equations: bool, input: Tensor, rows: Rows, hx: Tensor, params: list[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A padded batch by torch.gru: the sequences between its resets become rows of a packed batch. How many there are
    depends on data, so a graph takes the equations."""
    x, D = input.transpose(0, 1) if batch_first else input, 2 if bidirectional else 1
    if by_equations:
        visits = Visits.of(x, None, None if rows.lengths is None else rows.lengths.clamp(1, len(x)), rows.resets)

        def layer(x: Tensor, h_0: Tensor, weights: Sequence[Tensor], _: None) -> tuple[Tensor, Tensor]:
            return gru_layer(x, h_0, weights, visits)[:2]

        y, h_n = Call([layer] * num_layers, D, dropout if train else 0.0)(x, hx, params)
        return y.transpose(0, 1) if batch_first else y, h_n
    at, batch_sizes, *first_and_last = segments(rows.visits(x, False), x.device)
    states = torch.arange(len(hx), device=x.device)[:, None]
    begins, ends = (torch.stack(of[:D]).repeat(num_layers, 1) for of in (first_and_last, first_and_last[::-1]))
    if rows.resets is not None:  # of the first step: they clear the forward direction's
        hx = hx.masked_fill((rows.resets[0] & (states % D == 0))[..., None], 0)
    h_0 = hx.new_zeros(len(hx), int(batch_sizes[0]), hx.shape[-1]).index_put((states, begins), hx)
    t, b = at // x.shape[1], at % x.shape[1]
    y, h_n = torch.gru(x[t, b], batch_sizes, h_0, params, has_biases, num_layers, dropout, train, bidirectional)
    y = y.new_zeros(*x.shape[:2], y.shape[-1]).index_put((t, b), y)
    return y.transpose(0, 1) if batch_first else y, h_n[states, ends]


def _or_refuse(backend: str | None, meant: Requested, reason: Any, input: Tensor, result: Any) -> Any:
    """PyTorch's result in place of ours, with a warning; or an error, if a backend was asked for."""
    if is_aten(meant) or reason == EMPTY or (isinstance(meant, InGraph) and backend is None):
        return result
    if isinstance(meant, InGraph):
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    if meant is not None:
        raise registry.refuse(meant, reason, input.device, registry.computing_dtype(input))
    registry.log_once(logging.WARNING, f"PyTorch's own path (aten) runs on {input.device}: {reason}")
    return result
