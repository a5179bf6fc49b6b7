"""What a device tells the host without being waited for: a wait ran out (kernels/exchange.py); `lengths` were wrong."""

import os
import threading
from contextlib import suppress
from ctypes import c_int32

import torch
from torch import Tensor

from .latest import lasting

LENGTHS_OUTSIDE = "Expected sequence length to be larger than 0 in RNN, and no element of lengths above that of input"
WAIT_SECONDS = 10.0  # how long a program waits for another, unless TRITONGRU_WAIT_SECONDS says otherwise


class Status:
    """Two flags of a device, a wait ran out and lengths were out of bounds: each as a word on the device, and as one in
    host memory that a call reads without waiting."""

    def __init__(self, device: torch.device):
        def made() -> tuple[Tensor, ...]:
            words = torch.zeros(2, dtype=torch.int32, device=device)
            reports = torch.zeros(2, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
            return words, reports, words[:1], reports[:1]

        self.words, self.reports, self.word, self.report = lasting(made, device)
        self._read = (c_int32 * 2).from_address(self.reports.data_ptr())  # at every call, by no operator of PyTorch's
        self.seconds = WAIT_SECONDS  # the bound of the last launch

    def check(self) -> None:
        """Raise if a wait ran out since the last look. Reads host memory: no wait for the device, but for the error."""
        ran_out, outside = self._read
        if not (ran_out or outside):
            return
        if self.word.is_cuda:
            torch.cuda.synchronize(self.word.device)  # kernels that are still running would report once more
        for told in (self.reports, self.words):
            told[0 if ran_out else 1] = 0
        if ran_out:
            raise RuntimeError(
                f"a wait between the programs of a tritongru sequence kernel ran out on {self.word.device} after "
                f"{self.seconds:g} s: results since then are NaN. The device was shared, stopped or far slower than "
                "expected (a debugger, a sanitizer): set TRITONGRU_WAIT_SECONDS higher, or use backend='step'"
            )
        raise RuntimeError(
            f"{LENGTHS_OUTSIDE}: got one that is, in this call or an earlier one on {self.word.device}, which took "
            "the nearest that is allowed"
        )

    def note_lengths(self, wrong: Tensor) -> None:
        """Keep in mind whether lengths are `wrong`, a bool on the device; raise if earlier ones were."""
        self.check()
        self.words[1].logical_or_(wrong)
        self.reports[1:].copy_(self.words[1:], non_blocking=True)


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
