"""Who runs: the programs of a launch as threads, one of which holds the baton, and the reports on what they do."""

from __future__ import annotations

import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .binding import KERNEL
from .memory import Memory, span
from .values import EmulatorError

DEMOTION = 0.02  # probability, per point, that the running program falls to the lowest priority
PATIENCE = 200  # loads of a word that tell nothing new, without a look at the clock: taken for waiting for ever
LONGEST_SKIP = 10**11  # nanoseconds that the clock jumps ahead at once

Policy = Literal["random", "priorities", "lazy"]
Index = tuple[int, int, int]


class Deadlock(EmulatorError):  # noqa: N818
    """No live program can go on, or the launch took more than `max_steps` steps."""


class OutOfBounds(EmulatorError):  # noqa: N818
    """An access outside every tensor passed to the kernel."""


class KernelError(EmulatorError):
    """An exception in a program; it is the cause."""


class _Abort(BaseException):
    """Ends the other programs after an error."""


@dataclass(frozen=True)
class Access:
    """What a program did to memory; a store has no values."""

    verb: str
    addresses: np.ndarray
    values: np.ndarray | None

    def missing(self) -> np.ndarray:
        """Which elements have all bits set: what an exchanging kernel waits to vanish."""
        if self.values is None:
            return np.empty(0, np.int64)
        bits = np.ascontiguousarray(self.values).reshape(-1).view(f"u{self.values.itemsize}")
        return np.flatnonzero(bits == np.iinfo(bits.dtype).max)


@dataclass(eq=False)
class Program:
    number: int
    index: Index
    baton: Any = field(default_factory=threading.Lock)  # free: this program may run
    thread: threading.Thread | None = None  # set when the program first runs
    latest: Access | None = None
    looks: deque[Access] = field(default_factory=lambda: deque(maxlen=4))  # its loads since it last stored or waited
    # Does it wait? Its loads (first address, last, elements, hash of the values) since it last stored anything, or
    # another stored into what it looks at; how many in a row were among them, told it nothing new; the same since it
    # looked at the clock; and whether another stored there since it last waited.
    seen: set[tuple[int, int, int, int]] = field(default_factory=set)
    looking: tuple[int, int] = (0, -1)
    repeats: int = 0
    idle: int = 0
    hit: bool = False
    says_so: bool = False  # it is inside `wait`
    since: int = -1  # the step at which it last gave the baton away

    def __post_init__(self) -> None:
        self.baton.acquire()

    @property
    def waits(self) -> bool:
        return self.repeats > 1  # the first may be half of a torn load, made before a store

    def progress(self) -> None:
        self.seen.clear()
        self.repeats = self.idle = 0


class Scheduler:
    """The options of launches, and what happened in them.

    Attributes:
        steps: points passed at which the baton might change hands, over all launches so far.
        switches: how often it did.
        seed, policy: what to repeat the run with.
    """

    def __init__(
        self,
        seed: int = 0,
        policy: Policy | None = "lazy",
        switch: float | None = None,
        tear: float = 0.0,
        max_steps: int = 1_000_000,
        nanoseconds_per_step: int = 0,
    ):
        if policy not in (None, "random", "priorities", "lazy"):
            raise ValueError(f"policy must be 'random', 'priorities' or 'lazy', got {policy!r}")
        self.seed = seed
        self.policy: Policy = policy or ("random", "priorities")[seed % 2]
        self.random = random.Random(seed)
        self.switch = self.random.choice((1.0, 0.3, 0.05)) if switch is None else switch
        self.halves = np.random.default_rng(seed)
        self.tear = 0.0 if self.policy == "lazy" else tear
        self.max_steps, self.nanoseconds_per_step = max_steps, nanoseconds_per_step
        self.steps = 0
        self.switches = 0


