"""What every launcher needs: fresh memory, kernels with their arguments bound, and who is told of launches."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ..kernels import FUSED
from ..latest import Latest

Grid = tuple[int, int, int]
Steps = Callable[[], Iterable[tuple[Grid, Sequence[int]]]]  # grids and scalars, made where they are asked for
INT32 = (1 << 31) - 1

empty = torch.empty  # of all memory that launchers ask for, so that tests can fill and fence it


def interpreting() -> bool:
    """Whether this process runs kernels in Python, in the emulator: TRITON_INTERPRET=1 when Triton was imported."""
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel with all bound that is the same in every launch of a kind. It takes numbers that differ from launch to
    launch and are not specialised on (`scalars`), then pointers, then other numbers, then constants."""

    kernel: Any  # under triton.jit or gluon.jit
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    cooperative: bool = False  # all programs are on the device at once, or the launch fails
    max_registers: int | None = None  # of a thread, on NVIDIA; None: the assembler's choice
    # To compile it for a GPU that is not there, the types of all else: "*fp16" (a pointer, 16-byte aligned), "*fp16:2"
    # (aligned to 2 bytes), "i32", "i32:16" (divisible by 16), "i32:1", "i64" or "fp32".
    arguments: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @cached_property
    def options(self) -> dict[str, Any]:
        """What a launch is asked for with besides arguments; Triton tells kernels apart by it, its order included."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        options |= FUSED | {"launch_cooperative_grid": True} if self.cooperative else FUSED
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})

    @cached_property
    def pointers(self) -> slice:
        """Where pointers are among all that it takes."""
        at = [i for i, name in enumerate(self.kernel.arg_names) if name.endswith("_ptr")]
        return slice(at[0], at[-1] + 1)

    @cached_property
    def scalars(self) -> Callable[[Mapping[str, Any]], tuple[int, ...]]:
        """From arguments by name those that differ from launch to launch, in the kernel's order."""
        return itemgetter(*self.kernel.arg_names[: self.pointers.start])

    @cached_property
    def _others(self) -> tuple[Callable[[Mapping[str, Any]], tuple[Any, ...]], tuple[Any, ...]]:
        """From arguments by name those behind the scalars, and after these the constants."""
        names = self.kernel.arg_names[self.pointers.start :]
        asked = itemgetter(*[name for name in names if name not in self.constants])
        return asked, tuple(self.constants[name] for name in names if name in self.constants)

    @cached_property
    def identity(self) -> tuple[Hashable, ...]:
        return (self.kernel.fn, *self.options.values(), *self.constants.items())

    def launch(self, arguments: Mapping[str, Any], pdl: bool = False) -> Launch:
        """Bound to these arguments as well."""
        asked, constants = self._others
        return Launch(self, asked(arguments) + constants, pdl)

    def of_types(self, types: Mapping[str, str], own: str) -> Kernel:
        """To be compiled ahead of time: with these types, `own` for other pointers and "i32" for other numbers."""
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        return replace(self, arguments={n: types.get(n, own if n.endswith("_ptr") else "i32") for n in names})


