"""Host side of kernels/exchange.py: the buffer of an exchange."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..parts import part
from .runtime import empty

SENTINEL = -1


class Shape(NamedTuple):
    """Of an exchange buffer, without its slots. Blocks from `owned` on nobody publishes: they are zeros for ever."""

    sizes: tuple[int, ...]  # directions, groups, tiles, gates, rows / 16, blocks, elements of a block
    owned: int


class Buffer:
    """The exchange buffer of a pass, fresh: [directions, slots, groups, ...] for the launch with the most slots."""

    def __init__(self, shape: Shape, slots: int, dtype: torch.dtype, device: torch.device):
        (directions, *sizes), self.owned = shape
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        self.bits, self.slots = empty(directions, slots, *sizes, dtype=dtype, device=device).view(bits), slots

    @part("fill")
    def filled(self, slots: int) -> Tensor:
        """Full of sentinels, for one launch. That of the launch before is over by then, on the same stream."""
        found = self.bits
        if slots < self.slots:
            found = found.flatten()[: found.numel() // self.slots * slots].view(len(found), slots, *found.shape[2:])
        found.fill_(SENTINEL)
        if self.owned < found.shape[-2]:
            found[..., self.owned :, :].fill_(0)
        return found
