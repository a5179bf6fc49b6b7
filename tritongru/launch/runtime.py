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
from dataclasses import dataclass, replace
from functools import lru_cache
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
    with _observing(lambda launch, grid, scalars: observer(launch.kernel.name, grid)):
        yield


@contextmanager
def observe_counts(observer: Callable[[str, Mapping[str, Any]], None]) -> Iterator[None]:
    """Call `observer(kernel name, {"flops": .., "bytes": ..})` at every kernel launch; see kernels/metadata.py."""
    with _observing(lambda launch, grid, scalars: observer(launch.kernel.name, launch.counts(grid, scalars))):
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


empty = torch.empty  # of all memory that launchers ask for


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

    @property
    def options(self) -> dict[str, Any]:
        """What a launch is asked for with besides arguments; Triton tells kernels apart by it, its order included."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if interpreted(self.kernel):
            return options
        options |= FUSED
        if self.cooperative:
            options["launch_cooperative_grid"] = True
        if self.max_registers:
            options["maxnreg"] = self.max_registers
        return options


INT32 = (1 << 31) - 1


class Kernel:
    """A kernel with all bound that is the same in every launch of a kind: constants, warps, registers.

    Args:
        kernel: a function under triton.jit or gluon.jit. scalars: the names of its first parameters, which differ from
            launch to launch and are not specialised on. constants: of other parameters, by name.
        num_warps, num_stages: as Triton has them.
        cooperative: all programs are on the device at once, or the launch fails.
        max_registers: of a thread, on NVIDIA; None: the assembler's choice.
    """

    def __init__(
        self,
        kernel: Any,
        scalars: tuple[str, ...],
        constants: Mapping[str, Any],
        num_warps: int,
        num_stages: int = 1,
        cooperative: bool = False,
        max_registers: int | None = None,
    ):
        names = tuple(kernel.arg_names)
        if names[: len(scalars)] != scalars:
            raise TypeError(f"{kernel.__name__} must begin with the scalars {scalars}")
        self.kernel, self.scalars, self.constants = kernel, scalars, constants
        self.cooperative, self.interpreted = cooperative, interpreted(kernel)
        self.name: str = kernel.fn.__name__
        self.names = names[len(scalars) :]
        self.blank = [constants.get(name) for name in self.names]
        self.asked = [(i, name) for i, name in enumerate(self.names) if name not in constants]  # of each launch
        self.pointers = [i for i, name in enumerate(self.names) if name.endswith("_ptr")]
        self.like = Specimen(kernel, {}, constants, num_warps, num_stages, max_registers, cooperative)
        self.options = self.like.options
        wide: list[int] = []  # numbers of which nothing is compiled in but how wide they are
        if not self.interpreted:
            rest = kernel.params[len(scalars) :]
            wide = [i for i, p in enumerate(rest) if p.do_not_specialize and not p.is_constexpr]
        pointers = set(self.pointers)
        self.aligned = [i for i in self.pointers if i not in wide]  # pointers whose alignment to 16 is compiled in
        self.unspecialised = [i for i in wide if i not in pointers]
        others = pointers.union(wide)
        self.specialised = [i for i, name in enumerate(self.names) if i not in others and name not in constants]
        self.identity = (kernel.fn, scalars, *self.options.values(), *constants.items())

    def launch(self, arguments: Mapping[str, Any], pdl: bool = False) -> Launch:
        """Bound to these arguments as well."""
        rest = self.blank.copy()
        for i, name in self.asked:
            rest[i] = arguments[name]
        return Launch(self, rest, pdl)

    def values(self, scalars: Mapping[str, int]) -> list[int]:
        """The scalars in the kernel's order."""
        return [scalars[name] for name in self.scalars]

    def specimen(self, types: Mapping[str, str], own: str) -> Specimen:
        """A launch by its types: those of the parameters named, "i32" for scalars, `own` for all other pointers."""
        types = dict.fromkeys(self.scalars, "i32") | dict(types)
        given = {n: types.get(n, own) for n in self.kernel.arg_names if n in types or n.endswith("_ptr")}
        return replace(self.like, arguments=given)


