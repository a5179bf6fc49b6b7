"""How much memory a call has at once, counted in what PyTorch is asked for: on the CPU, kernels in the interpreter."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritongru.launch import runtime

from .counting import looked_into


class Memory(TorchDispatchMode):
    """Storages of floating tensors made inside; a packed batch's index (int64 [N]) is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}  # by address, which a weak reference keeps taken
        self.history: list[dict[int, int]] = []  # after every operation: bytes by address of those that live
        self.launched = False

    def note(self, tensors: Sequence[object], fresh: bool) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.dtype.is_floating_point:
                storage = tensor.untyped_storage()
                size = storage.nbytes() if fresh else 0
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), size))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note(tree_leaves((args, kwargs)), fresh=False)  # what was not seen before was made outside
        result = func(*args, **(kwargs or {}))
        self.note(tree_leaves(result), fresh=True)
        self._forget_launches()
        self.history.append({at: size for at, (weak, size) in self.storages.items() if not weak.expired()})
        return result

    def _forget_launches(self) -> None:
        """Triton's interpreter leaves a cycle behind that holds the launcher's frame, and with it the tensors there."""
        if self.launched:
            gc.collect()
            self.launched = False

    def now(self, without: Sequence[Tensor] = ()) -> int:
        """Bytes that live, but for those of the tensors in `without`."""
        self._forget_launches()
        left_out = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(size for at, (weak, size) in self.storages.items() if at not in left_out and not weak.expired())

    def peak(self, without: Sequence[Tensor | None] = ()) -> int:
        """The most bytes at once since the last call of it, not counting the storages of the tensors in `without`."""
        left_out = {tensor.untyped_storage()._cdata for tensor in without if tensor is not None}
        history, self.history = self.history, []
        return max(sum(size for at, size in live.items() if at not in left_out) for live in history)


@contextmanager
def memory(monkeypatch) -> Iterator[Memory]:
    """What is allocated inside the block; what Triton's interpreter does inside a launch is not counted."""
    found = Memory()

    def note(name: str, grid: tuple[int, int, int]) -> None:
        found.launched = True

    with looked_into(monkeypatch), runtime.observe(note), found:
        yield found
