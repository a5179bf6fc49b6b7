"""The functions that a kernel under the emulator finds in `gl` and `tl`, by their names in FUNCTIONS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import triton.language as tl

from .values import FUNCTIONS, EmulatorError, Tensor, computed, constant, converted, operands, storage, tensor

machine: Any = None  # the launch that runs (launch.py's Launch): memory, and who the running program is


def function(f: Callable[..., Any]) -> Callable[..., Any]:
    FUNCTIONS[f.__name__] = f
    return f


def powers_of_two(shape: Sequence[Any]) -> list[int]:
    sizes = [int(size) for size in shape]
    if any(size < 1 or size & (size - 1) for size in sizes):
        raise ValueError(f"the sizes of a tensor must be powers of 2, got {sizes}")
    return sizes


@function
def arange(start: int, end: int, layout: Any = None) -> Tensor:
    powers_of_two([end - start])
    return Tensor(np.arange(start, end, dtype=np.int32), tl.int32)


@function
def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Tensor:
    found = converted(value.v, value.dtype, dtype) if type(value) is Tensor else constant(value, dtype)
    return Tensor(np.full(powers_of_two(shape), found, storage(dtype))[()], dtype)


def runtime_range(*bounds: Any, **hints: Any) -> Iterator[Tensor]:
    """The loop variable is a tensor, whatever the bounds are."""
    wide = any(type(bound) is Tensor and bound.dtype == tl.int64 for bound in bounds)
    kind, dtype = (np.int64, tl.int64) if wide else (np.int32, tl.int32)
    return (Tensor(kind(i), dtype) for i in range(*(int(bound) for bound in bounds)))


FUNCTIONS |= {
    "zeros": lambda shape, dtype, layout=None: full(shape, 0, dtype),
    "zeros_like": lambda input, shape=None, dtype=None, layout=None: full(
        shape or input.shape, 0, dtype or input.dtype
    ),
    "program_id": lambda axis: Tensor(np.int32(machine.current.index[axis]), tl.int32),
    "num_programs": lambda axis: Tensor(np.int32(machine.grid[axis]), tl.int32),
    "range": runtime_range,
    "static_range": lambda *bounds, **hints: range(*(int(bound) for bound in bounds)),
    "num_warps": lambda: machine.num_warps,
    "globaltimer": lambda: Tensor(np.int64(machine.clock()), tl.int64),
    **dict.fromkeys(("convert_layout", "multiple_of", "max_contiguous"), lambda x, *rest, **options: x),
    **dict.fromkeys(("assume", "static_print", "gdc_wait", "gdc_launch_dependents"), lambda *given, **options: None),
    **dict.fromkeys(("barrier", "thread_barrier", "debug_barrier"), lambda **options: machine.point()),
}


@function
def static_assert(cond: Any, msg: str = "") -> None:
    if not cond:
        raise AssertionError(f"static_assert: {msg}" if msg else "static_assert")


def shaping(f: Callable[..., Any]) -> Callable[..., Tensor]:
    """Of a function of numpy's, that is given a tensor's values and sizes, dimensions or an axis."""

    def shaped(input: Tensor, *given: Any, can_reorder: bool = False, **named: Any) -> Tensor:
        (given,) = (*given, *named.values()) if len(given) + len(named) == 1 else (given,)
        return Tensor(f(input.v, given), input.dtype)

    return shaped


def transposed(v: Any, dims: Any) -> Any:
    return v.transpose(dims or (*range(v.ndim - 2), -1, -2))


FUNCTIONS |= {
    "expand_dims": shaping(np.expand_dims),
    "reshape": shaping(np.reshape),
    "broadcast_to": shaping(np.broadcast_to),
    "permute": shaping(transposed),
    "trans": shaping(transposed),
}


@function
def join(a: Any, b: Any) -> Tensor:
    v, w, dtype = operands(a, b)
    return Tensor(np.stack(np.broadcast_arrays(v, w), -1), dtype)


@function
def split(a: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape[-1:] != [2]:
        raise ValueError(f"split takes a last dimension of 2, got {a.shape}")
    return Tensor(a.v[..., 0], a.dtype), Tensor(a.v[..., 1], a.dtype)


@function
def where(condition: Any, x: Any, y: Any) -> Tensor:
    a, b, dtype = operands(x, y)
    return Tensor(np.where(tensor(condition).v, a, b)[()], dtype)


def of_floats(f: Callable[..., Any]) -> Callable[..., Tensor]:
    def applied(x: Any) -> Tensor:
        x = tensor(x)
        if x.dtype not in (tl.float32, tl.float64):
            raise ValueError(f"expected dtype fp32 or fp64, got {x.dtype}")
        return Tensor(f(x.v), x.dtype)

    return applied


for _name in ("exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "floor", "ceil", "tanh"):
    FUNCTIONS[_name] = of_floats(getattr(np, _name))
FUNCTIONS |= {
    "rsqrt": of_floats(lambda v: 1 / np.sqrt(v)),
    "abs": lambda x: Tensor(np.abs(tensor(x).v), tensor(x).dtype),
    "maximum": partial(computed, np.fmax, ""),  # of a NaN and a number the number
    "minimum": partial(computed, np.fmin, ""),
    "cast": lambda x, dtype, bitcast=False: tensor(x).to(dtype, bitcast=bitcast),
}


def reducing(ufunc: Any) -> Callable[..., Tensor]:
    """A reduction of Triton's library. tl.bfloat16 is added up, or compared, in float32; narrow integers in 32 bits."""

    def reduced(input: Tensor, axis: int | None = None, keep_dims: bool = False) -> Tensor:
        dtype = input.dtype
        if dtype == tl.bfloat16:
            dtype = tl.float32
        elif dtype.is_int() and dtype.int_bitwidth < 32:
            dtype = tl.int32
        v = ufunc.reduce(converted(input.v, input.dtype, dtype), axis=axis, keepdims=keep_dims)
        return Tensor(v.astype(storage(dtype), copy=False), dtype)

    return reduced