class Launch:
    """A kernel with its arguments bound, to be launched once per step with new scalars.

    What the JIT compiled for one launch serves all others of the process whose arguments are alike. These go straight
    to the compiled kernel, with addresses in place of tensors, about each of which Triton would ask the driver, and no
    hooks where none is set. With `pdl` each launch but the first may begin while the one before it runs, see
    kernels/step.py.
    """

    def __init__(self, kernel: Kernel, rest: list[Any], pdl: bool = False):
        self.kernel, self.rest, self.pdl = kernel, rest, pdl  # which keeps the tensors alive
        self.again: Callable[[Grid, Sequence[int]], None] | None = None
        self.observers: Sequence[Callable[[Launch, Grid, Sequence[int]], None]] = _observers
        if (kernels := _recorded.kernels) is not None:
            name = (kernel.name,)  # not this launch, which would live on in a cycle with its tensors
            self.again, self.observers = lambda grid, scalars: kernels.update(name), ()

    def __call__(self, grid: Grid, scalars: Sequence[int]) -> None:
        for observer in self.observers:
            observer(self, grid, scalars)
        if self.again is not None:
            self.again(grid, scalars)
        elif self.kernel.interpreted:
            self._interpret(grid, scalars)
        else:
            self._launch(grid, scalars)

    def each(self, steps: Iterable[tuple[Grid, Sequence[int]]], same: Hashable) -> None:
        """Launch once per step, of a grid and scalars.

        What was handed to the driver is kept, once the same arguments and steps have come before: a call with these
        hands it over again. Addresses that do not come again cost no more than the launches.

        same: tells these steps from others of the same kernel.
        """
        if self.observers or self.again is not None or self.kernel.interpreted or _watched():
            for grid, scalars in steps:
                self(grid, scalars)
            return
        device, stream = _here()
        addresses, kinds = self._addresses()
        key = (same, stream, *kinds, *addresses)
        known = _kept.get(key)
        if known is not None and known.given:
            launch = known.launch
            for given in known.given:
                launch(*given)
            return
        compiled = _compiled.get((device, False, *kinds))
        if compiled is not None and _repeatable(compiled.run):
            _kept.keep(key, self._in_turn(compiled, stream, addresses, steps, note=known is not None))
        else:
            for grid, scalars in steps:
                self(grid, scalars)

    def counts(self, grid: Grid, scalars: Sequence[int]) -> dict[str, Any]:
        """What Triton's launch hooks are told of this launch besides the kernel's name: flops, bytes."""
        jit = self.kernel.kernel
        told = jit.kwargs["launch_metadata"] if isinstance(jit, InterpretedFunction) else jit.launch_metadata
        found: dict[str, Any] = told(grid, None, dict(zip(jit.arg_names, (*scalars, *self.rest), strict=True)))
        return found

    def _interpret(self, grid: Grid, scalars: Sequence[int]) -> None:
        from ..tools.interpreter import launching

        jit, given = self.kernel.kernel, (*scalars, *self.rest)
        with launching:
            if not in_gluon(jit):
                jit[grid](*given, **self.kernel.options)
                return
            from ..tools.emulator import emulate

            arguments = dict(zip(jit.arg_names, given, strict=True))
            constants = {p.name: arguments.pop(p.name) for p in jit.params if p.is_constexpr}
            emulate(jit, grid, arguments, constants)

    def _launch(self, grid: Grid, scalars: Sequence[int]) -> None:
        """By what is compiled for such arguments, or by the JIT; the launches after this one know."""
        device, stream = _here()
        addresses, kinds = self._addresses()
        key = (device, bool(scalars) and max(scalars) > INT32, *kinds)
        compiled, run, watched = _compiled.get(key), self.again, _watched()
        if compiled is None:
            compiled = self.kernel.kernel[grid](*scalars, *self.rest, **self.kernel.options)
            if compiled is None:  # a hook of Triton kept it from compiling
                return
            if not watched:
                _compiled[key] = compiled
        else:
            run = self._bound(compiled, compiled.run, stream, addresses, watched)
            run(grid, scalars)
        if run is None or self.pdl:
            by = _dependent(compiled.run) if self.pdl else compiled.run
            run = self._bound(compiled, by, stream, addresses, watched)
        self.again = run

    def _bound(
        self, compiled: Any, run: Any, stream: int, addresses: list[Any], watched: bool
    ) -> Callable[[Grid, Sequence[int]], None]:
        function, packed, hooks, rest = compiled.function, compiled.packed_metadata, triton.knobs.runtime, self.rest

        def told(grid: Grid, scalars: Sequence[int]) -> None:
            metadata = compiled.launch_metadata(grid, stream, *scalars, *rest)
            enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
            run(*grid, stream, function, packed, metadata, enter, leave, *scalars, *rest)

        def bare(grid: Grid, scalars: Sequence[int]) -> None:
            run(*grid, stream, function, packed, None, None, None, *scalars, *addresses)

        return told if watched else bare

    def _addresses(self) -> tuple[list[Any], tuple[Any, ...]]:
        """The arguments, with addresses in place of tensors; and what the JIT would tell apart by, or more."""
        kernel, found = self.kernel, self.rest.copy()
        for i in kernel.pointers:
            found[i] = found[i].data_ptr()
        dtypes = [self.rest[i].dtype for i in kernel.pointers]
        aligned = [found[i] & 15 for i in kernel.aligned]
        numbers = [found[i] for i in kernel.specialised]
        wide = [found[i] > INT32 for i in kernel.unspecialised]
        return found, (kernel.identity, *dtypes, *aligned, *numbers, *wide)

    def _in_turn(
        self, compiled: Any, stream: int, addresses: list[Any], steps: Iterable[tuple[Grid, Sequence[int]]], note: bool
    ) -> Pass:
        """Launch; and `note` what Triton's launcher, which is Python, hands over to C."""
        found = Pass(compiled, compiled.run.launch, [])
        run = compiled.run
        after = _dependent(run) if self.pdl else run  # that of all steps but the first

        def noted(*given: Any) -> None:
            found.launch(*given)
            found.given.append(given)

        if note:
            run, after = _changed(run, launch=noted), _changed(after, launch=noted)
        function, packed = compiled.function, compiled.packed_metadata
        for grid, scalars in steps:
            run(*grid, stream, function, packed, None, None, None, *scalars, *addresses)
            run = after
        return found


