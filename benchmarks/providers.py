"""What is measured against what; a new provider is a line below. All take nn.GRU's parameters, by their names."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import tritongru
from tritongru.planning.sequence import parse_overrides
from tritongru.planning.step import StepTiles

from . import forms
from .cases import Case

TILES: dict[str, type] = {"step": StepTiles}
BASELINE = "nn.GRU"  # what every ratio is taken to


@dataclass(frozen=True)
class Provider:
    """One way to run a case: `make(case, device=, dtype=)` builds the module, which runs inside `around()`."""

    name: str
    about: str
    make: Callable[..., nn.Module]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    unserved: Callable[[Case], str | None] = lambda case: None  # why a case is not for it
    graphed: bool = False  # its calls are captured in a CUDA graph and replayed
    truth: str = BASELINE  # the provider whose float64 it is held against
    ours: bool = False  # a tritongru layer: its errors have to keep to the rule, and it has a limit


def _torch(case: Case, **place: Any) -> nn.Module:
    if case.cell:
        return nn.GRUCell(case.I, case.H, **place)
    return nn.GRU(case.I, case.H, case.layers, bidirectional=case.bidirectional, **place)


def _layer(case: Case, backend: str | None, recompute: bool, separate: bool, **place: Any) -> nn.Module:
    module: nn.Module
    if case.cell:
        module = tritongru.GRUCell(case.I, case.H, backend=backend, **place)
    else:
        module = tritongru.GRU(
            case.I, case.H, case.layers, bidirectional=case.bidirectional, backend=backend, recompute=recompute, **place
        )
    if separate:
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    return module


def _tritongru(
    name: str, about: str, backend: str | None = None, recompute: bool = False, separate: bool = False, **options: Any
) -> Provider:
    """A tritongru layer; `separate`: its weights are no views of one buffer."""
    make = partial(_layer, backend=backend, recompute=recompute, separate=separate)
    return Provider(name, about, make, ours=True, **options)


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
        starts[:, 0] = True
        hidden = hx[0].unsqueeze(1).expand(-1, x.shape[1], -1).contiguous()
        output, h_n = gru_triton(x, hidden, *self.all_weights[0], starts)
        return output.transpose(0, 1), h_n[None]


def _network(kind: type[nn.RNNBase], case: Case, **place: Any) -> nn.Module:
    return kind(case.I, case.H, case.layers, bidirectional=case.bidirectional, **place)


def _dense(case: Case) -> str | None:
    return "it takes no packed batch" if case.packed else None


def _no_cell(case: Case) -> str | None:
    return "it takes no cell" if case.cell else None


def _dense_no_cell(case: Case) -> str | None:
    return _dense(case) or _no_cell(case)


def _by_torchrl(case: Case) -> str | None:
    if find_spec("torchrl") is None:
        return "torchrl is not installed"
    if case.dtype != "fp32" or case.layers > 1 or case.bidirectional or case.packed or case.cell:
        return "it takes one float32 layer of one direction, dense"
    return None


def _study(name: str, about: str) -> Provider:
    """A form of the kernel study."""
    return Provider(name, about, partial(forms.module, name), unserved=forms.unserved, ours=True)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(BASELINE, "PyTorch's own: cuDNN on NVIDIA", _torch),
        Provider("nn.GRU-graph", "the same in a CUDA graph", _torch, unserved=_dense, graphed=True),
        _tritongru("default", "tritongru as it comes"),
        _tritongru("aten", "tritongru, PyTorch's own path", "aten"),
        _tritongru("reference", "tritongru, the equations in PyTorch", "reference"),
        _tritongru("step", "tritongru, one launch per timestep", "step"),
        _tritongru("step-graph", "step in a CUDA graph", "step", unserved=_dense, graphed=True),
        _tritongru("step-recompute", "step, gates again in backward", "step", recompute=True),
        _tritongru("step-separate", "step, each weight allocated alone", "step", separate=True),
        _tritongru("sequence", "tritongru, one launch per sequence", "sequence"),
        _tritongru("sequence-graph", "the same in a CUDA graph", "sequence", unserved=_dense, graphed=True),
        _tritongru("sequence-recompute", "the same, recomputing", "sequence", recompute=True),
        *(_study(name, about) for name, about in forms.ABOUT.items()),
        Provider("cell-loop", "PyTorch's cell in a Python loop", partial(_network, CellLoop), unserved=_dense_no_cell),
        Provider("torchrl", "TorchRL's Triton GRU", partial(_network, TorchRL), unserved=_by_torchrl),
        Provider("nn.LSTM", "an LSTM", partial(_network, nn.LSTM), unserved=_no_cell, truth="nn.LSTM"),
        Provider("nn.RNN", "a plain RNN (tanh)", partial(_network, nn.RNN), unserved=_no_cell, truth="nn.RNN"),
    )
}


def find(name: str) -> Provider:
    """The provider of that name; `step:num_warps=8,num_stages=2` is `step` with these fields of its tiles replaced, and
    `sequence:waits=3` likewise, by the layer's own argument `backend`.

    Raises:
        ValueError: no such provider or field.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]
    base, _, changes = name.partition(":")
    if base == "sequence" and changes:
        parse_overrides(changes)
        return _tritongru(name, f"sequence with {changes}", name)
    if base not in TILES or not changes:
        raise ValueError(
            f"provider must be one of {', '.join(PROVIDERS)}, or step:FIELD=N,... or sequence:FIELD=N,..., got {name!r}"
        )
    fields = [field.name for field in dataclasses.fields(TILES[base])]
    values = {}
    for change in changes.split(","):
        field, _, value = change.partition("=")
        if field not in fields or not value.isdecimal():
            raise ValueError(f"tiles are changed by FIELD=N with a field of {', '.join(fields)}, got {change!r}")
        values[field] = int(value)
    around = partial(_with_tiles, base, values)
    return dataclasses.replace(PROVIDERS[base], name=name, about=f"{base} with {changes}", around=around)


@contextmanager
def _with_tiles(backend: str, values: dict[str, int]) -> Iterator[None]:
    """Inside: the launcher of `backend` gets its tiles with `values` in place of what was chosen."""
    launcher = importlib.import_module(f"tritongru.launch.{backend}")
    name = f"{backend}_tiles"
    chosen = getattr(launcher, name)

    @cache
    def changed(*problem: Any) -> Any:
        found = chosen(*problem)
        return found if isinstance(found, str) else dataclasses.replace(found, **values)

    setattr(launcher, name, changed)
    try:
        yield
    finally:
        setattr(launcher, name, chosen)
