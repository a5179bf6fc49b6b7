"""Repairs of Triton's CPU interpreter, applied when a kernel is about to run there.

1. A runtime scalar as a bound of range() fails on 3.6 with numpy >= 2.4, which refuses int() of a one-element array.
2. tl.dot of bfloat16 operands multiplies their bit patterns (bfloat16 lives in uint16 arrays): 3.6 and 3.7.
3. float32 -> bfloat16 truncates, or rounds half up; hardware rounds to nearest, ties to even: 3.6 and 3.7.

They change `triton.runtime.interpreter` in this process only, which nothing but an interpreted kernel uses.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter


def float32_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits (uint16) of `x` rounded to nearest, ties to even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16): exact."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


@cache
def repair() -> None:
    """Apply the repairs, once per process."""
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))

    interpreter._patch_lang_tensor = patch_tensor_with_index

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar == tl.bfloat16:
            return handle(bfloat16_to_float32(operand.data), tl.float32)
        return handle(operand.data.astype(np.float32), tl.float32)

    create_dot = builder.create_dot

    def create_dot_of_bfloat16(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            a, b = widened(a), widened(b)
        return create_dot(self, a, b, d, *rest)

    builder.create_dot = create_dot_of_bfloat16

    def rounding(convert: Any) -> Any:
        def converted(self: Any, src: Any, dst: Any, *rest: Any) -> Any:
            floats = (tl.float16, tl.float32, tl.float64)
            if dst.scalar == tl.bfloat16 and src.dtype.scalar in floats:
                return handle(float32_to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
            if src.dtype.scalar == tl.bfloat16 and dst.scalar in floats:
                return handle(bfloat16_to_float32(src.data).astype(interpreter._get_np_dtype(dst.scalar)), dst.scalar)
            return convert(self, src, dst, *rest)

        return converted

    builder.cast_impl = rounding(builder.cast_impl)
    builder.create_fp_to_fp = rounding(builder.create_fp_to_fp)
