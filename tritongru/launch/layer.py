"""What a backend is handed: one layer's call, and its weights by direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..planning.devices import Device
from ..visits import Visits


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

    def direction(self, index: int) -> DirectionWeights:
        none = self.w_hh[index]
        return DirectionWeights(
            self.w_ih[index],
            self.w_hh[index],
            self.b_ih[index] if self.b_ih else none,
            self.b_hh[index] if self.b_hh else none,
        )


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
