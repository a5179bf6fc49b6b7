"""Memory with fences: what a launcher allocates is NaN, inside more NaN that is no tensor's of a launch, where nobody
may read or write in the emulator."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FENCE = 256  # elements on either side: more than a row of any tensor here, x_proj with both directions included


def poisoned(tensor: Tensor) -> Tensor:
    """The same values and strides inside an allocation that is NaN everywhere else, gaps between rows included."""
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    whole = torch.full((extent + 2 * FENCE,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return whole.as_strided(tensor.shape, tensor.stride(), FENCE).copy_(tensor)


def with_gaps(tensor: Tensor) -> Tensor:
    """The same values, non-contiguous in every dimension, with NaN in the gaps."""
    whole = torch.full([2 * n + 3 for n in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    return whole[tuple(slice(1, 1 + 2 * n, 2) for n in tensor.shape)].copy_(tensor)


@contextmanager
def fences(monkeypatch) -> Iterator[None]:
    """Inside: the launchers allocate fenced memory, x_proj too, in its own strides."""
    from tritongru.launch import exchange, sequence, step

    project = step.project

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return poisoned(torch.full(shape, float("nan"), dtype=dtype, device=device))

    with monkeypatch.context() as patch:
        for launcher in (step, sequence):
            patch.setattr(launcher, "empty", empty)
            patch.setattr(launcher, "project", lambda *given: poisoned(project(*given)))
        patch.setattr(exchange, "empty", empty)
        yield
