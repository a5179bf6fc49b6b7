"""Values of a kernel under the emulator, with Triton's rules.

A value is a numpy array and a dtype of Triton's. bfloat16 lives in float32 arrays that hold bfloat16's values only:
each operation rounds its result to nearest, ties to even. A pointer is an int64 array of addresses. Types are promoted
by Triton's own rules, integers are C's.
"""

import operator
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic


class EmulatorError(RuntimeError):
    """What the emulator finds wrong with a kernel, or with how it is asked to run one."""


TYPES = ("int8", "int16", "int32", "int64", "float16", "bfloat16", "float32")
POINTERS: dict[torch.dtype, Any] = {getattr(torch, name): tl.pointer_type(getattr(tl, name)) for name in TYPES}
STORAGE: dict[Any, Any] = {  # what values of a type are kept in
    tl.int1: np.dtype(bool),
    **{getattr(tl, name): np.dtype("float32" if name == "bfloat16" else name) for name in TYPES},
}
RAW = {**STORAGE, tl.bfloat16: np.dtype(np.uint16)}  # what lies in memory
NUMBERS = {bool: tl.int1, int: tl.int32, float: tl.float32}  # the types that numbers of Python's have as tensors
bfloat16 = tl.bfloat16


@cache
def common(a: tl.dtype, b: tl.dtype, divides: bool, b_is_number: bool = False) -> tl.dtype:
    """The type in which Triton computes with values of two types; a number of no higher kind takes the tensor's."""
    rules = TritonSemantic.__new__(TritonSemantic)  # those of promotion need no compiler
    return rules.computation_type_impl(a, False, b, b_is_number, divides)


