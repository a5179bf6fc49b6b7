"""The shapes that are measured; a new one is a line below."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Case:
    """A shape of a GRU's call. `packed`: T is the longest of B lengths, the shortest about a quarter of it."""

    T: int
    B: int
    I: int
    H: int
    dtype: str = "fp32"
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    cell: bool = False  # a GRUCell; T is 1

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @cached_property
    def name(self) -> str:
        marks = {
            f"{self.layers}layers": self.layers > 1,
            "bidirectional": self.bidirectional,
            "packed": self.packed,
            "cell": self.cell,
        }
        shape = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}-{self.dtype}"
        return "-".join([shape, *(mark for mark, on in marks.items() if on)])

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Length of each row, falling; empty where the batch is dense."""
        return tuple(max(1, self.T - 3 * self.T * b // (4 * self.B)) for b in range(self.B)) if self.packed else ()

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """Rows that run at each time step; empty where the batch is dense."""
        return tuple(sum(length > t for length in self.lengths) for t in range(self.T)) if self.packed else ()


TARGET = Case(50, 8, 128, 128)  # where tritongru.GRU on the CPU is to stay within 2 % of nn.GRU
EMPTY = Case(1, 1, 1, 1)  # nothing to compute: what is left is the call itself
CPU_CASES = (TARGET, EMPTY)

GPU_CASES = (
    Case(1, 1, 512, 512, "fp16"),  # streaming
    Case(1, 64, 256, 256, "fp32", cell=True),
    Case(128, 32, 64, 64, "fp32"),
    Case(128, 64, 128, 128, "fp16"),
    Case(128, 1, 256, 256, "bf16"),
    Case(128, 16, 256, 256, "fp32"),
    Case(128, 32, 256, 256, "fp16", bidirectional=True),
    Case(128, 128, 512, 512, "fp32"),
    Case(128, 32, 512, 512, "bf16"),
    Case(128, 32, 512, 512, "bf16", packed=True),
    Case(128, 1, 1024, 1024, "fp16"),
    Case(128, 16, 1024, 1024, "bf16"),
    Case(128, 64, 1024, 1024, "fp16"),
    Case(128, 64, 1024, 1024, "fp32"),
    Case(128, 32, 650, 650, "bf16"),
    Case(64, 64, 2048, 2048, "bf16"),
    Case(1000, 16, 512, 512, "fp16"),
)

# Small and odd, for a memory checker that slows a kernel a hundredfold.
MEMCHECK_CASES = (
    Case(1, 3, 5, 33, "fp16"),
    Case(4, 17, 7, 20, "fp32"),
    Case(3, 33, 9, 67, "bf16", bidirectional=True),
    Case(5, 4, 11, 24, "fp16", bidirectional=True, packed=True),
    Case(1, 2, 6, 19, "fp32", cell=True),
    # programs that exchange: odd H and a padded buffer; several row tiles; both directions
    Case(3, 17, 5, 203, "fp16"),
    Case(4, 40, 8, 512, "bf16"),
    Case(4, 5, 7, 264, "fp32", bidirectional=True, packed=True),
)
