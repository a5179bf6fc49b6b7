"""Of kernels/small.py, what launch/sequence.py launches for layers whose W_h one program holds: once each way."""

import torch
from torch import Tensor

from ..kernels import small as kernels
from ..planning.small import SmallTiles
from .runtime import Kernel


def kernel_of(kind: str, tiles: SmallTiles, resets: bool = False) -> Kernel:
    """The kernel of one pass, with its constants."""
    kernel = kernels.small_forward if kind == "forward" else kernels.small_backward
    constants = dict(
        ROWS=tiles.rows, UNITS=tiles.units, WARPS=tiles.num_warps, LANES=tiles.lanes, VECTOR=tiles.vector,
        AHEAD=tiles.ahead, RESETS=resets,
    )  # fmt: skip
    return Kernel(kernel, constants, tiles.num_warps)


def as_read(tensor: Tensor, vector: int) -> Tensor:
    """Itself, or a copy where its rows are not dense and aligned and units are read several at a time: an expanded dy,
    or what a hook on saved tensors has made."""
    *strides, stride_h = tensor.stride()
    unaligned = stride_h != 1 or tensor.data_ptr() % 16 or any([stride % vector for stride in strides])
    return tensor.clone(memory_format=torch.contiguous_format) if vector > 1 and unaligned else tensor
