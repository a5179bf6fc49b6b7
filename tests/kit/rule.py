"""The rule of numerics (tritongru/tools/check.py) as assertions."""

import zlib

import torch

from tritongru.tools.check import Case, measure

CPU = torch.device("cpu")


def assert_right(case: Case, backend: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> None:
    figures = measure(case, backend, dtype, device)
    wrong = {name: f for name, f in figures.items() if not f.holds}
    assert not wrong, f"{backend} {dtype} {case.name}: {wrong}"


def assert_not_wrong(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """One draw, or as many as give every tensor 8 elements, by the rule or by eight times the floor: for many shapes
    quickly. A wrong mask or term gives errors of order 1, while a single draw's error of a tensor with much
    cancellation scatters above its RMS figure, nn.GRU's as much as ours."""
    draws, seed = max(1, case.draws // 32), zlib.crc32(repr(case).encode())
    figures = measure(case, backend, dtype, CPU, draws, seed)
    wrong = {name: f for name, f in figures.items() if not (f.holds or f.error <= 8 * f.floor)}
    assert not wrong, f"{backend} {dtype} {case.name}: {wrong}"
