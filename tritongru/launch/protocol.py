"""What a backend is handed: one layer's call, its weights by direction, and what its forward kept for its backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..batch import Visits
from ..planning.devices import Device


class DirectionWeights(NamedTuple):
    """Weights of one direction; where the layer has no bias, the biases are some tensor that is not read."""

    w_ih: Tensor  # [3H, I]
    w_hh: Tensor  # [3H, H]
    b_ih: Tensor  # [3H]
    b_hh: Tensor  # [3H]


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer, a tuple per kind with an entry per direction; biases are empty where it has none."""

    w_ih: tuple[Tensor, ...]
    w_hh: tuple[Tensor, ...]
    b_ih: tuple[Tensor, ...]
    b_hh: tuple[Tensor, ...]

    @classmethod
    def of(cls, flat: tuple[Tensor, ...], directions: int) -> LayerWeights:
        """From PyTorch's order (w_ih, w_hh[, b_ih, b_hh]), forward then reverse; copied where not contiguous."""
        each = len(flat) // directions
        by_kind = [tuple(w.resolve_neg().contiguous() for w in flat[kind::each]) for kind in range(each)]
        return cls(*by_kind, *((),) * (4 - each))

    def only(self, direction: int) -> LayerWeights:
        """Those of one direction, as of a layer that has no other."""
        here = slice(direction, direction + 1)
        return LayerWeights(self.w_ih[here], self.w_hh[here], self.b_ih[here], self.b_hh[here])

    def direction(self, index: int) -> DirectionWeights:
        none = self.w_hh[index]
        return DirectionWeights(
            self.w_ih[index],
            self.w_hh[index],
            self.b_ih[index] if self.b_ih else none,
            self.b_hh[index] if self.b_hh else none,
        )


class SavedGates(NamedTuple):
    """What forward keeps for backward: r, z, n in the memory of x_proj, and q = h_{t-1} W_hn^T + b_hn."""

    rzn: Tensor  # [T, B, D, 3H] time-major or packed [N, D, 3H]: rows of D * 3H dense, strides of T and B any multiples
    q: Tensor  # [T, B, D, H] or packed [N, D, H], contiguous

    def laid_out(self) -> SavedGates:
        """As said above, by a copy where a hook on saved tensors handed back other strides."""
        *strides, stride_d, stride_gates = self.rzn.stride()
        D, size = self.rzn.shape[-2:]
        dense = stride_gates == 1 and stride_d == size and all(stride % (D * size) == 0 for stride in strides)
        return SavedGates(self.rzn if dense else self.rzn.contiguous(), self.q.contiguous())


def rzn_strides(rzn: Tensor) -> tuple[int, int]:
    """How many rows of D * 3H one step of T is, and one of B; in a packed batch both are one row."""
    row = rzn.shape[-2] * rzn.shape[-1]
    return rzn.stride(0) // row, rzn.stride(-3) // row


@dataclass(frozen=True)
class LayerCall:
    """What a backend knows of one layer's call besides the tensors."""

    visits: Visits
    directions: int
    hidden_size: int
    dtype: str  # "fp32", "fp16", "bf16", "fp64"
    precision: str  # of float32 products: "tf32" or "ieee"
    device: Device
    save_gates: bool
