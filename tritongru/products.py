"""The library products around the recurrence, over all T at once, which every backend shares.

    x_proj = x W_i^T + b_i
    dW_i = [dr dz dn]^T x        dx = [dr dz dn] W_i
    dW_h = [dr dz dq]^T h_prev   db_i, db_h = the column sums

dgates holds dq, dr, dz, dn side by side: [dr dz dn] is a view in PyTorch's order of gates, [dq dr dz] is one too, and
what is made of it, dW_h and db_h, is put into that order at the end.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .parts import part

ROWS_OF_A_SUM = 128  # of a column sum's rows, how many one launch adds

_rnn: Any = torch.backends.cudnn.rnn  # torch.backends takes a microsecond to find them
_matmul: Any = torch.backends.cuda.matmul


def rnn_precision(nvidia: bool) -> str:
    """How float32 products run: "tf32" (NVIDIA's alone) or "ieee", by the switch of PyTorch's RNNs, as in nn.GRU."""
    return "tf32" if nvidia and _rnn.fp32_precision == "tf32" else "ieee"


AS_IT_IS: AbstractContextManager[None] = nullcontext()


def surroundings(x: Tensor, precision: str | None) -> AbstractContextManager[None]:
    """Inside: x's device is current, autocast is off, float32 products run in `precision` (None: there are none). That
    switch of matmul is global: another thread's product may run while it is turned."""
    kind, index = x.device.type, x.device.index
    turned = _MatmulPrecision(precision) if kind == "cuda" and precision and x.dtype == torch.float32 else AS_IT_IS
    cast = (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)
    elsewhere = kind == "cuda" and index is not None and index != torch.cuda.current_device()
    return _changed(x.device, cast, elsewhere, turned) if cast or elsewhere else turned


@contextmanager
def _changed(device: torch.device, cast: bool, elsewhere: bool, turned: AbstractContextManager[None]) -> Iterator[None]:
    without_cast = torch.autocast(device.type, enabled=False) if cast else AS_IT_IS
    with without_cast, torch.cuda.device(device) if elsewhere else AS_IT_IS, turned:
        yield


_turning = threading.Lock()
_turned = 0  # how many calls are inside with matmul's switch turned: the first turns it, the last turns it back
_before = "none"


class _MatmulPrecision(AbstractContextManager[None]):
    def __init__(self, precision: str):
        self.precision, self.turns = precision, False

    def __enter__(self) -> None:
        global _turned, _before
        with _turning:
            if not _turned:
                _before = _matmul.fp32_precision
                self.turns = _before not in (self.precision, "none" if self.precision == "ieee" else self.precision)
                if self.turns:
                    _matmul.fp32_precision = self.precision
            # Where another thread has turned the switch it will turn it back: whoever needs it has to be counted.
            self.turns = self.turns or _turned > 0
            _turned += self.turns

    def __exit__(self, *_: object) -> None:
        global _turned
        with _turning:
            _turned -= self.turns
            if self.turns and not _turned:
                _matmul.fp32_precision = "none"  # inherit, as most processes do; a value of its own only if it had one
                if _matmul.fp32_precision != _before:
                    _matmul.fp32_precision = _before


@part("projection")
def project(x: Tensor, w_ih: Sequence[Tensor], b_ih: Sequence[Tensor]) -> Tensor:
    """x_proj of every direction side by side: x [..., I] to [..., D * 3H], one product, laid out in memory as x is."""
    if x.dim() == 3 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous():
        return project(x.transpose(0, 1), w_ih, b_ih).transpose(0, 1)
    if len(w_ih) == 1:
        return torch.nn.functional.linear(x, w_ih[0], b_ih[0] if b_ih else None)
    return torch.nn.functional.linear(x, torch.cat(list(w_ih)), torch.cat(list(b_ih)) if b_ih else None)


def input_gradient(dgates: Sequence[Tensor], w_ih: Sequence[Tensor]) -> Tensor:
    """dx [N, I] from dgates [N, 4H] of each direction: the sum over the directions of [dr dz dn] W_i."""
    first, *others = [dgate[:, dgate.shape[1] // 4 :] for dgate in dgates]
    dx = first.mm(w_ih[0])
    for d_x_proj, weight in zip(others, w_ih[1:], strict=True):
        dx.addmm_(d_x_proj, weight)
    return dx


def hidden_weight_gradient(by_gate: Tensor, h_prev: Sequence[tuple[slice, Tensor]]) -> Tensor:
    """dW_h [3H, H] from dgates [4H, N] and h_prev of one direction, as `Visits.h_prev` gives it."""
    H = by_gate.shape[0] // 4
    d_hidden, ((rows, h), *others) = by_gate[: 3 * H], h_prev  # dq dr dz
    dw = (d_hidden[:, rows] if others else d_hidden).mm(h)
    for rows, h in others:
        dw.addmm_(d_hidden[:, rows], h)
    return dw.roll(-H, 0)


def bias_gradients(dgate: Tensor) -> tuple[Tensor, Tensor]:
    """db_i, db_h [3H] from dgate [N, 4H] of one direction, summed in float32 or wider; db_i is a view."""
    sums, H = column_sums(dgate, dgate.dtype), dgate.shape[1] // 4
    return sums[H:], sums[: 3 * H].roll(-H, 0)


def column_sums(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of rows [N, C] in float32 or wider, then rounded to `dtype`, [C]: few rows at a time.

    PyTorch's CUDA kernel gives a sum of 256 rows or more a buffer of 128 float32 per column and block that shares the
    column: 132 MiB for [16384, 2048] on an H200, where every tensor of the call together has 160. Fewer rows have none.
    """
    wide, few = torch.float64 if rows.dtype == torch.float64 else torch.float32, ROWS_OF_A_SUM
    while rows.shape[0] > few:
        sums = -(-rows.shape[0] // few)
        partial = rows.new_empty(sums, rows.shape[1], dtype=wide)
        at_once = rows.shape[0] // few
        torch.sum(rows[: at_once * few].unflatten(0, (at_once, few)), 1, dtype=wide, out=partial[:at_once])
        if sums > at_once:
            torch.sum(rows[at_once * few :], 0, dtype=wide, out=partial[at_once])
        rows = partial
    return rows.sum(0) if rows.dtype == dtype else rows.sum(0, dtype=wide).to(dtype)  # PyTorch's sum is as wide
