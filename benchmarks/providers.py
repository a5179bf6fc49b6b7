"""What is measured against what; a new provider is a line below. All take nn.GRU's parameters, by their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
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
    about: str
    make: Callable[..., nn.Module]
    unserved: Callable[[Case], str | None] = lambda case: None  # why a case is not for it
    truth: str = BASELINE  # the provider whose float64 it is held against
    ours: bool = False  # a tritongru layer: its errors have to keep to the rule, and it has a limit


class SideBySide(nn.Module):
    """Layers of their own over blocks of the features, one after another."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(*(t.chunk(len(self.blocks), -1) for t in (input, hx)), strict=True)
        found = [block(*part) for block, part in zip(self.blocks, parts, strict=True)]
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


def _make(layer: Callable[..., nn.Module], cell: Callable[..., nn.Module], case: Case, **options: Any) -> nn.Module:
    if case.cell:
        return cell(case.I, case.H, **options)
    if case.padded or case.resets:
        if layer is nn.GRU:
            layer, options = tritongru.GRU, {**options, "backend": "aten"}
        given = layer.keywords if isinstance(layer, partial) else {}
        layer = partial(Padded, case, **given)
    blocks = [
        layer(case.I, case.H, case.layers, bidirectional=case.bidirectional, **options) for _ in range(case.blocks)
    ]
    return SideBySide(blocks) if case.blocks > 1 else blocks[0]


def _tritongru(name: str, about: str, backend: str | None = None, **options: Any) -> Provider:
    """A tritongru layer."""
    make = partial(_make, partial(tritongru.GRU, **options), tritongru.GRUCell, backend=backend)
    return Provider(name, about, make, ours=True)


class CellLoop(nn.GRU):
    """A GRU as one writes it by hand: nn.functional's cell at every step, in Python."""

    def forward(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        directions, h_n = 2 if self.bidirectional else 1, []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                weights = self.all_weights[layer * directions + direction]
                steps = range(len(input)) if direction == 0 else range(len(input) - 1, -1, -1)
                h, hs = hx[layer * directions + direction], {}
                for t in steps:
                    h = hs[t] = torch.gru_cell(input[t], h, *weights)
                outputs.append(torch.stack([hs[t] for t in range(len(input))]))
                h_n.append(h)
            input = torch.cat(outputs, -1)
        return input, torch.stack(h_n)


class TorchRL(nn.GRU):
    """TorchRL's Triton GRU (a private function): batch-first, with a mask of the steps that start from `hidden`."""

    def forward(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        from torchrl.modules.tensordict_module._rnn_triton import gru_triton

        x = input.transpose(0, 1).contiguous()
        starts = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        hidden = hx[0].unsqueeze(1).expand(-1, x.shape[1], -1).contiguous()
        _, resets = padding(self.case, x.device)
        if resets is not None:
            starts = resets.T.contiguous()
            hidden = hidden.masked_fill(starts[..., None], 0)
        starts[:, 0] = True
        output, h_n = gru_triton(x, hidden, *self.all_weights[0], starts)
        return output.transpose(0, 1), h_n[None]


def _network(kind: type[nn.RNNBase], case: Case, **place: Any) -> nn.Module:
    return kind(case.I, case.H, case.layers, bidirectional=case.bidirectional, **place)


def _torchrl(case: Case, **place: Any) -> nn.Module:
    found = _network(TorchRL, case, **place)
    found.case = case  # whose resets it takes
    return found


def _no_cell(case: Case) -> str | None:
    if case.padded or case.resets:
        return "it takes no lengths or resets"
    return "it takes no cell" if case.cell else None


def _dense_no_cell(case: Case) -> str | None:
    return "it takes no packed batch" if case.packed else _no_cell(case)


def _by_torchrl(case: Case) -> str | None:
    if find_spec("torchrl") is None:
        return "torchrl is not installed"
    ragged = case.packed or case.padded
    if case.dtype != "fp32" or case.layers * case.blocks > 1 or case.bidirectional or ragged or case.cell:
        return "it takes one float32 layer of one direction, dense"
    return None


def _study(name: str, about: str) -> Provider:
    """A form of the kernel study."""
    return Provider(name, about, partial(forms.module, name), unserved=forms.unserved, ours=True)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(BASELINE, "PyTorch's own: cuDNN on NVIDIA", partial(_make, nn.GRU, nn.GRUCell)),
        _tritongru("default", "tritongru as it comes"),
        _tritongru("aten", "tritongru, PyTorch's own path", "aten"),
        _tritongru("reference", "tritongru, the equations in PyTorch", "reference"),
        _tritongru("step", "tritongru, one launch per timestep", "step"),
        _tritongru("step-recompute", "step, gates again in backward", "step", recompute=True),
        _tritongru("sequence", "tritongru, one launch per sequence", "sequence"),
        _tritongru("sequence-recompute", "the same, recomputing", "sequence", recompute=True),
        *(_study(name, about) for name, about in forms.ABOUT.items()),
        Provider("cell-loop", "PyTorch's cell in a Python loop", partial(_network, CellLoop), unserved=_dense_no_cell),
        Provider("torchrl", "TorchRL's Triton GRU", _torchrl, unserved=_by_torchrl),
        Provider("nn.LSTM", "an LSTM", partial(_network, nn.LSTM), unserved=_no_cell, truth="nn.LSTM"),
        Provider("nn.RNN", "a plain RNN (tanh)", partial(_network, nn.RNN), unserved=_no_cell, truth="nn.RNN"),
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
    backend = registry.find(name)
    return _tritongru(name, f"{base} with {fields}", backend.name)
