"""What is asked of a plan: one call of a GRU, by its sizes; and of tiles: the recurrence of one of its layers."""

from dataclasses import dataclass
from typing import NamedTuple

from .devices import Device

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8}
Overrides = tuple[tuple[str, int], ...]  # fields of tiles by name, set for a measurement


class Recurrence(NamedTuple):
    """All that the tiles of a layer depend on: never on T."""

    batch: int
    hidden_size: int
    directions: int
    dtype: str
    precision: str  # of float32 products
    device: Device
    overrides: Overrides = ()

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return BYTES[self.dtype]


@dataclass(frozen=True)
class Problem:
    """One call of a GRU. Sizes as in the notation; `directions` is 2 for a bidirectional layer."""

    batch: int
    time: int
    input_size: int
    hidden_size: int
    layers: int = 1
    directions: int = 1
    dtype: str = "fp32"
    training: bool = True
    packed: bool = False
    bias: bool = True
    recompute: bool = False
    precision: str = "tf32"  # of float32 products

    def __post_init__(self) -> None:
        for name in ("batch", "time", "hidden_size", "input_size", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, possible in (("directions", (1, 2)), ("dtype", tuple(BYTES)), ("precision", ("tf32", "ieee"))):
            if getattr(self, name) not in possible:
                expected = ", ".join(map(str, possible))
                raise ValueError(f"{name} must be one of {expected}, got {getattr(self, name)!r}")

    def on(self, device: Device, overrides: Overrides = ()) -> Recurrence:
        """The recurrence of each of its layers there."""
        sizes = self.batch, self.hidden_size, self.directions
        return Recurrence(*sizes, self.dtype, self.precision, device, overrides)
