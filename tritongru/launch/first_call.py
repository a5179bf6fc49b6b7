"""A first call compiles its kernels: those of forward and backward side by side, and whoever waits long is told why.

Triton compiles a kernel when it is launched, one after another, and those of backward only then. Here a call's kernels
are compiled before the first of them is launched, by as many threads, in Triton's own mode for that. A kernel that
needs another form than was foreseen, or none at all, is compiled when it is launched, as ever.
"""

import logging
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import triton
from torch import Tensor

from ..latest import Latest
from .protocol import LayerCall
from .runtime import Kernel

logger = logging.getLogger("tritongru")

SECONDS = 1.0  # that are worth a word
_seen: Latest[Hashable, None] = Latest(4096)  # calls that are remembered
_told = False


def prepare(
    launcher: Any, call: LayerCall, input_size: int, weights: Sequence[Tensor], recompute: bool, copied: bool = False
) -> None:  # fmt: skip
    """Compile for the current device what a layer's call will launch, unless one like it was here before.

    copied: whether aligned copies of the weights are launched.
    """
    v, bias = call.visits, len(weights) > 2 * call.directions
    aligned = copied or all(w.data_ptr() % 16 == 0 for w in weights)
    how = input_size, bias, recompute, aligned
    of_batch = v.time > 1, v.lengths is None, v.resets is None, weights[0].device
    key = launcher.__name__, call.recurrence, call.save_gates, *how, *of_batch
    if key in _seen:
        return
    _seen.keep(key, None)
    with suppress(ValueError):  # not to be had: the launch says why
        compile_side_by_side(launcher.specimens(call, *how))


def compile_side_by_side(specimens: Sequence[Kernel]) -> None:
    """Compile for the current device what this process has not compiled yet; errors are left to the launch."""
    from ..tools.compile_report import examples

    global _told
    start = time.perf_counter()
    with ThreadPoolExecutor(len(specimens)) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for specimen in specimens:
            with suppress(Exception):
                specimen.kernel.warmup(grid=(1, 1, 1), **examples(specimen), **specimen.options)
    if (took := time.perf_counter() - start) > SECONDS and not _told:
        _told = True
        logger.warning(
            "a first call compiled its kernels for %.1f s, as the first of every dtype and size may; Triton keeps them "
            "on disk. This is said once",
            took,
        )
