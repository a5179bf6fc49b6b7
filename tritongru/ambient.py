"""What `use_backend` says at a call, which in a checkpoint's recompute is what it said in forward.

torch.utils.checkpoint restores autocast, random numbers and the default device for a recompute, and nothing else: by
then the block of `use_backend` may be over, or of another thread. So the choice in force where a region begins is kept
with the object that PyTorch keeps of the region from forward to backward, found among the local variables of its
functions on the call stack, which only a call inside of `use_backend` and of what looks like a checkpoint walks.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import checkpoint

_block: ContextVar[tuple[str | None, Sequence[Any]] | None] = ContextVar("tritongru_backend", default=None)
_at_the_start: Any = WeakKeyDictionary()  # of a region: what was chosen outside of it
_FILE = checkpoint.detach_variable.__code__.co_filename


@contextmanager
def choose(name: str | None) -> Iterator[None]:
    """Inside, in this thread or task, `chosen()` is `name`."""
    token = _block.set((name, [region for region, _ in _regions()]))
    try:
        yield
    finally:
        _block.reset(token)


def chosen() -> str | None:
    """The name that the innermost `choose` has; in a region that is computed again, as when it was first computed."""
    block = _block.get()
    if block is None and not _at_the_start.data:  # as in every call of who does not use it
        return None
    name, inside = block or (None, ())
    begun = []
    for region, again in _regions():
        if any(region is r for r in inside):
            break
        if region in _at_the_start or again:  # None: nobody had chosen anything in forward
            name = _at_the_start.get(region)
            break
        begun.append(region)
    for region in begun:
        _at_the_start[region] = name
    return name


def _regions() -> list[tuple[Any, bool]]:
    """The checkpointed regions around the caller, innermost first, each with whether it is computed again."""
    if (
        torch._C._current_graph_task_id() == -1  # no backward runs, which alone computes again
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # nor is this in use_reentrant=False
        and torch._C._is_fwd_grad_enabled()  # nor in an autograd.Function's forward, as with use_reentrant=True
    ):
        return []
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _FILE:
            local = frame.f_locals
            if code.co_name in ("forward", "backward"):  # of CheckpointFunction
                found.append((local["ctx"], code.co_name == "backward"))
            elif code.co_name == "unpack_hook" and "frame" in local:
                found.append((local["frame"], True))
            elif (begun := getattr(local.get("gen"), "gi_frame", None)) and "new_frame" in begun.f_locals:
                found.append((begun.f_locals["new_frame"], False))  # `checkpoint` itself keeps it in a generator
        frame = frame.f_back
    return found
