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
    single,
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

    def _halves(self, addresses: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """Masks of two random halves of a tile, or None where the access stays whole."""
        if addresses.size == 1 or not self.scheduler.tear or self.scheduler.random.random() >= self.scheduler.tear:
            return None
        half = self.scheduler.halves.integers(0, 2, addresses.shape, dtype=bool)
        return half, ~half

    def _checked(self, verb: str, addresses: Any, itemsize: int) -> tuple[int, int]:
        """The least and the greatest address of an access to be made."""
        ends = span(addresses)
        fault = self.memory.fault(addresses, itemsize, ends)
        if fault is not None:
            raise OutOfBounds(f"{self._who(self.current)} {verb} {fault}\n  at {self._lines(self.current)}")
        return ends

    def look(self, verb: str, addresses: Any, kind: np.dtype) -> Any:
        """Elements as they are now, by a load that others may see change: it passes a point, and counts as waiting."""
        me = self.current
        ends = me.looking = self._checked(verb, addresses, kind.itemsize)
        self.point()
        halves = self._halves(addresses)
        if halves is None:
            values = self.memory.gather(addresses, kind, ends)
        else:
            values = np.empty(addresses.shape, kind)
            for i, half in enumerate(halves):
                if i:
                    self.point()
                if half.any():
                    values[half] = self.memory.gather(addresses[half], kind, ends)
        me.looking = (0, -1)
        me.latest = Access(verb, addresses, values)
        me.looks.append(me.latest)
        signature = (*ends, addresses.size, hash(values.tobytes()))
        if signature in me.seen:
            me.repeats += 1
            me.idle += 1
        else:
            me.seen.add(signature)
            me.repeats = me.idle = 0
        return values

    def load(self, pointer: Tensor, mask: Any, other: Any, volatile: bool) -> Tensor:
        """As the language's load."""
        dtype, addresses = _pointee(pointer), pointer.v
        active = None if mask is None else _lanes(mask, addresses)
        if active is None or active.all():
            return Tensor(unraw(self._loaded(addresses, RAW[dtype], volatile), dtype), dtype)
        fill = poison(dtype)
        if other is not None:
            other = tensor(other)
            fill = converted(other.v, other.dtype, dtype)
        out = np.empty(addresses.shape, STORAGE[dtype])
        out[...] = fill
        if active.any():
            out[active] = unraw(self._loaded(addresses[active], RAW[dtype], volatile), dtype)
        return Tensor(out[()], dtype)

    def _loaded(self, addresses: Any, kind: np.dtype, volatile: bool) -> Any:
        if volatile or self._watches:
            return self.look("loads", addresses, kind)
        self.step()
        return self.memory.gather(addresses, kind, self._checked("loads", addresses, kind.itemsize))

    def store(self, pointer: Tensor, value: Any, mask: Any) -> None:
        """As the language's store."""
        dtype, addresses, value = _pointee(pointer), pointer.v, tensor(value)
        values = raw(converted(value.v, value.dtype, dtype), dtype)
        if values.shape != addresses.shape:
            values = _spread(values, addresses)
        if mask is not None:
            active = _lanes(mask, addresses)
            if not active.all():
                addresses, values = addresses[active], values[active]
        self.put(addresses, np.asarray(values))

    def put(self, addresses: Any, values: np.ndarray) -> None:
        """Store raw values."""
        me = self.point()
        if not addresses.size:
            return
        ends = self._checked("stores", addresses, values.dtype.itemsize)
        halves = self._halves(addresses)
        if halves is None:
            self.memory.scatter(addresses, values, ends)
        else:
            for half in halves:
                if half.any():
                    self.memory.scatter(addresses[half], values[half], ends)
                if half is halves[0]:
                    self._stored(me, addresses, ends)
                    self.point()
        self._stored(me, addresses, ends)

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
        where = addresses[active]
        ends = self._checked("updates", where, kind.itemsize) if where.size else (0, -1)
        for at in zip(*np.nonzero(np.atleast_1d(active)), strict=True):
            place = at if addresses.ndim else ()
            before = self.memory.gather(addresses[place], kind, span(addresses[place]))
            old = unraw(before, dtype)
            new = np.asarray(update(old, *(value[place] for value in values)), STORAGE[dtype])[()]
            after = raw(round_to_bfloat16(new) if dtype == tl.bfloat16 else new, dtype)
            self.memory.scatter(addresses[place], np.asarray(after), span(addresses[place]))
            changed |= np.asarray(before).tobytes() != np.asarray(after).tobytes()
            out[place] = old
        if changed:
            self._stored(me, where, ends, "updates")
        elif where.size:
            me.latest = Access("updates", where, out[active])
            me.seen.add((*ends, where.size, hash(out.tobytes())))
            me.repeats += 1
            me.idle += 1
        return Tensor(out[()], dtype)

    def inline_asm(self, text: str, arguments: list[Tensor], dtype: Any) -> Any:
        twin = TWINS.get(text)
        if twin is None:
            raise EmulatorError(f"no twin in Python is registered (TWINS) for the inline PTX {text!r}")
        return twin(self.turn, *arguments, dtype=dtype)


def _lanes(mask: Any, addresses: Any) -> Any:
    """A mask in the shape of the pointers."""
    active = tensor(mask)
    v = active.v if active.dtype == tl.int1 else active.v != 0
    return v if v.shape == addresses.shape else _spread(v, addresses)


def _spread(v: Any, addresses: Any) -> Any:
    """A value or mask in the shape of the pointers, which never take that of the others."""
    rank_checked(addresses, v)
    return np.broadcast_to(v, addresses.shape)


def _pointee(pointer: Tensor) -> tl.dtype:
    if not isinstance(pointer, Tensor) or not pointer.dtype.is_ptr():
        raise TypeError(f"a pointer is needed, got {pointer!r}")
    return single(pointer.dtype.element_ty)


class Turn:
    """What a twin of inline PTX does besides computing: memory, waiting, the clock."""

    def __init__(self, launch: Launch):
        self._launch = launch

    def load(self, addresses: Any, dtype: tl.dtype) -> Tensor:
        """Elements as they are now, each for itself: others may store between them. addresses: int64, any shape."""
        found = self._launch.look("waits for", _addresses(addresses), RAW[dtype])
        return Tensor(unraw(found, single(dtype)), single(dtype))

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
