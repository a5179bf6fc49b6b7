"""A shape of a GRU's call, and what is measured of it. Which there are: suites.py and workloads.py."""

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

from tritongru.planning import Problem

BASELINE = "nn.GRU"  # what every ratio is taken to


@dataclass(frozen=True)
class Case:
    """A shape of a GRU's call. `packed`: lengths are spread log-normally, the longest is T; `padded`: the same lengths
    as a tensor on the device, mixed. `resets`: the probability that a step begins a new sequence."""

    T: int
    B: int
    I: int
    H: int
    dtype: str = "fp32"
    precision: str = "tf32"  # of float32 products; on a CPU always ieee
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    cell: bool = False  # a GRUCell; T is 1
    blocks: int = 1  # layers side by side, each with I and H of its own
    padded: bool = False
    resets: float = 0.0

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @cached_property
    def name(self) -> str:
        marks = {
            "ieee": self.dtype == "fp32" and self.precision == "ieee",
            f"{self.layers}layers": self.layers > 1,
            f"{self.blocks}blocks": self.blocks > 1,
            "bidirectional": self.bidirectional,
            "packed": self.packed,
            "cell": self.cell,
            "padded": self.padded,
            f"resets{self.resets:g}": self.resets > 0,
        }
        shape = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}-{self.dtype}"
        return "-".join([shape, *(mark for mark, on in marks.items() if on)])

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Length of each row, falling; empty where the batch is dense.

        The quantiles of a log-normal distribution of sigma 0.5, about that of sentences and utterances: an assumption.
        """
        if not (self.packed or self.padded):
            return ()
        normal = NormalDist(sigma=0.5)
        log_lengths = [normal.inv_cdf((self.B - b - 0.5) / self.B) for b in range(self.B)]
        return tuple(max(1, round(self.T * math.exp(log - log_lengths[0]))) for log in log_lengths)

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """Rows that run at each time step; empty where the batch is dense."""
        return tuple(sum(length > t for length in self.lengths) for t in range(self.T)) if self.packed else ()

    def problem(self, training: bool) -> Problem:
        """The case as a plan takes it."""
        return Problem(
            batch=self.B, time=self.T, input_size=self.I, hidden_size=self.H, layers=self.layers,
            directions=self.directions, dtype=self.dtype, training=training, packed=self.packed,
            precision=self.precision,
        )  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A shape, and what is measured of it: passes by the names in work.py, providers by those in providers.py."""

    case: Case
    passes: tuple[str, ...] = ("inference", "forward+backward")
    providers: tuple[str, ...] = (BASELINE, "default")
    checked: bool = True  # held against float64 before it is timed
    rounds: int = 40  # at the most; 0: nothing is timed
    seconds: float = 1.0  # for each pass, over all providers
    replayed: bool = False  # what is sampled is the call in a CUDA graph
    note: str = ""  # of every row
