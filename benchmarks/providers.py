"""What is measured against what; a new provider is a line below. All take nn.GRU's parameters, by their names."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import nn

import tritongru
from tritongru.planning.sequence import SequenceTiles
from tritongru.planning.step import StepTiles

from .cases import Case

TILES: dict[str, type] = {"step": StepTiles, "sequence": SequenceTiles}
BASELINE = "nn.GRU"  # what every ratio is taken to


@dataclass(frozen=True)
class Provider:
    """One way to run a case: `make(case, device=, dtype=)` builds the module, which runs inside `around()`."""

    name: str
    about: str
    make: Callable[..., nn.Module]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def _torch(case: Case, **place: Any) -> nn.Module:
    if case.cell:
        return nn.GRUCell(case.I, case.H, **place)
    return nn.GRU(case.I, case.H, case.layers, bidirectional=case.bidirectional, **place)


def _ours(case: Case, backend: str | None, recompute: bool = False, separate: bool = False, **place: Any) -> nn.Module:
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


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(BASELINE, "PyTorch's own: cuDNN on NVIDIA", _torch),
        Provider("step", "tritongru, one launch per timestep", partial(_ours, backend="step")),
        Provider("step-recompute", "step, gates again in backward", partial(_ours, backend="step", recompute=True)),
        Provider("step-separate", "step, each weight allocated alone", partial(_ours, backend="step", separate=True)),
        Provider("sequence", "tritongru, one launch per sequence", partial(_ours, backend="sequence")),
        Provider("sequence-recompute", "the same, recomputing", partial(_ours, backend="sequence", recompute=True)),
        Provider("default", "tritongru as it comes", partial(_ours, backend=None)),
    )
}
GPU_PROVIDERS = (BASELINE, "step", "sequence")


def find(name: str) -> Provider:
    """The provider of that name; `step:num_warps=8,num_stages=2` is `step` with these fields of its tiles replaced, and
    `sequence:per_wait=1` likewise.

    Raises:
        ValueError: no such provider or field.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]
    base, _, changes = name.partition(":")
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
