"""One launch: what its programs do to the memory they share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import triton.language as tl

from .binding import Binder
from .memory import Memory, extents_of, span
from .scheduler import Access, Index, OutOfBounds, Programs, Scheduler
from .values import (
    RAW,
    STORAGE,
    EmulatorError,
    Tensor,
    converted,
    poison,
    rank_checked,
    raw,
    round_to_bfloat16,
    tensor,
    unraw,
)

TWINS: dict[str, Callable[..., Any]] = {}


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
        self.bound = (binder := Binder()).function
        memory = Memory([extent for name, value in arguments.items() for extent in extents_of(name, value)])
        early = [name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)]
        given = {name: binder.value(value) for name, value in constants.items()}
        for name, value in arguments.items():
            given[name] = binder.value(value) if name in early else argument(name, value)
        inspect.signature(kernel.fn).bind(**given)  # before any program runs: names that are missing, or too many
        run = self.bound(kernel)
        self.turn = Turn(self)
        self._watches = scheduler.policy != "lazy"  # every load is a point
        super().__init__(scheduler, lambda: run(**given), grid, memory)

    def _halves(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """A flat mask in two random halves, or None where the access stays whole."""
        if mask.size == 1 or not self.scheduler.tear or self.scheduler.random.random() >= self.scheduler.tear:
            return None
        half = self.scheduler.halves.integers(0, 2, mask.shape, dtype=bool)
        return mask & half, mask & ~half

    def _check(self, verb: str, addresses: Any, itemsize: int) -> None:
        fault = self.memory.fault(addresses, itemsize)
        if fault is not None:
            raise OutOfBounds(f"{self._who(self.current)} {verb} {fault}\n  at {self._lines(self.current)}")

    def look(self, verb: str, addresses: Any, kind: np.dtype) -> Any:
        """Elements as they are now, by a load that others may see change: it passes a point, and counts as waiting."""
        self._check(verb, addresses, kind.itemsize)
        me = self.current
        begin, last = me.looking = span(addresses)
        self.point()
        halves = self._halves(np.ones(addresses.shape, bool)) if addresses.ndim else None
        if halves is None:
            values = self.memory.gather(addresses, kind)
        else:
            values = np.empty(addresses.shape, kind)
            for i, half in enumerate(halves):
                if i:
                    self.point()
                if half.any():
                    values[half] = self.memory.gather(addresses[half], kind)
        me.looking = (0, -1)
        me.latest = Access(verb, addresses, values)
        signature = (begin, last, addresses.size, hash(values.tobytes()))
        if signature in me.seen:
            me.repeats += 1
            me.idle += 1
        else:
            me.seen.add(signature)
            me.repeats = me.idle = 0
        return values

    def load(self, pointer: Tensor, mask: Any, other: Any, volatile: bool) -> Tensor:
        """As the language's load."""
        dtype = _pointee(pointer)
        kind, addresses = RAW[dtype], pointer.v
        active = None
        if mask is not None:
            active = np.asarray(tensor(mask).v, bool)
            if active.ndim:
                rank_checked(addresses, active)
            addresses, active = np.broadcast_arrays(addresses, active)
            if active.all():
                active = None
        if active is not None:
            fill = poison(dtype)
            if other is not None:
                other = tensor(other)
                fill = converted(other.v, other.dtype, dtype)
            out = np.empty(addresses.shape, STORAGE[dtype])
            out[...] = fill
            if active.any():
                out[active] = unraw(self._loaded(addresses[active], kind, volatile), dtype)
            return Tensor(out[()], dtype)
        return Tensor(unraw(self._loaded(addresses, kind, volatile), dtype), dtype)

    def _loaded(self, addresses: Any, kind: np.dtype, volatile: bool) -> Any:
        if volatile or self._watches:
            return self.look("loads", addresses, kind)
        self.step()
        self._check("loads", addresses, kind.itemsize)
        return self.memory.gather(addresses, kind)

    def store(self, pointer: Tensor, value: Any, mask: Any) -> None:
        """As the language's store."""
        dtype = _pointee(pointer)
        value = tensor(value)
        values = raw(converted(value.v, value.dtype, dtype), dtype)
        addresses = pointer.v
        rank_checked(addresses, values)
        if mask is not None:
            active = np.asarray(tensor(mask).v, bool)
            addresses, values, active = np.broadcast_arrays(addresses, values, active)
            if not active.all():
                addresses, values = addresses[active], values[active]
        elif addresses.shape != values.shape:
            addresses, values = np.broadcast_arrays(addresses, values)
        self.put(addresses, np.asarray(values))

    def put(self, addresses: Any, values: np.ndarray) -> None:
        """Store raw values."""
        me = self.point()
        if not addresses.size:
            return
        self._check("stores", addresses, values.dtype.itemsize)
        access = Access("stores", addresses, None)
        halves = self._halves(np.ones(addresses.shape, bool)) if addresses.ndim else None
        for i, half in enumerate(halves or ()):
            if i:
                self.point()
            if half.any():
                self.memory.scatter(addresses[half], values[half])
                self._stored(me, access)
        if halves is None:
            self.memory.scatter(addresses, values)
            self._stored(me, access)

    def atomic(self, pointer: Tensor, operands: tuple[Any, ...], mask: Any, update: Callable[..., Any]) -> Tensor:
        """Element after element, at one point for all of them: the values before."""
        dtype = _pointee(pointer)
        kind, parts = RAW[dtype], [tensor(operand) for operand in operands]
        values = [converted(part.v, part.dtype, dtype) for part in parts]
        active = np.asarray(True) if mask is None else np.asarray(tensor(mask).v, bool)
        addresses, active, *values = np.broadcast_arrays(pointer.v, active, *values)
        out = np.zeros(addresses.shape, STORAGE[dtype])
        me = self.point()
        changed = False
        if active.any():
            self._check("updates", addresses[active], kind.itemsize)
        for at in zip(*np.nonzero(np.atleast_1d(active)), strict=True):
            place = at if addresses.ndim else ()
            before = self.memory.gather(addresses[place], kind)
            old = unraw(before, dtype)
            new = np.asarray(update(old, *(value[place] for value in values)), STORAGE[dtype])[()]
            after = raw(round_to_bfloat16(new) if dtype == tl.bfloat16 else new, dtype)
            self.memory.scatter(addresses[place], np.asarray(after))
            changed |= np.asarray(before).tobytes() != np.asarray(after).tobytes()
            out[place] = old
        if changed:
            self._stored(me, Access("updates", addresses[active], None))
        elif active.any():
            me.latest = Access("updates", addresses[active], np.asarray(out)[active])
            me.seen.add((*span(addresses[active]), addresses.size, hash(out.tobytes())))
            me.repeats += 1
            me.idle += 1
        return Tensor(out[()], dtype)

    def inline_asm(self, text: str, arguments: list[Tensor], dtype: Any) -> Any:
        twin = TWINS.get(text)
        if twin is None:
            raise EmulatorError(f"no twin in Python is registered (TWINS) for the inline PTX {text!r}")
        return twin(self.turn, *arguments, dtype=dtype)


