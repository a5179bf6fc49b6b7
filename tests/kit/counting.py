"""What a call launches: Triton kernels by name, PyTorch's own launches by kind as tools/counted.py names them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def counted(monkeypatch) -> Iterator[Counter[str]]:
    """Counts of everything launched inside the block, but for what Triton's interpreter does inside a launch."""
    found: Counter[str] = Counter()
    with looked_into(monkeypatch), Watch() as seen:
        with runtime.observe(lambda name, grid: found.update([name])):
            yield found
        found.update(seen.launches)
