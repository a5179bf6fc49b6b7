"""What may be asked for again: kept, but never more than so much of it; and memory that outlives a call."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

K = TypeVar("K")
V = TypeVar("V")


class Latest(dict[K, V]):
    """Entries that were kept last, of `limit` in all by `size` of (key, value); by any thread."""

    def __init__(self, limit: int, size: Callable[[Any, Any], int] = lambda key, value: 1):
        super().__init__()
        self.limit, self._size, self._total, self._lock = limit, size, 0, threading.Lock()

    def keep(self, key: K, value: V) -> None:
        with self._lock:
            if key in self:
                self._total -= self._size(key, self.pop(key))
            self[key] = value
            self._total += self._size(key, value)
            while self._total > self.limit:
                oldest = next(iter(self))
                self._total -= self._size(oldest, self.pop(oldest))

    def clear(self) -> None:
        with self._lock:
            super().clear()
            self._total = 0


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def lasting(make: Callable[[], V], device: torch.device, wait: bool = True) -> V:
    """What `make` puts on a device to be kept, for every stream, or without `wait` for the current one. It runs in
    another thread: the memory pool of a CUDA graph takes this thread's allocations, and would overwrite them.
    RuntimeError while a graph is captured."""
    if capturing(device):
        raise RuntimeError(
            "backend 'sequence', lengths and every new packed batch need memory that outlives a CUDA graph, not made "
            f"yet on {device}: call a layer once before the capture"
        )
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def made() -> V:
        with torch.cuda.stream(stream):
            found = make()
        if stream is not None and wait:
            stream.synchronize()
        return found

    with ThreadPoolExecutor(1) as other:
        return other.submit(made).result()