def _pointee(pointer: Tensor) -> tl.dtype:
    if not isinstance(pointer, Tensor) or not pointer.dtype.is_ptr():
        raise TypeError(f"a pointer is needed, got {pointer!r}")
    return pointer.dtype.element_ty


class Turn:
    """What a twin of inline PTX does besides computing: memory, waiting, the clock."""

    def __init__(self, launch: Launch):
        self._launch = launch

    def load(self, addresses: Any, dtype: tl.dtype) -> Tensor:
        """Elements as they are now, each for itself: others may store between them. addresses: int64, any shape."""
        found = self._launch.look("waits for", _addresses(addresses), RAW[dtype])
        return Tensor(unraw(found, dtype), dtype)

    def store(self, addresses: Any, values: Tensor) -> None:
        """Values to the addresses."""
        where, bits = np.broadcast_arrays(_addresses(addresses), raw(values.v, values.dtype))
        self._launch.put(where, np.array(bits))

    def wait(self) -> None:
        """What was loaded does not do: wait until another program stores there, or nobody else can run.

        Whoever waits for ever is told of by a Deadlock. A wait that is to run out looks at the clock as well.
        """
        self._launch.wait()

    def clock(self) -> int:
        """Virtual nanoseconds since the launch began."""
        return self._launch.clock()

    def give(self) -> None:
        """Let others run, perhaps."""
        self._launch.point()


def _addresses(addresses: Any) -> Any:
    return np.asarray(addresses.v if isinstance(addresses, Tensor) else addresses, np.int64)


# ---- launches --------------------------------------------------------------------------------------------------------

POINTERS = {getattr(torch, str(kind)): tl.pointer_type(dtype) for dtype, kind in STORAGE.items() if kind.kind != "b"}
POINTERS |= {torch.bool: tl.pointer_type(tl.int1), torch.bfloat16: tl.pointer_type(tl.bfloat16)}
POINTERS |= {torch.float32: tl.pointer_type(tl.float32)}


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
    if value is None:
        return None
    if isinstance(value, (bool, int, float)):
        return tensor(value)
    raise EmulatorError(f"the emulator takes tensors and numbers as arguments, {name} is {type(value).__name__}")