FUNCTIONS |= {"sum": reducing(np.add), "max": reducing(np.fmax), "min": reducing(np.fmin)}


def factor(x: Tensor, precision: Any) -> np.ndarray:
    """As the tensor core reads it: float32 loses its low 13 bits, rounded by nobody."""
    if x.dtype == tl.float32 and precision in (None, "tf32"):
        return (np.ascontiguousarray(x.v).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    if x.dtype not in (tl.float16, tl.bfloat16, tl.float32) or precision not in (None, "tf32", "ieee"):
        raise EmulatorError(f"the emulator multiplies no matrices of {x.dtype} with input_precision {precision!r}")
    return x.v.astype(np.float32, copy=False)


@function
def mma_v2(a: Tensor, b: Tensor, acc: Tensor, input_precision: Any = None) -> Tensor:
    if a.shape[-1] < 16:
        raise ValueError(f"K must be at least 16, the left factor is {a.shape}")
    if a.dtype != b.dtype or a.v.ndim != b.v.ndim:
        raise ValueError(f"no matrix product of {a.dtype}{a.shape} and {b.dtype}{b.shape}")
    out = np.matmul(factor(a, input_precision), factor(b, input_precision))
    if acc.dtype != tl.float32 or acc.v.shape != out.shape:
        raise ValueError(f"the accumulator must be fp32{list(out.shape)}, got {acc.dtype}{acc.shape}")
    return Tensor(out + acc.v, tl.float32)


FUNCTIONS |= {  # hints, of caches and `volatile`, change nothing
    "load": lambda pointer, mask=None, other=None, **hints: machine.load(pointer, mask, other),
    "store": lambda pointer, value, mask=None, **hints: machine.store(pointer, value, mask),
}


@function
def inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:
    return machine.inline_asm(asm, [tensor(arg) for arg in args], dtype)
