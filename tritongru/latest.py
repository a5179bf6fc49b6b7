"""What may be asked for again: kept, but never more than so much of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

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
