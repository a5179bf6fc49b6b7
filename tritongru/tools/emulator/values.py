"""Values of a kernel under the emulator, with Triton's rules.

A value is a numpy array and a dtype of Triton's. bfloat16 lives in float32 arrays that hold bfloat16's values only:
each operation rounds its result to nearest, ties to even. A pointer is an int64 array of addresses. Types are promoted
as Triton promotes them, integers are C's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import triton.language as tl


class EmulatorError(RuntimeError):
    """What the emulator finds wrong with a kernel, or with how it is asked to run one."""


STORAGE: dict[Any, Any] = {  # what values of a type are kept in
    tl.int1: np.bool_, tl.int8: np.int8, tl.int16: np.int16, tl.int32: np.int32, tl.int64: np.int64,
    tl.uint8: np.uint8, tl.uint16: np.uint16, tl.uint32: np.uint32, tl.uint64: np.uint64,
    tl.float16: np.float16, tl.bfloat16: np.float32, tl.float32: np.float32, tl.float64: np.float64,
}  # fmt: skip
STORAGE = {dtype: np.dtype(kind) for dtype, kind in STORAGE.items()}
RAW: dict[Any, Any] = {**STORAGE, tl.int1: np.dtype(np.uint8), tl.bfloat16: np.dtype(np.uint16)}  # what lies in memory
int1, int32, int64, bfloat16, float16, float32 = tl.int1, tl.int32, tl.int64, tl.bfloat16, tl.float16, tl.float32
HALVES = (float16, bfloat16)

FUNCTIONS: dict[str, Any] = {}  # by the name under which a kernel finds them, in whatever module of Triton's
MEMBERS = (
    "abs", "broadcast_to", "cast", "exp", "exp2", "expand_dims", "log", "log2", "max", "min", "permute", "ravel",
    "reduce", "reshape", "sqrt", "rsqrt", "sum", "trans", "xor_sum", "atomic_add", "atomic_cas", "atomic_max", "store",
    "atomic_min", "atomic_xchg", "split", "floor", "ceil", "sin", "cos",
)  # fmt: skip


def single(dtype: Any) -> Any:
    """The one object of a type: types of values are compared by identity, but for pointers."""
    return _SINGLE.get(dtype.name, dtype)


_SINGLE = {dtype.name: dtype for dtype in STORAGE}


def round_to_bfloat16(x: Any) -> Any:
    """float32 values rounded to bfloat16's, as `cvt.rn.bf16` does: a NaN becomes 0x7FFF."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view(np.float32)
    nan = x != x
    return np.where(nan, np.uint32(0x7FFF0000).view(np.float32), rounded) if nan.any() else rounded


@cache
def _common(a: tl.dtype, b: tl.dtype, divides: bool) -> tl.dtype:
    """The type in which Triton computes with two values of these."""
    for wide in (tl.float64, float32):
        if wide in (a, b):
            return wide
    if a in HALVES or b in HALVES:
        if divides or (bfloat16 in (a, b) and a != b and float16 not in (a, b)):
            return float32
        return float16 if float16 in (a, b) else bfloat16
    if a.int_signedness == b.int_signedness:
        return a if a.int_bitwidth > b.int_bitwidth else b
    if divides:
        raise TypeError(f"cannot divide {a} and {b}: their signedness differs")
    unsigned, signed = (a, b) if a.is_int_unsigned() else (b, a)
    return unsigned if unsigned.int_bitwidth >= signed.int_bitwidth else signed


def common(a: tl.dtype, b: tl.dtype, divides: bool = False) -> tl.dtype:
    """As `_common`, for two tensors; two pointers must point to one type."""
    if a is b and not divides:
        return a
    if a.is_ptr() or b.is_ptr():
        if a != b:
            raise TypeError(f"invalid operands of type {a} and {b}")
        return a
    return _common(a, b, divides)