class Launch:
    """A kernel with its arguments bound, to be launched once per step with new scalars.

    What the JIT compiled for one launch serves all others of the process whose arguments are alike. These go straight
    to the compiled kernel, with addresses in place of tensors, about each of which Triton would ask the driver, and no
    hooks where none is set. With `pdl` each launch but the first may begin while the one before it runs, see
    kernels/step.py.
    """

    def __init__(self, kernel: Kernel, rest: tuple[Any, ...], pdl: bool = False):
        self.kernel, self.rest, self.pdl = kernel, rest, pdl
        count = kernel.pointers.stop - kernel.pointers.start
        self.tensors, self.others = rest[:count], rest[count:]
        self.again: Callable[[Grid, Sequence[int]], None] | None = None  # once it is compiled

    def __call__(self, grid: Grid, scalars: Sequence[int]) -> None:
        if (counts := _recorded.kernels) is not None:
            counts[self.kernel.name] += 1
            return
        for observer in _observers:
            observer(self, grid, scalars)
        if self.again is not None:
            self.again(grid, scalars)
        elif interpreting():
            self._emulate(grid, scalars)
        else:
            self._launch(grid, scalars)

    def each(self, steps: Steps, same: Hashable) -> None:
        """Launch once per step.

        What was handed to the driver is kept: a call with the same arguments and steps hands it over again.

        same: tells these steps from others of the same kernel; None: there is one, and nothing is kept.
        """
        compiled = None
        if same is not None and not (interpreting() or _told()):
            device, stream = _here()
            addresses, alike = self.addresses()
            compiled = _compiled.get((device, False, *alike))
        if compiled is None or not _repeatable(compiled.run):
            for grid, scalars in steps():
                self(grid, scalars)
        else:
            _hand_over(compiled, stream, addresses, steps, same, self.pdl)

    def counts(self, grid: Grid, scalars: Sequence[int]) -> dict[str, Any]:
        """What Triton's launch hooks are told of this launch besides the kernel's name: flops, bytes."""
        jit = self.kernel.kernel
        told = jit.kwargs["launch_metadata"] if isinstance(jit, InterpretedFunction) else jit.launch_metadata
        found: dict[str, Any] = told(grid, None, dict(zip(jit.arg_names, (*scalars, *self.rest), strict=True)))
        return found

    def _emulate(self, grid: Grid, scalars: Sequence[int]) -> None:
        from ..tools.emulator import emulate

        jit = self.kernel.kernel
        arguments = dict(zip(jit.arg_names, (*scalars, *self.rest), strict=True))
        constants = {name: arguments.pop(name) for name in self.kernel.constants}
        emulate(jit, grid, arguments, constants, self.kernel.cooperative)

    def _launch(self, grid: Grid, scalars: Sequence[int]) -> None:
        """By what is compiled for such arguments, or by the JIT; the launches after this one know."""
        (device, stream), rest = _here(), self.rest  # not self, which would live on in a cycle with its tensors
        addresses, alike = self.addresses()
        key = (device, bool(scalars) and max(scalars) > INT32, *alike)
        compiled: Any = _compiled.get(key)
        hooks = triton.knobs.runtime if _watched() else None

        def again(grid: Grid, scalars: Sequence[int]) -> None:
            function, packed = compiled.function, compiled.packed_metadata
            if hooks is None:
                run(*grid, stream, function, packed, None, None, None, *scalars, *addresses)
            else:
                metadata = compiled.launch_metadata(grid, stream, *scalars, *rest)
                told = metadata, hooks.launch_enter_hook, hooks.launch_exit_hook
                run(*grid, stream, function, packed, *told, *scalars, *rest)

        if compiled is not None:
            run = compiled.run
            again(grid, scalars)
        else:
            compiled = self.kernel.kernel[grid](*scalars, *rest, **self.kernel.options)
            if compiled is None:  # a hook of Triton kept it from compiling
                return
            if hooks is None:
                _compiled[key] = compiled
        run = _dependent(compiled.run) if self.pdl else compiled.run
        self.again = again

    def addresses(self) -> tuple[tuple[Any, ...], tuple[Hashable, ...]]:
        """The arguments, with addresses in place of tensors; and what the JIT would tell apart by, or more."""
        addresses = [tensor.data_ptr() for tensor in self.tensors]
        dtypes, aligned = [tensor.dtype for tensor in self.tensors], [address & 15 for address in addresses]
        numbers = self.others[: len(self.others) - len(self.kernel.constants)]
        classes = [(n == 1) + 2 * (n % 16 == 0) + 4 * (n > INT32) for n in numbers]
        return (*addresses, *self.others), (self.kernel.identity, *dtypes, *aligned, *classes)

    def with_others(
        self, given: Sequence[Tensor], steps: Steps, same: Hashable
    ) -> Callable[[Sequence[Tensor]], bool] | None:
        """`each` once more, as a function of tensors in place of those `given`, which holds none of them. It gives
        False, and launches nothing, where one of them is not aligned to 16 bytes, or somebody is told of launches.

        None where the launch is not compiled yet, or its tensors are not those given, each another and aligned.
        """
        places = {tensor.data_ptr(): i for i, tensor in enumerate(given)}
        order, others, pdl = [places.get(tensor.data_ptr(), -1) for tensor in self.tensors], self.others, self.pdl
        if interpreting() or _told() or -1 in order or len(places) < len(given):
            return None
        device, _ = _here()
        compiled = _compiled.get((device, False, *self.addresses()[1]))
        unaligned = any([tensor.data_ptr() & 15 for tensor in given])
        if compiled is None or unaligned or not _repeatable(compiled.run):
            return None

        steps = steps if same is not None else partial(list, list(steps()))

        def again(given: Sequence[Tensor]) -> bool:
            addresses = [tensor.data_ptr() for tensor in given]
            if _told() or any([address & 15 for address in addresses]):
                return False
            stream = triton.runtime.driver.active.get_current_stream(device)
            _hand_over(compiled, stream, (*[addresses[i] for i in order], *others), steps, same, pdl)
            return True

        return again


