"""What the host spends per timestep of backend `step`, without a GPU: the launcher as it is, the launch left out.

The real launchers run, through Triton's own JIT. In place of what the JIT compiles stands `NoLaunch`; in place of
Triton's driver a stand-in that names a stream. Nothing reaches a GPU, and nothing is interpreted.

Counted per step: the loop of tritongru/launch/step.py (scalars, grid), tritongru.launch.runtime.Launch, and Triton's
launcher as far as it is Python (CudaLauncher.__call__). Not counted: its part in C, which reads the arguments, and the
CUDA driver.

A pass costs the host one of three: `first`, the JIT binds and specialises; `new`, what was compiled is known, addresses
are not those of a call before; `again`, all are: what was handed over then is handed over again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from .timing import quantiles

T = 200
BATCH, HIDDEN = 8, 16  # small: the host's work does not depend on them, and x_proj is computed for real
_NOWHERE = 1 << 20  # a device number that no GPU has
_SETTLED = 3  # intervals of a pass that are left out: they contain first launches


class NoLaunch:
    """Stands where Triton's compiled kernel would, and notes when C would have been reached."""

    name, function, packed_metadata, src = "no launch", 0, (), None

    def __init__(self) -> None:
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.compiler.compiler import CompiledKernel

        self.reached: list[int] = []  # nanoseconds
        self.hooked = False  # whether launches may have hooks
        self.launch_metadata = CompiledKernel.launch_metadata.__get__(self)
        self.run = CudaLauncher.__new__(CudaLauncher)
        nothing = (
            "global_scratch_size",
            "profile_scratch_size",
            "launch_cooperative_grid",
            "launch_pdl",
            "gsan_enabled",
        )
        of_c = ("global_scratch_align", "profile_scratch_align", "num_ctas", "arg_annotations", "kernel_signature")
        vars(self.run).update({**dict.fromkeys(nothing, 0), **dict.fromkeys(of_c, 1), "launch": self._launch})

    def _init_handles(self) -> None:
        pass

    def _launch(self, *arguments: Any) -> None:
        self.reached.append(time.perf_counter_ns())
        if self.hooked:  # hooks, which come after what they are told
            first = next((i for i, argument in enumerate(arguments) if callable(argument)), 0)
            for hook in filter(callable, arguments[first : first + 2]):
                hook(arguments[first - 1])


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

    from tritongru.launch.runtime import forget

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
        forget()
        for kernel in kernels:
            kernel.device_caches.pop(_NOWHERE, None)


@contextmanager
def as_on_a_gpu() -> Iterator[NoLaunch]:
    """Inside: tensors of the CPU go an H200's way through whole calls of backend `step`, up to the `NoLaunch`."""
    from tritongru import one_step, registry
    from tritongru.kernels import step as kernels
    from tritongru.planning import describe

    with ExitStack() as stack:
        stack.enter_context(patch.object(one_step, "DEVICES", ("cpu",)))
        stack.enter_context(patch.object(one_step, "_known", {}))
        stack.enter_context(patch.object(registry, "device_of", lambda device: describe("h200")))
        stack.enter_context(patch.object(registry.Backend, "why_not", lambda *given: None))
        yield stack.enter_context(without_gpu(kernels.step_forward, kernels.step_backward))


@dataclass(frozen=True)
class HostCost:
    """Microseconds of the host: `first_us` of a whole first launch, the rest per step, of calls of that kind."""

    name: str  # dense or packed, or GRUCell
    pass_: str  # forward or backward, or inference
    kind: str  # new or again
    p20_us: float
    p50_us: float
    p80_us: float
    first_us: float
    steps: int

    @property
    def cell(self) -> bool:
        """Whether it is of whole calls of a GRUCell, not of timesteps."""
        return self.name == "GRUCell"


