"""What a kernel under the emulator finds in place of Triton: its own source runs, bound to FUNCTIONS.

Functions of Triton's that FUNCTIONS lists are the emulator's; those that Triton writes in its own language run from
their source; any other is an error that names it. Layouts are built by Triton's own classes, which check them.
"""

import types
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import triton.language as tl

from .values import STORAGE, EmulatorError, Tensor, allocate_shared_memory, computed, operands, poison, tensor

TWINS: dict[str, Callable[..., Any]] = {}
machine: Any = None  # the launch that runs, or ran last (launch.py's Launch): memory, and who the running program is


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    if end <= start or end - start & end - start - 1:
        raise ValueError(f"the sizes of a tensor must be powers of 2, got {end - start}")
    return Tensor(np.arange(start, end, dtype=np.int32), tl.int32)


def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Tensor:
    return Tensor(np.zeros(shape, STORAGE[dtype]), dtype)


def reduced(ufunc: Any, x: Tensor, axis: int) -> Tensor:
    assert x.dtype in (tl.float32, tl.int32), "Triton widens narrower ones"
    return Tensor(ufunc.reduce(x.v, axis, dtype=x.v.dtype), x.dtype)


def join(a: Any, b: Any) -> Tensor:
    v, w, dtype = operands(a, b)
    return Tensor(np.stack(np.broadcast_arrays(v, w), -1), dtype)


def where(condition: Any, x: Any, y: Any) -> Tensor:
    a, b, dtype = operands(x, y)
    return Tensor(np.where(tensor(condition).v, a, b)[()], dtype)


def factor(x: Tensor, precision: Any) -> np.ndarray:
    """As the tensor core reads it: float32 loses its low 13 bits, rounded by nobody."""
    if x.dtype == tl.float32 and precision != "ieee":
        return (np.ascontiguousarray(x.v).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return x.v.astype(np.float32, copy=False)


def mma_v2(a: Tensor, b: Tensor, acc: Tensor, input_precision: str = "tf32") -> Tensor:
    return Tensor(np.matmul(factor(a, input_precision), factor(b, input_precision)) + acc.v, tl.float32)


def lanes(pointer: Tensor, mask: Any) -> tuple[Any, Any, Any]:
    """What a pointer points to, its addresses, and which of them are accessed."""
    mask = tensor(True if mask is None else mask)
    if mask.dtype != tl.int1:
        raise ValueError(f"a mask must be boolean, got {mask!r}")
    active = np.broadcast_to(mask.v, pointer.v.shape)
    return pointer.dtype.element_ty, pointer.v, ... if active.all() else active


def load(pointer: Tensor, mask: Any = None, other: Any = None, **hints: Any) -> Tensor:
    """Hints, of caches and `volatile`, change nothing."""
    dtype, addresses, active = lanes(pointer, mask)
    fill = poison(dtype) if other is None else tensor(other).to(dtype).v
    out = np.full(addresses.shape, fill, STORAGE[dtype])
    out[active] = machine.load(addresses[active], dtype).v
    return Tensor(out[()], dtype)


def store(pointer: Tensor, value: Any, mask: Any = None, **hints: Any) -> None:
    dtype, addresses, active = lanes(pointer, mask)
    values = np.broadcast_to(tensor(value).to(dtype).v, addresses.shape)
    machine.store(addresses[active], Tensor(values[active], dtype))


def inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:
    if asm not in TWINS:
        raise EmulatorError(f"no twin in Python is registered (TWINS) for the inline PTX {asm!r}")
    return TWINS[asm](machine, *map(tensor, args), dtype=dtype)


_own = (allocate_shared_memory, arange, inline_asm_elementwise, join, load, mma_v2, store, where, zeros)
FUNCTIONS: dict[str, Any] = {  # by the names under which a kernel finds them in any module of Triton's
    **{function.__name__: function for function in _own},
    "convert_layout": lambda x, *rest, **options: x,
    "program_id": lambda axis: Tensor(np.int32(machine.current.index[axis]), tl.int32),
    "num_programs": lambda axis: Tensor(np.int32(machine.grid[axis]), tl.int32),
    "range": lambda *bounds: (Tensor(np.int32(i), tl.int32) for i in range(*bounds)),
    "static_range": range,
    "gdc_wait": lambda: None,  # a launch is over before the next begins
    "gdc_launch_dependents": lambda: None,
    "zeros_like": lambda x: zeros(x.shape, x.dtype),
    "expand_dims": lambda x, axis: Tensor(np.expand_dims(x.v, axis), x.dtype),
    "split": lambda x: tuple(Tensor(half, x.dtype) for half in np.moveaxis(x.v, -1, 0)),
    "reshape": Tensor.reshape,
    "permute": Tensor.permute,
    "abs": lambda x: Tensor(np.abs(x.v), x.dtype),
    "exp": lambda x: Tensor(np.exp(x.v), x.dtype),
    "dot": mma_v2,
    "maximum": partial(computed, np.fmax, ""),  # of a NaN and a number the number
    "minimum": partial(computed, np.fmin, ""),
    "sum": partial(reduced, np.add),
    "max": partial(reduced, np.fmax),
}

KERNEL = "__emulated__"  # among the globals of a function that runs here
_bound: dict[types.FunctionType, Callable[..., Any]] = {}


def bound(fn: types.FunctionType) -> Callable[..., Any]:
    """What is under gluon.jit or triton.jit, with the emulator's language among its globals."""
    if fn not in _bound:
        names: dict[str, Any] = {"__builtins__": __builtins__, KERNEL: True, "range": FUNCTIONS["range"]}
        defaults = fn.__defaults__ and tuple(map(in_emulator, fn.__defaults__))
        _bound[fn] = types.FunctionType(fn.__code__, names, fn.__name__, defaults)
        names |= {name: in_emulator(fn.__globals__[name]) for name in fn.__code__.co_names if name in fn.__globals__}
    return _bound[fn]


def in_emulator(value: Any) -> Any:
    """What a kernel gets for a global of its module, a constant or a default."""
    if isinstance(value, tl.constexpr):
        return in_emulator(value.value)
    if isinstance(value, types.ModuleType):
        return Module(value)
    fn = getattr(value, "fn", value)
    of_triton = str(getattr(fn, "__module__", "")).split(".")[0] == "triton"
    if of_triton and getattr(fn, "__name__", "") in FUNCTIONS:
        return FUNCTIONS[fn.__name__]
    if type(value).__name__ == "ConstexprFunction":
        return fn
    if fn is not value:
        return bound(fn)
    if of_triton and isinstance(fn, types.FunctionType):
        raise EmulatorError(f"the emulator does not know {fn.__name__}")
    return value


@cache
class Module:
    """Stands for a module."""

    def __init__(self, real: types.ModuleType):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = in_emulator(getattr(self._real, name))
        return value