def _hand_over(compiled: Any, stream: int, addresses: tuple[Any, ...], steps: Steps, same: Hashable, pdl: bool) -> None:
    """`Launch.each` of what is compiled; `addresses`: as `Launch.addresses` has them."""
    run, of_kernel = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
    if same is None:
        for grid, scalars in steps():
            run(*grid, stream, *of_kernel, *scalars, *addresses)
        return
    key = (same, stream, compiled, *addresses)
    known = _kept.get(key)
    if known is not None:
        launch = known.launch
        for given in known.given:
            launch(*given)
        return
    handed = Handed(run.launch, [])

    def noted(*given: Any) -> None:
        handed.launch(*given)
        handed.given.append(given)

    run = _changed(run, launch=noted)  # Triton's launcher, which is Python and hands over to C
    for grid, scalars in steps():
        run(*grid, stream, *of_kernel, *scalars, *addresses)
        run.launch_pdl = pdl
    _kept.keep(key, handed)


class Handed(NamedTuple):
    """What was handed to the driver for the launches of a pass."""

    launch: Callable[..., None]
    given: list[tuple[Any, ...]]


_compiled: dict[Hashable, Any] = {}  # Triton's CompiledKernel by what `Launch.addresses` tells apart
_kept: Latest[Hashable, Handed] = Latest(1 << 14, lambda key, handed: len(handed.given))  # half a KB a launch


def forget() -> None:
    """Bind anew whatever is launched next: of tests and benchmarks that put something else in the place of a kernel."""
    _compiled.clear()
    _kept.clear()
    _dependent.cache_clear()


_observers: list[Callable[[Launch, Grid, Sequence[int]], None]] = []


class _Recorded(threading.local):
    kernels: Counter[str] | None = None


_recorded = _Recorded()


@contextmanager
def observe(observer: Callable[[str, Any], None], of: Callable[..., Any] = lambda _, grid, __: grid) -> Iterator[None]:
    """Inside, at every launch: `observer(kernel name, grid)`; or in place of the grid what `of`, a function of launch,
    grid and scalars, finds: with `Launch.counts` its flops and bytes, see kernels/metadata.py."""

    def tell(launch: Launch, grid: Grid, scalars: Sequence[int]) -> None:
        observer(launch.kernel.name, of(launch, grid, scalars))

    _observers.append(tell)
    try:
        yield
    finally:
        _observers.remove(tell)


@contextmanager
def recording() -> Iterator[Counter[str]]:
    """Inside, in this thread: kernels are counted by name, and none is launched; observers hear of none."""
    _recorded.kernels = Counter[str]()
    try:
        yield _recorded.kernels
    finally:
        _recorded.kernels = None


def _told() -> Any:
    """Whether launches are not made, or not by the shortest way: somebody is told of them."""
    return _observers or _recorded.kernels is not None or _watched()


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


def _changed(run: Any, **fields: Any) -> Any:
    """Another of Triton's launchers, the same but for these fields; in a fifth of copy.copy's time."""
    found = object.__new__(type(run))
    vars(found).update(vars(run), **fields)
    return found


@lru_cache(maxsize=1024)
def _dependent(run: Any) -> Any:
    """Triton's launcher of a kernel as one that asks for programmatic dependent launch."""
    return _changed(run, launch_pdl=True)


def _repeatable(run: Any) -> bool:
    """Whether all that Triton's launcher hands to C is the same for the same arguments: no memory of its own."""
    own = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    return hasattr(run, "launch") and not any(getattr(run, name, 0) for name in own)
