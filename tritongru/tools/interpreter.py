"""Repairs of Triton's CPU interpreter, applied when a kernel is about to run there.

1. A runtime scalar as a bound of range() fails on 3.6 with numpy >= 2.4, which refuses int() of a one-element array.
2. tl.dot of bfloat16 operands multiplies their bit patterns (bfloat16 lives in uint16 arrays): 3.6 and 3.7.
3. float32 -> bfloat16 truncates, or rounds half up; hardware rounds to nearest, ties to even: 3.6 and 3.7.
4. tl.extra.cuda.globaltimer() is inline assembly, an error of the interpreter's: here it reads the host's clock.
5. So are gdc_wait() and gdc_launch_dependents(): a launch is over before the next begins, and they do nothing.
6. Every call of a device function patches the whole language again, a quarter of the time: 3.6 and 3.7.
7. A comparison of scalars, spread over a tile, is a tile of the scalars' integers: 3.6 to 3.9, which refuses it as a
   mask.

An interpreted launch patches triton.language for the whole process and keeps the program's number in one place there:
one thread at a time may launch, see `launching`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
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


launching = threading.RLock()  # held through every interpreted launch


def repair() -> None:
    """Apply the repairs, once per process."""
    with launching:  # a launch of another thread sees all of them or none
        _repair()


def _instead(owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function takes the place of another, and gets as its first argument the one that was there."""
    was = getattr(owner, name)

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(owner, name, lambda *given: function(was, *given))
        return function

    return put


@cache
def _repair() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    floats = (tl.float16, tl.float32, tl.float64)

    @_instead(interpreter, "_patch_lang_tensor")
    def _(patch: Any, tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))

    @_instead(builder, "create_dot")
    def _(dot: Any, self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            a, b = (self.cast_impl(each, tl.float32) for each in (a, b))
        return dot(self, a, b, d, *rest)

    @_instead(builder, "cast_impl")
    @_instead(builder, "create_fp_to_fp")
    def _(convert: Any, self: Any, src: Any, dst: Any, *rest: Any) -> Any:
        if dst.scalar == tl.bfloat16 and src.dtype.scalar in floats:
            return handle(float32_to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst.scalar in floats:
            return handle(bfloat16_to_float32(src.data).astype(interpreter._get_np_dtype(dst.scalar)), dst.scalar)
        return convert(self, src, dst, *rest)

    @_instead(builder, "create_splat")
    def _(splat: Any, self: Any, of: Any, value: Any) -> Any:
        found = splat(self, of, value)
        return handle(found.data.astype(bool), tl.int1) if of.scalar == tl.int1 else found

    @_instead(builder, "create_inline_asm")
    def _(inline_asm: Any, self: Any, asm: str, *rest: Any) -> Any:
        if asm.split() != ["mov.u64", "$0,", "%globaltimer;"]:
            return inline_asm(self, asm, *rest)
        now = handle(np.array([self.global_timer()], dtype=np.int64), tl.int64)
        return SimpleNamespace(get_result=lambda i: now)

    builder.global_timer = lambda self: time.monotonic_ns()  # nanoseconds
    timer = tl.extra.cuda.globaltimer

    @_instead(interpreter, "_patch_lang")
    def _(patch: Any, fn: Any) -> Any:
        used = [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]
        if used and not any(tl.core.is_builtin(lang.load) for lang in used):
            return interpreter._LangPatchScope()  # the launch that calls this device function has patched all of it
        scope = patch(fn)  # gives the interpreter's builder to every builtin of tl, but not of tl.extra
        interpreter._patch_attr(tl.extra.cuda, "globaltimer", timer, interpreter.interpreter_builder, scope)
        for name in ("gdc_wait", "gdc_launch_dependents"):
            scope.set_attr(tl.extra.cuda, name, lambda **given: None)
        return scope
