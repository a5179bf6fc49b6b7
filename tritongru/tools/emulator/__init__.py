"""Kernels in Triton or Gluon run by Python on the CPU: those that wait for each other all alive, by a seeded scheduler.

`emulate` runs the kernel's own source (language.py) on numpy arrays (values.py), in the memory of the tensors passed.
Programs that wait for each other have a thread each, of which one, the holder of the baton, runs (launch.py). The baton
may change hands at points: before every load, store and look at the clock, and in the middle of a tile, which is
sometimes moved in two random halves, as hardware does not move it at once either. A seed repeats its interleaving.

Inline PTX has a twin in Python, registered by its text in TWINS: `twin(turn, *arguments, dtype)`, arguments and results
Tensors, a tuple of results for a tuple of dtypes. By `turn` (Launch) it looks at memory, reads the clock, and waits: a
kernel waits nowhere else. The clock is virtual, and jumps ahead where all programs wait, so that time-outs happen.

Found are deadlocks, accesses outside every tensor passed, and other errors of a program. What a mask left out of a
load, and fresh shared memory, is poison: NaN or a large number. Unseen stay layouts and PTX, a missing cache modifier,
as memory is sequentially consistent here, and a missing barrier, as a program is one thread; an access that leaves one
argument and lands in another. A loop that touches neither memory nor the clock never ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any

import numpy as np
import torch

from . import language
from . import twins as twins  # registers what the inline PTX of kernels/ does
from .language import TWINS
from .launch import Deadlock, KernelError, Launch, Memory, OutOfBounds, Scheduler
from .values import POINTERS, EmulatorError, Tensor, tensor

__all__ = ["TWINS", "Deadlock", "EmulatorError", "KernelError", "OutOfBounds", "Tensor", "emulate", "emulating"]

_scheduler: Scheduler | None = None
_launching = RLock()


def _argument(name: str, value: Any) -> Any:
    """An argument of a launch as the kernel gets it."""
    if not isinstance(value, torch.Tensor):
        return None if value is None else tensor(value)
    if value.device.type != "cpu" or value.dtype not in POINTERS:
        raise EmulatorError(f"the emulator takes no {value.dtype} on {value.device}, as {name} is")
    return Tensor(np.int64(value.data_ptr()), POINTERS[value.dtype])


def emulate(
    kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any], constants: Mapping[str, Any], together: bool = True
) -> None:
    """Run one launch of a function under gluon.jit or triton.jit, one thread at a time. Outside `emulating` a program
    runs until it waits for another.

    Args:
        grid: three sizes.
        arguments: tensors on the CPU, numbers and None, by name; constants: what is known at compile time.
        together: programs wait for each other; else they run one after the other.

    Raises:
        Deadlock, OutOfBounds, KernelError: of its programs.
    """
    with _launching:
        values = {name: _argument(name, value) for name, value in arguments.items()}
        values |= {name: language.in_emulator(value) for name, value in constants.items()}
        scheduler = _scheduler or Scheduler(switch=0, tear=0, nanoseconds_per_step=0)
        language.machine = Launch(scheduler, partial(language.bound(kernel.fn), **values), grid, Memory(arguments))
        language.machine.run(together)


@contextmanager
def emulating(seed: int = 0, **options: Any) -> Iterator[Scheduler]:
    """Inside, launches are scheduled by the seed and options of Scheduler, which is yielded and counts what happens."""
    global _scheduler
    outer, _scheduler = _scheduler, Scheduler(seed, **options)
    try:
        yield _scheduler
    finally:
        _scheduler = outer