class Programs:
    """The programs of one launch, and their threads."""

    def __init__(self, scheduler: Scheduler, run: Callable[[], None], grid: Index, memory: Memory):
        self.scheduler, self.memory = scheduler, memory
        self._run = run
        x, y, z = grid
        indices = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        self.programs = [Program(number, index) for number, index in enumerate(indices)]
        self.threads: list[threading.Thread] = []
        self._live = list(self.programs)
        self._priority = scheduler.random.sample(range(len(indices)), len(indices))
        self._began = scheduler.steps
        self._skipped, self._stride = 0, scheduler.nanoseconds_per_step
        self._error: BaseException | None = None
        self._ended = threading.Lock()

    # ---- the baton ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the programs to their ends.

        Raises:
            What went wrong first; the other programs' threads have ended by then.
        """
        if not self.programs:
            return
        self._ended.acquire()
        ended = False
        while not ended:
            try:
                if not self.threads and self._error is None:
                    self._resume(self._choose(None))
                ended = self._ended.acquire(timeout=-1 if self._error is None else 1)
                ended = ended or not any(thread.is_alive() for thread in self.threads)
                for thread in self.threads if ended else ():
                    if thread.ident is not None:  # else the interruption came before its start
                        thread.join()
            except BaseException as error:  # KeyboardInterrupt, perhaps several: the programs end at their next point
                self._error = self._error or error
        found, self._error = self._error, None
        if found is not None:
            try:
                raise found
            finally:
                del found  # its traceback holds this frame

    def _resume(self, program: Program) -> None:
        """Hand the baton over. The caller must wait for its own, or end."""
        self.current = program
        if program.thread is not None:
            program.baton.release()
            return
        program.thread = threading.Thread(target=self._work, args=(program,), daemon=True)
        self.threads.append(program.thread)
        try:
            program.thread.start()
        except RuntimeError:  # no more threads to be had
            self.threads.remove(program.thread)
            program.thread = None
            raise

    def _work(self, program: Program | None) -> None:
        """A thread: a program, and after its end the next one if that has not begun."""
        with np.errstate(all="ignore"):
            while program is not None:
                self.current, program.thread = program, threading.current_thread()
                try:
                    self._run()
                except _Abort:
                    pass
                except EmulatorError as error:
                    self._error = self._error or (
                        error if isinstance(error, (Deadlock, OutOfBounds)) else self._told(program, error)
                    )
                except Exception as error:
                    self._error = self._error or self._told(program, error)
                except BaseException as error:
                    self._error = self._error or error
                program = self._after(program)

    def _after(self, ended: Program) -> Program | None:
        """Hand the baton on; the program that this thread is to run, if any."""
        self._live.remove(ended)
        try:
            if self._live and self._error is None:
                chosen = self._choose(None)
                if chosen.thread is None:
                    return chosen
                self._resume(chosen)
                return None
        except BaseException as error:
            self._error = error
        for other in self._live:
            if other.thread is not None:  # it must end as well; one that never began has nothing to end
                self._resume(other)
                return None
        self._ended.release()
        return None

    def point(self) -> Program:
        """Maybe let others run. Returns the program that called, which holds the baton again."""
        me = self.current
        self.step()
        chosen = self._choose(me)
        if chosen is not me:
            self.scheduler.switches += 1
            me.since = self.scheduler.steps
            self._resume(chosen)
            me.baton.acquire()
            if self._error is not None:
                raise _Abort
        return me

    def step(self) -> None:
        if self._error is not None:
            raise _Abort
        self.scheduler.steps += 1
        if self.scheduler.steps - self._began > self.scheduler.max_steps:
            raise Deadlock(self._report(f"the budget of {self.scheduler.max_steps} steps is used up"))

    def _choose(self, me: Program | None) -> Program:
        """Who runs next; `me` runs now, None when it has just ended.

        The priorities with random demotions are PCT: Burckhardt et al., A Randomized Scheduler with Probabilistic
        Guarantees of Finding Bugs (2010).

        Raises:
            Deadlock: if nobody can go on.
        """
        policy, choice = self.scheduler.policy, self.scheduler.random
        if policy == "lazy" and me is not None and not me.waits:
            return me
        ready = [program for program in self._live if not program.waits]
        if not ready:  # a program that waits for what nobody has changed since gets no turn while another can run
            stands_still = not self.scheduler.nanoseconds_per_step
            if all(
                (program.says_so and stands_still) or program.idle > PATIENCE * max(1, len(program.seen))
                for program in self._live
            ):
                raise Deadlock(self._report("every live program waits for what nobody changes any more"))
            self._skipped += self._stride  # nothing can happen but that a wait runs out
            self._stride = min(2 * self._stride, LONGEST_SKIP)
            return choice.choice(self._live)
        if policy == "lazy":  # who waits the longest: what it waits for is there if anything is
            return min(ready, key=lambda program: program.since)
        if len(ready) == 1:
            return ready[0]
        if policy == "priorities":
            if me is not None and choice.random() < DEMOTION:
                self._priority[me.number] = min(self._priority) - 1
            return max(ready, key=lambda program: self._priority[program.number])
        if me is not None and not me.waits and choice.random() >= self.scheduler.switch:
            return me
        return choice.choice(ready)

    def wait(self) -> None:
        """The running program goes on only when another stores into what it looked at, or when nobody else can run."""
        me = self.current
        if not me.hit:
            me.repeats = max(2, me.repeats)
            me.idle += 1
        me.says_so = True
        self.point()
        me.says_so = me.hit = False
        me.looks.clear()

    def _stored(self, me: Program, addresses: Any, ends: tuple[int, int], verb: str = "stores") -> None:
        """Note that memory changed: whoever waits for it has a reason to run again."""
        me.latest = Access(verb, addresses, None)
        me.looks.clear()
        me.progress()
        self._stride = self.scheduler.nanoseconds_per_step
        begin, last = ends
        for other in self._live:
            if other is not me:
                spans = (other.looking, *(found[:2] for found in other.seen))
                if any(first <= last and begin <= behind for first, behind in spans):
                    other.hit = True
                    other.progress()

    def clock(self) -> int:
        """Virtual nanoseconds since the launch began. Whoever looks at a clock that moves will end its wait itself."""
        me = self.point()
        if self.scheduler.nanoseconds_per_step:
            me.idle = 0
        return (self.scheduler.steps - self._began) * self.scheduler.nanoseconds_per_step + self._skipped

    # ---- reports -----------------------------------------------------------------------------------------------------

    def _who(self, program: Program) -> str:
        return f"seed {self.scheduler.seed}: program {program.index}"

    def _told(self, program: Program, error: Exception) -> KernelError:
        lines: list[str] = []
        trace = error.__traceback__
        while trace is not None:
            if KERNEL in trace.tb_frame.f_globals:
                lines.insert(0, _line(trace.tb_frame.f_code, trace.tb_lineno))
            trace = trace.tb_next
        told = KernelError(
            f"{self._who(program)} raised {type(error).__name__}: {error}\n  at {' < '.join(lines) or 'its beginning'}"
        )
        told.__cause__ = error
        return told

    def _report(self, what: str) -> str:
        ended = len(self.programs) - len(self._live)
        head = f"seed {self.scheduler.seed}: {what} ({ended} of {len(self.programs)} programs have ended)"
        return "\n".join([head, *(f"  program {p.index} {self._doing(p)}" for p in self._live)])

    def _doing(self, program: Program) -> str:
        access = next((look for look in program.looks if look.missing().size), program.latest)
        if program.thread is None:
            return "has not begun"
        if access is None:
            return f"has touched no memory that others see, at {self._lines(program)}"
        addresses = np.atleast_1d(access.addresses).reshape(-1)
        begin, last = span(addresses)
        names = [
            f"{extent.name}[{extent.place(begin)}]"
            if begin == last
            else f"{extent.name}[{extent.place(begin)} .. {extent.place(last)}]"
            for extent in self.memory.extents
            if not extent.distance(begin) and not extent.distance(last)
        ]
        seen = ""
        if access.values is not None:
            values = np.atleast_1d(access.values).reshape(-1)
            missing = access.missing()
            seen = f" = {values[0]}" if values.size == 1 else ""
            if missing.size:
                first = int(addresses[missing[0]])
                at = "/".join(
                    f"{extent.name}[{extent.place(first)}]"
                    for extent in self.memory.extents
                    if not extent.distance(first)
                )
                seen += f" (all bits set in {missing.size} of {values.size} elements, the first {at})"
        return f"{access.verb} {'/'.join(names) or 'several arguments'}{seen} at {self._lines(program)}"

    def _lines(self, program: Program) -> str:
        """The lines of kernel source where a program is, innermost first."""
        frame: types.FrameType | None = None
        if program.thread is not None and program.thread.ident is not None:
            frame = sys._current_frames().get(program.thread.ident)
        found = []
        while frame is not None and frame.f_code is not Programs._work.__code__:
            if KERNEL in frame.f_globals:
                found.append(_line(frame.f_code, frame.f_lineno))
            frame = frame.f_back
        return " < ".join(found) or "its beginning"


def _line(code: types.CodeType, number: int | None) -> str:
    return f"{Path(code.co_filename).name}:{number} in {code.co_name}"
