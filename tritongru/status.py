"""What a device tells the host without being waited for: that a wait inside a kernel ran out (kernels/exchange.py), and
that `lengths` were out of bounds."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from ctypes import c_bool, c_int32
from functools import partial

import torch
from torch import Tensor

from .latest import lasting

LENGTHS_OUTSIDE = "Expected sequence length to be larger than 0 in RNN, and no element of lengths above that of input"
WAIT_SECONDS = 10.0  # how long a program waits for another, unless TRITONGRU_WAIT_SECONDS says otherwise


class Status:
    """Of a device: a word there, set where a wait ran out, which waiting programs look at, and one that the host reads.
    Two words likewise of `lengths` that were out of bounds."""

    def __init__(self, device: torch.device):
        host = partial(torch.zeros, device="cpu", pin_memory=device.type == "cuda")
        self.word, self.report, self.wrong_lengths, self.lengths_report = lasting(
            lambda: (
                torch.zeros(1, dtype=torch.int32, device=device),
                host(1, dtype=torch.int32),
                torch.zeros((), dtype=torch.bool, device=device),
                host((), dtype=torch.bool),
            ),
            device,
        )
        # Read without an operator of PyTorch's, at every call.
        self._ran_out = c_int32.from_address(self.report.data_ptr())
        self._outside = c_bool.from_address(self.lengths_report.data_ptr())
        self.seconds = WAIT_SECONDS  # the bound of the last launch

    def check(self) -> None:
        """Raise if a wait ran out since the last look. Reads host memory: no wait for the device, but for the error."""
        if self._ran_out.value:
            self._reset(self.report, self.word)
            raise RuntimeError(
                f"a wait between the programs of a tritongru sequence kernel ran out on {self.word.device} after "
                f"{self.seconds:g} s: results since then are NaN. The device was shared, stopped or far slower than "
                "expected (a debugger, a sanitizer): set TRITONGRU_WAIT_SECONDS higher, or use backend='step'"
            )
        if self._outside.value:
            self._reset(self.lengths_report, self.wrong_lengths)
            raise RuntimeError(
                f"{LENGTHS_OUTSIDE}: got one that is, in this call or an earlier one on {self.word.device}, which took "
                "the nearest that is allowed"
            )

    def _reset(self, *words: Tensor) -> None:
        if self.word.is_cuda:
            torch.cuda.synchronize(self.word.device)  # kernels that are still running would report once more
        for word in words:
            word.zero_()

    def note_lengths(self, wrong: Tensor) -> None:
        """Keep in mind whether lengths are `wrong`, a bool on the device; raise if earlier ones were."""
        self.check()
        self.wrong_lengths.logical_or_(wrong)
        self.lengths_report.copy_(self.wrong_lengths, non_blocking=True)


_creating = threading.Lock()
_statuses: dict[torch.device, Status] = {}


def status(device: torch.device) -> Status:
    """The status words of a device, made at its first use."""
    if device not in _statuses:
        with _creating:
            if device not in _statuses:
                _statuses[device] = Status(device)
    return _statuses[device]


def check_all() -> None:
    """Raise the error of any device whose kernels gave up a wait."""
    for found in tuple(_statuses.values()):
        found.check()


def wait_seconds() -> float:
    """The bound of a wait. Raises ValueError for a TRITONGRU_WAIT_SECONDS that is no positive number below 2000."""
    given = os.environ.get("TRITONGRU_WAIT_SECONDS")
    if given is None:
        return WAIT_SECONDS
    with suppress(ValueError):
        if 0 < float(given) < 2000:
            return float(given)
    raise ValueError(f"TRITONGRU_WAIT_SECONDS must be a number above 0 and below 2000, got {given!r}")
