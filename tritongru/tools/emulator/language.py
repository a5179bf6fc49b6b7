"""The functions that a kernel under the emulator finds in `gl` and `tl`, by their names in FUNCTIONS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import triton.language as tl

from .values import (
    FUNCTIONS,
    HALVES,
    STORAGE,
    EmulatorError,
    Shared,
    Tensor,
    bfloat16,
    common,
    constant,
    converted,
    float32,
    int1,
    int32,
    int64,
    pair,
    poison,
    rank_checked,
    single,
    storage,
    tensor,
)

machine: Any = None  # the launch that runs (launch.py's Launch): memory, and who the running program is


def function(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def listed(f: Callable[..., Any]) -> Callable[..., Any]:
        for name in names or (f.__name__,):
            FUNCTIONS[name] = f
        return f

    return listed


def _power_of_two(shape: Sequence[Any]) -> list[int]:
    sizes = [int(size) for size in shape]
    if any(size < 1 or size & (size - 1) for size in sizes):
        raise ValueError(f"the sizes of a tensor must be powers of 2, got {sizes}")
    return sizes


@lru_cache(maxsize=256)
def _arange(start: int, end: int) -> np.ndarray:
    return np.arange(start, end, dtype=np.int32)


@function()
def arange(start: int, end: int, layout: Any = None) -> Tensor:
    _power_of_two([end - start])
    return Tensor(_arange(start, end), int32)


@function()
def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Tensor:
    dtype = single(dtype)
    found = converted(value.v, value.dtype, dtype) if isinstance(value, Tensor) else constant(value, dtype)
    return Tensor(np.full(_power_of_two(shape), found, storage(dtype))[()], dtype)


@function()
def zeros(shape: Any, dtype: Any, layout: Any = None) -> Tensor:
    return Tensor(np.zeros(_power_of_two(shape), storage(dtype))[()], single(dtype))


@function()
def full_like(input: Tensor, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    return full(input.shape if shape is None else shape, value, dtype or input.dtype)


@function()
def zeros_like(input: Tensor, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    return full_like(input, 0, shape, dtype)


@function()
def program_id(axis: int) -> Tensor:
    return Tensor(np.int32(machine.current.index[axis]), int32)


@function()
def num_programs(axis: int) -> Tensor:
    return Tensor(np.int32(machine.grid[axis]), int32)


FUNCTIONS["num_warps"] = lambda: machine.num_warps
FUNCTIONS["num_ctas"] = lambda: 1


@function()
def static_range(*bounds: Any, **hints: Any) -> range:
    return range(*(int(bound) for bound in bounds))


@function("range")
def runtime_range(*bounds: Any, **hints: Any) -> Iterator[Tensor]:
    """The loop variable is a tensor, whatever the bounds are."""
    wide = any(isinstance(bound, Tensor) and bound.dtype == int64 for bound in bounds)
    kind, dtype = (np.int64, int64) if wide else (np.int32, int32)
    return (Tensor(kind(i), dtype) for i in range(*(int(bound) for bound in bounds)))


@function("convert_layout", "set_auto_layout")
def convert_layout(value: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    return value


@function("multiple_of", "max_contiguous", "max_constancy")
def hinted(input: Tensor, values: Any) -> Tensor:
    return input


@function("assume", "static_print", "device_print")
def nothing(*args: Any, **options: Any) -> None:
    pass


@function()
def static_assert(cond: Any, msg: str = "") -> None:
    if not cond:
        raise AssertionError(f"static_assert: {msg}" if msg else "static_assert")


@function()
def device_assert(cond: Any, msg: str = "", mask: Any = None) -> None:
    failed = ~np.asarray(tensor(cond).v, bool)
    if mask is not None:
        failed = failed & tensor(mask).v
    if failed.any():
        raise AssertionError(f"device_assert: {msg}")


@function()
def to_tensor(x: Any) -> Tensor:
    return tensor(x)


@function()
def cast(input: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Tensor:
    return tensor(input).to(dtype, fp_downcast_rounding, bitcast)


@function()
def expand_dims(input: Tensor, axis: Any) -> Tensor:
    return Tensor(np.expand_dims(input.v, axis if isinstance(axis, int) else tuple(axis)), input.dtype)


def _sizes(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape


@function()
def reshape(input: Tensor, *shape: Any, can_reorder: bool = False) -> Tensor:
    return Tensor(input.v.reshape(_sizes(shape)), input.dtype)


@function()
def ravel(x: Tensor, can_reorder: bool = False) -> Tensor:
    return Tensor(x.v.reshape(-1), x.dtype)


@function("permute", "trans")
def permute(input: Tensor, *dims: Any) -> Tensor:
    order = _sizes(dims)
    return Tensor(input.v.transpose(order or (*range(input.v.ndim - 2), -1, -2)), input.dtype)


@function()
def broadcast_to(input: Tensor, *shape: Any) -> Tensor:
    return Tensor(np.broadcast_to(input.v, _sizes(shape)), input.dtype)


@function()
def broadcast(input: Any, other: Any) -> tuple[Tensor, Tensor]:
    a, b = np.broadcast_arrays(tensor(input).v, tensor(other).v)
    return Tensor(a, tensor(input).dtype), Tensor(b, tensor(other).dtype)


@function()
def join(a: Tensor, b: Tensor) -> Tensor:
    v, w, dtype = pair(a, b)
    return Tensor(np.stack(np.broadcast_arrays(v, w), -1), dtype)


@function()
def split(a: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape[-1:] != [2]:
        raise ValueError(f"split takes a last dimension of 2, got {a.shape}")
    return Tensor(a.v[..., 0], a.dtype), Tensor(a.v[..., 1], a.dtype)


@function()
def gather(src: Tensor, index: Tensor, axis: int) -> Tensor:
    return Tensor(np.take_along_axis(src.v, index.v, axis), src.dtype)


@function()
def where(condition: Any, x: Any, y: Any) -> Tensor:
    condition = tensor(condition)
    a, b, dtype = pair(x, y)
    for v in (a, b):
        if condition.v.ndim:
            rank_checked(condition.v, v)
    return Tensor(np.where(condition.v if condition.dtype is int1 else condition.v != 0, a, b)[()], dtype)


def _extremum(ignoring: Any, spreading: Any) -> Callable[..., Tensor]:
    def extremum(x: Any, y: Any, propagate_nan: Any = None) -> Tensor:
        a, b, dtype = pair(x, y)
        spreads = propagate_nan is not None and propagate_nan == tl.PropagateNan.ALL
        return Tensor((spreading if spreads else ignoring)(a, b), dtype)

    return extremum


FUNCTIONS["maximum"] = _extremum(np.fmax, np.maximum)
FUNCTIONS["minimum"] = _extremum(np.fmin, np.minimum)


@function()
def clamp(x: Any, min: Any, max: Any, propagate_nan: Any = None) -> Tensor:
    return FUNCTIONS["minimum"](FUNCTIONS["maximum"](x, min, propagate_nan), max, propagate_nan)


for _name, _symbol in (("add", "__add__"), ("sub", "__sub__"), ("mul", "__mul__"), ("fdiv", "__truediv__")):
    FUNCTIONS[_name] = lambda x, y, symbol=_symbol, **options: getattr(tensor(x), symbol)(y)
FUNCTIONS["div_rn"] = FUNCTIONS["fdiv"]


def _elementwise(f: Callable[..., Any], any_type: bool = False) -> Callable[..., Tensor]:
    def applied(x: Any, **options: Any) -> Tensor:
        x = tensor(x)
        if not any_type and x.dtype not in (float32, tl.float64):
            raise ValueError(f"expected dtype fp32 or fp64, got {x.dtype}")
        return Tensor(f(x.v), x.dtype)

    return applied


_MATHS: dict[str, Callable[..., Any]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "sin": np.sin, "cos": np.cos, "sqrt": np.sqrt,
    "sqrt_rn": np.sqrt, "rsqrt": lambda v: 1 / np.sqrt(v), "floor": np.floor, "ceil": np.ceil, "tanh": np.tanh,
}  # fmt: skip
FUNCTIONS.update((name, _elementwise(f)) for name, f in _MATHS.items())
FUNCTIONS["abs"] = _elementwise(np.abs, any_type=True)


@function()
def fma(x: Any, y: Any, z: Any) -> Tensor:
    """Rounded once: the product of two float32 is exact in float64."""
    values = [tensor(value) for value in (x, y, z)]
    dtype = common(common(values[0].dtype, values[1].dtype), values[2].dtype)
    if dtype not in (*HALVES, float32):
        raise EmulatorError(f"the emulator knows no fma of {dtype}")
    a, b, c = (np.asarray(value.v, np.float64) for value in values)
    return Tensor(converted((a * b + c).astype(np.float32), float32, dtype)[()], dtype)


@function()
def umulhi(x: Any, y: Any) -> Tensor:
    a, b, dtype = pair(x, y)
    if dtype not in (int32, tl.uint32):
        raise EmulatorError(f"the emulator knows no umulhi of {dtype}")
    product = a.astype(np.uint32).astype(np.uint64) * b.astype(np.uint32).astype(np.uint64)
    return Tensor((product >> np.uint64(32)).astype(STORAGE[dtype]), dtype)


@function()
def cdiv(x: Any, div: Any) -> Any:
    return (x + div - 1) // div


def _reducing(ufunc: Any) -> Callable[..., Tensor]:
    """A reduction of Triton's library. bfloat16 is added up, or compared, in float32; narrow integers in 32 bits."""

    def reduced(input: Tensor, axis: int | None = None, *rest: Any, keep_dims: bool = False, dtype: Any = None) -> Any:
        if rest:
            raise EmulatorError(f"the emulator knows no options {rest} of a reduction")
        of = input.dtype
        if dtype is not None:
            of = single(dtype)
        elif of == bfloat16:
            of = float32
        elif of.is_int() and of.int_bitwidth < 32:
            of = tl.uint32 if ufunc is np.add and of.is_int_unsigned() and of != int1 else int32
        v = ufunc.reduce(converted(input.v, input.dtype, of), axis=axis, keepdims=keep_dims)
        return Tensor(v if v.dtype == storage(of) else v.astype(storage(of)), of)

    return reduced


