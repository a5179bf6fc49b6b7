"""The parts of a call, for profilers: projection, weights, fill, recurrence, recompute, gradient products.

Inside `profiling()` a function marked with `part` is a range of torch.profiler's; otherwise the mark costs a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

PREFIX = "tritongru: "  # of the ranges' names

P = ParamSpec("P")
R = TypeVar("R")

blocks = 0  # of `profiling` that are open: a count of the process, since backward runs on autograd's own threads


@contextmanager
def profiling() -> Iterator[None]:
    """Inside, in every thread: marked functions are ranges `tritongru: <part>`, in any profiler of PyTorch."""
    global blocks
    blocks += 1
    try:
        yield
    finally:
        blocks -= 1


def part(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function as a part of a call. Parts may contain each other; what runs belongs to the innermost."""

    def marked(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            if not blocks:
                return function(*args, **kwargs)
            with record_function(PREFIX + name):
                return function(*args, **kwargs)

        return inside

    return marked