def measure(repeats: int = 10) -> Iterator[HostCost]:
    """Forward and backward of a dense and a packed batch."""
    packed = tuple(max(1, BATCH - BATCH * t // T) for t in range(T))
    for name, sizes in (("dense", None), ("packed", packed)):
        for (pass_, kind), (first, steps) in calls(sizes, T, repeats).items():
            p20, p50, p80 = quantiles(steps)
            yield HostCost(name, pass_, kind, p20, p50, p80, quantiles(first)[1], len(steps))
    for kind, whole in cell_calls(200 * repeats).items():
        p20, p50, p80 = quantiles(whole)
        yield HostCost("GRUCell", "inference", kind, p20, p50, p80, p50, len(whole))


def cell_calls(repeats: int) -> dict[str, list[float]]:
    """By kind, in us: calls of a GRUCell in inference, the long way (`new`) and as one that is known (`again`)."""
    from tritongru import GRUCell, one_step

    found: dict[str, list[float]] = {"new": [], "again": []}
    with torch.no_grad(), as_on_a_gpu():
        cell = GRUCell(HIDDEN, HIDDEN, backend="step")
        x, h = torch.randn(BATCH, HIDDEN), torch.randn(BATCH, HIDDEN)
        for _ in range(3):
            cell(x, h)
        for _ in range(repeats):
            for kind, able in (("new", ()), ("again", ("cpu",))):
                with patch.object(one_step, "DEVICES", able):
                    begun = time.perf_counter_ns()
                    cell(x, h)
                    found[kind].append((time.perf_counter_ns() - begun) / 1e3)
    return found


def stand_in_us() -> float:
    """What the stand-in adds to every step by itself: one call of it."""
    stand_in = NoLaunch()
    for _ in range(1000):
        stand_in._launch()
    return quantiles(_intervals(stand_in.reached))[1]


def calls(
    batch_sizes: tuple[int, ...] | None, time_steps: int, repeats: int
) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """By pass and kind, in us: first launches, from the launcher's call to C, and intervals between launches."""
    from tritongru.batch import Visits
    from tritongru.kernels import step as kernels
    from tritongru.launch import runtime, step
    from tritongru.launch.protocol import LayerCall, LayerWeights
    from tritongru.planning import describe

    H, I = HIDDEN, HIDDEN
    shape = (time_steps, BATCH) if batch_sizes is None else (sum(batch_sizes),)
    x, h_0 = torch.randn(*shape, I), torch.randn(1, BATCH, H)
    weights = LayerWeights.of((torch.randn(3 * H, I), torch.randn(3 * H, H), torch.randn(3 * H), torch.randn(3 * H)), 1)
    call = LayerCall(
        visits=Visits.of(x, batch_sizes), directions=1, hidden_size=H, dtype="fp32", precision="tf32",
        device=describe("h200"), save_gates=True,
    )  # fmt: skip
    passes, kinds = ("forward", "backward"), ("new", "again")
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {
        (pass_, kind): ([], []) for pass_ in passes for kind in kinds
    }
    begun: list[int] = []
    each, memory = runtime.Launch.each, SameMemory()
    x_proj = torch.randn(*shape, 3 * H)
    dy, dh_n = torch.zeros(*shape, H), torch.zeros(1, BATCH, H)

    def noted(self: runtime.Launch, *given: Any) -> None:
        begun.append(time.perf_counter_ns())
        each(self, *given)

    with ExitStack() as stack:
        stand_in = stack.enter_context(without_gpu(kernels.step_forward, kernels.step_backward))
        stack.enter_context(patch.object(runtime.Launch, "each", noted))
        stack.enter_context(patch.object(step, "empty", memory.empty))
        stack.enter_context(patch.object(step, "project", lambda *given: x_proj))
        y, _, gates = step.forward(call, x, h_0, weights)
        for repeat in range(2 * repeats + 4):
            kind = kinds[repeat % 2]
            if kind == "new":
                runtime.forget_passes()
            for pass_ in passes:
                begun.clear()
                stand_in.reached.clear()
                memory.again()
                if pass_ == "forward":
                    y, _, gates = step.forward(call, x, h_0, weights)
                else:
                    assert gates is not None
                    step.backward(call, dy, dh_n, y, h_0, gates, weights, h_0.dtype)
                first, steps = found[pass_, kind]
                if repeat < 4:  # the JIT's own caches are filled
                    continue
                first.append((stand_in.reached[0] - begun[0]) / 1e3)
                steps += _intervals(stand_in.reached)[_SETTLED:]
    return found


class SameMemory:
    """`runtime.empty` that hands out in each pass what it handed out before, in the same order."""

    def __init__(self) -> None:
        self._tensors: dict[Any, torch.Tensor] = {}
        self._count = 0

    def again(self) -> None:
        """A pass begins."""
        self._count = 0

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `runtime.empty`."""
        self._count += 1
        key = self._count, shape, dtype
        if key not in self._tensors:
            self._tensors[key] = torch.empty(shape, dtype=dtype, device=device)
        return self._tensors[key]


def _intervals(stamps: list[int]) -> list[float]:
    return [(b - a) / 1e3 for a, b in pairwise(stamps)]