def round_to_bfloat16(x: Any) -> Any:
    """float32 values rounded to bfloat16's, as `cvt.rn.bf16` does: a NaN becomes 0x7FFF."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(x != x, np.uint32(0x7FFF0000).view(np.float32), rounded)[()]


def converted(v: Any, old: tl.dtype, new: tl.dtype) -> Any:
    """Storage of one type as that of another, rounded to nearest; floats become integers by truncation."""
    if old is new or old == new:
        return v
    if new is bfloat16:
        return round_to_bfloat16(v.astype(np.float32, copy=False))
    return v != 0 if new == tl.int1 else v.astype(STORAGE[new])


def raw(v: Any, dtype: tl.dtype) -> Any:
    """The bits of values, as they lie in memory."""
    if dtype is bfloat16:
        return (np.ascontiguousarray(v).view(np.uint32) >> 16).astype(np.uint16).reshape(np.shape(v))
    return v


def unraw(bits: Any, dtype: tl.dtype) -> Any:
    """The values whose bits these are."""
    return (bits.astype(np.uint32) << 16).view(np.float32) if dtype is bfloat16 else bits


def poison(dtype: tl.dtype) -> Any:
    """What nobody wrote: NaN, or a large number, so that a use of it shows."""
    kind = STORAGE[dtype]
    return kind.type(np.nan if kind.kind == "f" else kind.kind == "b" or np.iinfo(kind).max // 3)


class Tensor:
    """A value of a kernel: `v` as STORAGE has it (a numpy scalar for one without shape), and its type."""

    __slots__ = ("dtype", "v")

    def __init__(self, v: Any, dtype: tl.dtype):
        self.v, self.dtype = v, dtype

    shape = property(lambda self: list(self.v.shape))

    def to(self, dtype: Any, *, bitcast: bool = False) -> "Tensor":
        if not bitcast:
            return Tensor(converted(self.v, self.dtype, dtype), dtype)
        bits = np.ascontiguousarray(raw(self.v, self.dtype)).view(RAW[dtype]).reshape(self.v.shape)
        return Tensor(unraw(bits, dtype)[()], dtype)

    def reshape(self, shape: Any) -> "Tensor":
        return Tensor(self.v.reshape(shape), self.dtype)

    def permute(self, dims: Any) -> "Tensor":
        return Tensor(self.v.transpose(dims), self.dtype)

    def __getitem__(self, at: Any) -> "Tensor":
        return Tensor(self.v[at], self.dtype)

    def __bool__(self) -> bool:
        return bool(self.v)  # an error for a tile

    def __index__(self) -> int:
        return self.v.__index__()

    def __repr__(self) -> str:
        return f"{self.dtype}{self.shape} {self.v}"


def tensor(x: Any) -> Tensor:
    """A tensor, or a number as one; refused where it does not fit."""
    return x if type(x) is Tensor else Tensor(STORAGE[NUMBERS[type(x)]].type(x), NUMBERS[type(x)])


def operands(a: Any, b: Any, divides: bool = False) -> tuple[Any, Any, Any]:
    """Two values, numbers among them, in the type in which Triton computes with them."""
    x, y = tensor(a), tensor(b)
    dtype = x.dtype
    if x is not a:
        dtype = common(y.dtype, dtype, divides, True)
    elif dtype is not y.dtype or divides or y is not b:
        dtype = common(dtype, y.dtype, divides, y is not b)
    return converted(x.v, x.dtype, dtype), converted(y.v, y.dtype, dtype), dtype


def computed(f: Callable[..., Any], kind: str, x: Any, y: Any) -> Tensor:
    """A function of two arrays applied to two values. kind: "compares", or "divides", or neither."""
    v, w, dtype = operands(x, y, kind == "divides")
    if kind == "compares":
        return Tensor(f(v, w), tl.int1)
    if dtype.is_ptr():
        raise TypeError(f"unexpected type {dtype}")
    found = f(v, w)
    return Tensor(round_to_bfloat16(found) if dtype is bfloat16 else found, dtype)


def shifted(f: Callable[..., Any], x: Any, y: Any) -> Tensor:
    """A sum or difference, of a pointer and an offset in elements too."""
    if f is operator.add and type(y) is Tensor and y.dtype.is_ptr():
        x, y = y, x
    if type(x) is not Tensor or not x.dtype.is_ptr():
        return computed(f, "", x, y)
    offset = tensor(y)
    if not offset.dtype.is_int():
        raise TypeError(f"invalid operands of type {x.dtype} and {offset.dtype}")
    return Tensor(f(x.v, RAW[x.dtype.element_ty].itemsize * offset.v.astype(np.int64)), x.dtype)


for _name, _operator in {
    "add": partial(shifted, operator.add),
    "sub": partial(shifted, operator.sub),
    "truediv": partial(computed, lambda v, w: np.true_divide(v, w, dtype=v.dtype), "divides"),  # not of integers
    "floordiv": partial(computed, lambda v, w: (v - np.fmod(v, w)) // w, "divides"),
    "mod": partial(computed, np.fmod, "divides"),
    **{name: partial(computed, getattr(operator, f"__{name}__"), "") for name in ("mul", "and", "or", "xor")},
    **{name: partial(computed, getattr(operator, name), "compares") for name in ("lt", "le", "gt", "ge", "eq", "ne")},
}.items():
    setattr(Tensor, f"__{_name}__", lambda self, other, f=_operator: f(self, other))
    setattr(Tensor, f"__r{_name}__", lambda self, other, f=_operator: f(other, self))
for _name, _f in {"neg": operator.neg, "invert": operator.invert}.items():
    setattr(Tensor, f"__{_name}__", lambda self, f=_f: Tensor(f(self.v), self.dtype))


class Shared(Tensor):
    """A place in shared memory. Fresh, it is poisoned; nothing orders its loads and stores but the program itself."""

    def store(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise ValueError(f"shared memory is {self.dtype}{self.shape}, the value {value.dtype}{value.shape}")
        self.v[...] = value.v

    def load(self, layout: Any = None) -> Tensor:
        return Tensor(self.v.copy(), self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.v[(slice(None),) * dim + (slice(start, start + length),)], self.dtype)


def allocate_shared_memory(dtype: Any, shape: Any, layout: Any, value: Tensor | None = None) -> Shared:
    found = Shared(np.full(shape, poison(dtype), STORAGE[dtype]), dtype)
    if value is not None:
        found.store(value)
    return found
