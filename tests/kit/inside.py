"""What tests of the layer take from inside the package, which changes faster than its public names: here alone."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tritongru import ambient, batch, call, functional, layer, registry, status
from tritongru.planning.sequence import SequenceTiles

layer_forward, layer_backward = layer.layer_forward, layer.layer_backward  # torch.ops.tritongru's, with their schemas


def asked_for() -> Any:
    """The name of the backend that `use_backend` or the environment ask for here."""
    found = registry.asked_for(None)
    return None if found is None else found.name


def fall_back(reason: str, x: torch.Tensor) -> Any:
    """What a call on x that no kernel can serve, for this reason, does about it."""
    return functional._or_refuse(None, None, reason, x, "result")


def checkpoints_remembered() -> int:
    """How many regions of torch.utils.checkpoint have a choice of `use_backend` kept for them."""
    return len(ambient._at_the_start)


def without_walking_the_stack(patch: pytest.MonkeyPatch) -> None:
    """A call that looks for a checkpoint around it fails."""
    patch.setattr(ambient, "sys", SimpleNamespace(_getframe=lambda *_: pytest.fail("the stack was walked")))


def without(patch: pytest.MonkeyPatch, *, triton: bool = False, interpreter: bool = False) -> None:
    """As on a machine without Triton, or in a process where it does not interpret."""
    if triton:
        patch.setattr(registry, "has_triton", lambda: False)
    if interpreter:
        patch.setattr(registry, "has_triton", lambda: True)
        patch.setattr(registry, "interpreting", lambda: False)


@contextmanager
def default_device_elsewhere() -> Iterator[None]:
    """It is "meta", for any other than the layer's: what is made there has no values, and mixes with nothing."""
    torch.set_default_device("meta")
    batch.kept.clear()  # a packed batch's tables that another call has made
    try:
        yield
    finally:
        torch.set_default_device(None)


def nothing_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(status, "_statuses", {})
    batch.kept.clear()


def in_a_capture(patch: pytest.MonkeyPatch) -> None:
    """As where a CUDA graph is being captured, of CPU tensors."""
    for module in (batch, layer):
        patch.setattr(module, "capturing", lambda device: True)
    patch.setattr(batch, "in_graphs", {})


def is_anything_kept() -> bool:
    return bool(status._statuses or batch.kept)


def body(operator: Any) -> Any:
    """The Python of one of ours, called past PyTorch's dispatcher: what a mode sees then is what it does."""
    return operator._init_fn


def reports_to_the_host() -> list[torch.Tensor]:
    """Host memory of waits that ran out and of wrong lengths."""
    return [of.reports for of in status._statuses.values()]


def several_launches_over_time(patch: pytest.MonkeyPatch, visits: int) -> None:
    patch.setattr(SequenceTiles, "visits_per_launch", lambda *_: visits)


def fewer_programs(patch: pytest.MonkeyPatch) -> None:
    from tritongru.launch import runtime

    once = runtime.Launch.once
    patch.setattr(runtime.Launch, "once", lambda self, grid, s: once(self, (grid[0] - 1, *grid[1:]), s))


@contextmanager
def launches_without_pdl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside: the same tiles of `step`, every launch after the end of the one before it."""
    from tritongru.launch import step

    tiles = step.step_tiles
    with monkeypatch.context() as patch:
        patch.setattr(step, "step_tiles", lambda *problem: dataclasses.replace(tiles(*problem), pdl=False))
        call.forget()  # calls that are known have their tiles
        yield
    call.forget()
