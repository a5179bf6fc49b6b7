"""Calls of the layer by shrunken plans, in the emulator: what is drawn for them, and whether what comes is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import tritongru
from tritongru.launch import exchange
from tritongru.tools.check import Case, floor, run
from tritongru.tools.emulator import emulating

from .cases import DTYPES as DTYPES
from .plans import ShrunkenPlan

FP32, FP16, BF16 = DTYPES


@dataclass(frozen=True)
class Call:
    """What is asked of the layer, and by which plan (None: the backend's own)."""

    plan: ShrunkenPlan | None
    case: Case
    dtype: torch.dtype = torch.float32
    wants_dh_0: bool = True
    backend: str = "sequence"


# Of a small layer, whose W_h one program holds.
ONE_PROGRAM = Call(None, Case(I=4, H=13, bidirectional=True, lengths=(1, 3, 2, 3, 1, 2)), backend="sequence:exchange=0")


class Drawn:
    """Weights, inputs and cotangents of a call, from one seed; kept, so that calls under many seeds can be compared."""

    def __init__(self, call: Call):
        case, dtype = call.case, call.dtype
        self.call = call
        T, B, D = case.sizes
        generator = torch.Generator().manual_seed(7)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

        self.shape = (case.I, case.H, case.layers, case.bias, case.batch_first, 0.0, case.bidirectional)
        self.ours = tritongru.GRU(*self.shape, dtype=dtype, backend=call.backend, recompute=case.recompute)
        with torch.no_grad():
            for p in self.ours.parameters():
                p.copy_((torch.rand(p.shape, generator=generator, dtype=torch.float64) * 2 - 1) / case.H**0.5)
        leading = (B, T) if case.batch_first else (T, B)
        self.x: Any = normal(*leading, case.I)
        self.dy = normal(*leading, D * case.H)
        self.lengths = torch.tensor(case.lengths) if case.padded else None
        self.resets = None if case.resets is None else torch.rand(*leading, generator=generator) < case.resets
        if case.packed:
            self.x = pack_padded_sequence(self.x, torch.tensor(case.lengths), enforce_sorted=False)
            self.dy = normal(len(self.x.data), D * case.H)
        self.h_0, self.dh_n = (normal(case.layers * D, B, case.H) for _ in range(2))

    def given(self) -> dict[str, Any]:
        """Arguments of `run`."""
        return {name: getattr(self, name) for name in ("x", "h_0", "dy", "dh_n", "lengths", "resets")}

    def results(self, module: nn.GRU, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output, h_n and the gradients of one call of a module."""
        given = (tensor.to(dtype) for tensor in (self.x, self.h_0, self.dy, self.dh_n))
        wants = self.call.wants_dh_0
        with module.register_forward_pre_hook(lambda _, of: (of[0], of[1].requires_grad_(wants))):
            return run(module, *given, lengths=self.lengths, resets=self.resets)

    def of_ours(self, seed: int, **options: Any) -> dict[str, Tensor]:
        with emulating(seed, **options):
            return self.results(self.ours, self.call.dtype)

    def of_nn_gru(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Sequence by sequence where the batch is padded."""
        module = tritongru.GRU(*self.shape, dtype=dtype, backend="aten")
        module.load_state_dict(self.ours.state_dict())
        return self.results(module, dtype)

    def assert_right(self, found: dict[str, Tensor], what: str = "") -> None:
        """One draw against eight times the floor, as tests/kit/rule.py's `assert_not_wrong`; no NaN is right."""
        truth = self.of_nn_gru(torch.float64)
        assert found.keys() == truth.keys()
        for name, true in truth.items():
            error = ((found[name].double() - true).norm() / true.norm()).item()
            limit = 8 * floor(name, self.call.case, self.call.dtype, tf32=False)
            assert error <= limit, f"{what}: {name} error={error:.2e}, not at most {limit:.2e}"

    def assert_not_finite_as_nn_gru(self, ours: dict[str, Tensor]) -> None:
        for name, theirs in self.of_nn_gru(self.call.dtype).items():
            assert torch.equal(ours[name].isfinite(), theirs.isfinite()), f"{name} is not finite elsewhere"
            if name in ("output", "h_n"):
                assert torch.equal(ours[name].isnan(), theirs.isnan()), f"{name} has NaNs elsewhere"


def put(drawn: Drawn, place: str, value: float | None) -> None:
    """One element becomes `value`, or the NaN with the sentinel's bits."""
    x = drawn.x if isinstance(drawn.x, Tensor) else drawn.x.data
    tensor = {"x": x, "dy": drawn.dy, "dh_n": drawn.dh_n}.get(place, drawn.h_0)
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
