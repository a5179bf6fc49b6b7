"""Clocks, and how samples are taken: providers in turn, in a random order, round after round of one run.

`triton.testing.do_bench` times one call after the other: what changes meanwhile, the clock of a card that grows warm or
a busy host, would count as a difference between them.
"""

import gc
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import tritongru

from .results import processor

Call = Callable[[], Any]
CONTEXT = 2 << 30  # bytes of a GPU's memory that this process's own context and libraries may take


class WaitsError(RuntimeError):
    """A call waits for the device: no CUDA graph holds it."""


@dataclass(frozen=True)
class Sample:
    """Microseconds per call: until the work is done, and until the host has issued it."""

    time_us: float
    host_us: float


@dataclass(frozen=True)
class Timed:
    """A call to be sampled, `calls` times in a row."""

    call: Call
    calls: int = 1


class HostMeter:
    """The host's clock: calls that are done when they return."""

    device = torch.device("cpu")
    l2 = ""  # what a sample finds in L2

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock

    def synchronize(self) -> None:
        """Wait for the device; raises what its programs had to report."""

    def sample(self, timed: Timed) -> Sample:
        start = self.clock()
        for _ in range(timed.calls):
            timed.call()
        us = (self.clock() - start) * 1e6 / timed.calls
        return Sample(us, us)

    def captured(self, call: Call) -> Call | None:
        """The call in a CUDA graph; None where there are none."""
        return None

    def note(self) -> str:
        """What a row says of where it was measured."""
        return f"{torch.get_num_threads()} thread(s)"

    def release(self) -> None:
        """Give memory back that no tensor holds."""
        gc.collect()


class CudaMeter(HostMeter):
    """CUDA events on the current stream of the current device; a sample begins on an idle device, and finds in L2 what
    the call before left there."""

    l2 = "warm"

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", torch.cuda.current_device())

    def synchronize(self) -> None:
        tritongru.synchronize(self.device)

    def sample(self, timed: Timed) -> Sample:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.synchronize()
        start = self.clock()
        begin.record()
        for _ in range(timed.calls):
            timed.call()
        end.record()
        host = self.clock() - start
        self.synchronize()
        return Sample(begin.elapsed_time(end) * 1e3 / timed.calls, host * 1e6 / timed.calls)

    def captured(self, call: Call) -> Call | None:
        """What the call returns is let go, and with it the autograd graph, which would tie later calls to the capture's
        stream.

        Raises:
            WaitsError: found out before the capture, which would fail and spoil the process.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels compiled, workspaces there: a capture allows neither
                call()
            _without_waiting(call)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def note(self) -> str:
        free, total = torch.cuda.mem_get_info(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device) - CONTEXT
        in_use = f"; {others / 2**30:.1f} GiB of the GPU are others'" if others > 0 else ""
        return f"host {processor()}, {os.cpu_count()} cores{in_use}"

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def _without_waiting(call: Call) -> None:
    """The call, or WaitsError where it would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except torch.AcceleratorError:
        raise
    except RuntimeError as error:
        raise WaitsError(f"in no CUDA graph: {str(error).splitlines()[0]}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def interleave(
    timed: Mapping[str, Timed], meter: HostMeter, *, rounds: int, seconds: float, fewest: int = 10
) -> tuple[dict[str, list[Sample]], dict[str, Exception]]:
    """Samples of every call: each once per round, in a random order, until `rounds` or (after `fewest`) `seconds`; and
    the errors of those that failed, which have no samples."""
    order, timed, failures = random.Random(0), dict(timed), {}
    samples: dict[str, list[Sample]] = {name: [] for name in timed}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = meter.clock()
        for done in range(rounds):
            if done >= fewest and meter.clock() - start > seconds:
                break
            for name in order.sample(list(timed), len(timed)):
                try:
                    samples[name].append(meter.sample(timed[name]))
                except torch.AcceleratorError:
                    raise
                except Exception as error:
                    failures[name] = error
                    del timed[name], samples[name]
    finally:
        if collecting:
            gc.enable()
    return samples, failures


def quantiles(values: Sequence[float], at: Sequence[float] = (0.2, 0.5, 0.8)) -> list[float]:
    """p20, p50, p80, or those `at`."""
    taken, wanted = (torch.tensor(numbers, dtype=torch.float64) for numbers in (values, at))
    found: list[float] = taken.quantile(wanted).tolist()
    return found
