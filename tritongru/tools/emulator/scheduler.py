"""Who runs: the programs of a launch as threads, one of which holds the baton, and the reports on what they do."""

from __future__ import annotations

import random
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .binding import KERNEL
from .memory import Memory, OutOfBounds
from .values import EmulatorError

DEMOTION = 0.02  # probability, per point, that the running program falls to the lowest priority
PATIENCE = 200  # turns in vain of a program, with no look at the clock: taken for waiting for ever
LONGEST_SKIP = 10**11  # nanoseconds that the clock jumps ahead at once

Index = tuple[int, int, int]


class Deadlock(EmulatorError):  # noqa: N818
    """No live program can go on, or the launch took more than `max_steps` steps."""


class KernelError(EmulatorError):
    """An exception in a program; it is the cause."""


class _Abort(BaseException):
    """Ends the other programs after an error."""


@dataclass(frozen=True)
class Access:
    """What a program did to memory; a store has no values."""

    verb: str
    addresses: np.ndarray
    ends: tuple[int, int]  # the least and the greatest address
    values: np.ndarray = field(default_factory=lambda: np.empty(0))

    def missing(self) -> np.ndarray:
        """Which elements have all bits set: what an exchanging kernel waits to vanish."""
        bits = np.ascontiguousarray(self.values).reshape(-1).view(f"u{self.values.itemsize}")
        return np.flatnonzero(bits == np.iinfo(bits.dtype).max)


@dataclass(eq=False)
class Program:
    number: int
    index: Index
    baton: Any = field(default_factory=threading.Lock)  # free: this program may run
    thread: threading.Thread | None = None  # set when the program first runs
    latest: Access | None = None
    looks: list[Access] = field(default_factory=list)  # of twins, since it last stored or waited
    hit: bool = False  # another has stored since into what it looked at
    waits: bool = False
    since: int = -1  # the step at which it last gave the baton away

    def __post_init__(self) -> None:
        self.baton.acquire()


@dataclass
class Scheduler:
    """The options of launches, and what happened in them.

    Attributes:
        seed: of everything random.
        policy: "random" hands the baton to anyone, with probability `switch` at each point; "priorities" to the
            program of the highest priority that does not wait, with random demotions; "lazy" lets a program run until
            it waits. By default random for even seeds, priorities for odd ones.
        switch: by default one of 1.0, 0.3 and 0.05, by the seed.
        tear: probability that a tile is loaded or stored in two halves; the lazy policy never does.
        max_steps: of one launch; beyond them it is a Deadlock.
        nanoseconds_per_step: by how much the launch's virtual clock advances at every step of any program. With 0 it
            stands still, and a wait that would run out is a Deadlock, which says what it waits for.
        steps: points passed at which the baton might change hands, over all launches so far.
        switches: how often it did.
    """

    seed: int = 0
    policy: str = ""
    switch: float = -1.0
    tear: float = 0.3
    max_steps: int = 1_000_000
    nanoseconds_per_step: int = 1000
    steps: int = field(default=0, init=False)
    switches: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.policy = self.policy or ("random", "priorities")[self.seed % 2]
        if self.policy not in ("random", "priorities", "lazy"):
            raise ValueError(f"policy must be 'random', 'priorities' or 'lazy', got {self.policy!r}")
        self.random = random.Random(self.seed)
        if self.switch < 0:
            self.switch = self.random.choice((1.0, 0.3, 0.05))
        self.halves = np.random.default_rng(self.seed)
        self.tear = 0.0 if self.policy == "lazy" else self.tear


