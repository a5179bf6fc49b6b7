"""Shrunken plans of kernels/sequence.py: few programs, small tiles, so that a scheduler can run them all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from tritongru import registry
from tritongru.launch import sequence
from tritongru.planning import describe
from tritongru.planning.sequence import BLOCK_B, SequenceTiles


@dataclass(frozen=True)
class ShrunkenPlan:
    """An exchanging plan of at most 8 programs; row tiles are dealt out to `groups`."""

    block_h: int = 8
    block_k: int = 32
    num_k: int = 1
    split: int = 4
    wait: Literal["chunk", "gate", "all"] = "all"  # what is awaited together: forward, all there is are num_k chunks
    groups: int = 1
    together: bool = True  # both directions in one launch

    def tiles(self, kind: str, batch: int, hidden_size: int, directions: int, *_: object) -> SequenceTiles:
        """In place of planning/sequence.py's `sequence_tiles`."""
        chunks = self.num_k if kind == "forward" else 3 * self.num_k
        row_tiles = -(-batch // BLOCK_B)
        found = SequenceTiles(
            exchange=True, block_b=BLOCK_B, block_h=self.block_h, block_k=self.block_k, num_k=self.num_k,
            split=self.split, per_wait={"chunk": 1, "gate": self.num_k, "all": chunks}[self.wait],
            num_warps=self.split, programs=-(-hidden_size // self.block_h), groups=self.groups,
            tiles=-(-row_tiles // self.groups), directions=directions if self.together else 1,
        )  # fmt: skip
        assert hidden_size <= self.block_k * self.num_k, "a plan whose K is too small"
        assert found.programs * found.groups * found.directions <= 8, "a plan of too many programs for the scheduler"
        return found


@contextmanager
def exchanging(monkeypatch, plan: ShrunkenPlan | None = None) -> Iterator[None]:
    """Inside: backend `sequence` exchanges by `plan`, or by what is planned for the device `concurrent`."""
    with monkeypatch.context() as patch:
        patch.setattr(registry, "device_of", lambda device: describe("concurrent"))
        if plan is not None:
            patch.setattr(sequence, "sequence_tiles", plan.tiles)
        yield
