"""Memory with fences: what a launcher allocates starts as NaN inside a fence of a known pattern, which must survive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

FENCE = 256  # elements on either side: more than a row of any tensor here, x_proj with both directions included
PATTERN = {4: 0x7FC12345, 2: 0x7FC3}  # a NaN that no arithmetic makes (as float16 0x7FC3 is one too)


def fenced(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(tensor full of NaN, the whole allocation with its fences)."""
    size = torch.Size(shape).numel()
    whole = torch.empty(size + 2 * FENCE, dtype=dtype, device=device)
    whole.view(torch.int32 if dtype.itemsize == 4 else torch.int16).fill_(PATTERN[dtype.itemsize])
    inside = whole[FENCE : FENCE + size]
    inside.fill_(float("nan"))
    return inside.view(shape), whole


def poisoned(tensor: Tensor) -> Tensor:
    """The same values and strides inside an allocation that is NaN everywhere else, gaps between rows included."""
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    whole = torch.full((extent + 2 * FENCE,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    found = whole.as_strided(tensor.shape, tensor.stride(), FENCE)
    found.copy_(tensor)
    return found


def with_gaps(tensor: Tensor) -> Tensor:
    """The same values, non-contiguous in every dimension, with NaN in the gaps."""
    whole = torch.full([2 * n + 3 for n in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    inside = whole[tuple(slice(1, 1 + 2 * n, 2) for n in tensor.shape)]
    inside.copy_(tensor)
    return inside


@dataclass
class Fences:
    wholes: list[Tensor] = field(default_factory=list)

    def check(self) -> None:
        """Every fence is as it was."""
        for whole in self.wholes:
            bits = whole.view(torch.int32 if whole.dtype.itemsize == 4 else torch.int16)
            ends = torch.cat([bits[:FENCE], bits[-FENCE:]])
            assert (ends == PATTERN[whole.dtype.itemsize]).all(), f"memory beyond a {whole.dtype} buffer was written"


@contextmanager
def fences(monkeypatch) -> Iterator[Fences]:
    """Inside: the launchers allocate fenced memory, x_proj too, in its own strides. Leaving checks the fences."""
    from tritongru.launch import exchange, sequence, step

    found, project = Fences(), step.project

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor, whole = fenced(shape, dtype, device)
        found.wholes.append(whole)
        return tensor

    def fenced_project(*args) -> Tensor:
        x_proj = project(*args)
        tensor = empty(x_proj.numel(), dtype=x_proj.dtype, device=x_proj.device)
        return tensor.as_strided(x_proj.shape, x_proj.stride()).copy_(x_proj)

    with monkeypatch.context() as patch:
        for launcher in (step, sequence):
            patch.setattr(launcher, "empty", empty)
            patch.setattr(launcher, "project", fenced_project)
        patch.setattr(exchange, "empty", empty)
        yield found
    found.check()
    assert found.wholes, "the launcher allocated nothing through `empty`"


def call_between_fences(layer, x, h_0, monkeypatch):
    """Forward and backward between fences; all results."""
    packed = not isinstance(x, torch.Tensor)
    data = x.data if packed else x
    leaf = data.detach().requires_grad_()  # keeps the strides
    h_0 = h_0.detach().requires_grad_()
    layer.zero_grad()
    with fences(monkeypatch):
        output, h_n = layer(x._replace(data=leaf) if packed else leaf, h_0)
        output = output.data if packed else output
        generator = torch.Generator().manual_seed(1)
        dy, dh_n = (
            poisoned(torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)) for t in (output, h_n)
        )
        torch.autograd.backward([output, h_n], [dy, dh_n])
    return [output.detach(), h_n.detach(), leaf.grad, h_0.grad, *(p.grad for p in layer.parameters())]
