"""Values of a kernel under the emulator, with Triton's rules.

A value is a numpy array and a dtype of Triton's. bfloat16 lives in float32 arrays that hold bfloat16's values only:
each operation rounds its result to nearest, ties to even. A pointer is an int64 array of addresses. Types are promoted
by Triton's own rules, integers are C's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic


class EmulatorError(RuntimeError):
    """What the emulator finds wrong with a kernel, or with how it is asked to run one."""


STORAGE: dict[Any, Any] = {  # what values of a type are kept in
    tl.int1: np.bool_, tl.int8: np.int8, tl.int16: np.int16, tl.int32: np.int32, tl.int64: np.int64,
    tl.uint8: np.uint8, tl.uint16: np.uint16, tl.uint32: np.uint32, tl.uint64: np.uint64,
    tl.float16: np.float16, tl.bfloat16: np.float32, tl.float32: np.float32, tl.float64: np.float64,
}  # fmt: skip
STORAGE = {dtype: np.dtype(kind) for dtype, kind in STORAGE.items()}
RAW: dict[Any, Any] = {**STORAGE, tl.int1: np.dtype(np.uint8), tl.bfloat16: np.dtype(np.uint16)}  # what lies in memory
int1, int32, int64, bfloat16, float32 = tl.int1, tl.int32, tl.int64, tl.bfloat16, tl.float32
FUNCTIONS: dict[str, Any] = {}  # by the name under which a kernel finds them, in whatever module of Triton's


@cache
def common(a: tl.dtype, b: tl.dtype, divides: bool = False, b_is_number: bool = False) -> tl.dtype:
    """The type in which Triton computes with values of two types; a number of no higher kind takes the tensor's."""
    if a.is_ptr() or b.is_ptr():
        if a != b:
            raise TypeError(f"invalid operands of type {a} and {b}")
        return a
    rules = TritonSemantic.__new__(TritonSemantic)  # those of promotion need no compiler
    return rules.computation_type_impl(a, False, b, b_is_number, divides)


def type_of(number: Any) -> tl.dtype:
    """The type that a number of Python's has as a tensor."""
    if isinstance(number, bool):
        return int1
    if isinstance(number, float):
        return float32
    if isinstance(number, int):
        for dtype, least, bits in (
            (int32, -(2**31), 31),
            (tl.uint32, 0, 32),
            (int64, -(2**63), 63),
            (tl.uint64, 0, 64),
        ):
            if least <= number < 1 << bits:
                return dtype
    raise TypeError(f"cannot convert {number!r} of type {type(number).__name__} to a tensor")


def storage(dtype: tl.dtype) -> np.dtype:
    found = STORAGE.get(int64 if dtype.is_ptr() else dtype)
    if found is None:
        raise EmulatorError(f"the emulator has no values of type {dtype}")
    return found


def round_to_bfloat16(x: Any) -> Any:
    """float32 values rounded to bfloat16's, as `cvt.rn.bf16` does: a NaN becomes 0x7FFF."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view(np.float32)
    nan = x != x
    return np.where(nan, np.uint32(0x7FFF0000).view(np.float32), rounded) if nan.any() else rounded


def converted(v: Any, old: tl.dtype, new: tl.dtype) -> Any:
    """Storage of one type as that of another, rounded to nearest; floats become integers by truncation."""
    if old is new or old == new:
        return v
    if new == int1:
        return v != 0
    if new == bfloat16:
        return round_to_bfloat16(v.astype(np.float32, copy=False))[()]
    return v.astype(storage(new))


def constant(number: Any, dtype: tl.dtype) -> Any:
    """A number of Python's as a value of the type; refused where it does not fit."""
    found = storage(dtype).type(number)
    return round_to_bfloat16(found)[()] if dtype is bfloat16 else found


def raw(v: Any, dtype: tl.dtype) -> Any:
    """The bits of values, as they lie in memory."""
    if dtype == bfloat16:
        return (np.ascontiguousarray(v).view(np.uint32) >> 16).astype(np.uint16).reshape(np.shape(v))
    return v.astype(np.uint8) if dtype == int1 else v


