"""What every launcher needs: fresh buffers, a kernel with its arguments bound, and who is watching.

Launchers allocate through `empty`, so that tests can fill fresh memory with NaN and fence it; and launch through
`Launch`, so that tests, `check` and `profile` can count what really ran.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..kernels import FUSED
from .interpreter import launching

Grid = tuple[int, int, int]
_observers: list[Callable[[Launch, Grid, Sequence[int]], None]] = []


class _Recorded(threading.local):
    kernels: Counter[str] | None = None


_recorded = _Recorded()


@contextmanager
def observe(observer: Callable[[str, Grid], None]) -> Iterator[None]:
    """Call `observer(kernel name, grid)` at every kernel launch inside the block."""
    with _observing(lambda launch, grid, scalars: observer(launch.name, grid)):
        yield


@contextmanager
def observe_counts(observer: Callable[[str, Mapping[str, Any]], None]) -> Iterator[None]:
    """Call `observer(kernel name, {"flops": .., "bytes": ..})` at every kernel launch; see kernels/metadata.py."""
    with _observing(lambda launch, grid, scalars: observer(launch.name, launch.counts(grid, scalars))):
        yield


@contextmanager
def recording() -> Iterator[Counter[str]]:
    """Inside, in this thread: kernels are counted by name, and none is launched; observers hear of none."""
    _recorded.kernels = Counter[str]()
    try:
        yield _recorded.kernels
    finally:
        _recorded.kernels = None


@contextmanager
def _observing(observer: Callable[[Launch, Grid, Sequence[int]], None]) -> Iterator[None]:
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A fresh, contiguous, uninitialised tensor."""
    return torch.empty(shape, dtype=dtype, device=device)


def interpreted(kernel: Any) -> bool:
    """Whether this process runs a kernel in Python: Triton's in Triton's interpreter (TRITON_INTERPRET=1 when they were
    imported), Gluon's, which know of none, in the emulator."""
    return isinstance(kernel, InterpretedFunction) or (in_gluon(kernel) and bool(triton.knobs.runtime.interpret))


def in_gluon(kernel: Any) -> bool:
    """Whether a kernel is written in Gluon."""
    return bool(getattr(kernel, "is_gluon", lambda: False)())


@dataclass(frozen=True)
class Specimen:
    """A launch by its types alone: what is needed to compile its kernel for a GPU that is not there.

    `arguments` maps names to "*fp16" (a pointer, 16-byte aligned), "*fp16:2" (aligned to 2 bytes), "i32", "i32:16"
    (divisible by 16), "i32:1", "i64" or "fp32"; `constants` maps the constexpr names to their values.
    """

    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; None: the assembler's choice
    cooperative: bool = False

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def launch_options(
    kernel: Any, num_warps: int, num_stages: int, cooperative: bool, max_registers: int | None
) -> dict[str, Any]:
    """What a launch is asked for with besides arguments; Triton tells kernels apart by it, its order included."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    if interpreted(kernel):
        return options
    options |= FUSED
    if cooperative:
        options["launch_cooperative_grid"] = True
    if max_registers:
        options["maxnreg"] = max_registers
    return options


class Launch:
    """A kernel with its arguments bound, to be launched once per step with new scalars.

    The kernel's first parameters are the scalars of the step; they are not specialised on, so the JIT's binding and
    specialisation of the first launch hold for all the others, which go straight to the compiled kernel: with addresses
    in place of tensors, about each of which Triton would ask the driver, and without hooks where none is set.
    """

    def __init__(
        self,
        kernel: Any,
        scalars: Sequence[str],
        arguments: Mapping[str, Any],
        num_warps: int,
        num_stages: int,
        cooperative: bool = False,  # all programs are on the device at once, or the launch fails
        max_registers: int | None = None,  # of a thread, on NVIDIA; None: the assembler's choice
    ):
        names = kernel.arg_names
        if tuple(names[: len(scalars)]) != tuple(scalars):
            raise TypeError(f"{kernel.__name__} must begin with the scalars {tuple(scalars)}")
        self.kernel = kernel
        self.name: str = kernel.fn.__name__
        self.rest = [arguments[name] for name in names[len(scalars) :]]  # keeps the tensors alive
        self.options = launch_options(kernel, num_warps, num_stages, cooperative, max_registers)
        self.again: Callable[..., None] | None = None
        self.observers: Sequence[Callable[[Launch, Grid, Sequence[int]], None]] = _observers
        if (kernels := _recorded.kernels) is not None:
            name = (self.name,)  # not this launch, which would live on in a cycle with its tensors
            self.again, self.observers = lambda grid, scalars: kernels.update(name), ()

    def __call__(self, grid: Grid, scalars: Sequence[int]) -> None:
        for observer in self.observers:
            observer(self, grid, scalars)
        if self.again is not None:
            self.again(grid, scalars)
            return
        if interpreted(self.kernel):
            with launching:
                if in_gluon(self.kernel):
                    self._emulate(grid, scalars)
                else:
                    self.kernel[grid](*scalars, *self.rest, **self.options)
            return
        compiled = self.kernel[grid](*scalars, *self.rest, **self.options)
        if compiled is not None:  # None where a hook of Triton kept it from compiling
            self.again = self._bound(compiled)

    def counts(self, grid: Grid, scalars: Sequence[int]) -> dict[str, Any]:
        """What Triton's launch hooks are told of this launch besides the kernel's name: flops, bytes."""
        kernel = self.kernel
        told = kernel.kwargs["launch_metadata"] if isinstance(kernel, InterpretedFunction) else kernel.launch_metadata
        found: dict[str, Any] = told(grid, None, dict(zip(kernel.arg_names, (*scalars, *self.rest), strict=True)))
        return found

    def _emulate(self, grid: Grid, scalars: Sequence[int]) -> None:
        from .emulator import emulate  # imports what no other launch needs

        given = dict(zip(self.kernel.arg_names, (*scalars, *self.rest), strict=True))
        constants = {p.name: given.pop(p.name) for p in self.kernel.params if p.is_constexpr}
        emulate(self.kernel, grid, given, constants, self.options["num_warps"])

    def _bound(self, compiled: Any) -> Callable[..., None]:
        driver, hooks = triton.runtime.driver.active, triton.knobs.runtime
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
        stream = driver.get_current_stream(driver.get_current_device())
        if getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True):
            rest = tuple(self.rest)

            def watched(grid: Grid, scalars: Sequence[int]) -> None:
                metadata = compiled.launch_metadata(grid, stream, *scalars, *rest)
                enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
                run(*grid, stream, function, packed, metadata, enter, leave, *scalars, *rest)

            return watched
        addresses = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in self.rest)

        def bare(grid: Grid, scalars: Sequence[int]) -> None:
            run(*grid, stream, function, packed, None, None, None, *scalars, *addresses)

        return bare
