"""What is asked of a plan: one call of a GRU, by its sizes."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8}


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
        if self.directions not in (1, 2):
            raise ValueError(f"directions must be 1 or 2, got {self.directions}")
        if self.dtype not in BYTES:
            raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got {self.dtype!r}")
        if self.precision not in ("tf32", "ieee"):
            raise ValueError(f"precision must be tf32 or ieee, got {self.precision!r}")
