"""What every launcher needs: fresh memory, kernels with their arguments bound, and who is told of launches."""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
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


def one_step(grid: Grid, scalars: Sequence[int]) -> Steps:
    """The steps of a kernel that is launched once."""
    return lambda: ((grid, scalars),)


empty = torch.empty  # of all memory that launchers ask for, so that tests can fill and fence it


def interpreting() -> bool:
    """Whether this process runs kernels in Python, in the emulator: TRITON_INTERPRET=1 when Triton was imported."""
    return bool(triton.knobs.runtime.interpret)


class Signature(NamedTuple):
    """How a kernel takes its arguments: how many pointers, and from a mapping by name, each in the kernel's order, its
    scalars, its other arguments that are no constants, and its constants."""

    pointers: int
    scalars: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    others: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    constants: Callable[[Mapping[str, Any]], tuple[Any, ...]]


@lru_cache(maxsize=256)
def signature(names: tuple[str, ...], constants: tuple[str, ...]) -> Signature:
    """From the names of all arguments, scalars first, then pointers (`*_ptr`), and those of the constants."""
    pointers = [i for i, name in enumerate(names) if name.endswith("_ptr")]
    first, rest = pointers[0], names[pointers[0] :]
    groups = names[:first], [n for n in rest if n not in constants], [n for n in rest if n in constants]
    return Signature(len(pointers), *(itemgetter(*group) for group in groups))


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
    # To compile it without a launch, the types of all else: "*fp16" (a pointer, 16-byte aligned), "*fp16:2" (aligned to
    # 2 bytes), "i32", "i32:16" (divisible by 16) or "i32:1".
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
    def signature(self) -> "Signature":
        return signature(tuple(self.kernel.arg_names), tuple(self.constants))

    @cached_property
    def in_order(self) -> tuple[Any, ...]:
        """The constants, as the kernel takes them."""
        return self.signature.constants(self.constants)

    def launch(self, arguments: Mapping[str, Any], pdl: bool = False, rows: int = 0) -> "Launch":
        """Bound to these arguments by name as well."""
        return Launch(self, self.signature.others(arguments), pdl, rows)

    def of_types(self, types: Mapping[str, str], own: str) -> "Kernel":
        """To be compiled ahead of time: with these types, `own` for other pointers and "i32" for other numbers."""
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        return replace(self, arguments={n: types.get(n, own if n.endswith("_ptr") else "i32") for n in names})


class Launch:
    """A kernel with its arguments bound, to be launched once per step with new scalars.

    What the JIT compiled for one launch serves all others of the process whose arguments are alike. These go straight
    to the compiled kernel, with addresses in place of tensors, about each of which Triton would ask the driver; unless
    somebody is told of launches. With `pdl` each of them but the first may begin while the one before it runs, see
    kernels/step.py. rows: what no scalar is above; where they take 64 bits the JIT has every launch.
    """

    def __init__(self, kernel: Kernel, arguments: tuple[Any, ...], pdl: bool = False, rows: int = 0):
        self.kernel, self.rest, self.pdl, self.wide = kernel, arguments + kernel.in_order, pdl, rows > INT32
        self.tensors, self.others = arguments[: kernel.signature.pointers], self.rest[kernel.signature.pointers :]

    def __call__(self, steps: Steps, same: Hashable = None) -> None:
        """Launch once per step. What was handed to the driver is kept: a call of the same arguments and steps hands it
        over again. same: tells these steps from others of the kernel; None: there is one, and nothing is kept."""
        if (compiled := self.compiled()) is None:
            for grid, scalars in steps():
                self.once(grid, scalars)
        else:
            _hand_over(compiled, _here()[1], self.addresses, steps, same, self.pdl)

    def once(self, grid: Grid, scalars: Sequence[int]) -> None:
        """Launch by the JIT or in the emulator, and tell whoever asked for it."""
        if (counts := _recorded.kernels) is not None:
            counts[self.kernel.name] += 1
            return
        for observer in _observers:
            observer(self, grid, scalars)
        if interpreting():
            self._emulate(grid, scalars)
            return
        compiled = self.kernel.kernel[grid](*scalars, *self.rest, **self.kernel.options)
        if compiled is not None and not self.wide and not _watched():  # a hook of Triton may keep it from compiling
            _compiled[(_here()[0], *self.alike)] = compiled

    def counts(self, grid: Grid, scalars: Sequence[int]) -> dict[str, Any]:
        """What Triton's launch hooks are told of this launch besides the kernel's name: flops, bytes."""
        jit = self.kernel.kernel
        told = jit.kwargs["launch_metadata"] if isinstance(jit, InterpretedFunction) else jit.launch_metadata
        found: dict[str, Any] = told(grid, None, self._by_name(scalars))
        return found

    def _by_name(self, scalars: Sequence[int]) -> dict[str, Any]:
        return dict(zip(self.kernel.kernel.arg_names, (*scalars, *self.rest), strict=True))

    def _emulate(self, grid: Grid, scalars: Sequence[int]) -> None:
        from ..tools.emulator import emulate

        constants = self.kernel.constants
        arguments = {name: value for name, value in self._by_name(scalars).items() if name not in constants}
        emulate(self.kernel.kernel, grid, arguments, constants, self.kernel.cooperative)

    @cached_property
    def addresses(self) -> tuple[Any, ...]:
        """The arguments, with addresses in place of tensors."""
        return *[tensor.data_ptr() for tensor in self.tensors], *self.others

    @cached_property
    def alike(self) -> tuple[Hashable, ...]:
        """What the JIT would tell apart by, or more."""
        constants = self.kernel.in_order
        numbers = self.others[: len(self.others) - len(constants)]
        classes = [(n == 1) + 2 * (n % 16 == 0) + 4 * (n > INT32) for n in numbers]
        aligned = [address & 15 for address in self.addresses[: len(self.tensors)]]
        identity = self.kernel.kernel.fn, *self.kernel.options.values(), *constants
        return *identity, *[tensor.dtype for tensor in self.tensors], *aligned, *classes

    def compiled(self) -> Any:
        """What is compiled for such arguments, where the shortest way may be taken; else None."""
        if interpreting() or _told() or self.wide:
            return None
        found: Any = _compiled.get((_here()[0], *self.alike))
        # What Triton's launcher hands to C must be the same for the same arguments: no memory of its own.
        own = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
        run = getattr(found, "run", None)
        return found if hasattr(run, "launch") and not any([getattr(run, name, 0) for name in own]) else None


