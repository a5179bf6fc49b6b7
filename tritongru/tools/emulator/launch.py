"""One launch: what its programs do to the memory they share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import triton.language as tl

from .binding import Binder
from .memory import Memory
from .scheduler import Access, Index, Programs, Scheduler
from .values import RAW, STORAGE, EmulatorError, Tensor, converted, poison, raw, same_rank, tensor, unraw

TWINS: dict[str, Callable[..., Any]] = {}
POINTERS = {getattr(torch, str(kind)): tl.pointer_type(dtype) for dtype, kind in STORAGE.items() if kind.kind != "b"}
POINTERS |= {getattr(torch, name): tl.pointer_type(getattr(tl, name)) for name in ("float32", "bfloat16")}
POINTERS[torch.bool] = tl.pointer_type(tl.int1)


def argument(name: str, value: Any) -> Any:
    """An argument of a launch as the kernel gets it."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise EmulatorError(f"the emulator takes tensors on the CPU, {name} is on {value.device}")
        if value.dtype not in POINTERS:
            raise EmulatorError(f"the emulator has no values of {value.dtype}, the type of {name}")
        return Tensor(np.int64(value.data_ptr()), POINTERS[value.dtype])
    if isinstance(value, tuple):
        return tuple(argument(f"{name}[{i}]", part) for i, part in enumerate(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value if value is None else tensor(value)
    raise EmulatorError(f"the emulator takes tensors and numbers as arguments, {name} is {type(value).__name__}")


def pointee(pointer: Any) -> tl.dtype:
    if not isinstance(pointer, Tensor) or not pointer.dtype.is_ptr():
        raise TypeError(f"a pointer is needed, got {pointer!r}")
    return pointer.dtype.element_ty


def spread(v: Any, addresses: Any) -> Any:
    """A value or mask in the shape of the pointers, which never take that of the others."""
    same_rank(addresses, v)
    return v if v.shape == addresses.shape else np.broadcast_to(v, addresses.shape)


def lanes(mask: Any, addresses: Any) -> Any:
    if tensor(mask).dtype != tl.int1:
        raise ValueError(f"a mask must be boolean, got {mask!r}")
    return spread(tensor(mask).v, addresses)


class Launch(Programs):
    """One launch: its programs, and the memory they share."""

    def __init__(
        self,
        scheduler: Scheduler,
        kernel: Any,
        grid: Index,
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
        num_warps: int,
    ):
        self.grid, self.num_warps = grid, num_warps
        binder = Binder()
        early = [name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)]
        given = {name: binder.value(value) for name, value in constants.items()}
        for name, value in arguments.items():
            given[name] = binder.value(value) if name in early else argument(name, value)
        inspect.signature(kernel.fn).bind(**given)  # before any program runs: names that are missing, or too many
        run = binder.function(kernel)
        self.turn = Turn(self)
        super().__init__(scheduler, lambda: run(**given), grid, Memory(arguments))

    def _halves(self, addresses: Any) -> tuple[Any, ...]:
        """Masks of two random halves of a tile, or of all of it where the access stays whole."""
        if addresses.size <= 1 or not self.scheduler.tear or self.scheduler.random.random() >= self.scheduler.tear:
            return (...,)
        half = self.scheduler.halves.integers(0, 2, addresses.shape, dtype=bool)
        return half, ~half

    def look(self, verb: str, addresses: Any, kind: np.dtype, may_wait: bool = False) -> Any:
        """Elements as they are now, at a point or two: others may see them change."""
        me = self.current
        ends = self.memory.checked(verb, addresses, kind.itemsize)
        values = np.zeros(addresses.shape, kind)
        me.latest = Access(verb, addresses, ends, values)
        if may_wait:
            me.looks.append(me.latest)  # before the point, at which others may store
        for half in self._halves(addresses):
            self.point()
            values[half] = self.memory.load(addresses[half], kind)
        return values

    def load(self, pointer: Tensor, mask: Any, other: Any) -> Tensor:
        """As the language's load."""
        dtype, addresses = pointee(pointer), pointer.v
        active = None if mask is None else lanes(mask, addresses)
        if active is None or active.all():
            return Tensor(unraw(self._loaded(addresses, RAW[dtype]), dtype)[()], dtype)
        fill = poison(dtype) if other is None else converted(tensor(other).v, tensor(other).dtype, dtype)
        out = np.full(addresses.shape, fill, STORAGE[dtype])
        if active.any():
            out[active] = unraw(self._loaded(addresses[active], RAW[dtype]), dtype)
        return Tensor(out[()], dtype)

    def _loaded(self, addresses: Any, kind: np.dtype) -> Any:
        if self.scheduler.policy != "lazy":
            return self.look("loads", addresses, kind)
        self.step()
        self.memory.checked("loads", addresses, kind.itemsize)
        return self.memory.load(addresses, kind)

    def store(self, pointer: Tensor, value: Any, mask: Any) -> None:
        """As the language's store."""
        dtype, addresses, value = pointee(pointer), pointer.v, tensor(value)
        values = spread(raw(converted(value.v, value.dtype, dtype), dtype), addresses)
        if mask is not None:
            active = lanes(mask, addresses)
            if not active.all():
                addresses, values = addresses[active], values[active]
        self.put(addresses, np.asarray(values))

    def put(self, addresses: Any, values: np.ndarray) -> None:
        """Store raw values."""
        ends = self.memory.checked("stores", addresses, values.itemsize) if addresses.size else (0, -1)
        for half in self._halves(addresses):
            me = self.point()
            self.memory.store(addresses[half], values[half])
            self.stored(me, Access("stores", addresses, ends))

    def inline_asm(self, text: str, arguments: list[Tensor], dtype: Any) -> Any:
        if text not in TWINS:
            raise EmulatorError(f"no twin in Python is registered (TWINS) for the inline PTX {text!r}")
        return TWINS[text](self.turn, *arguments, dtype=dtype)


class Turn:
    """What a twin of inline PTX does besides computing: memory, waiting, the clock."""

    def __init__(self, launch: Launch):
        self._launch, self.wait, self.clock = launch, launch.wait, launch.clock

    def load(self, addresses: Any, dtype: tl.dtype) -> Tensor:
        """Elements as they are now, each for itself: others may store between them. addresses: int64, any shape."""
        return Tensor(unraw(self._launch.look("waits for", _addresses(addresses), RAW[dtype], True), dtype), dtype)

    def store(self, addresses: Any, values: Tensor) -> None:
        """Values to the addresses."""
        where, bits = np.broadcast_arrays(_addresses(addresses), raw(values.v, values.dtype))
        self._launch.put(where, np.array(bits))


def _addresses(addresses: Any) -> Any:
    return np.asarray(addresses.v if isinstance(addresses, Tensor) else addresses, np.int64)