def unraw(bits: Any, dtype: tl.dtype) -> Any:
    """The values whose bits these are."""
    if dtype == bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits != 0 if dtype == int1 else bits


def poison(dtype: tl.dtype) -> Any:
    """What nobody wrote: NaN, or a large number, so that a use of it shows."""
    kind = storage(dtype)
    return kind.type(np.nan if kind.kind == "f" else kind.kind == "b" or np.iinfo(kind).max // 3)


class Tensor:
    """A value of a kernel: `v` as STORAGE has it (a numpy scalar for one without shape), and its type."""

    __slots__ = ("dtype", "v")

    def __init__(self, v: Any, dtype: tl.dtype):
        self.v, self.dtype = v, dtype

    shape = property(lambda self: list(self.v.shape))

    def to(self, dtype: Any, *, bitcast: bool = False) -> Tensor:
        old, v = self.dtype, self.v
        if dtype is old:
            return self
        if old.is_ptr() or dtype.is_ptr():
            if (int64 if old.is_ptr() else old).primitive_bitwidth != 64:
                raise TypeError(f"cannot cast {old} to {dtype}")
            return Tensor(v.astype(storage(dtype)), dtype)
        if not bitcast:
            return Tensor(converted(v, old, dtype), dtype)
        if old.primitive_bitwidth != dtype.primitive_bitwidth:
            raise ValueError(f"cannot bitcast {old} to {dtype}: their sizes differ")
        bits = np.ascontiguousarray(raw(v, old)).view(RAW[dtype]).reshape(v.shape)
        return Tensor(unraw(bits, dtype)[()], dtype)

    def __bool__(self) -> bool:
        if self.v.size != 1:
            raise ValueError(f"a tensor of shape {self.shape} decides no branch")
        return bool(self.v)

    def __index__(self) -> int:
        if self.v.ndim or not self.dtype.is_int():
            raise TypeError(f"a whole number is needed, got {self}")
        return int(self.v)

    def __neg__(self) -> Tensor:
        return Tensor(np.negative(self.v), self.dtype)

    def __invert__(self) -> Tensor:
        return Tensor(np.invert(self.v), self.dtype)

    def __getitem__(self, at: Any) -> Tensor:
        places = at if isinstance(at, tuple) else (at,)
        if any(place is not None and place != slice(None) for place in places):
            raise ValueError(f"a tensor takes `:` and `None` as an index, got {at}")
        return Tensor(self.v[places], self.dtype)

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS and hasattr(tl.tensor, name):
            return partial(FUNCTIONS[name], self)
        raise EmulatorError(f"the emulator knows no tensor.{name}")

    def __repr__(self) -> str:
        return f"{self.dtype}{self.shape} {self.v}"


def tensor(x: Any) -> Tensor:
    """A tensor, or a number as one."""
    return x if type(x) is Tensor else Tensor(constant(x, type_of(x)), type_of(x))


def same_rank(a: Any, b: Any) -> None:
    if a.ndim != b.ndim and a.ndim and b.ndim:
        raise ValueError(f"cannot broadcast {a.shape} and {b.shape}: their ranks differ")


def operands(a: Any, b: Any, divides: bool = False) -> tuple[Any, Any, Any]:
    """Two values, numbers among them, in the type in which Triton computes with them."""
    if type(b) is not Tensor:
        a = tensor(a)
        dtype = a.dtype
        if dtype is not float32 or not isinstance(b, (int, float)):
            dtype = common(dtype, type_of(b), divides, True)
        return converted(a.v, a.dtype, dtype), constant(b, dtype), dtype
    if type(a) is not Tensor:
        v, w, dtype = operands(b, a, divides)
        return w, v, dtype
    same_rank(a.v, b.v)
    dtype = a.dtype
    if dtype is b.dtype and not divides:
        return a.v, b.v, dtype
    dtype = common(dtype, b.dtype, divides)
    return converted(a.v, a.dtype, dtype), converted(b.v, b.dtype, dtype), dtype


def computed(f: Callable[..., Any], kind: str, x: Any, y: Any) -> Tensor:
    """A function of numpy's applied to two values. kind: "compares", "divides"; "integers" are needed, or "floats"
    made."""
    v, w, dtype = operands(x, y, kind in ("divides", "floats"))
    if kind == "compares":
        return Tensor(f(v, w), int1)
    if dtype.is_ptr() or (kind == "integers" and not dtype.is_int()):
        raise TypeError(f"unexpected type {dtype}")
    if kind == "floats" and dtype.is_int():
        v, w, dtype = v.astype(np.float32), w.astype(np.float32), float32
    found = f(v, w)
    return Tensor(round_to_bfloat16(found) if dtype is bfloat16 else found, dtype)


def shifted(f: Callable[..., Any], x: Any, y: Any) -> Tensor:
    """A sum or difference, of a pointer and an offset in elements too."""
    if f is np.add and type(y) is Tensor and y.dtype.is_ptr():
        x, y = y, x
    if type(x) is not Tensor or not x.dtype.is_ptr():
        return computed(f, "", x, y)
    offset, size = tensor(y), max(1, x.dtype.element_ty.primitive_bitwidth // 8)
    if not offset.dtype.is_int():
        raise TypeError(f"invalid operands of type {x.dtype} and {offset.dtype}")
    same_rank(x.v, offset.v)
    return Tensor(f(x.v, size * offset.v.astype(np.int64)), x.dtype)


def quotient(a: Any, b: Any) -> Any:
    return (a - np.fmod(a, b)) // b


OPERATORS: dict[str, Callable[[Any, Any], Tensor]] = {}
OPERATORS |= {"add": partial(shifted, np.add), "sub": partial(shifted, np.subtract)}
for _name, _f, _kind in (
    ("mul", np.multiply, ""), ("truediv", np.true_divide, "floats"), ("floordiv", quotient, "divides"),
    ("mod", np.fmod, "divides"), ("and", np.bitwise_and, "integers"), ("or", np.bitwise_or, "integers"),
    ("xor", np.bitwise_xor, "integers"), ("lshift", np.left_shift, "integers"),
    ("rshift", np.right_shift, "integers"), ("lt", np.less, "compares"), ("le", np.less_equal, "compares"),
    ("gt", np.greater, "compares"), ("ge", np.greater_equal, "compares"), ("eq", np.equal, "compares"),
    ("ne", np.not_equal, "compares"),
):  # fmt: skip
    OPERATORS[_name] = partial(computed, _f, _kind)
for _name, _operator in OPERATORS.items():
    setattr(Tensor, f"__{_name}__", lambda self, other, operator=_operator: operator(self, other))
    setattr(Tensor, f"__r{_name}__", lambda self, other, operator=_operator: operator(other, self))


class Shared:
    """A place in shared memory. Fresh, it is poisoned; nothing orders its loads and stores but the program itself."""

    def __init__(self, data: np.ndarray, dtype: tl.dtype):
        self.data, self.dtype = data, dtype

    shape = property(lambda self: list(self.data.shape))

    def store(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise ValueError(f"shared memory is {self.dtype}{self.shape}, the value {value.dtype}{value.shape}")
        self.data[...] = value.v

    def load(self, layout: Any = None) -> Tensor:
        return Tensor(self.data.copy(), self.dtype)

    def index(self, index: Any) -> Shared:
        if not 0 <= int(index) < self.data.shape[0]:
            raise IndexError(f"index {int(index)} of shared memory of shape {self.shape}")
        return Shared(self.data[int(index)], self.dtype)

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        if not 0 <= int(start) <= int(start) + length <= self.data.shape[dim]:
            raise IndexError(f"slice [{start}, {start + length}) of dimension {dim} of shared memory {self.shape}")
        return Shared(self.data[(slice(None),) * dim + (slice(int(start), int(start) + length),)], self.dtype)

    def __getattr__(self, name: str) -> Any:
        raise EmulatorError(f"the emulator knows no shared_memory_descriptor.{name}")


def allocate_shared_memory(element_ty: Any, shape: Any, layout: Any = None, value: Any = None) -> Shared:
    found = Shared(np.full([int(size) for size in shape], poison(element_ty), storage(element_ty)), element_ty)
    if value is not None:
        found.store(value)
    return found


FUNCTIONS["allocate_shared_memory"] = allocate_shared_memory