@dataclass(frozen=True)
class Direct:
    """A launch with all bound but the addresses of its tensors, which are aligned to 16 bytes."""

    compiled: Any  # Triton's CompiledKernel
    grid: Grid
    scalars: Sequence[int]
    order: list[int]  # of each tensor that the kernel takes, which of the given ones it is
    rest: list[Any]  # what it takes besides

    @classmethod
    def of(cls, launch: Launch, grid: Grid, scalars: Sequence[int], given: Sequence[Tensor]) -> Direct | None:
        """None where the launch is not compiled yet, or its tensors, which its kernel takes first, are not the given
        ones, each another and aligned."""
        kernel, places = launch.kernel, {id(tensor): i for i, tensor in enumerate(given)}
        if kernel.interpreted or launch.observers or kernel.pointers != list(range(len(kernel.pointers))):
            return None
        order = [places.get(id(launch.rest[i]), -1) for i in kernel.pointers]
        compiled = _compiled.get((_here()[0], False, *launch._addresses()[1]))
        if compiled is None or -1 in order or len(places) < len(given) or any([t.data_ptr() % 16 for t in given]):
            return None
        return cls(compiled, grid, scalars, order, launch.rest[len(order) :])

    def __call__(self, given: Sequence[Tensor]) -> bool:
        """Launch it with these in place of those that `of` was given; False, and nothing launched, where one of them is
        not aligned, or somebody is told of launches."""
        addresses, compiled = [tensor.data_ptr() for tensor in given], self.compiled
        if _observers or _watched() or _recorded.kernels is not None or any([address & 15 for address in addresses]):
            return False
        compiled.run(
            *self.grid, _here()[1], compiled.function, compiled.packed_metadata, None, None, None,
            *self.scalars, *[addresses[i] for i in self.order], *self.rest,
        )  # fmt: skip
        return True


@dataclass(frozen=True)
class Pass:
    """What was handed to the driver for the launches of a pass; nothing, where it was launched once."""

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
            before = self.pop(key, None)
            self[key] = found
            self._launches += self._size(found) - (0 if before is None else self._size(before))
            while self._launches > self.limit:
                self._launches -= self._size(self.pop(next(iter(self))))

    @staticmethod
    def _size(found: Pass) -> int:
        return max(1, len(found.given))

    def clear(self) -> None:
        with self._lock:
            super().clear()
            self._launches = 0


_compiled: dict[Hashable, Any] = {}  # Triton's CompiledKernel by what `Launch._alike` says
_kept = Kept(1 << 14)


def forget() -> None:
    """Bind anew whatever is launched next: of tests and benchmarks that put something else in the place of a kernel."""
    _compiled.clear()
    _kept.clear()
    _dependent.cache_clear()


def _watched() -> bool:
    """Whether somebody has asked Triton to tell of launches, or to put something of its own into kernels."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    return bool(
        getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or getattr(compilation, "instrumentation_mode", "")
    )


def _here() -> tuple[int, int]:
    """The current device and its current stream."""
    driver = triton.runtime.driver.active
    device: int = driver.get_current_device()
    return device, driver.get_current_stream(device)


@lru_cache(maxsize=1024)
def _dependent(run: Any) -> Any:
    """Triton's launcher of a kernel as one that asks for programmatic dependent launch."""
    return _changed(run, launch_pdl=True)


def _changed(run: Any, **fields: Any) -> Any:
    """Another launcher, the same but for these fields."""
    found = copy.copy(run)
    vars(found).update(fields)
    return found


def _repeatable(run: Any) -> bool:
    """Whether all that Triton's launcher hands to C is the same for the same arguments: no memory of its own."""
    own = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    return hasattr(run, "launch") and not any(getattr(run, name, 0) for name in own)
