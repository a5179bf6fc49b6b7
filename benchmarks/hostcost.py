"""What the host spends per timestep of backend `step`, without a GPU: the launcher as it is, the launch left out.

The real launchers run, through Triton's own JIT. In place of what the JIT compiles stands `NoLaunch`; in place of
Triton's driver a stand-in that names a stream. Nothing reaches a GPU, and nothing is interpreted.

Counted per step: the loop of tritongru/launch/step.py (scalars, grid), tritongru.launch.runtime.Launch, Triton's
CompiledKernel.launch_metadata and the calls of its (empty) hooks where Launch makes them, and the stand-in's own call.
Not counted: Triton's launcher below that (CudaLauncher.__call__, which reads every argument and asks the driver about
every tensor) and the CUDA driver.
`first launch` is that of a call, which goes through the JIT's binding and specialisation; a call has one forward and,
with T > 1, two backward.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from .timing import quantiles

T = 200
BATCH, HIDDEN = 8, 16  # small: the host's work does not depend on them, and x_proj is computed for real
_NOWHERE = 1 << 20  # a device number that no GPU has
_SETTLED = 3  # intervals of a pass that are left out: they contain first launches


class NoLaunch:
    """Stands where Triton's compiled kernel would, and notes when the driver would have been reached."""

    name, function, packed_metadata, src = "no launch", 0, (), None

    def __init__(self) -> None:
        from triton.compiler.compiler import CompiledKernel

        self.reached: list[int] = []  # nanoseconds
        self.launch_metadata = CompiledKernel.launch_metadata.__get__(self)

    def _init_handles(self) -> None:
        pass

    def run(self, *arguments: Any) -> None:
        """Triton's launcher: grid (3), stream, function, packed metadata, metadata, two hooks, arguments."""
        self.reached.append(time.perf_counter_ns())
        for hook in arguments[7:9]:
            if hook is not None:
                hook(arguments[6])


class _Always(dict[Any, Any]):
    """A cache that has the same kernel for every key."""

    def __init__(self, kernel: NoLaunch):
        super().__init__()
        self.kernel = kernel

    def get(self, key: Any, default: Any = None) -> Any:
        return self.kernel


@contextmanager
def without_gpu(*kernels: Any) -> Iterator[NoLaunch]:
    """Inside: launches of these JIT functions stop at the `NoLaunch` this gives."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    for kernel in kernels:
        if not hasattr(kernel, "create_binder"):
            raise RuntimeError("kernels are interpreted in this process: start it without TRITON_INTERPRET")
    stand_in = NoLaunch()
    active = driver._active
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: _NOWHERE,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    try:
        for kernel in kernels:
            kernel.device_caches[_NOWHERE] = (_Always(stand_in), *kernel.create_binder()[1:])
        yield stand_in
    finally:
        driver._active = active
        for kernel in kernels:
            kernel.device_caches.pop(_NOWHERE, None)


@dataclass(frozen=True)
class HostCost:
    """Microseconds of one pass; `first_us` is the whole of a first launch, the rest is per later step."""

    name: str  # dense or packed
    pass_: str  # forward or backward
    p20_us: float
    p50_us: float
    p80_us: float
    first_us: float
    steps: int


def measure(repeats: int = 10) -> Iterator[HostCost]:
    """Forward and backward of a dense and a packed batch."""
    packed = tuple(max(1, BATCH - BATCH * t // T) for t in range(T))
    for name, sizes in (("dense", None), ("packed", packed)):
        for pass_, (first, steps) in calls(sizes, T, repeats).items():
            p20, p50, p80 = quantiles(steps)
            yield HostCost(name, pass_, p20, p50, p80, quantiles(first)[1], len(steps))


def stand_in_us() -> float:
    """What the stand-in adds to every step by itself: one call of it, no hooks."""
    stand_in = NoLaunch()
    for _ in range(1000):
        stand_in.run(1, 1, 1, 0, 0, (), None, None, None)
    return quantiles(_intervals(stand_in.reached))[1]


def calls(
    batch_sizes: tuple[int, ...] | None, time_steps: int, repeats: int
) -> dict[str, tuple[list[float], list[float]]]:
    """By pass, in us: every first launch, from its call to the driver, and every interval between launches."""
    from tritongru.kernels import step as kernels
    from tritongru.launch import runtime, step
    from tritongru.launch.layer import LayerCall, LayerWeights
    from tritongru.planning import describe
    from tritongru.visits import Visits

    H, I = HIDDEN, HIDDEN
    shape = (time_steps, BATCH) if batch_sizes is None else (sum(batch_sizes),)
    x, h_0 = torch.randn(*shape, I), torch.randn(1, BATCH, H)
    weights = LayerWeights.of((torch.randn(3 * H, I), torch.randn(3 * H, H), torch.randn(3 * H), torch.randn(3 * H)), 1)
    call = LayerCall(
        visits=Visits.of(x, batch_sizes), directions=1, hidden_size=H, dtype="fp32", precision="tf32",
        device=describe("h200"), save_gates=True,
    )  # fmt: skip
    found: dict[str, tuple[list[float], list[float]]] = {"forward": ([], []), "backward": ([], [])}
    called: list[int] = []

    def note(name: str, grid: tuple[int, int, int]) -> None:
        called.append(time.perf_counter_ns())

    with without_gpu(kernels.step_forward, kernels.step_backward) as stand_in:
        for repeat in range(2 * repeats + 2):
            watched = repeat % 2 == 0  # being watched costs time: first launches and intervals are taken in turn
            with runtime.observe(note) if watched else nullcontext():
                for pass_ in found:
                    called.clear()
                    stand_in.reached.clear()
                    if pass_ == "forward":
                        y, h_n, gates = step.forward(call, x, h_0, weights)
                    else:
                        assert gates is not None
                        dy, dh_n = torch.zeros_like(y), torch.zeros_like(h_n)
                        step.backward(call, dy, dh_n, y, h_0, gates, weights, h_0.dtype)
                    first, steps = found[pass_]
                    if repeat < 2:  # the JIT's own caches are filled
                        continue
                    if watched:
                        first.append((stand_in.reached[0] - called[0]) / 1e3)
                    else:
                        steps += _intervals(stand_in.reached)[_SETTLED:]
    return found


def _intervals(stamps: list[int]) -> list[float]:
    return [(b - a) / 1e3 for a, b in pairwise(stamps)]
