"""Clocks, and how samples are taken: providers in turn, in a random order, round after round of one run."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import tritongru
from tritongru.planning.devices import of_cuda

from .results import processor

Call = Callable[[], Any]
UNKNOWN_L2 = 64 << 20  # bytes to take where the driver does not say
CONTEXT = 2 << 30  # bytes of a GPU's memory that this process's own context and libraries may take


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
        pass

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

    def allocated(self) -> int:
        """Bytes that tensors hold now."""
        return 0

    def peak(self) -> int:
        """The most bytes they held at once since the last call of this method."""
        return 0

    def release(self) -> None:
        """Give memory back that no tensor holds."""
        gc.collect()


class CudaMeter(HostMeter):
    """CUDA events on the current stream of the current device; a sample begins on an idle device.

    Args:
        cold: overwrite twice the size of L2 before each sample, which is then one call; else L2 is as the call before
            left it.
    """

    def __init__(self, cold: bool = False) -> None:
        super().__init__()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.l2 = "cold" if cold else "warm"
        self._flushed = None
        if cold:
            size = 2 * (of_cuda(self.device.index).l2_bytes or UNKNOWN_L2)
            self._flushed = torch.empty(size, dtype=torch.int8, device=self.device)

    def _ready(self) -> None:
        if self._flushed is not None:
            self._flushed.zero_()
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the device; raises what its programs had to report."""
        tritongru.synchronize(self.device)

    def sample(self, timed: Timed) -> Sample:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._ready()
        start = self.clock()
        begin.record()
        for _ in range(timed.calls):
            timed.call()
        end.record()
        host = self.clock() - start
        self.synchronize()
        return Sample(begin.elapsed_time(end) * 1e3 / timed.calls, host * 1e6 / timed.calls)

    def captured(self, call: Call) -> Call | None:
        return captured(call)

    def note(self) -> str:
        free, total = torch.cuda.mem_get_info(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device) - CONTEXT
        in_use = f"; {others / 2**30:.1f} GiB of the GPU are others'" if others > 0 else ""
        return f"host {processor()}, {os.cpu_count()} cores{in_use}"

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        self.synchronize()
        found = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return found

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def captured(call: Call) -> Callable[[], None]:
    """`call` as a CUDA graph that is replayed. What it returns is let go, and with it the autograd graph, which would
    tie later calls to the capture's stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels compiled, workspaces there: a capture allows neither
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def interleave(
    timed: Mapping[str, Timed],
    meter: HostMeter,
    *,
    rounds: int,
    seconds: float,
    fewest: int = 10,
    seed: int = 0,
    failures: dict[str, Exception] | None = None,
) -> dict[str, list[Sample]]:
    """Samples of every call: each once per round, in a random order, until `rounds` or (after `fewest`) `seconds`.

    failures: takes the errors of calls that fail, which are then left out; without it the first one is raised.
    """
    order, timed = random.Random(seed), dict(timed)
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
                    if failures is None:
                        raise
                    failures[name] = error
                    del timed[name], samples[name]
    finally:
        if collecting:
            gc.enable()
    return samples


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return p20, p50, p80


def p99(values: Sequence[float]) -> float:
    """What one value in a hundred exceeds."""
    return float(np.quantile(values, 0.99))
