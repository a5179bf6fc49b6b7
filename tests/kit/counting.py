"""What a call launches, by name or by kind (tools/counted.py), and how much memory it asks PyTorch for at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from tritongru import call, layer
from tritongru.launch import runtime
from tritongru.tools.counted import Watch


@contextmanager
def looked_into(monkeypatch) -> Iterator[None]:
    """Dispatch modes of the block see what a layer runs where there are none, instead of its operators."""
    with monkeypatch.context() as patch:
        patch.setattr(call, "seen_by_a_mode", lambda: False)
        patch.setattr(layer, "_by_operator", lambda dy, dh_n: False)
        yield


@contextmanager
def launched() -> Iterator[list[str]]:
    """The kernels launched inside the block, by name, in order."""
    names: list[str] = []
    with runtime.observe(lambda name, grid: names.append(name)):
        yield names


@contextmanager
def memory(monkeypatch) -> Iterator[Watch]:
    """Everything launched and allocated inside the block; a packed batch's index (int64 [N]) is not counted."""
    found = Watch()
    with looked_into(monkeypatch), runtime.observe(lambda name, grid: found.launches.update([name])), found:
        yield found
