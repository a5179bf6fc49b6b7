"""What the tests on a CUDA device share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tritongru

from .modules import randn

CUDA, DOCS = torch.device("cuda", 0), Path(__file__).parents[2] / "docs"

needs_pdl = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability(CUDA) < (9, 0),
    reason="needs compute capability 9.0",
)
# H, B, T, bidirectional: all of W_h ahead, a part of it, wgmma; launches that do not fill the device, and that do
BESIDE = [(512, 32, 60, False), (203, 5, 40, True), (1024, 64, 40, False), (2048, 64, 30, False), (1024, 512, 20, True)]


def drawn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return randn(*size, seed=seed).to(CUDA, dtype)


def layer_of(backend: str | None, *sizes: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    return tritongru.GRU(*sizes, device=CUDA, dtype=dtype, backend=backend, **options)


@contextmanager
def on_a_side_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a call after one on a side stream, and what it writes."""
    with on_a_side_stream():
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, call()


def of_page(page: str) -> dict[str, Any]:
    """What the first Python of a page defines."""
    names: dict[str, Any] = {}
    exec(compile((DOCS / page).read_text().split("```python\n")[1].split("```")[0], page, "exec"), names)
    return names
