"""A kernel's own source, bound to the emulator's language in place of Triton.

Of the names of Triton's that a kernel uses, functions that FUNCTIONS lists are the emulator's; those that Triton writes
in its own language run from their source; any other is an error that names it. Layouts are built by Triton's own
classes, which check them, and ignored.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import triton.language as tl
from triton.experimental.gluon import language as gl

from .language import FUNCTIONS
from .values import EmulatorError, Shared, Tensor

KERNEL = "__emulated__"  # among the globals of a function that runs here


def unwrapped(value: Any) -> Any:
    if isinstance(value, tl.constexpr):
        return unwrapped(value.value)
    if type(value) in (tuple, list, tl.tuple):
        return (list if type(value) is list else tuple)(unwrapped(part) for part in value)
    return value


def of_numbers_too(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Python's, that is Triton's where it is called with a tensor."""
    return lambda *args: (FUNCTIONS[name] if any(type(arg) is Tensor for arg in args) else own)(*args)


BUILTINS = {"range": FUNCTIONS["range"], "min": of_numbers_too("minimum", min), "max": of_numbers_too("maximum", max)}
CLASSES: dict[Any, Any] = {
    tl.tensor: Tensor,
    tl.constexpr: unwrapped,  # a value known at compile time is a plain one here
    tl.tuple: tuple,
    tl.range: FUNCTIONS["range"],
    tl.static_range: FUNCTIONS["static_range"],
    gl.shared_memory_descriptor: Shared,
}


def unknown(name: str, *args: Any, **options: Any) -> None:
    """Stands for a function of Triton's that the emulator lacks."""
    raise EmulatorError(f"the emulator does not know {name}")


def names_of(code: types.CodeType) -> set[str]:
    """The names that a function, and functions inside it, may take from its module."""
    inner = (names_of(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


class Binder:
    """Functions of kernels, with the emulator's language among their globals."""

    def __init__(self) -> None:
        self._bound: dict[Any, Any] = {}

    def function(self, function: Any) -> Callable[..., Any]:
        """Of a function under gluon.jit or triton.jit, or a plain one."""
        fn = getattr(function, "fn", function)
        found = fn if KERNEL in fn.__globals__ else self._bound.get(fn)
        if found is None:
            names: dict[str, Any] = {"__builtins__": __builtins__, "__name__": fn.__module__, KERNEL: True, **BUILTINS}
            cells = tuple(types.CellType() for _ in fn.__closure__ or ())
            found = types.FunctionType(fn.__code__, names, fn.__name__, None, cells)
            self._bound[fn] = found  # before what it calls, which may call it
            found.__defaults__ = fn.__defaults__ and tuple(map(self.value, fn.__defaults__))
            found.__kwdefaults__ = fn.__kwdefaults__ and {k: self.value(v) for k, v in fn.__kwdefaults__.items()}
            for own, cell in zip(cells, fn.__closure__ or (), strict=True):
                own.cell_contents = self.value(cell.cell_contents)
            for name in names_of(fn.__code__) & fn.__globals__.keys():
                names[name] = self.value(fn.__globals__[name])
        return found

    def value(self, value: Any) -> Any:
        """What a kernel gets for a global of its module, a constant or a default."""
        value = unwrapped(value)
        if isinstance(value, (types.ModuleType, type)):
            if value not in self._bound:
                self._bound[value] = CLASSES.get(value) or self._named(value)
            return self._bound[value]
        fn = getattr(value, "fn", value)
        if not callable(fn) or isinstance(fn, tl.dtype):
            return value
        of_triton = (getattr(fn, "__module__", None) or "").split(".")[0] == "triton"
        if of_triton and fn.__name__ in FUNCTIONS:
            return FUNCTIONS[fn.__name__]
        if type(value).__name__ == "ConstexprFunction":
            return fn
        if fn is not value:
            return self.function(value)
        return partial(unknown, f"{fn.__module__}.{fn.__name__}") if of_triton else value

    def _named(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return _Module(self, value)
        return self._aggregate(value) if getattr(value, "__triton_aggregate__", False) else value

    def _aggregate(self, cls: type) -> type:
        """A class under @aggregate, without Triton's checks of its fields."""
        new: Any = cls.__new__
        own = dict(zip(new.__code__.co_freevars, new.__closure__ or (), strict=True))["cls"].cell_contents
        found = self._bound[cls] = type(own.__name__, (), {})  # before its members, which may name it
        for base in reversed(own.__mro__[:-1]):
            for name, member in vars(base).items():
                if name not in ("__dict__", "__weakref__", "__setattr__", "__module__", "__annotations__"):
                    written = isinstance(getattr(member, "fn", member), types.FunctionType)
                    setattr(found, name, self.function(member) if written else self.value(member))
        return found


class _Module:
    """Stands for a module."""

    def __init__(self, binder: Binder, real: types.ModuleType):
        self._binder, self._real = binder, real

    def __getattr__(self, name: str) -> Any:
        real = vars(self)["_real"]
        if not hasattr(real, name):
            raise EmulatorError(f"{real.__name__} has no {name!r}")
        found = self._binder.value(getattr(real, name))
        setattr(self, name, found)
        return found
