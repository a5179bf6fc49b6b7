"""Clocks, and how samples are taken: providers in turn, in a random order, round after round of one run."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import tritongru
from tritongru.planning.devices import of_cuda

Call = Callable[[], Any]
UNKNOWN_L2 = 64 << 20  # bytes to take where the driver does not say


@dataclass(frozen=True)
class Sample:
    """Microseconds per call: until the work is done, and until the host has issued it."""

    time_us: float
    host_us: float


@dataclass(frozen=True)
class Timed:
    """A call to be sampled, `calls` times in a row, inside `around()`, whose own cost is not timed."""

    call: Call
    calls: int = 1
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class HostMeter:
    """The host's clock: calls that are done when they return."""

    device = torch.device("cpu")
    l2 = ""  # what a sample finds in L2
    late = ""  # what a row says where `on_device_alone` gives None

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock

    def synchronize(self) -> None:
        pass

    def sample(self, timed: Timed) -> Sample:
        with timed.around():
            start = self.clock()
            for _ in range(timed.calls):
                timed.call()
            us = (self.clock() - start) * 1e6 / timed.calls
        return Sample(us, us)

    def on_device_alone(self, timed: Timed, host_us: float) -> float | None:
        """Microseconds of one call on the device with its launches queued beforehand, for which the host is given twice
        `host_us`; None where that was too little, or where there is no queue."""
        return None

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

    late = "the device began before the host had queued the whole call"

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
        with timed.around():
            self._ready()
            start = self.clock()
            begin.record()
            for _ in range(timed.calls):
                timed.call()
            end.record()
            host = self.clock() - start
            self.synchronize()
        return Sample(begin.elapsed_time(end) * 1e3 / timed.calls, host * 1e6 / timed.calls)

    def on_device_alone(self, timed: Timed, host_us: float) -> float | None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with timed.around():
            self._ready()
            # the device spins while the host queues the call: twice its time, at 2 cycles per ns or fewer
            torch.cuda._sleep(int(2 * host_us * 2000))
            begin.record()
            timed.call()
            end.record()
            late = begin.query()  # the device no longer spun when the last launch was queued
            self.synchronize()
        return None if late else begin.elapsed_time(end) * 1e3

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
