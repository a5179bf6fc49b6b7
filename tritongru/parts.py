"""The parts of a call, for profilers: projection, weights, fill, recurrence, recompute, gradient products."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.autograd import profiler

PREFIX = "tritongru: "  # of the ranges' names

P = ParamSpec("P")
R = TypeVar("R")


def part(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function as a part of a call: a range of PyTorch's profiler where one is on. Parts may contain each other;
    what runs belongs to the innermost."""

    def marked(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            if not profiler._is_profiler_enabled:
                return function(*args, **kwargs)
            with profiler.record_function(PREFIX + name):
                return function(*args, **kwargs)

        return inside

    return marked
