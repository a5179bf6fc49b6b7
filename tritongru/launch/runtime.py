"""What every launcher needs: fresh buffers, a kernel with its arguments bound, and who is watching.

Launchers allocate through `empty`, so that tests can fill fresh memory with NaN and fence it; and launch through
`Launch`, so that tests, `check` and `profile` can count what really ran.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..kernels import FUSED

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

    The kernel's first parameters are the scalars of the step; they are not specialised on, so what the JIT compiled for
    one launch serves all others of the process whose arguments are alike. These go straight to the compiled kernel,
    with addresses in place of tensors, about each of which Triton would ask the driver, and no hooks where none is set.

    With `pdl` each launch but the first may begin while the one before it runs, see kernels/step.py.
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
        pdl: bool = False,
    ):
        names = kernel.arg_names[len(scalars) :]
        if tuple(kernel.arg_names[: len(scalars)]) != tuple(scalars):
            raise TypeError(f"{kernel.__name__} must begin with the scalars {tuple(scalars)}")
        self.kernel = kernel
        self.name: str = kernel.fn.__name__
        self.rest = [arguments[name] for name in names]  # keeps the tensors alive
        self.options = launch_options(kernel, num_warps, num_stages, cooperative, max_registers)
        self.pdl = pdl
        self.again: Callable[[Grid, Sequence[int]], None] | None = None
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
            from ..tools.interpreter import launching

            with launching:
                if in_gluon(self.kernel):
                    self._emulate(grid, scalars)
                else:
                    self.kernel[grid](*scalars, *self.rest, **self.options)
            return
        key = self._alike(self._addresses(), any(map(_wide, scalars)))
        compiled = _compiled.get(key)
        if compiled is not None:
            self._bound(compiled, compiled.run)(grid, scalars)
        else:
            compiled = self.kernel[grid](*scalars, *self.rest, **self.options)
            if compiled is None:  # a hook of Triton kept it from compiling
                return
            if not _watched():
                _compiled[key] = compiled
        self.again = self._bound(compiled, _dependent(compiled.run) if self.pdl else compiled.run)

    def each(self, steps: Iterable[tuple[Grid, Sequence[int]]], same: Hashable) -> None:
        """Launch once per step, of a grid and scalars.

        What was handed to the driver is kept: a call with the same arguments and steps hands it over again.

        same: tells these steps from others of the same kernel.
        """
        if self.observers or self.again is not None or interpreted(self.kernel) or _watched():
            for grid, scalars in steps:
                self(grid, scalars)
            return
        stream, addresses = _stream(), self._addresses()
        key = (self.kernel, same, stream, addresses, self._dtypes(), *self.options.values())
        known = _kept.get(key)
        if known is not None:
            launch = known.launch
            for given in known.given:
                launch(*given)
            return
        compiled = _compiled.get(self._alike(addresses))
        if compiled is not None and _repeatable(compiled.run):
            _kept.keep(key, self._noted(compiled, stream, addresses, steps))
        else:
            for grid, scalars in steps:
                self(grid, scalars)

    def counts(self, grid: Grid, scalars: Sequence[int]) -> dict[str, Any]:
        """What Triton's launch hooks are told of this launch besides the kernel's name: flops, bytes."""
        kernel = self.kernel
        told = kernel.kwargs["launch_metadata"] if isinstance(kernel, InterpretedFunction) else kernel.launch_metadata
        found: dict[str, Any] = told(grid, None, dict(zip(kernel.arg_names, (*scalars, *self.rest), strict=True)))
        return found

    def _emulate(self, grid: Grid, scalars: Sequence[int]) -> None:
        from ..tools.emulator import emulate  # imports what no other launch needs

        given = dict(zip(self.kernel.arg_names, (*scalars, *self.rest), strict=True))
        constants = {p.name: given.pop(p.name) for p in self.kernel.params if p.is_constexpr}
        emulate(self.kernel, grid, given, constants, self.options["num_warps"])

    def _addresses(self) -> tuple[Any, ...]:
        """The arguments, with addresses in place of tensors."""
        found = self.rest.copy()
        for i in _pointers(self.kernel, len(found)):
            found[i] = found[i].data_ptr()
        return tuple(found)

    def _dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple([self.rest[i].dtype for i in _pointers(self.kernel, len(self.rest))])

    def _alike(self, addresses: tuple[Any, ...], wide: bool = False) -> Hashable:
        """What the JIT would tell apart by, or more. wide: whether a scalar of the step takes 64 bits."""
        kinds = list(addresses)
        for i in _pointers(self.kernel, len(kinds)):
            kinds[i] %= 16
        for i in _unspecialised(self.kernel, len(kinds)):
            kinds[i] = _wide(kinds[i])
        device = triton.runtime.driver.active.get_current_device()
        return (self.kernel, device, wide, self._dtypes(), *self.options.values(), *kinds)

    def _bound(self, compiled: Any, run: Any) -> Callable[[Grid, Sequence[int]], None]:
        hooks, stream = triton.knobs.runtime, _stream()
        function, packed = compiled.function, compiled.packed_metadata
        if _watched():
            rest = tuple(self.rest)

            def watched(grid: Grid, scalars: Sequence[int]) -> None:
                metadata = compiled.launch_metadata(grid, stream, *scalars, *rest)
                enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
                run(*grid, stream, function, packed, metadata, enter, leave, *scalars, *rest)

            return watched
        addresses = self._addresses()

        def bare(grid: Grid, scalars: Sequence[int]) -> None:
            run(*grid, stream, function, packed, None, None, None, *scalars, *addresses)

        return bare

    def _noted(
        self, compiled: Any, stream: int, addresses: tuple[Any, ...], steps: Iterable[tuple[Grid, Sequence[int]]]
    ) -> Pass:
        """Launch, and note what Triton's launcher, which is Python, hands over to C."""
        found = Pass(compiled, compiled.run.launch, [])
        run = copy.copy(compiled.run)

        def noted(*given: Any) -> None:
            found.launch(*given)
            found.given.append(given)

        run.launch = noted
        function, packed = compiled.function, compiled.packed_metadata
        for grid, scalars in steps:
            run(*grid, stream, function, packed, None, None, None, *scalars, *addresses)
            run.launch_pdl = self.pdl
        return found


