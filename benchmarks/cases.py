"""The shapes that are measured, and the suites they make up; a new shape is a line below, or in workloads.py.

A suite is a tuple of entries, the most valuable first: what a budget cuts off is at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from statistics import NormalDist

from tritongru.planning import Device, Problem
from tritongru.planning.candidates import TILED, candidates

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
    rounds: int = 40  # at the most; 0: it is checked alone
    replayed: bool = False  # what is sampled is the call in a CUDA graph
    note: str = ""  # of every row


ALL_PASSES = ("inference", "forward", "forward+backward")
BACKENDS = (BASELINE, "step", "sequence")
CPU = (BASELINE, "reference", "cell-loop", "nn.LSTM", "nn.RNN")  # tritongru as it comes is nn.GRU's path: cpu.py

TARGET = Case(50, 8, 128, 128)  # where tritongru.GRU on the CPU is to stay within 2 % of nn.GRU
EMPTY = Case(1, 1, 1, 1)  # nothing to compute: what is left is the call itself
CPU_CASES = (TARGET, EMPTY)

GRID_T, SHORT_T = 128, 2
TUNE_T = 160  # of its own, for rows are told apart by their shape
GRID_H = (512, 1024, 256, 128, 2048, 64, 768, 1536, 384, 192, 32, 2816)  # most used first, as below
GRID_B = (32, 128, 1, 512, 16, 64, 256, 4)
DTYPES = ("bf16", "fp32", "fp16")
# What a call costs however short it is: of one step, which `step` takes in one launch, and of two.
SHORT = tuple(
    Entry(Case(T, B, H, H, dtype), providers=BACKENDS[:2] if T == 1 else BACKENDS, checked=False, rounds=20)
    for T in (1, SHORT_T)
    for dtype in DTYPES
    for H in (256, 64, 512, 1024)
    for B in (32, 1, 256)
)
GRID = (
    *SHORT,
    # along the diagonals, so that what is there first covers both axes
    *(
        Entry(Case(GRID_T, B, H, H, dtype), providers=BACKENDS, checked=False, rounds=5)
        for dtype in DTYPES
        for H, B in sorted(product(GRID_H, GRID_B), key=lambda at: GRID_H.index(at[0]) + GRID_B.index(at[1]))
    ),
)
RIGHT = tuple(
    Entry(Case(20, B, H, H, dtype), ("forward+backward",), (*BACKENDS, "reference"), rounds=0)
    for dtype in DTYPES
    for H in sorted(GRID_H)
    for B in (5, 70)
)
FIRST = (Entry(Case(100, 32, 512, 512, "bf16"), ("forward+backward",), BACKENDS, rounds=5),)

# The forms of kernels/README.md, which have no backward; a T of their own, for rows are told apart by their shape.
STUDY_T = 384
FORMS = ("unfused", "step", "step-input", "sequence")
STUDY = tuple(Entry(Case(STUDY_T, 32, H, H, "bf16"), ("inference",), (BASELINE, *FORMS)) for H in (1024, 512, 256))


def tuning(device: Device) -> tuple[Entry, ...]:
    """Every class of tiles with its candidates, of which a row is a replay: the recurrence and little else."""
    found = []
    for backend, dtype, H, B in TILED:
        case = Case(TUNE_T, B, H, H, dtype)
        fields = candidates(backend, case.problem(training=True), device)
        if fields:
            providers = (BASELINE, backend, *(f"{backend}:{text}" for text in fields))
            passes = ("forward", "forward+backward")
            found.append(Entry(case, passes, providers, rounds=10, replayed=True, note="replayed from a CUDA graph"))
    return tuple(found)


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
