"""What a call launches: Triton kernels by name, PyTorch's own launches by kind (as planning/cost.py names them)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tritongru import autograd, ops
from tritongru.launch import runtime

KINDS = {
    "library product": ("addmm", "mm", "addmm_", "bmm"),
    "copy": ("cat", "copy_", "roll", "flip", "index_select", "index_copy_", "clone", "_to_copy"),
    "padded copy": ("constant_pad_nd",),
    "column sum": ("sum",),
    "element-wise": ("add", "mul", "sigmoid", "tanh", "add_", "mul_", "sigmoid_", "tanh_", "addcmul_"),
    "fill": ("zeros", "fill_", "zero_", "new_zeros", "full", "ones_like"),
}  # fmt: skip
KIND_OF = {op: kind for kind, ops in KINDS.items() for op in ops}
NOTHING = {  # views and allocations
    "view", "_unsafe_view", "t", "transpose", "transpose_", "select", "slice", "split", "permute", "expand", "detach",
    "unbind", "unsqueeze", "squeeze", "squeeze_", "as_strided", "empty", "new_empty", "alias", "chunk",
    "_reshape_alias", "_local_scalar_dense", "empty_like", "split_with_sizes", "lift_fresh",
}  # fmt: skip


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        op = func.overloadpacket.__name__
        floating = not isinstance(result, torch.Tensor) or result.dtype.is_floating_point
        # other integer arithmetic is the packed batch's index, made on the host
        if op not in NOTHING and (floating or op == "fill_"):
            self.counts[KIND_OF.get(op, f"unknown: {op}")] += 1
        return result


@contextmanager
def looked_into(monkeypatch) -> Iterator[None]:
    """Dispatch modes of the block see what a layer runs where there are none, instead of its operators; but not what
    Triton's interpreter does inside a launch."""
    call = runtime.Launch.__call__

    def quietly(self, grid, scalars):
        with _disable_current_modes():
            call(self, grid, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.Launch, "__call__", quietly)
        patch.setattr(ops, "seen_by_a_mode", lambda: False)
        patch.setattr(autograd, "_by_operator", lambda dy, dh_n: False)
        yield


@contextmanager
def counted(monkeypatch) -> Iterator[Counter[str]]:
    """Counts of everything launched inside the block, but for what Triton's interpreter does inside a launch."""
    found: Counter[str] = Counter()
    with looked_into(monkeypatch), _Ops() as seen:
        with runtime.observe(lambda name, grid: found.update([name])):
            yield found
        found.update(seen.counts)