FUNCTIONS.update(
    sum=_reducing(np.add), max=_reducing(np.fmax), min=_reducing(np.fmin), xor_sum=_reducing(np.bitwise_xor)
)


@function()
def reduce(input: Any, axis: int | None, combine_fn: Any, keep_dims: bool = False) -> Any:
    """By the function given, in the order of the elements."""
    combine = machine.bound(combine_fn)
    inputs = input if isinstance(input, tuple) else (input,)
    rows = [np.moveaxis(t.v, axis, 0) if axis is not None else t.v.reshape(-1) for t in inputs]
    total = [Tensor(row[0], t.dtype) for row, t in zip(rows, inputs, strict=True)]
    for i in range(1, len(rows[0])):
        step = combine(*total, *(Tensor(row[i], t.dtype) for row, t in zip(rows, inputs, strict=True)))
        total = list(step) if isinstance(step, tuple) else [step]
    if keep_dims:
        places = axis if axis is not None else tuple(range(inputs[0].v.ndim))
        total = [Tensor(np.expand_dims(t.v, places), t.dtype) for t in total]
    return tuple(total) if isinstance(input, tuple) else total[0]


def _factor(x: Tensor, precision: Any) -> np.ndarray:
    """As the tensor core reads it: float32 loses its low 13 bits, rounded by nobody."""
    if x.dtype == float32:
        if precision in (None, "tf32"):
            return (np.ascontiguousarray(x.v).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        if precision != "ieee":
            raise EmulatorError(f"the emulator knows no input_precision {precision!r}")
        return x.v
    if x.dtype not in HALVES:
        raise EmulatorError(f"the emulator multiplies no matrices of {x.dtype}")
    return x.v.astype(np.float32, copy=False)


def _product(a: Tensor, b: Tensor, acc: Any, precision: Any) -> Tensor:
    if a.dtype != b.dtype or a.v.ndim != b.v.ndim or a.v.ndim not in (2, 3):
        raise ValueError(f"no matrix product of {a.dtype}{a.shape} and {b.dtype}{b.shape}")
    out = np.matmul(_factor(a, precision), _factor(b, precision))
    if acc is None:
        return Tensor(out, float32)
    if acc.dtype != float32 or acc.v.shape != out.shape:
        raise ValueError(f"the accumulator must be fp32{list(out.shape)}, got {acc.dtype}{acc.shape}")
    return Tensor(out + acc.v, float32)


@function()
def mma_v2(a: Tensor, b: Tensor, acc: Tensor, input_precision: Any = None) -> Tensor:
    if a.shape[-1] < 16:
        raise ValueError(f"K must be at least 16, the left factor is {a.shape}")
    return _product(a, b, acc, input_precision)


@function()
def dot(
    input: Tensor, other: Tensor, acc: Any = None, input_precision: Any = None, allow_tf32: Any = None, **options: Any
) -> Tensor:
    return _product(input, other, acc, "ieee" if allow_tf32 is False else input_precision)


@function()
def dot_fma(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    return _product(a, b, acc, "ieee")


@function()
def load(
    pointer: Tensor, mask: Any = None, other: Any = None, boundary_check: Any = (), padding_option: str = "",
    cache_modifier: str = "", eviction_policy: str = "", volatile: bool = False,
) -> Tensor:  # fmt: skip
    return machine.load(pointer, mask, other, volatile)


@function()
def store(
    pointer: Tensor, value: Any, mask: Any = None, boundary_check: Any = (), cache_modifier: str = "",
    eviction_policy: str = "",
) -> None:  # fmt: skip
    machine.store(pointer, value, mask)


def _atomic(update: Callable[[Any, Any], Any]) -> Callable[..., Tensor]:
    def atomic(pointer: Tensor, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> Tensor:
        return machine.atomic(pointer, (val,), mask, update)

    return atomic


_UPDATES: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "xchg": lambda old, new: new,
}  # fmt: skip
FUNCTIONS.update((f"atomic_{name}", _atomic(update)) for name, update in _UPDATES.items())


@function()
def atomic_cas(pointer: Tensor, cmp: Any, val: Any, sem: Any = None, scope: Any = None) -> Tensor:
    return machine.atomic(pointer, (cmp, val), None, lambda old, expected, new: new if old == expected else old)


@function("barrier", "thread_barrier", "debug_barrier")
def barrier(**options: Any) -> None:
    machine.point()


FUNCTIONS["globaltimer"] = lambda: Tensor(np.int64(machine.clock()), int64)
FUNCTIONS["gdc_wait"] = FUNCTIONS["gdc_launch_dependents"] = nothing


@function()
def allocate_shared_memory(element_ty: Any, shape: Any, layout: Any = None, value: Any = None) -> Shared:
    sizes = [int(size) for size in shape]
    found = Shared(np.full(sizes, poison(element_ty), storage(element_ty)), single(element_ty))
    if value is not None:
        found.store(value)
    return found


@function()
def inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:
    return machine.inline_asm(asm, [tensor(arg) for arg in args], dtype)
