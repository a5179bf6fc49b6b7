"""The rule of numerics (tritongru/inspection/check.py) as assertions."""

from __future__ import annotations

import torch

from tritongru.inspection.check import Case, measure

CPU = torch.device("cpu")


def assert_right(case: Case, backend: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> None:
    """The rule itself, for every tensor."""
    figures = measure(case, backend, dtype, device)
    wrong = {name: f for name, f in figures.items() if not f.holds}
    assert not wrong, f"{backend} {dtype} {case.name}: {wrong}"


def assert_not_wrong(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """One draw, against eight times the floor: for many shapes quickly. A wrong mask or term gives errors of order 1,
    while a single draw's error of a tensor with much cancellation scatters above its RMS figure."""
    figures = measure(case, backend, dtype, CPU, draws=1, seed=hash(case) % 2**31)
    wrong = {name: f for name, f in figures.items() if not f.error <= 8 * f.floor}
    assert not wrong, f"{backend} {dtype} {case.name}: {wrong}"
