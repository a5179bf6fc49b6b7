"""W_hh as kernels that keep it on chip read it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parts import part
from ..planning.sequence import SequenceTiles
from .protocol import LayerWeights


@part("weights")
def padded_weights(weights: LayerWeights, tiles: SequenceTiles, transpose: bool) -> dict[str, Tensor]:
    """W_hh of both directions as [3, U, K], each gate's transposed if asked for, padded with zeros and aligned; itself
    where it is so already."""
    U, K = tiles.programs * tiles.block_h, tiles.units

    def slices(w_hh: Tensor) -> Tensor:
        H = w_hh.shape[-1]
        w = w_hh.view(3, H, H)
        if transpose:
            w = w.transpose(1, 2)
        if (U, K) != (H, H):
            return torch.nn.functional.pad(w, (0, K - H, 0, U - H))
        w = w.contiguous()
        return w if w.data_ptr() % 16 == 0 else w.clone()

    first = slices(weights.w_hh[0])
    return {"w_ptr": first, "w_reverse_ptr": first if len(weights.w_hh) == 1 else slices(weights.w_hh[1])}
