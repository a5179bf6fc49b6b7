"""What a call costs the host of a GPU, without one: all of it runs, up to the driver, and nothing is launched.

Tensors are the CPU's, the plans an H200's. Triton's own JIT is asked; in place of what it compiles stands `NoLaunch`,
in place of its driver a stand-in that names a stream. Library products are computed, of sizes so small that they cost
what a call of PyTorch's costs. Fresh memory of the CPU is seldom where it was: launches of `step` over many timesteps
are mostly of addresses not seen before, unlike a training loop's on a GPU. Not counted: what Triton's launcher does in
C, which reads the arguments, and CUDA.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.benchmark import Timer

from . import work
from .cases import Case
from .providers import find
from .timing import quantiles

SECONDS = 1.0  # of each call
_NOWHERE = 1 << 20  # a device number that no GPU has
# A cell; streaming; few timesteps and many; programs that exchange, where H is above 128.
CASES = (
    Case(1, 8, 16, 16, cell=True),
    Case(1, 8, 16, 16),
    Case(2, 8, 16, 16),
    Case(200, 8, 16, 16),
    Case(2, 1, 144, 144),
)


class NoLaunch:
    """Stands where Triton's compiled kernel would, and notes when C would have been reached."""

    name, function, packed_metadata, src = "no launch", 0, (), None

    def __init__(self) -> None:
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.compiler.compiler import CompiledKernel

        self.reached = 0
        self.hooked = False  # whether launches may have hooks
        self.launch_metadata = CompiledKernel.launch_metadata.__get__(self)
        self.run = CudaLauncher.__new__(CudaLauncher)
        zero = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "gsan_enabled")
        of_c = ("global_scratch_align", "profile_scratch_align", "num_ctas", "arg_annotations", "kernel_signature")
        vars(self.run).update({**dict.fromkeys(zero, 0), **dict.fromkeys(of_c, 1), "launch": self._launch})

    def _init_handles(self) -> None:
        pass

    def _launch(self, *arguments: Any) -> None:
        self.reached += 1
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
    """Inside: tensors of the CPU go an H200's way through whole calls of both backends, up to the `NoLaunch`."""
    from tritongru import call, registry
    from tritongru.kernels import sequence, small, step
    from tritongru.latest import Latest
    from tritongru.planning import describe

    kernels = (step.step_forward, step.step_backward, small.small_forward, small.small_backward)
    kernels += (sequence.sequence_forward, sequence.sequence_backward)
    with ExitStack() as stack:
        stack.enter_context(patch.object(call, "DEVICES", ("cpu",)))
        stack.enter_context(patch.object(call, "_known", Latest(1024)))
        stack.enter_context(patch.object(registry, "device_of", lambda device: describe("h200")))
        stack.enter_context(patch.object(registry.Backend, "why_not", lambda *given: None))
        yield stack.enter_context(without_gpu(*kernels))


def measure(seconds: float = SECONDS) -> Iterator[tuple[Case, str, str, list[float]]]:
    """Case, backend, pass, and p20, p50, p80 of a call in us of this process's CPU time."""
    cpu = torch.device("cpu")
    for case in CASES:
        for backend in ("step", "sequence") if case.T > 1 else ("step",):
            for pass_ in ("inference", "forward+backward"):
                module = find(backend).make(case, device=cpu, dtype=torch.float32)
                call = work.PASSES[pass_].make(module, work.Inputs.draw(case, cpu))
                with as_on_a_gpu():
                    timer = Timer("call()", timer=time.process_time, globals={"call": call})
                    timer.blocked_autorange(min_run_time=seconds)  # the JIT's caches are filled, addresses come again
                    taken = timer.blocked_autorange(min_run_time=seconds)
                yield case, backend, pass_, quantiles([1e6 * t for t in taken.times])
