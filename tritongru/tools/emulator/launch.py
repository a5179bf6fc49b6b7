"""One launch: its programs as threads, one of which holds the baton; the tensors that they share; reports on them."""

import random
import sys
import threading
import traceback
import types
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl

from .language import KERNEL
from .values import RAW, EmulatorError, Tensor, raw, unraw

FIRST = 1 << 12  # no address is below


class Deadlock(EmulatorError):  # noqa: N818
    """No live program can go on, or the launch took more than `max_steps` steps."""


class KernelError(EmulatorError):
    """An exception in a program; it is the cause."""


class _Abort(BaseException):
    """Ends a program after the error of another."""


class OutOfBounds(EmulatorError):  # noqa: N818
    """An access outside every tensor passed to the kernel."""


@cache
def everything(kind: np.dtype) -> np.ndarray:
    """The process's address space from FIRST on, as elements of one type: whoever reads or writes has checked where."""
    interface = {"version": 3, "data": (FIRST, False), "shape": (2**47 // kind.itemsize,), "typestr": kind.str}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


class Memory:
    """The tensors of a launch, by their addresses."""

    def __init__(self, arguments: Mapping[str, Any]):
        self.extents: list[tuple[int, int, int, str]] = []  # [begin, end), size of an element, name; strides considered
        for name, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                begin, itemsize = tensor.data_ptr(), tensor.element_size()
                self.extents.append((begin, begin + elements * itemsize, itemsize, name))
        self.extents.sort()
        self.begins = [begin for begin, *_ in self.extents]
        # Of each and all before it, the greatest; behind them, as number -1, that of what lies before all of them.
        self.ends = [*accumulate((end for _, end, *_ in self.extents), max), 0]

    def checked(self, verb: str, addresses: Any, itemsize: int) -> tuple[int, int]:
        """The least and the greatest address of an access to be made."""
        if not addresses.size:
            return 0, -1
        begin, last = int(addresses.min()), int(addresses.max())
        if (begin | last) & (itemsize - 1):
            raise OutOfBounds(f"{verb} {addresses.size} elements at addresses that are no multiples of {itemsize}")
        if last + itemsize > self.ends[bisect_right(self.begins, begin) - 1]:  # perhaps in several: each for itself
            ends = np.array(self.ends)[np.searchsorted(self.begins, addresses, side="right") - 1]
            if (outside := addresses[addresses + itemsize > ends]).size:
                first = self.name(int(outside.flat[0]))
                raise OutOfBounds(f"{verb} {outside.size} elements outside every tensor, the first {first}")
        return begin, last

    def load(self, addresses: Any, kind: np.dtype) -> Any:
        return everything(kind).take((addresses - FIRST) >> (kind.itemsize.bit_length() - 1))

    def store(self, addresses: Any, values: np.ndarray) -> None:
        everything(values.dtype)[(addresses - FIRST) >> (values.itemsize.bit_length() - 1)] = values

    def name(self, address: int) -> str:
        """Of an element, by the argument that holds it or is the nearest."""
        begin, end, itemsize, name = min(self.extents, key=lambda e: max(e[0] - address, address - e[1] + 1, 0))
        return f"{name}[{(address - begin) // itemsize}] of {(end - begin) // itemsize}"


@dataclass(eq=False)
class Program:
    index: tuple[int, ...]
    baton: Any = field(default_factory=lambda: threading.Semaphore(0))  # free: this program may run
    thread: int = 0
    # its last load: the least and the greatest address, all addresses, the values
    look: tuple[int, int, np.ndarray, np.ndarray] = (0, -1, np.empty(0), np.empty(0))
    hit: bool = False  # since its last wait another has stored into what it looked at
    waits: bool = False
    since: int = -1  # the step at which it last gave the baton away


@dataclass
class Scheduler:
    """The options of launches, and what happened in them."""

    seed: int = 0  # of everything random
    # Probability that at a point anyone goes on; -1: 1, 0.3 or 0.05, by seed. With 0 a program runs until it waits.
    switch: float = -1
    tear: float = 0.3  # probability that a tile is loaded or stored in two halves
    max_steps: int = 1_000_000  # of one launch; beyond them it is a Deadlock
    # By how much a launch's clock advances at every step of any program. With 0 it stands still, and a wait that would
    # run out is a Deadlock, which says what it waits for.
    nanoseconds_per_step: int = 1000
    steps: int = field(default=0, init=False)  # points passed at which the baton might change hands, in all launches
    switches: int = field(default=0, init=False)  # how often it did

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.halves = np.random.default_rng(self.seed)
        if self.switch < 0:
            self.switch = self.random.choice((1.0, 0.3, 0.05))


class Launch:
    """The programs of one launch, and the memory they share. To a twin of inline PTX it is the `turn`."""

    current: Program  # which holds the baton

    def __init__(self, scheduler: Scheduler, run: Callable[[], None], grid: Sequence[int], memory: Memory):
        self.scheduler, self._run, self.grid, self.memory = scheduler, run, grid, memory
        self.programs = [Program(index) for index in product(*map(range, grid))]
        self._live = list(self.programs)
        self._began = scheduler.steps
        self._skipped = 0  # nanoseconds of the clock
        self._error: BaseException | None = None

    def run(self, together: bool) -> None:
        """Run the programs to their ends, together or one after the other."""
        if together:
            with ThreadPoolExecutor(len(self.programs)) as pool:
                try:
                    work = [pool.submit(self._work, program) for program in self.programs]
                    self._resume(self._choose(None))
                    while wait(work, timeout=0.2).not_done:  # a signal may come just before it sleeps
                        pass
                except BaseException as error:  # KeyboardInterrupt, no more threads: each ends at its next point
                    self._error = self._error or error
                    for program in self.programs:
                        program.baton.release()
        else:
            for program in self.programs:
                self._live = [program]
                self._resume(program)
                self._work(program)
        if self._error is not None:
            raise self._error

    def _resume(self, program: Program) -> None:
        """Hand the baton over. The caller must wait for its own, or end."""
        self.current = program
        program.baton.release()

    def _work(self, program: Program) -> None:
        """A program, from its first turn to its end, after which it hands the baton on."""
        program.thread = threading.get_ident()
        program.baton.acquire()
        try:
            if self._error is None:
                with np.errstate(all="ignore"):
                    self._run()
        except _Abort:
            pass
        except Exception as error:
            self._error = self._error or self._failed(program, error)
        self._live.remove(program)
        if self._live:
            self._resume(self._choose(None))

    def point(self) -> Program:
        """Maybe let others run. Returns the program that called, which holds the baton again."""
        me, scheduler = self.current, self.scheduler
        scheduler.steps += 1
        if scheduler.steps - self._began > scheduler.max_steps:
            self._error = self._deadlock(f"the budget of {scheduler.max_steps} steps is used up")
        chosen = self._choose(me)
        if chosen is not me:
            scheduler.switches += 1
            me.since = scheduler.steps
            self._resume(chosen)
            me.baton.acquire()
        if self._error is not None:
            raise _Abort
        return me

    def _choose(self, me: Program | None) -> Program:
        """Who runs next; `me` runs now, None when it has just ended."""
        scheduler, choice = self.scheduler, self.scheduler.random
        if self._error is None:
            if me is not None and not me.waits and choice.random() >= scheduler.switch:
                return me
            ready = [program for program in self._live if program.hit or not program.waits]
            if ready:  # where programs run until they wait, who waits the longest: it is the likeliest to go on
                return choice.choice(ready) if scheduler.switch else min(ready, key=lambda program: program.since)
            if scheduler.nanoseconds_per_step:  # nothing can happen but that a wait runs out
                self._skipped += 10**9
                return choice.choice(self._live)
            self._error = self._deadlock("every live program waits for what nobody changes any more")
        return me or self._live[0]

    def wait(self) -> None:
        """The running program goes on when another stores into what it looked at last, or when nobody else can run."""
        me = self.current
        me.waits = True
        self.point()
        me.waits = me.hit = False

    def clock(self) -> int:
        """Virtual nanoseconds since the launch began."""
        self.point()
        return (self.scheduler.steps - self._began) * self.scheduler.nanoseconds_per_step + self._skipped

    def _halves(self, addresses: Any) -> tuple[Any, ...]:
        """Masks of two random halves of a tile, or of all of it where the access stays whole."""
        if addresses.size <= 1 or not self.scheduler.tear or self.scheduler.random.random() >= self.scheduler.tear:
            return (...,)
        half = self.scheduler.halves.integers(0, 2, addresses.shape, dtype=bool)
        return half, ~half

    def load(self, addresses: Any, dtype: tl.dtype) -> Tensor:
        """Elements as they are now, at a point or two."""
        kind = RAW[dtype]
        begin, last = self.memory.checked("loads", addresses, kind.itemsize)
        values = np.zeros(addresses.shape, kind)
        self.current.look = begin, last, addresses, values  # before others may store at the point
        for half in self._halves(addresses):
            self.point()
            values[half] = self.memory.load(addresses[half], kind)
        return Tensor(unraw(values, dtype)[()], dtype)

    def store(self, addresses: Any, values: Tensor) -> None:
        """As many values to the addresses."""
        bits = np.asarray(raw(values.v, values.dtype))
        begin, last = self.memory.checked("stores", addresses, bits.itemsize)
        for half in self._halves(addresses):
            me = self.point()
            self.memory.store(addresses[half], bits[half])
            for other in self._live:
                other.hit |= other is not me and begin <= other.look[1] and other.look[0] <= last

    def _failed(self, program: Program, error: BaseException) -> EmulatorError:
        at = _lines([*traceback.walk_tb(error.__traceback__)][::-1])
        kind = OutOfBounds if isinstance(error, OutOfBounds) else KernelError
        what = f"program {program.index} raised {type(error).__name__}: {error}"
        report = kind(f"seed {self.scheduler.seed}: {what}\n  at {at}")
        report.__cause__ = error
        return report

    def _deadlock(self, what: str) -> Deadlock:
        text = f"seed {self.scheduler.seed}: {what} ({len(self._live)} of {len(self.programs)} programs have not ended)"
        for program in self._live:
            frame = sys._current_frames().get(program.thread)
            text += f"\n  program {program.index} at {_lines(traceback.walk_stack(frame) if frame else ())}"
            *_, addresses, values = program.look
            missing = addresses[values == -1]  # with all bits set: what an exchanging kernel waits to vanish
            if program.waits and missing.size:
                text += f" waits for {missing.size} elements, the first {self.memory.name(int(missing.flat[0]))}"
        return Deadlock(text)


def _lines(frames: Iterable[tuple[types.FrameType, int]]) -> str:
    """The lines of kernel source among some frames, innermost first."""
    found = ((frame.f_code, line) for frame, line in frames if KERNEL in frame.f_globals)
    return " < ".join(f"{Path(f.co_filename).name}:{line} in {f.co_name}" for f, line in found) or "its beginning"
