"""What is measured against what; a new provider is a line of PROVIDERS. All take nn.GRU's parameters, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import tritongru
from tritongru import registry

from . import forms
from .cases import BASELINE, Case


@dataclass(frozen=True)
class Provider:
    """One way to run a case: `make(case, device=, dtype=)` builds the module."""

    name: str
    make: Callable[..., nn.Module]
    unserved: Callable[[Case], str | None] = lambda case: None  # why a case is not for it
    ours: bool = False  # a tritongru layer: its errors have to keep to the rule


class SideBySide(nn.Module):
    """Layers of their own over blocks of the features, one after another. cuDNN takes no h_0 with gaps."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        inputs, states = (t.chunk(len(self.blocks), -1) for t in (input, hx))
        found = [block(x, h.contiguous()) for block, x, h in zip(self.blocks, inputs, states, strict=True)]
        output, h_n = (torch.cat(results, -1) for results in zip(*found, strict=True))
        return output, h_n


class Padded(tritongru.GRU):
    """The layer with a case's lengths and resets; on PyTorch's own path nn.GRU over the sequences as rows of a packed
    batch, the packing and unpacking included."""

    def __init__(self, case: Case, *sizes: int, **options: Any):
        super().__init__(*sizes, **options)
        self.case = case

    def forward(self, input: Any, hx: Tensor | None = None, **_: Any) -> Any:
        lengths, resets = padding(self.case, input.device)
        return super().forward(input, hx, lengths=lengths, resets=resets)


@cache
def padding(case: Case, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Lengths and resets of a case, the same in every call."""
    generator = torch.Generator().manual_seed(2)
    lengths, resets = None, None
    if case.padded:
        lengths = torch.tensor(case.lengths)[torch.randperm(case.B, generator=generator)].to(device)
    if case.resets:
        resets = (torch.rand(case.T, case.B, generator=generator) < case.resets).to(device)
    return lengths, resets


def _make(layer: Callable[..., nn.Module], cell: type[nn.Module], case: Case, **options: Any) -> nn.Module:
    if case.cell:
        return cell(case.I, case.H, **options)
    if case.padded or case.resets:
        if layer is nn.GRU:
            options["backend"] = "aten"
        layer = partial(Padded, case, **getattr(layer, "keywords", {}))
    sizes = (case.I, case.H, case.layers)
    blocks = [layer(*sizes, bidirectional=case.bidirectional, **options) for _ in range(case.blocks)]
    return SideBySide(blocks) if case.blocks > 1 else blocks[0]


def _ours(name: str, backend: str | None, **options: Any) -> Provider:
    make = partial(_make, partial(tritongru.GRU, **options), tritongru.GRUCell, backend=backend)
    return Provider(name, make, ours=True)


TWIN = f"{BASELINE}, twin"
PROVIDERS = {
    provider.name: provider
    for provider in (
        *(Provider(name, partial(_make, nn.GRU, nn.GRUCell)) for name in (BASELINE, TWIN)),  # cuDNN on NVIDIA
        _ours("default", None),  # the layer as it comes
        *(_ours(name, name) for name in registry.BACKENDS),
        *(_ours(f"{name}-recompute", name, recompute=True) for name in ("step", "sequence")),
        *(Provider(name, form, forms.unserved, ours=True) for name, form in forms.FORMS.items()),
    )
}


def find(name: str) -> Provider:
    """The provider of that name; `sequence:block_h=8,num_warps=4` is the backend with fields of its tiles set.

    Raises:
        ValueError: no such provider or field.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]
    base, _, fields = name.partition(":")
    if base not in PROVIDERS or not fields:
        raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, or BACKEND:FIELD=N,..., got {name!r}")
    return _ours(name, registry.find(name).name)
