"""How much memory a call has at once, counted in what PyTorch is asked for: on the CPU, kernels in the interpreter."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tritongru.launch import runtime
from tritongru.tools.counted import Watch

from .counting import looked_into


class Memory(Watch):
    """Storages of floating tensors made inside; a packed batch's index (int64 [N]) is not counted."""

    launched = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._forget_launches()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _forget_launches(self) -> None:
        """Triton's interpreter leaves a cycle behind that holds the launcher's frame, and with it the tensors there."""
        if self.launched:
            gc.collect()
            self.launched = False

    def now(self, without: Sequence[Tensor] = ()) -> int:
        self._forget_launches()
        return super().now(without)


class SameMemory:
    """`runtime.empty` that hands out in each pass what it handed out before, in the same order."""

    def __init__(self) -> None:
        self._tensors: dict[Any, Tensor] = {}
        self._count = 0

    def again(self) -> None:
        """A pass begins."""
        self._count = 0

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `runtime.empty`."""
        self._count += 1
        key = self._count, shape, dtype
        if key not in self._tensors:
            self._tensors[key] = torch.empty(shape, dtype=dtype, device=device)
        return self._tensors[key]


@contextmanager
def memory(monkeypatch) -> Iterator[Memory]:
    """What is allocated inside the block; what Triton's interpreter does inside a launch is not counted."""
    found = Memory()

    def note(name: str, grid: tuple[int, int, int]) -> None:
        found.launched = True

    with looked_into(monkeypatch), runtime.observe(note), found:
        yield found