class Programs:
    """The programs of one launch, and their threads."""

    def __init__(self, scheduler: Scheduler, run: Callable[[], None], grid: Index, memory: Memory):
        self.scheduler, self.memory, self.current = scheduler, memory, Program(-1, (0, 0, 0))
        self._run = run
        x, y, z = grid
        indices = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        self.programs = [Program(number, index) for number, index in enumerate(indices)]
        self.threads: list[threading.Thread] = []
        self._live = list(self.programs)
        self._priority = scheduler.random.sample(range(len(indices)), len(indices))
        self._began = scheduler.steps
        self._skipped, self._stride = 0, scheduler.nanoseconds_per_step
        self._in_vain = 0  # turns of programs that wait, in a row
        self._error: BaseException | None = None
        self._ended = threading.Lock()

    def run(self) -> None:
        """Run the programs to their ends."""
        if not self._live:
            return
        ended = not self._ended.acquire()  # until the last program releases it
        while not ended:
            try:
                if not self.threads:
                    self._resume(self._choose(None))
                ended = self._ended.acquire()
            except BaseException as error:  # KeyboardInterrupt: the programs end at their next point
                self._error = self._error or error
                ended = not any(thread.ident for thread in self.threads)
        for thread in self.threads:
            if thread.ident is not None:  # else it could not be started
                thread.join()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # whose traceback holds this frame

    def _resume(self, program: Program) -> None:
        """Hand the baton over. The caller must wait for its own, or end."""
        self.current = program
        if program.thread is not None:
            program.baton.release()
            return
        thread = threading.Thread(target=self._work, args=(program,), daemon=True)
        self.threads.append(thread)
        thread.start()

    def _work(self, program: Program | None) -> None:
        """A thread: a program, and after its end the next one if that has not begun."""
        with np.errstate(all="ignore"):
            while program is not None:
                self.current, program.thread = program, threading.current_thread()
                try:
                    self._run()
                except _Abort:
                    pass
                except BaseException as error:
                    self._error = self._error or self._told(program, error)
                program = self._after(program)

    def _after(self, ended: Program) -> Program | None:
        """Hand the baton on; the program that this thread is to run, if any."""
        self._live.remove(ended)
        try:
            chosen = self._choose(None) if self._live and self._error is None else None
        except Deadlock as error:
            chosen, self._error = None, error
        if chosen is not None and chosen.thread is None:
            return chosen
        # after an error the others must end as well; one that never began has nothing to end
        chosen = chosen or next((program for program in self._live if program.thread is not None), None)
        if chosen is not None:
            self._resume(chosen)
        else:
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
        if not ready:  # nothing can happen but that a wait runs out
            self._in_vain += 1
            if not self.scheduler.nanoseconds_per_step or self._in_vain > PATIENCE * len(self._live):
                raise Deadlock(self._report("every live program waits for what nobody changes any more"))
            self._skipped += self._stride
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
        me.waits = not me.hit
        self.point()
        me.waits = me.hit = False
        me.looks.clear()

    def stored(self, me: Program, access: Access) -> None:
        """Note that memory changed: whoever waits for it has a reason to run again."""
        me.latest = access
        me.looks.clear()
        self._stride, self._in_vain = self.scheduler.nanoseconds_per_step, 0
        begin, last = access.ends
        for other in self._live:
            if other is not me and any(begin <= look.ends[1] and look.ends[0] <= last for look in other.looks):
                other.hit, other.waits = True, False

    def clock(self) -> int:
        """Virtual nanoseconds since the launch began. Whoever looks at a clock that moves will end its wait itself."""
        self.point()
        self._in_vain = 0
        return (self.scheduler.steps - self._began) * self.scheduler.nanoseconds_per_step + self._skipped

    # ---- reports -----------------------------------------------------------------------------------------------------

    def _told(self, program: Program, error: BaseException) -> BaseException:
        if isinstance(error, Deadlock) or not isinstance(error, Exception):
            return error
        outside = isinstance(error, OutOfBounds)
        what = error if outside else f"raised {type(error).__name__}: {error}"
        at = _lines([*traceback.walk_tb(error.__traceback__)][::-1])
        text = f"seed {self.scheduler.seed}: program {program.index} {what}\n  at {at}"
        told = OutOfBounds(text) if outside else KernelError(text)
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
        at = _lines(traceback.walk_stack(sys._current_frames()[program.thread.ident or 0]))
        if access is None:
            return f"has touched no memory, at {at}"
        missing, seen = access.missing(), ""
        if access.values.size == 1:
            seen = f" = {access.values.item()}"
        if missing.size:
            first = self.memory.name(int(access.addresses.reshape(-1)[missing[0]]))
            seen += f" (all bits set in {missing.size} of {access.addresses.size} elements, the first {first})"
        return f"{access.verb} {self.memory.name(*access.ends)}{seen} at {at}"


def _lines(frames: Iterable[tuple[types.FrameType, int]]) -> str:
    """The lines of kernel source among some frames, innermost first."""
    found = [
        f"{Path(frame.f_code.co_filename).name}:{line} in {frame.f_code.co_name}"
        for frame, line in frames
        if KERNEL in frame.f_globals
    ]
    return " < ".join(found) or "its beginning"
