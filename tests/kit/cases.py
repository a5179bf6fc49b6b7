"""Shapes and dtypes that every backend is tested on, besides those of `check`."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tritongru.tools.check import Case

HALF = (torch.float16, torch.bfloat16)


DTYPES = (torch.float32, *HALF)


MORE_CASES = (
    Case(T=3, B=9, I=1, H=65, batch_first=True),  # B 9: fewer draws give the gradient of x its 256 elements
    Case(T=2, B=18, I=6, H=16, bias=False),
    Case(T=3, B=3, I=5, H=17, layers=2, bidirectional=True, recompute=True),
    Case(T=1, B=3, I=70, H=9, layers=2, bidirectional=True),
    Case(I=4, H=20, layers=2, lengths=(1, 4, 2)),
    Case(I=4, H=13, lengths=(3, 3, 3, 3)),
    Case(I=6, H=18, bidirectional=True, lengths=(5, 1, 4, 4), recompute=True, bias=False),
)


shapes = st.builds(
    Case,
    T=st.integers(1, 5),
    B=st.integers(1, 19),
    I=st.integers(1, 40),
    H=st.integers(1, 40),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    recompute=st.booleans(),
    lengths=st.one_of(st.just(()), st.lists(st.integers(1, 5), min_size=1, max_size=6).map(tuple)),
)


quiet = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
