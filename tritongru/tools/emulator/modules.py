"""What stands for the names of Triton's that a kernel uses: its modules, classes and functions.

Functions that FUNCTIONS lists are the emulator's; those that Triton writes in its own language run from their source;
any other is an error that names it. Layouts are built by Triton's own classes, which check them, and ignored.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import triton.language as tl
from triton.experimental.gluon import language as gl

from . import language
from .values import FUNCTIONS, EmulatorError, Shared, Tensor


class _Constexpr(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return value is None or isinstance(value, (bool, int, float, str, tl.dtype))


class Constexpr(metaclass=_Constexpr):
    """A value known at compile time is a plain one here."""

    def __new__(cls, value: Any) -> Any:
        return unwrapped(value)


def unwrapped(value: Any) -> Any:
    if isinstance(value, tl.constexpr):
        return unwrapped(value.value)
    if type(value) in (tuple, list, tl.tuple):
        return (list if type(value) is list else tuple)(unwrapped(part) for part in value)
    return value


def _of_numbers_too(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Python's, that is Triton's where it is called with a tensor."""

    def called(*args: Any) -> Any:
        return (FUNCTIONS[name] if any(isinstance(arg, Tensor) for arg in args) else own)(*args)

    return called


BUILTINS = {
    "range": language.runtime_range,
    "min": _of_numbers_too("minimum", min),
    "max": _of_numbers_too("maximum", max),
    "print": language.nothing,
}
CLASSES = {tl.tensor: Tensor, tl.constexpr: Constexpr, gl.shared_memory_descriptor: Shared, tl.tuple: tuple}
CLASSES |= {tl.range: language.runtime_range, tl.static_range: language.static_range}


class Module:
    """Stands for a module of Triton's."""

    def __init__(self, real: types.ModuleType):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        real = vars(self)["_real"]
        if not hasattr(real, name):
            raise EmulatorError(f"{real.__name__} of the installed Triton has no {name!r}")
        found = known(getattr(real, name), f"{real.__name__}.{name}")
        setattr(self, name, found)
        return found


@cache
def module(real: types.ModuleType) -> Module:
    return Module(real)


def of_triton(value: Any) -> bool:
    """Whether Triton itself defines this module, function or class."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
    return (name or "").split(".")[0] == "triton"


def unknown(name: str, *args: Any, **options: Any) -> None:
    """Stands for a function of Triton's that the emulator lacks."""
    raise EmulatorError(f"the emulator does not know {name}")


def known(value: Any, name: str) -> Any:
    """What a kernel gets for something of Triton's; a function that the emulator lacks says so when it is called."""
    if isinstance(value, types.ModuleType):
        return module(value) if of_triton(value) else value
    if isinstance(value, type):
        return CLASSES.get(value, value)
    value = unwrapped(value)
    written = getattr(value, "fn", None)  # in Triton's own language
    if callable(value) and not isinstance(value, tl.dtype):
        short = name.rsplit(".", 1)[-1]
        if short in FUNCTIONS:
            return FUNCTIONS[short]
        if written is None and of_triton(value):
            return partial(unknown, name)
    if written is not None:
        return lambda *args, **options: language.machine.bound(value)(*args, **options)
    return value
