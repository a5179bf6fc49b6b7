"""What a backend is: two functions of one layer, and what they are handed and hand back."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..batch import Visits
from ..planning.devices import Device
from ..planning.problem import Overrides, Problem, Recurrence


class LayerWeights(NamedTuple):
    """Weights of one layer, a tuple per kind with an entry per direction; biases are empty where it has none."""

    w_ih: tuple[Tensor, ...]  # [3H, I] each
    w_hh: tuple[Tensor, ...]  # [3H, H]
    b_ih: tuple[Tensor, ...] = ()  # [3H]
    b_hh: tuple[Tensor, ...] = ()  # [3H]

    @classmethod
    def of(cls, flat: tuple[Tensor, ...], directions: int, as_they_lie: bool = False) -> "LayerWeights":
        """From PyTorch's order (w_ih, w_hh[, b_ih, b_hh]), forward then reverse; copied where a kernel could not read
        them as they lie in memory, unless it is known that it can."""
        each = len(flat) // directions
        if not as_they_lie:
            flat = tuple([w if w.is_contiguous() and not w.is_neg() else w.resolve_neg().contiguous() for w in flat])
        return cls(flat[0::each], flat[1::each], *((flat[2::each], flat[3::each]) if each == 4 else ()))

    def only(self, direction: int) -> "LayerWeights":
        """Those of one direction, as of a layer that has no other."""
        return LayerWeights(*[of_kind[direction : direction + 1] for of_kind in self])


class SavedGates(NamedTuple):
    """What forward keeps for backward: r, z, n in the memory of x_proj, and q = h_{t-1} W_hn^T + b_hn."""

    rzn: Tensor  # [T, B, D, 3H] time-major or packed [N, D, 3H]: rows of D * 3H dense, strides of T and B any multiples
    q: Tensor  # [T, B, D, H] or packed [N, D, H], contiguous

    def laid_out(self) -> "SavedGates":
        """As said above, by a copy where a hook on saved tensors handed back other strides."""
        (*strides, stride_d, stride_gates), (*_, D, size) = self.rzn.stride(), self.rzn.shape
        dense = stride_gates == 1 and stride_d == size and not any([stride % (D * size) for stride in strides])
        return SavedGates(self.rzn if dense else self.rzn.contiguous(), self.q.contiguous())


def rzn_strides(rzn: Tensor | None) -> dict[str, int]:
    """How many rows of D * 3H one step of T is, and one of B; in a packed batch both are one row."""
    if rzn is None:
        return dict(stride_rzn_t=0, stride_rzn_b=0)
    row, strides = rzn.shape[-2] * rzn.shape[-1], rzn.stride()
    return dict(stride_rzn_t=strides[0] // row, stride_rzn_b=strides[-3] // row)


@dataclass(frozen=True, eq=False)
class LayerCall:
    """What a backend knows of one layer's call besides the tensors."""

    visits: Visits
    directions: int
    hidden_size: int
    dtype: str  # "fp32", "fp16", "bf16", "fp64"
    precision: str  # of float32 products: "tf32" or "ieee"
    device: Device
    save_gates: bool
    overrides: Overrides = ()  # fields of the backend's tiles, set for a measurement
    # What a launcher has worked out once, for all calls that differ in values alone; by pass.
    settled: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, problem: Problem, device: Device, overrides: Overrides = ()) -> "LayerCall":
        """Of one of a problem's layers."""
        p, packed = problem, (problem.batch,) * problem.time if problem.packed else None
        visits = Visits(p.time, p.batch, packed)
        return cls(visits, p.directions, p.hidden_size, p.dtype, p.precision, device, p.training, overrides)

    def again(self, kind: Hashable, given: Sequence[Tensor]) -> bool:
        """Whether a pass like one before was launched by this: its `kind` tells how what it is `given` lies in memory,
        and `runtime.once_more` has made what is settled of it."""
        once_more = self.settled.get(("again", kind))
        return once_more is not None and once_more(given)

    def was_launched(self, kind: Hashable, once_more: Callable[[], Any]) -> None:
        """Of a pass that `again` did not launch: the second of its kind settles how the third is. Most sizes that vary
        from call to call come once."""
        key = ("again", kind)
        self.settled[key] = once_more() if key in self.settled else None

    @property
    def recurrence(self) -> Recurrence:
        sizes = self.visits.batch, self.hidden_size, self.directions
        return Recurrence(*sizes, self.dtype, self.precision, self.device, self.overrides)


class Launcher(Protocol):
    """A backend's module in launch/. Its functions run inside the device of their tensors, autocast off."""

    def forward(
        self, call: LayerCall, x: Tensor, h_0: Tensor, weights: LayerWeights, h_n: Tensor | None = None
    ) -> tuple[Tensor, Tensor, SavedGates | None]:
        """One layer forward: y [T, B, D * H] or [N, D * H], h_n [D, B, H], and the gates if call.save_gates.

        Args:
            x, h_0: time-major [T, B, I] or packed [N, I], and [D, B, H]; any strides.
            weights: of each direction, contiguous.
            h_n: contiguous [D, B, H], where h_n is to be put; None: in fresh memory.
        """

    def backward(
        self, call: LayerCall, dy: Tensor, dh_n: Tensor, y: Tensor, h_0: Tensor, gates: SavedGates,
        weights: LayerWeights, dh_0_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """One layer backward, but for the library products of tritongru/products.py: dgates [D, rows, 4H] (dq, dr, dz,
        dn) and, if wanted, dh_0 [D, B, H].

        Args:
            dy, dh_n: gradients of y, time-major, any strides, and of h_n, in y's dtype or float32.
            y, h_0, gates: what forward took and made.
            dh_0_dtype: y's dtype, or float32, in which dh_0 is not rounded; None: dh_0 is not wanted.
        """

    def product_precision(self, call: LayerCall, backward: bool = True) -> str | None:
        """Of the library products around the recurrence in float32: "tf32" or "ieee"; None: forward has none."""

    def specimens(
        self, call: LayerCall, input_size: int, bias: bool, recompute: bool, aligned: bool = True
    ) -> list[Any]:  # fmt: skip
        """What a call launches, a `runtime.Kernel` each, for compiling without a GPU. `aligned=False` takes the
        caller's tensors at their elements' own alignment. Only a Triton backend has it."""