@dataclass(frozen=True)
class Pass:
    """What was handed to the driver for the launches of a pass."""

    compiled: Any  # which owns what is launched
    launch: Callable[..., None]
    given: list[tuple[Any, ...]]


class Kept(dict[Hashable, Pass]):
    """Records of passes, the latest: of no more than so many launches, at half a kilobyte each."""

    def __init__(self, launches: int):
        super().__init__()
        self.limit, self._launches = launches, 0
        self._lock = threading.Lock()

    def keep(self, key: Hashable, found: Pass) -> None:
        with self._lock:
            if key not in self:
                self[key] = found
                self._launches += len(found.given)
            while self._launches > self.limit:
                self._launches -= len(self.pop(next(iter(self))).given)

    def clear(self) -> None:
        with self._lock:
            super().clear()
            self._launches = 0


@dataclass(frozen=True)
class OneStep:
    """A launch with all bound but the addresses of its tensors, which are aligned to 16 bytes."""

    compiled: Any
    grid: Grid
    scalars: tuple[int, ...]
    order: tuple[int, ...]  # of each tensor that the kernel takes, which of the given ones it is
    rest: tuple[Any, ...]  # what it takes besides

    @classmethod
    def of(cls, launch: Launch, step: tuple[Grid, Sequence[int]], given: Sequence[Tensor]) -> OneStep | None:
        """None where the launch is not compiled yet, its tensors are not the given ones, each another, or not aligned;
        its kernel takes them first."""
        if interpreted(launch.kernel):
            return None
        compiled = _compiled.get(launch._alike(launch._addresses()))
        places = {id(tensor): i for i, tensor in enumerate(given)}
        pointers = _pointers(launch.kernel, len(launch.rest))
        order = tuple(places.get(id(launch.rest[i]), -1) for i in pointers)
        told_apart = len(places) == len(given) and min(order) >= 0 and pointers == tuple(range(len(pointers)))
        if compiled is None or not told_apart or any(tensor.data_ptr() % 16 for tensor in given):
            return None
        return cls(compiled, step[0], tuple(step[1]), order, tuple(launch.rest[len(pointers) :]))

    def __call__(self, *given: Tensor) -> bool:
        """Launch it with these in place of those that `of` was given; False, and nothing launched, where one of them is
        not aligned, or somebody is told of launches."""
        addresses = [tensor.data_ptr() for tensor in given]
        if _observers or _watched() or any(address & 15 for address in addresses):
            return False
        compiled = self.compiled
        compiled.run(
            *self.grid, _stream(), compiled.function, compiled.packed_metadata, None, None, None,
            *self.scalars, *[addresses[i] for i in self.order], *self.rest,
        )  # fmt: skip
        return True


_compiled: dict[Hashable, Any] = {}  # Triton's CompiledKernel by what `Launch._alike` says
_kept = Kept(1 << 14)


def forget() -> None:
    """Bind anew whatever is launched next: of tests and benchmarks that put something else in the place of a kernel."""
    _compiled.clear()
    _kept.clear()


def forget_passes() -> None:
    """Hand over anew whatever is launched next: as where memory lies elsewhere at every call."""
    _kept.clear()


@cache
def _pointers(kernel: Any, rest: int) -> tuple[int, ...]:
    """Where the tensors are among the last so many arguments of a kernel."""
    return tuple(i for i, name in enumerate(kernel.arg_names[-rest:]) if name.endswith("_ptr"))


@cache
def _unspecialised(kernel: Any, rest: int) -> tuple[int, ...]:
    """Where the numbers are of which nothing is compiled in but how wide they are."""
    plain = [not p.is_constexpr and p.do_not_specialize for p in kernel.params[-rest:]]
    return tuple(i for i, p in enumerate(plain) if p)


def _wide(number: Any) -> bool:
    return isinstance(number, int) and number.bit_length() > 31


def _watched() -> bool:
    """Whether somebody has asked Triton to tell of launches, or to put something of its own into kernels."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return any(getattr(hook, "calls", True) for hook in hooks) or bool(getattr(compilation, "instrumentation_mode", ""))


def _stream() -> int:
    driver = triton.runtime.driver.active
    stream: int = driver.get_current_stream(driver.get_current_device())
    return stream


def _dependent(run: Any) -> Any:
    """Triton's launcher of a kernel as one that asks for programmatic dependent launch."""
    run = copy.copy(run)
    run.launch_pdl = True
    return run


def _repeatable(run: Any) -> bool:
    """Whether all that Triton's launcher hands to C is the same for the same arguments: no memory of its own."""
    own = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    return hasattr(run, "launch") and not any(getattr(run, name, 0) for name in own)
