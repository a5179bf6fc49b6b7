"""Memory with fences: what a launcher allocates starts as NaN inside a fence of a known pattern, which must survive."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .modules import results, tensors

FENCE = 256  # elements on either side: more than a row of any tensor here, x_proj with both directions included
PATTERN = {4: 0x7FC12345, 2: 0x7FC3}  # a NaN that no arithmetic makes (as float16 0x7FC3 is one too)


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
    """Inside: the launchers allocate fenced memory, x_proj too, in its own strides. Leaving checks the fences."""
    from tritongru.launch import exchange, sequence, step

    wholes: list[Tensor] = []  # every allocation with its fences, as integers
    project = step.project

    def empty(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        size = torch.Size(shape).numel()
        whole = torch.empty(size + 2 * FENCE, dtype=dtype, device=device)
        wholes.append(whole.view(torch.int32 if dtype.itemsize == 4 else torch.int16).fill_(PATTERN[dtype.itemsize]))
        return whole[FENCE : FENCE + size].fill_(float("nan")).view(shape)

    def fenced_project(*args) -> Tensor:
        x_proj = project(*args)
        tensor = empty(x_proj.numel(), dtype=x_proj.dtype, device=x_proj.device)
        return tensor.as_strided(x_proj.shape, x_proj.stride()).copy_(x_proj)

    with monkeypatch.context() as patch:
        for launcher in (step, sequence):
            patch.setattr(launcher, "empty", empty)
            patch.setattr(launcher, "project", fenced_project)
        patch.setattr(exchange, "empty", empty)
        yield
    assert wholes, "the launcher allocated nothing through `empty`"
    for bits in wholes:
        ends = torch.cat([bits[:FENCE], bits[-FENCE:]])
        assert (ends == PATTERN[bits.itemsize]).all(), "memory beyond a buffer was written"


def call_between_fences(layer, x, h_0, monkeypatch) -> list[Tensor]:
    """Forward and backward between fences, with poison beyond the cotangents too; all results."""

    def call(x, h_0):
        found = tensors(layer(x, h_0))
        for t in found:
            t.register_hook(poisoned)
        return found

    with fences(monkeypatch):
        return list(results(call, x, h_0, of=layer).values())
