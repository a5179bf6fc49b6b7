"""Calls of the layer in the emulator: what is drawn for them, and whether what comes is right."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritongru.launch import exchange
from tritongru.tools.check import Case, draw, floor, run
from tritongru.tools.emulator import emulating

from .cases import DTYPES

FP32, FP16, BF16 = DTYPES
SMALL = "sequence:exchange=0"  # whose W_h one program holds; without it programs exchange in the emulator


@dataclass(frozen=True)
class Call:
    case: Case
    backend: str = "sequence"  # with fields of its tiles, see planning/sequence.py
    dtype: torch.dtype = torch.float32
    wants_dh_0: bool = True


ONE_PROGRAM = Call(Case(I=4, H=13, bidirectional=True, lengths=(1, 3, 2, 3, 1, 2)), SMALL)


class Drawn:
    """Weights, inputs and cotangents of a call, kept, so that calls under many seeds can be compared."""

    def __init__(self, call: Call):
        self.call = call
        drawn = draw(call.case, call.backend, call.dtype, torch.Generator().manual_seed(7))
        self.ours, (self.x, self.h_0, self.dy, self.dh_n), self.padding = drawn

    def results(self, module: nn.GRU, dtype: torch.dtype) -> dict[str, Tensor]:
        given = (tensor.to(dtype) for tensor in (self.x, self.h_0, self.dy, self.dh_n))
        wants = self.call.wants_dh_0
        with module.register_forward_pre_hook(lambda _, of: (of[0], of[1].requires_grad_(wants))):
            return run(module, *given, **self.padding)

    def of_ours(self, seed: int, **options: Any) -> dict[str, Tensor]:
        with emulating(seed, **options):
            return self.results(self.ours, self.call.dtype)

    def of_nn_gru(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Sequence by sequence where the batch is padded."""
        module = copy.deepcopy(self.ours).to(dtype)
        module.backend = "aten"
        return self.results(module, dtype)

    def assert_right(self, found: dict[str, Tensor]) -> None:
        """One draw against eight times the floor, as kit/cases.py's `assert_not_wrong`; no NaN is right."""
        truth = self.of_nn_gru(torch.float64)
        assert found.keys() == truth.keys()
        for name, true in truth.items():
            error = ((found[name].double() - true).norm() / true.norm()).item()
            limit = 8 * floor(name, self.call.case, self.call.dtype, tf32=False)
            assert error <= limit, f"{name} error={error:.2e}, not at most {limit:.2e}"

    def assert_not_finite_as_nn_gru(self, ours: dict[str, Tensor]) -> None:
        for name, theirs in self.of_nn_gru(self.call.dtype).items():
            assert torch.equal(ours[name].isfinite(), theirs.isfinite()), f"{name} is not finite elsewhere"
            if name in ("output", "h_n"):
                assert torch.equal(ours[name].isnan(), theirs.isnan()), f"{name} has NaNs elsewhere"

    def put(self, place: str, value: float | None) -> None:
        """One element becomes `value`, or the NaN with the sentinel's bits."""
        tensor = getattr(self, place.split()[0])
        tensor = tensor if isinstance(tensor, Tensor) else tensor.data
        rows = tensor[-1] if tensor.dim() == 3 else tensor  # of the last step; in h_0 and dh_n of the last direction
        row = rows[-1 if place == "h_0 of the last row" else 0]
        if value is None:
            row.view(torch.int16 if row.element_size() == 2 else torch.int32)[2] = exchange.SENTINEL
            assert row[2].isnan()
        else:
            row[2] = value


# Waits of these tests are cut to their least, a unit of the clock: 100 steps of the emulator.
SHORT = {"nanoseconds_per_step": 10_500}
SHORT_SECONDS = "0.001"
