"""A first call compiles its kernels: those of forward and backward side by side, and whoever waits long is told why.

Triton compiles a kernel when it is launched, one after another, and those of backward only then. Here a call's kernels
are compiled before the first of them is launched, by as many threads, in Triton's own mode for that. A kernel that
needs another form than was foreseen, or none at all, is compiled when it is launched, as ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import MockTensor

from ..latest import Latest
from ..planning.problem import Problem
from .protocol import LayerCall
from .runtime import Kernel

logger = logging.getLogger("tritongru")

SECONDS = 1.0  # that are worth a word
DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "i8": torch.int8, "i16": torch.int16,
    "i32": torch.int32,
}  # fmt: skip
_seen: Latest[Hashable, None] = Latest(4096)  # calls that are remembered
_told = False


class _Unaligned(MockTensor):
    """A tensor as cuDNN's flattened weights may lie in memory."""

    @staticmethod
    def data_ptr() -> int:
        return 2


def prepare(
    launcher: Any, call: LayerCall, input_size: int, weights: Sequence[Tensor], recompute: bool, copied: bool = False
) -> None:  # fmt: skip
    """Compile for the current device what a layer's call will launch, unless one like it was here before.

    copied: whether aligned copies of the weights are launched.
    """
    visits, training = call.visits, call.save_gates
    sizes = visits.time == 1, input_size, training, len(weights), recompute
    key = (launcher.__name__, call.recurrence, weights[0].device, *sizes)
    if key in _seen:
        return
    _seen.keep(key, None)
    problem = Problem(
        batch=visits.batch, time=visits.time, input_size=input_size, hidden_size=call.hidden_size,
        directions=call.directions, dtype=call.dtype, training=training, packed=visits.batch_sizes is not None,
        bias=len(weights) > 2 * call.directions, recompute=recompute, precision=call.precision,
    )  # fmt: skip
    aligned = copied or all(w.data_ptr() % 16 == 0 for w in weights)
    with suppress(ValueError):  # not to be had: the launch says why
        compile_side_by_side(launcher.specimens(problem, call.device, aligned=aligned, overrides=call.overrides))


def compile_side_by_side(specimens: Sequence[Kernel]) -> None:
    """Compile for the current device what this process has not compiled yet; errors are left to the launch."""
    global _told
    start = time.perf_counter()
    with ThreadPoolExecutor(len(specimens)) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for specimen in specimens:
            with suppress(Exception):
                given = {name: _like(kind) for name, kind in specimen.arguments.items()} | dict(specimen.constants)
                arguments = [given[name] for name in specimen.kernel.arg_names]
                specimen.kernel.warmup(*arguments, grid=(1, 1, 1), **specimen.options)
    if (took := time.perf_counter() - start) > SECONDS and not _told:
        _told = True
        logger.warning(
            "a first call compiled its kernels for %.1f s, as the first of every dtype and size may; Triton keeps them "
            "on disk. This is said once",
            took,
        )


def _like(kind: str) -> Any:
    """An argument that Triton takes for one of this type, as `Kernel` has it."""
    name, _, divisor = kind.partition(":")
    if name.startswith("*"):
        dtype = DTYPES[name[1:]]
        return _Unaligned(dtype) if divisor else dtype
    return 1.5 if name.startswith("fp") else int(divisor or 3)
