"""All programs of a grid at once in Triton's CPU interpreter, under a seeded scheduler.

The interpreter runs the programs of a grid one after another, so that a kernel whose programs wait for each other never
ends. Inside `with concurrent(seed):` every launch gets one thread per program, of which exactly one, the holder of the
baton, runs. The baton may change hands before every load, store, atomic, barrier and look at the clock, and in the
middle of a tile: a load or store is sometimes made in two random halves (`tear`), because hardware does not move a tile
at once either. A random number generator decides, so the same seed gives the same interleaving.

Three mistakes are found on the way:

    Deadlock       every live program polls memory that nobody changes any more, or the budget of steps is used up
    OutOfBounds    an access outside every tensor passed to the kernel; the plain interpreter would just make it
    a time-out     of the kernel's own, since the clock of `tl.extra.cuda.globaltimer()` is virtual here

What stays unseen: memory is sequentially consistent here, so a missing cache modifier, or a load hoisted by a compiler,
looks right; so does an access that leaves one argument and lands in another. A loop that touches neither memory nor the
clock never ends.
"""

from __future__ import annotations

import contextvars
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from .interpreter import repair

DEMOTION = 0.02  # probability, per point, that the running program falls to the lowest priority
TRITON = str(Path(triton.__file__).parent)

Policy = Literal["random", "priorities"]
Index = tuple[int, int, int]


class ConcurrencyError(RuntimeError):
    """What the scheduler finds wrong with a kernel, or with how it is asked to run one."""


class Deadlock(ConcurrencyError):  # noqa: N818
    """No live program can go on, or the launch took more than `max_steps` steps."""


class OutOfBounds(ConcurrencyError):  # noqa: N818
    """An access outside every tensor passed to the kernel."""


class _Abort(BaseException):
    """Ends the other programs' threads after an error. No Exception, so that Triton does not wrap it."""


@dataclass(frozen=True)
class _Extent:
    """The addresses [begin, end) of one tensor argument: from its first element to its last, strides considered."""

    name: str
    begin: int
    end: int
    itemsize: int

    def distance(self, address: int) -> int:
        """Bytes from the extent to `address`; 0 inside."""
        return max(self.begin - address, address - (self.end - 1), 0)

    def element(self, address: int) -> str:
        return f"{self.name}[{(address - self.begin) // self.itemsize}]"


@dataclass(frozen=True)
class _Access:
    """A program's latest access: arrays of one shape, and no values after a store."""

    verb: str
    pointers: np.ndarray
    mask: np.ndarray
    values: np.ndarray | None


@dataclass(eq=False)
class _Program:
    number: int
    index: Index
    arguments: Mapping[str, Any]
    baton: Any = field(default_factory=threading.Lock)  # free: this program may run
    thread: threading.Thread | None = None  # started when the program first gets the baton
    latest: _Access | None = None
    # Does it poll? Its loads (first byte, byte behind the last, elements, hash of the values) since it last stored
    # anything, or another stored into what it polls; how many loads in a row were among them, told it nothing new; and
    # the same since it looked at the clock.
    seen: set[tuple[int, int, int, int]] = field(default_factory=set)
    repeats: int = 0
    idle: int = 0

    def __post_init__(self) -> None:
        self.baton.acquire()

    @property
    def polls_in_vain(self) -> bool:
        return self.repeats > 1  # the first may be half of a torn load, made before a store

    def progress(self) -> None:
        self.seen.clear()
        self.repeats = self.idle = 0


def _extents(name: str, value: Any) -> Iterator[_Extent]:
    """Of the tensors in one argument of a kernel."""
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _extents(f"{name}[{i}]", part)
    elif isinstance(value, (TensorDescriptor, TensorWrapper)):
        yield from _extents(name, value.base)
    elif isinstance(value, torch.Tensor) and value.numel():
        span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        begin, itemsize = value.data_ptr(), value.element_size()
        yield _Extent(name, begin, begin + span * itemsize, itemsize)


