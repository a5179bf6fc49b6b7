"""A kernel's own source, bound to the emulator's language in place of Triton."""

from __future__ import annotations

import dis
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl

from . import modules

KERNEL = "__emulated__"  # among the globals of a function that runs here


@cache
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """The global names that a function reads, and functions inside it."""
    found = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found += _globals_of(const)
    return tuple(dict.fromkeys(found))


class Binder:
    """Functions of kernels, with the emulator's language among their globals."""

    def __init__(self) -> None:
        self._bound: dict[Any, Any] = {}

    def function(self, function: Any) -> Callable[..., Any]:
        """Of a function under gluon.jit or triton.jit, or a plain one."""
        fn = getattr(function, "fn", function)
        found = fn if KERNEL in fn.__globals__ else self._bound.get(fn)
        if found is None:
            names: dict[str, Any] = {
                "__builtins__": __builtins__,
                "__name__": fn.__module__,
                KERNEL: True,
            } | modules.BUILTINS
            cells = tuple(types.CellType() for _ in fn.__closure__ or ())
            found = types.FunctionType(fn.__code__, names, fn.__name__, None, cells)
            self._bound[fn] = found  # before what it calls, which may call it
            found.__defaults__ = fn.__defaults__ and tuple(map(self.value, fn.__defaults__))
            found.__kwdefaults__ = fn.__kwdefaults__ and {k: self.value(v) for k, v in fn.__kwdefaults__.items()}
            for own, cell in zip(cells, fn.__closure__ or (), strict=True):
                own.cell_contents = self.value(cell.cell_contents)
            for name in _globals_of(fn.__code__):
                if name in fn.__globals__:
                    names[name] = self.value(fn.__globals__[name])
        return found

    def value(self, value: Any) -> Any:
        """What a kernel gets for a global of its module, a constant or a default."""
        if isinstance(value, types.ModuleType):
            return modules.module(value) if modules.of_triton(value) else _Names(self, value)
        if isinstance(value, type):
            return self._class(value) if getattr(value, "__triton_aggregate__", False) else modules.known(value, "")
        value = modules.unwrapped(value)
        fn = getattr(value, "fn", None)
        if isinstance(fn, types.FunctionType) and not modules.of_triton(fn):
            if type(value).__name__ == "ConstexprFunction":
                return lambda *args, **options: modules.unwrapped(value(*args, **options))
            return self.function(value)
        if callable(value) and modules.of_triton(fn or value) and not isinstance(value, tl.dtype):
            return modules.known(value, f"{(fn or value).__module__}.{(fn or value).__name__}")
        return value

    def _class(self, cls: type) -> type:
        """A class under @aggregate, without Triton's checks of its fields."""
        found = self._bound.get(cls)
        if found is None:
            new = cls.__new__
            own = dict(zip(new.__code__.co_freevars, new.__closure__ or (), strict=True))["cls"].cell_contents
            fields = {name for base in own.__mro__ for name in getattr(base, "__annotations__", ())}

            def set_field(self: Any, name: str, value: Any) -> None:
                if name not in fields:
                    raise AttributeError(f"{own.__name__} has no field {name!r}")
                object.__setattr__(self, name, value)

            members: dict[str, Any] = {}
            found = self._bound[cls] = type(own.__name__, (), {"__setattr__": set_field})
            for base in reversed(own.__mro__[:-1]):
                members |= vars(base)
            for name, member in members.items():
                if name not in ("__dict__", "__weakref__", "__setattr__", "__module__", "__annotations__"):
                    setattr(found, name, self._member(member))
        return found

    def _member(self, member: Any) -> Any:
        if isinstance(member, property):
            return property(self.function(member.fget))
        if isinstance(member, (staticmethod, classmethod)):
            return type(member)(self._member(member.__func__))
        if isinstance(member, types.FunctionType) or isinstance(getattr(member, "fn", None), types.FunctionType):
            return self.function(member)
        return self.value(member)


class _Names:
    """Stands for a module that is not Triton's."""

    def __init__(self, binder: Binder, real: types.ModuleType):
        self._binder, self._real = binder, real

    def __getattr__(self, name: str) -> Any:
        found = self._binder.value(getattr(vars(self)["_real"], name))
        setattr(self, name, found)
        return found