def type_of(scalar: Any) -> tl.dtype:
    """The type that a number of Python's has as a tensor."""
    if isinstance(scalar, bool):
        return int1
    if isinstance(scalar, int):
        if -(2**31) <= scalar < 2**31:
            return int32
        for dtype, low, high in ((tl.uint32, 0, 2**32), (int64, -(2**63), 2**63)):
            if low <= scalar < high:
                return dtype
        return tl.uint64
    if isinstance(scalar, float):
        representable = scalar == 0 or not math.isfinite(scalar) or 2**-126 <= abs(scalar) < 2**128
        return float32 if representable else tl.float64
    raise TypeError(f"cannot convert {scalar!r} of type {type(scalar).__name__} to a tensor")


@cache
def _with_scalar(dtype: tl.dtype, scalar: tl.dtype, divides: bool) -> tl.dtype:
    if scalar.kind().value <= dtype.kind().value:  # a number of no higher kind takes the tensor's type
        return float32 if divides and dtype in HALVES else dtype
    return _common(dtype, scalar, divides)


def with_scalar(dtype: tl.dtype, scalar: Any, divides: bool = False) -> tl.dtype:
    """The type in which Triton computes with a tensor and a number."""
    if dtype is int32 and type(scalar) is int:
        if not -(2**31) <= scalar < 2**31:
            raise ValueError(f"scalar {scalar} is out of range for type {dtype}")
        return dtype
    if dtype is float32 and type(scalar) in (int, float):
        return dtype
    if dtype.is_ptr():
        raise TypeError(f"invalid operands of type {dtype} and {type_of(scalar)}")
    return _with_scalar(dtype, type_of(scalar), divides)


def converted(v: Any, old: tl.dtype, new: tl.dtype) -> Any:
    """Storage of one type as that of another, rounded to nearest; floats become integers by truncation."""
    if old is new or (old == new if new.is_ptr() else False):
        return v
    if new is int1:
        return v != 0
    if new is bfloat16:
        return round_to_bfloat16(v if old is float32 else v.astype(np.float32))
    return v.astype(storage(new))


def storage(dtype: tl.dtype) -> np.dtype:
    if dtype.is_ptr():
        return STORAGE[int64]
    found = STORAGE.get(dtype)
    if found is None:
        raise EmulatorError(f"the emulator has no values of type {dtype}")
    return found


def raw(v: Any, dtype: tl.dtype) -> Any:
    """The bits of values, as they lie in memory."""
    if dtype is bfloat16:
        return (np.ascontiguousarray(v).view(np.uint32) >> 16).astype(np.uint16).reshape(np.shape(v))
    return v.astype(np.uint8) if dtype is int1 else v


def unraw(bits: Any, dtype: tl.dtype) -> Any:
    """The values whose bits these are."""
    if dtype is bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits != 0 if dtype is int1 else bits


