"""Shapes and dtypes that every backend is tested on, besides those of `check`, and its rule as assertions."""

import zlib

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tritongru.tools.check import Case, measure

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
CPU = torch.device("cpu")
MORE_CASES = (
    Case(T=3, B=9, I=1, H=65, batch_first=True),  # B 9: fewer draws give the gradient of x its 256 elements
    Case(T=2, B=18, I=6, H=16, bias=False),
    Case(T=3, B=3, I=5, H=17, layers=2, bidirectional=True, recompute=True),
    Case(T=1, B=3, I=70, H=9, layers=2, bidirectional=True),
    Case(I=4, H=20, layers=2, lengths=(1, 4, 2)),
    Case(I=4, H=13, lengths=(3, 3, 3, 3)),
    Case(I=6, H=18, bidirectional=True, lengths=(5, 1, 4, 4), recompute=True, bias=False),
)

# On a GPU.
LARGE_CASES = (
    Case(T=20, B=33, I=100, H=300, bidirectional=True),
    Case(T=12, B=64, I=256, H=512, layers=2),
    Case(T=1, B=1, I=512, H=512),
    Case(T=50, B=7, I=64, H=128, batch_first=True),
    Case(I=40, H=130, bidirectional=True, lengths=(30, 1, 17, 17, 9)),
    Case(T=9, B=130, I=32, H=200, recompute=True),
    Case(T=20, I=40, H=130, bidirectional=True, lengths=(20, 1, 17, 9, 3), padded=True, resets=0.1),
)
# What `sequence` spreads over many programs: odd sizes, several groups, several row tiles, all the SMs.
EXCHANGING_CASES = (
    Case(T=30, B=3, I=20, H=203, bidirectional=True),
    Case(T=25, B=70, I=64, H=256, layers=2),
    Case(T=15, B=200, I=48, H=512),
    Case(T=12, B=16, I=64, H=1024),
    Case(I=40, H=650, bidirectional=True, lengths=(30, 1, 17, 17, 9)),
    Case(T=10, B=40, I=96, H=768, bias=False, recompute=True),
    Case(T=12, I=20, H=300, layers=2, bidirectional=True, lengths=(12, 1, 7) * 6, padded=True, resets=0.2),
)
# What one program holds: every number of rows of a program, odd sizes, more programs than SMs.
SMALL_CASES = (
    Case(T=30, B=9, I=20, H=127, bidirectional=True),
    Case(T=20, B=700, I=24, H=128),
    Case(T=20, B=3000, I=8, H=64, bias=False),
    Case(I=20, H=96, bidirectional=True, lengths=(20, 1, 7) * 70),
)

shapes = st.builds(
    Case,
    T=st.integers(1, 5),
    B=st.integers(1, 19),
    I=st.integers(1, 40),
    H=st.integers(1, 40),
    layers=st.integers(1, 3),
    **dict.fromkeys(("bidirectional", "bias", "batch_first", "recompute"), st.booleans()),
    lengths=st.one_of(st.just(()), st.lists(st.integers(1, 5), min_size=1, max_size=6).map(tuple)),
)
quiet = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def assert_right(case: Case, backend: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> None:
    figures = measure(case, backend, dtype, device)
    wrong = {name: f for name, f in figures.items() if not f.holds}
    assert not wrong, f"{backend} {dtype} {case.name}: {wrong}"


def assert_not_wrong(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """One draw, or as many as give every tensor 8 elements, by the rule or by eight times the floor: a wrong mask or
    term gives errors of order 1, while a single draw's error of a tensor with much cancellation scatters widely."""
    draws, seed = max(1, case.draws // 32), zlib.crc32(repr(case).encode())
    figures = measure(case, backend, dtype, CPU, draws, seed)
    wrong = {name: f for name, f in figures.items() if not (f.holds or f.error <= 8 * f.floor)}
    assert not wrong, f"{backend} {dtype} {case.name}: {wrong}"