def once_more(
    tensors: Sequence[Tensor], launches: Sequence[tuple[Launch, Steps, Hashable]]
) -> Callable[[Sequence[Tensor]], bool] | None:
    """A pass, of launches with what `Launch` takes when it is called, as a function of other tensors in place of these,
    which are not kept. None where a launch is not compiled yet, or has a tensor that is none of these, or these are not
    all different and aligned to 16 bytes. The function returns False, and launches nothing, where one of its tensors is
    not aligned so, or somebody is told of launches."""
    places = {tensor.data_ptr(): i for i, tensor in enumerate(tensors)}
    if len(places) < len(tensors) or any([address & 15 for address in places]):
        return None
    passed: list[tuple[Any, ...]] = []
    for launch, steps, same in launches:
        order, compiled = [places.get(tensor.data_ptr(), -1) for tensor in launch.tensors], launch.compiled()
        if -1 in order or compiled is None:
            return None
        steps = steps if same is not None else one_step(*next(iter(steps())))
        passed.append((compiled, order, launch.others, steps, same, launch.pdl))
    device, _ = _here()

    def again(tensors: Sequence[Tensor]) -> bool:
        at = [tensor.data_ptr() for tensor in tensors]
        if _told() or [address for address in at if address & 15]:
            return False
        stream = triton.runtime.driver.active.get_current_stream(device)
        for compiled, order, others, *how in passed:
            _hand_over(compiled, stream, (*[at[i] for i in order], *others), *how)
        return True

    return again


def _hand_over(compiled: Any, stream: int, addresses: tuple[Any, ...], steps: Steps, same: Hashable, pdl: bool) -> None:
    """`Launch` of what is compiled; `addresses`: as `Launch.addresses` has them."""
    run, of_kernel = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)  # without hooks
    if same is None:
        for grid, scalars in steps():
            run(*grid, stream, *of_kernel, *scalars, *addresses)
        return
    key = (same, stream, compiled, *addresses)
    if (known := _kept.get(key)) is not None:
        launch, handed = known
        for given in handed:
            launch(*given)
        return
    launch, handed = run.launch, []

    def noted(*given: Any) -> None:
        launch(*given)
        handed.append(given)

    noting = object.__new__(type(run))  # Triton's launcher, which is Python and hands over to C; faster than copy.copy
    vars(noting).update(vars(run), launch=noted)
    for grid, scalars in steps():
        noting(*grid, stream, *of_kernel, *scalars, *addresses)
        noting.launch_pdl = pdl
    _kept.keep(key, (launch, handed))


_compiled: dict[Hashable, Any] = {}  # Triton's CompiledKernel by what `Launch.addresses` tells apart
# What was handed to the driver for the launches of a pass, by its key: the function, and its arguments each time.
_kept: Latest[Hashable, Any] = Latest(1 << 14, lambda key, handed: len(handed[1]))  # half a KB a launch


def forget() -> None:
    """Bind anew whatever is launched next: of tests and benchmarks that put something else in the place of a kernel."""
    _compiled.clear()
    _kept.clear()


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