def poison(dtype: tl.dtype) -> Any:
    """What nobody wrote: NaN, or a large number, so that a use of it shows."""
    kind = storage(dtype)
    if kind.kind == "f":
        return kind.type(np.nan)
    return kind.type(True) if kind.kind == "b" else kind.type(np.iinfo(kind).max // 3)


def truncated_quotient(a: Any, b: Any) -> Any:
    return (a - np.fmod(a, b)) // b


def rank_checked(a: Any, b: Any) -> None:
    if a.ndim != b.ndim and a.ndim and b.ndim:
        raise ValueError(f"cannot broadcast {a.shape} and {b.shape}: their ranks differ")


def operator(
    ufunc: Callable[..., Any], swap: bool = False, compares: bool = False, divides: bool = False, kinds: str = ""
) -> Callable[..., Any]:
    """A method of Tensor. kinds: "i" takes integers only, "f" makes floats of them."""

    def method(self: Tensor, other: Any) -> Any:
        dtype, a = self.dtype, self.v
        if type(other) is Tensor:
            b = other.v
            rank_checked(a, b)
            if dtype is not other.dtype or divides:
                dtype = common(self.dtype, other.dtype, divides)
                a, b = converted(a, self.dtype, dtype), converted(b, other.dtype, dtype)
        elif isinstance(other, (int, float)):
            dtype = with_scalar(self.dtype, other, divides)
            a = converted(a, self.dtype, dtype)
            b = round_to_bfloat16(np.float32(other))[()] if dtype is bfloat16 else other
        else:
            return NotImplemented
        if dtype.is_ptr() and not compares:
            raise TypeError(f"unexpected type {dtype}")
        if kinds == "i" and not dtype.is_int():
            raise TypeError(f"unexpected type {dtype}: integers are needed")
        if kinds == "f" and dtype.is_int():
            a, b, dtype = np.asarray(a, np.float32)[()], np.asarray(b, np.float32)[()], float32
        out = ufunc(b, a) if swap else ufunc(a, b)
        if compares:
            return Tensor(out, int1)
        return Tensor(round_to_bfloat16(out) if dtype is bfloat16 else out, dtype)

    return method


class Tensor:
    """A value of a kernel: `v` as STORAGE has it (a numpy scalar for one without shape), and its type."""

    __slots__ = ("dtype", "v")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, v: Any, dtype: tl.dtype):
        self.v, self.dtype = v, dtype

    @property
    def shape(self) -> list[int]:
        return list(self.v.shape)

    @property
    def numel(self) -> int:
        return int(self.v.size)

    @property
    def type(self) -> Any:
        return tl.block_type(self.dtype, self.shape) if self.v.ndim else self.dtype

    def to(self, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Tensor:
        if fp_downcast_rounding not in (None, "rtne"):
            raise EmulatorError(f"the emulator knows no rounding {fp_downcast_rounding!r}")
        old, v, dtype = self.dtype, self.v, single(dtype)
        if dtype is old or dtype == old:
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

    def _moved(self, other: Any, sign: int) -> Tensor:
        """A pointer and an offset, in elements."""
        size = sign * max(1, self.dtype.element_ty.primitive_bitwidth // 8)
        if type(other) is int:
            return Tensor(self.v + size * other, self.dtype)
        other = tensor(other)
        if not other.dtype.is_int():
            raise TypeError(f"invalid operands of type {self.dtype} and {other.dtype}")
        rank_checked(self.v, other.v)
        offset = other.v.astype(np.int64)
        offset *= size
        return Tensor(self.v + offset, self.dtype)

    def __add__(self, other: Any) -> Any:
        if self.dtype.is_ptr():
            return self._moved(other, 1)
        if type(other) is Tensor and other.dtype.is_ptr():
            return other._moved(self, 1)
        return _add(self, other)

    def __sub__(self, other: Any) -> Any:
        return self._moved(other, -1) if self.dtype.is_ptr() else _sub(self, other)

    __radd__ = __add__
    __rsub__ = operator(np.subtract, swap=True)
    __mul__ = __rmul__ = operator(np.multiply)
    __truediv__, __rtruediv__ = (operator(np.true_divide, swap, divides=True, kinds="f") for swap in (False, True))
    __floordiv__, __rfloordiv__ = (
        operator(truncated_quotient, swap, divides=True, kinds="i") for swap in (False, True)
    )
    __mod__, __rmod__ = (operator(np.fmod, swap, divides=True) for swap in (False, True))
    __and__ = __rand__ = operator(np.bitwise_and, kinds="i")
    __or__ = __ror__ = operator(np.bitwise_or, kinds="i")
    __xor__ = __rxor__ = operator(np.bitwise_xor, kinds="i")
    __lshift__, __rlshift__ = (operator(np.left_shift, swap, kinds="i") for swap in (False, True))
    __rshift__, __rrshift__ = (operator(np.right_shift, swap, kinds="i") for swap in (False, True))
    __lt__, __le__ = operator(np.less, compares=True), operator(np.less_equal, compares=True)
    __gt__, __ge__ = operator(np.greater, compares=True), operator(np.greater_equal, compares=True)
    __eq__ = operator(np.equal, compares=True)
    __ne__ = operator(np.not_equal, compares=True)

    def __neg__(self) -> Tensor:
        if self.dtype == int1:
            raise TypeError("unexpected type int1: a truth value has no sign")
        return Tensor(np.negative(self.v), self.dtype)

    def __invert__(self) -> Tensor:
        if not self.dtype.is_int():
            raise TypeError(f"unexpected type {self.dtype}: integers are needed")
        return Tensor(np.invert(self.v), self.dtype)

    def __bool__(self) -> bool:
        if self.v.size != 1:
            raise ValueError(f"a tensor of shape {self.shape} decides no branch")
        return bool(self.v)

    def __index__(self) -> int:
        if self.v.ndim or not self.dtype.is_int():
            raise TypeError(f"a whole number is needed, got {self}")
        return int(self.v)

    __int__ = __index__

    def __getitem__(self, at: Any) -> Tensor:
        places = at if isinstance(at, tuple) else (at,)
        if any(place is not None and place != slice(None) for place in places):
            raise ValueError(f"a tensor takes `:` and `None` as an index, got {at}")
        return Tensor(self.v[places], self.dtype)

    def __getattr__(self, name: str) -> Any:
        if name in MEMBERS:
            return partial(FUNCTIONS[name], self)
        raise EmulatorError(f"the emulator knows no tensor.{name}")

    def __repr__(self) -> str:
        return f"{self.dtype}{self.shape} {self.v}"


_add, _sub = operator(np.add), operator(np.subtract)


def tensor(x: Any) -> Tensor:
    """A tensor, or a number as one."""
    if type(x) is Tensor:
        return x
    dtype = type_of(x)
    return Tensor(STORAGE[dtype].type(x), dtype)


def pair(a: Any, b: Any) -> tuple[Any, Any, tl.dtype]:
    """Two operands, numbers among them, in the type in which Triton computes with them."""
    a_scalar, b_scalar = not isinstance(a, Tensor), not isinstance(b, Tensor)
    if a_scalar != b_scalar:
        x, number = (b, a) if a_scalar else (a, b)
        dtype = with_scalar(x.dtype, number)
        v, w = converted(x.v, x.dtype, dtype), constant(number, dtype)
        return (w, v, dtype) if a_scalar else (v, w, dtype)
    a, b = tensor(a), tensor(b)
    dtype = common(a.dtype, b.dtype)
    rank_checked(a.v, b.v)
    return converted(a.v, a.dtype, dtype), converted(b.v, b.dtype, dtype), dtype


def constant(number: Any, dtype: tl.dtype) -> Any:
    """A number of Python's as a value of the type."""
    if dtype.is_int() and not dtype.is_bool() and not isinstance(number, float):
        return storage(dtype).type(int(number))  # refused where it does not fit
    return converted(np.float64(number), tl.float64, dtype)


class Shared:
    """A place in shared memory. Fresh, it is poisoned; nothing orders its loads and stores but the program itself."""

    def __init__(self, data: np.ndarray, dtype: tl.dtype):
        self.data, self.dtype = data, dtype

    shape = property(lambda self: list(self.data.shape))
    rank = property(lambda self: self.data.ndim)
    numel = property(lambda self: self.data.size)

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
        start = int(start)
        if not 0 <= start <= start + length <= self.data.shape[dim]:
            raise IndexError(f"slice [{start}, {start + length}) of dimension {dim} of shared memory {self.shape}")
        return Shared(self.data[(slice(None),) * dim + (slice(start, start + length),)], self.dtype)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.transpose(tuple(order)), self.dtype)

    def reshape(self, shape: Sequence[int]) -> Shared:
        view = self.data.view()
        view.shape = tuple(shape)  # refuses what would be a copy
        return Shared(view, self.dtype)

    def gather(self, indices: Tensor, axis: int) -> Tensor:
        return Tensor(np.take_along_axis(self.data, indices.v, axis), self.dtype)

    def scatter(self, values: Tensor, indices: Tensor, axis: int) -> None:
        np.put_along_axis(self.data, indices.v, values.v, axis)

    def _keep_alive(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise EmulatorError(f"the emulator knows no shared_memory_descriptor.{name}")