def _itemsize(pointers: Any) -> int:
    """Bytes of what a handle of pointers points to; an int1 takes one."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


class Scheduler:
    """Runs the launches of one `concurrent` block.

    Attributes:
        steps: points passed at which the baton might change hands, over all launches so far.
        switches: how often it did.
        seed, policy: what to repeat the run with.
    """

    def __init__(
        self,
        seed: int,
        max_steps: int,
        nanoseconds_per_step: int,
        policy: Policy | None,
        switch: float | None,
        tear: float,
        patience: int,
    ):
        self.seed = seed
        self.steps = 0
        self.switches = 0
        self._random = random.Random(seed)
        self._halves = np.random.default_rng(seed)
        self.policy: Policy = policy or ("random", "priorities")[seed % 2]
        self._switch = self._random.choice((1.0, 0.3, 0.05)) if switch is None else switch
        self._max_steps, self._nanoseconds_per_step = max_steps, nanoseconds_per_step
        self._tear, self._patience = tear, patience
        self._builder = interpreter.interpreter_builder
        self.extents: list[_Extent] = []  # of the launch that runs

    # ---- the baton ---------------------------------------------------------------------------------------------------

    def run(self, kernel: Callable[..., None], calls: list[tuple[Index, dict[str, Any]]]) -> None:
        """Run one launch's programs, each `kernel(**arguments)` at its place in the grid, to their ends.

        Raises:
            Whatever a program raised first; the threads of the others have ended by then.
        """
        self._kernel = kernel
        self._programs = [_Program(i, index, arguments) for i, (index, arguments) in enumerate(calls)]
        self._live = list(self._programs)
        self._priority = self._random.sample(range(len(calls)), len(calls))
        self._error: BaseException | None = None
        self._ended = threading.Lock()
        self._ended.acquire()
        self._launched_at = self.steps
        self._resume(self._choose(None))
        try:
            self._ended.acquire()
        except BaseException as error:  # KeyboardInterrupt: the programs end at their next point
            self._error = self._error or error
            self._ended.acquire()
        for program in self._programs:
            if program.thread is not None:
                program.thread.join()
        if self._error is not None:
            raise self._error

    def _body(self, program: _Program) -> None:
        try:
            self._kernel(**program.arguments)
        except _Abort:
            pass
        except BaseException as error:
            self._error = self._error or error
        self._live.remove(program)
        try:
            if self._live and self._error is None:
                self._resume(self._choose(None))
                return
        except BaseException as error:
            self._error = error
        for other in self._live:
            if other.thread is not None:  # it must end as well; one that never began has nothing to end
                self._resume(other)
                return
        self._ended.release()

    def _resume(self, program: _Program) -> None:
        """Hand the baton over. The caller must wait for its own, or end."""
        self._current = program
        self._builder.grid_idx = program.index
        if program.thread is not None:
            program.baton.release()
            return
        context = contextvars.copy_context()  # numpy's errstate as the launching thread has it
        program.thread = threading.Thread(target=context.run, args=(self._body, program), daemon=True)
        try:
            program.thread.start()
        except RuntimeError:  # no more threads to be had
            program.thread = None
            raise

    def point(self) -> _Program:
        """Maybe let others run. Returns the program that called, which holds the baton again."""
        me = self._current
        if self._error is not None:
            raise _Abort
        self.steps += 1
        if self.steps - self._launched_at > self._max_steps:
            raise Deadlock(self._report(f"the budget of {self._max_steps} steps is used up"))
        chosen = self._choose(me)
        if chosen is not me:
            self.switches += 1
            self._resume(chosen)
            me.baton.acquire()
            if self._error is not None:
                raise _Abort
        return me

    def _choose(self, me: _Program | None) -> _Program:
        """Who runs next; `me` runs now, None when it has just ended.

        The priorities with random demotions are PCT: Burckhardt et al., A Randomized Scheduler with Probabilistic
        Guarantees of Finding Bugs (2010).

        Raises:
            Deadlock: if nobody can go on.
        """
        ready = [program for program in self._live if not program.polls_in_vain]
        if not ready:  # a program that polls what nobody has changed since waits until nobody else can run
            if all(program.idle > self._patience * len(program.seen) for program in self._live):
                raise Deadlock(self._report("every live program polls memory that nobody changes any more"))
            return self._random.choice(self._live)
        if len(ready) == 1:
            return ready[0]
        if self.policy == "priorities":
            if me is not None and self._random.random() < DEMOTION:
                self._priority[me.number] = min(self._priority) - 1
            return max(ready, key=lambda program: self._priority[program.number])
        if me is not None and not me.polls_in_vain and self._random.random() >= self._switch:
            return me
        return self._random.choice(ready)

    # ---- what the programs do ----------------------------------------------------------------------------------------

    def halves(self, mask: np.ndarray) -> list[np.ndarray] | None:
        """A mask in two random halves, or None where the access stays whole."""
        if mask.size == 1 or self._random.random() >= self._tear:
            return None
        half = self._halves.integers(0, 2, mask.shape, dtype=bool)
        return [mask & half, mask & ~half]

    def bounds(self, program: _Program, verb: str, pointers: Any, mask: np.ndarray) -> tuple[int, int]:
        """First address of an access and the one behind its last; (0, 0) if the mask leaves nothing.

        Raises:
            OutOfBounds: if an element is outside every tensor.
        """
        addresses = pointers.data if np.count_nonzero(mask) == mask.size else pointers.data[mask]
        if not addresses.size:
            return 0, 0
        itemsize = _itemsize(pointers)
        begin, end = int(addresses.min()), int(addresses.max()) + itemsize
        if any(extent.begin <= begin and end <= extent.end for extent in self.extents):
            return begin, end
        inside = np.zeros(addresses.shape, bool)  # a tile may span several tensors
        for extent in self.extents:
            inside |= (addresses >= extent.begin) & (addresses <= extent.end - itemsize)
        if not inside.all():
            outside = addresses[~inside]
            first = int(outside.flat[0])
            nearest = min(self.extents, key=lambda extent: extent.distance(first), default=None)
            place = "no tensor was passed"
            if nearest is not None:
                size = (nearest.end - nearest.begin) // nearest.itemsize
                place = f"the first would be {nearest.element(first)} of {size}, by the nearest argument"
            raise OutOfBounds(
                f"seed {self.seed}: program {program.index} {verb} {outside.size} elements outside every tensor; "
                f"{place}\n  at {self._lines(program)}"
            )
        return begin, end

    def loaded(self, program: _Program, access: _Access, begin: int, end: int) -> None:
        """Note a load, or an atomic that changed nothing: is the program polling?"""
        program.latest = access
        if begin == end:  # all of it masked: nobody waits by that
            return
        assert access.values is not None
        signature = (begin, end, access.pointers.size, hash(access.values.tobytes()))
        if signature in program.seen:
            program.repeats += 1
            program.idle += 1
        else:
            program.seen.add(signature)
            program.repeats = program.idle = 0

    def stored(self, program: _Program, access: _Access, begin: int, end: int) -> None:
        """Note that memory changed: whoever polls it, has a reason to run again."""
        program.latest = access
        program.progress()
        for other in self._live:
            if other.repeats and any(first < end and begin < behind for first, behind, *_ in other.seen):
                other.progress()

    def clock(self) -> int:
        """Virtual nanoseconds since the launch began. Whoever looks at the clock will end its wait by itself."""
        self.point().idle = 0
        return (self.steps - self._launched_at) * self._nanoseconds_per_step

    # ---- reports -----------------------------------------------------------------------------------------------------

    def _report(self, what: str) -> str:
        ended = len(self._programs) - len(self._live)
        head = f"seed {self.seed}: {what} ({ended} of {len(self._programs)} programs have ended)"
        return "\n".join([head, *(f"  program {p.index} {self._doing(p)}" for p in self._live)])

    def _doing(self, program: _Program) -> str:
        access = program.latest
        if access is None:
            return f"has touched no memory yet, at {self._lines(program)}"
        addresses = access.pointers[access.mask]
        if not addresses.size:
            return f"{access.verb} nothing at {self._lines(program)}"
        at, seen = 0, ""
        if access.values is not None:
            values = access.values[access.mask]
            bits = values.view(f"u{values.itemsize}")
            sentinels = np.flatnonzero(bits == np.iinfo(bits.dtype).max)  # what an exchanging kernel waits to vanish
            at = sentinels[0] if sentinels.size else 0
            seen = f" = {values[at]}"
            if sentinels.size:
                seen += f" (all bits set, as in {sentinels.size} of {addresses.size} elements)"
        address = int(addresses[at])
        element = "/".join(extent.element(address) for extent in self.extents if not extent.distance(address))
        return f"{access.verb} {element}{seen} at {self._lines(program)}"

    def _lines(self, program: _Program) -> str:
        """The lines of kernel source where a program is, innermost first."""
        frame: FrameType | None = None
        if program.thread is not None and program.thread.ident is not None:
            frame = sys._current_frames().get(program.thread.ident)
        found = []
        while frame is not None and frame.f_code is not Scheduler._body.__code__:
            code = frame.f_code
            if code.co_filename != __file__ and not code.co_filename.startswith(TRITON):
                found.append(f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}")
            frame = frame.f_back
        return " < ".join(found) or "its beginning"


class _Collected:
    """Stands for the kernel in the interpreter's loop over the grid: notes the calls, and runs them all at the last."""

    def __init__(self, kernel: Any, scheduler: Scheduler):
        self.kernel, self.scheduler = kernel, scheduler
        self.calls: list[tuple[Index, dict[str, Any]]] = []
        # what the interpreter reads of a kernel
        self.__signature__ = inspect.signature(kernel)
        self.__globals__ = kernel.__globals__
        self.__annotations__ = kernel.__annotations__
        self.__name__ = kernel.__name__

    def __call__(self, **arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        self.calls.append((builder.grid_idx, arguments))
        x, y, z = builder.grid_dim
        if len(self.calls) == x * y * z:
            self.scheduler.run(self.kernel, self.calls)


class _Executor(interpreter.GridExecutor):
    """The interpreter's launch of a grid, with the programs given to a scheduler."""

    def __init__(self, scheduler: Scheduler, kernel: Any, *rest: Any, **options: Any):
        super().__init__(_Collected(kernel, scheduler), *rest, **options)
        self.scheduler = scheduler

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        self.scheduler.extents = [extent for name, value in named for extent in _extents(name, value)]
        return args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__call__(*args, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while isinstance(cause, InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, ConcurrencyError):
                raise cause from None
            raise


def _methods(scheduler: Scheduler) -> dict[str, Callable[..., Any]]:
    """The methods of the interpreter's builder that touch memory, each with its points."""
    builder, handle = interpreter.interpreter_builder, interpreter.TensorHandle
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, barrier = builder.create_atomic_rmw, builder.create_atomic_cas, builder.create_barrier
    policies = (None,) * (len(inspect.signature(load).parameters) - 4)  # of the cache: two of them, one from 3.9 on

    def masked_load(pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        active = np.asarray(mask.data, dtype=bool)  # an array itself under a block pointer
        program = scheduler.point()
        begin, end = scheduler.bounds(program, "loads", pointers, active)
        halves = scheduler.halves(active)
        if halves is None:
            result = load(pointers, mask, other, *rest, **options)
        else:
            first = load(pointers, handle(halves[0], tl.int1), other, *rest, **options)
            scheduler.point()
            second = load(pointers, handle(halves[1], tl.int1), other, *rest, **options)
            result = handle(np.where(halves[0], first.data, second.data), first.dtype)
        scheduler.loaded(program, _Access("loads", pointers.data, active, result.data), begin, end)
        return result

    def masked_store(pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> None:
        active = np.asarray(mask.data, dtype=bool)
        program = scheduler.point()
        begin, end = scheduler.bounds(program, "stores", pointers, active)
        access = _Access("stores", pointers.data, active, None)
        halves = scheduler.halves(active)
        if halves is None:
            store(pointers, value, mask, *rest, **options)
        else:
            store(pointers, value, handle(halves[0], tl.int1), *rest, **options)
            scheduler.stored(program, access, begin, end)
            scheduler.point()
            store(pointers, value, handle(halves[1], tl.int1), *rest, **options)
        scheduler.stored(program, access, begin, end)

    def atomic(pointers: Any, active: np.ndarray, operation: Callable[[], Any]) -> Any:
        program = scheduler.point()
        begin, end = scheduler.bounds(program, "updates", pointers, active)
        before = operation()
        access = _Access("updates", pointers.data, active, before.data)
        after = load(pointers, handle(active, tl.int1), None, *policies, False)
        if before.data[active].tobytes() == after.data[active].tobytes():
            scheduler.loaded(program, access, begin, end)
        else:
            scheduler.stored(program, access, begin, end)
        return before

    def atomic_rmw(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        active = np.asarray(mask.data, dtype=bool)
        return atomic(pointers, active, lambda: rmw(operation, pointers, value, mask, *rest))

    def atomic_cas(pointers: Any, *rest: Any) -> Any:
        return atomic(pointers, np.ones(pointers.data.shape, bool), lambda: cas(pointers, *rest))

    def barrier_with_point(*rest: Any) -> Any:
        scheduler.point()
        return barrier(*rest)

    return {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "create_atomic_rmw": atomic_rmw,
        "create_atomic_cas": atomic_cas,
        "create_barrier": barrier_with_point,
        "global_timer": scheduler.clock,
    }


_running: Scheduler | None = None


def running_concurrently() -> bool:
    """Whether this process is inside a `concurrent` block: may programs of a grid wait for each other?"""
    return _running is not None


@contextmanager
def concurrent(
    seed: int = 0,
    *,
    max_steps: int = 1_000_000,
    nanoseconds_per_step: int = 1000,
    policy: Policy | None = None,
    switch: float | None = None,
    tear: float = 0.3,
    patience: int = 200,
) -> Iterator[Scheduler]:
    """Inside: the programs of every interpreted launch run concurrently, one step at a time.

    Args:
        seed: of everything random. Even seeds follow the policy "random", odd ones "priorities", unless told.
        max_steps: of one launch; beyond them it is a Deadlock.
        nanoseconds_per_step: by how much the launch's virtual clock advances at every step of any program.
        policy: "random" hands the baton to anyone, with probability `switch` at each point; "priorities" to the
            program of the highest priority that does not poll in vain, with random demotions.
        switch: by default one of 1.0, 0.3 and 0.05, by the seed.
        tear: probability that a tile is loaded or stored in two halves.
        patience: rounds of polling in vain after which all that is left is a Deadlock. A kernel that looks at the
            clock more rarely than every `patience` rounds needs more.

    Yields:
        The scheduler, whose `steps` and `switches` count what happens.

    Raises:
        ConcurrencyError: inside another such block.
        Deadlock, OutOfBounds: from a launch.
    """
    global _running
    if _running is not None:
        raise ConcurrencyError("a `concurrent` block inside another: the interpreter has one scheduler at a time")
    repair()
    scheduler = Scheduler(seed, max_steps, nanoseconds_per_step, policy, switch, tear, patience)
    builder = vars(interpreter.interpreter_builder)
    methods, before, executor = _methods(scheduler), dict(builder), interpreter.GridExecutor
    _running = scheduler
    try:
        builder.update(methods)  # attributes of the one instance, before those of its class
        interpreter.GridExecutor = partial(_Executor, scheduler)
        yield scheduler
    finally:
        interpreter.GridExecutor = executor
        builder.clear()
        builder.update(before)
        _running = None
