"""Gluon kernels run by Python on the CPU, all programs of the grid alive, under a seeded scheduler.

`emulate` runs the kernel's own source: what it calls is bound to language.py in place of Triton, values are numpy
arrays, memory is that of the tensors passed. Each program has a thread, of which exactly one, the holder of the baton,
runs. The baton may change hands before every load, store, barrier and look at the clock, and in the middle of a tile:
a load or store is sometimes made in two random halves (`tear`), because hardware does not move a tile at once either.
A random number generator decides, so the same seed gives the same interleaving. Outside `emulating` the policy is
"lazy", the cheapest: a program runs until it waits for another.

Inline PTX has a twin in Python, registered by its text in TWINS: `twin(turn, *arguments, dtype)`, arguments and results
Tensors, a tuple of results for a tuple of dtypes. By `turn` (Turn) it looks at memory, reads the clock, and waits: a
kernel waits nowhere else, for a loop of plain loads may be one load to a compiler.

What is found on the way:

    Deadlock       every live program waits for what nobody publishes any more, or the budget of steps is used up
    OutOfBounds    an access outside every tensor passed to the kernel
    KernelError    an exception in a program, such as an operation that the emulator lacks
    poison         what a mask left out of a load, and fresh shared memory, is NaN or a large number
    a time-out     of the kernel's own: the clock is virtual, and jumps ahead where all programs wait

What stays unseen: layouts, and PTX itself. Memory is sequentially consistent here, so a missing cache modifier, or a
load hoisted by a compiler, looks right; so does an access that leaves one argument and lands in another, and, as a
program is one thread, a missing barrier between its own accesses to shared memory. A loop that touches neither memory
nor the clock never ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from . import language
from .launch import TWINS, Launch, Turn
from .memory import OutOfBounds
from .scheduler import Deadlock, KernelError, Scheduler
from .values import EmulatorError, Tensor

__all__ = [
    "TWINS", "Deadlock", "EmulatorError", "KernelError", "OutOfBounds", "Scheduler", "Tensor", "Turn", "emulate",
    "emulating",
]  # fmt: skip

_one_launch = threading.Lock()
_emulating: Scheduler | None = None


def emulate(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    num_warps: int = 4,
) -> None:
    """Run one launch, all programs of its grid alive.

    Args:
        kernel: a function under gluon.jit (or triton.jit).
        grid: up to three sizes.
        arguments: tensors on the CPU, numbers, None, and tuples of those, by name.
        constants: what is known at compile time, by name.

    Raises:
        Deadlock, OutOfBounds: what the scheduler finds.
        KernelError: an exception in a program, which is its cause.
    """
    if language.machine is not None and threading.current_thread() in language.machine.threads:
        raise EmulatorError("a launch inside a program of another")
    x, y, z = (*grid, 1, 1)[:3]
    with _one_launch:
        launch = Launch(
            _emulating or Scheduler(policy="lazy", nanoseconds_per_step=0),
            kernel,
            (x, y, z),
            arguments,
            constants,
            num_warps,
        )
        language.machine = launch
        try:
            launch.run()
        finally:
            language.machine = None


@contextmanager
def emulating(seed: int = 0, **options: Any) -> Iterator[Scheduler]:
    """Inside: the options of every launch, as Scheduler has them.

    Yields:
        The scheduler, whose `steps` and `switches` count what happens.

    Raises:
        EmulatorError: inside another such block.
    """
    global _emulating
    if _emulating is not None:
        raise EmulatorError("an `emulating` block inside another")
    _emulating = Scheduler(seed, **options)
    try:
        yield _emulating
    finally:
        _emulating = None
