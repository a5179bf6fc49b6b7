"""What a call launches, Triton kernels by name and PyTorch's own launches by kind as tools/counted.py names them; and
how much memory it has at once, counted in what PyTorch is asked for: on the CPU, kernels in the interpreter."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tritongru import call, layer
from tritongru.launch import runtime
from tritongru.tools.counted import Watch


@contextmanager
def looked_into(monkeypatch) -> Iterator[None]:
    """Dispatch modes of the block see what a layer runs where there are none, instead of its operators; but not what
    Triton's interpreter does inside a launch."""
    launch = runtime.Launch.__call__

    def quietly(self, grid, scalars):
        with _disable_current_modes():
            launch(self, grid, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.Launch, "__call__", quietly)
        patch.setattr(call, "seen_by_a_mode", lambda: False)
        patch.setattr(layer, "_by_operator", lambda dy, dh_n: False)
        yield


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


@contextmanager
def memory(monkeypatch) -> Iterator[Memory]:
    """Everything launched and allocated inside the block, but for what Triton's interpreter does inside a launch."""
    found = Memory()

    def note(name: str, grid: tuple[int, int, int]) -> None:
        found.launched = True
        found.launches[name] += 1

    with looked_into(monkeypatch), runtime.observe(note), found:
        yield found


@contextmanager
def counted(monkeypatch) -> Iterator[Counter[str]]:
    """Counts of everything launched inside the block."""
    with memory(monkeypatch) as found:
        yield found.launches
