"""Shrunken plans of kernels/sequence.py: few programs, small tiles, so that the emulator can run them all at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tritongru.launch import sequence
from tritongru.planning.problem import Recurrence
from tritongru.planning.sequence import SequenceTiles


@dataclass(frozen=True)
class ShrunkenPlan:
    """An exchanging plan of at most 16 programs; row tiles are dealt out to `groups`, several launches of `tiles` each
    where these do not take all."""

    block_h: int = 16
    block_k: int = 32
    num_k: int = 1
    num_warps: int = 2
    shared_gates: int = 0
    waits: int = 1  # of backward
    block_b: int = 16
    tiles: int = 1
    groups: int = 1
    together: bool = True  # both directions in one launch

    def of(self, kind: str, layer: Recurrence) -> SequenceTiles:
        """In place of planning/sequence.py's `sequence_tiles`."""
        programs = -(-layer.hidden_size // self.block_h)
        block = 16 if self.block_b > 8 else 32
        programs += programs * self.block_h % block > 0  # a block of half precision belongs to whole programs
        found = SequenceTiles(
            block_b=self.block_b, block_h=self.block_h, block_k=self.block_k, num_k=self.num_k,
            num_warps=self.num_warps, shared_gates=self.shared_gates, waits=self.waits if kind == "backward" else 1,
            delay=0, programs_per_sm=1, tiles=self.tiles, programs=programs, groups=self.groups,
            directions=layer.directions if self.together else 1,
        )  # fmt: skip
        assert layer.hidden_size <= found.units, "a plan whose K is too small"
        assert found.programs * found.groups * found.directions <= 16, "a plan of too many programs for the emulator"
        return found


@contextmanager
def exchanging(monkeypatch, plan: ShrunkenPlan | None = None) -> Iterator[None]:
    """Inside: backend `sequence` exchanges by `plan`, or by what is planned for the interpreter."""
    with monkeypatch.context() as patch:
        if plan is not None:
            patch.setattr(sequence, "sequence_tiles", plan.of)
        yield
