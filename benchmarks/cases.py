"""The shapes that are measured, and the suites they make up; a new shape is a line below.

A suite is a tuple of entries, the most valuable first: what a budget cuts off is at the end. Sources of shapes
    [deepbench]  github.com/baidu-research/DeepBench, README: the GRU problems of training and inference, I = H
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product, zip_longest
from statistics import NormalDist


@dataclass(frozen=True)
class Case:
    """A shape of a GRU's call. `packed`: lengths are spread log-normally, the longest is T."""

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

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @cached_property
    def name(self) -> str:
        marks = {
            "ieee": self.dtype == "fp32" and self.precision == "ieee",
            f"{self.layers}layers": self.layers > 1,
            "bidirectional": self.bidirectional,
            "packed": self.packed,
            "cell": self.cell,
        }
        shape = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}-{self.dtype}"
        return "-".join([shape, *(mark for mark, on in marks.items() if on)])

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Length of each row, falling; empty where the batch is dense.

        The quantiles of a log-normal distribution of sigma 0.5, about that of sentences and utterances: an assumption.
        """
        if not self.packed:
            return ()
        normal = NormalDist(sigma=0.5)
        log_lengths = [normal.inv_cdf((self.B - b - 0.5) / self.B) for b in range(self.B)]
        return tuple(max(1, round(self.T * math.exp(log - log_lengths[0]))) for log in log_lengths)

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """Rows that run at each time step; empty where the batch is dense."""
        return tuple(sum(length > t for length in self.lengths) for t in range(self.T)) if self.packed else ()


@dataclass(frozen=True)
class Entry:
    """A shape, and what is measured of it: passes by the names in work.py, providers by those in providers.py."""

    case: Case
    passes: tuple[str, ...] = ("inference", "forward+backward")
    providers: tuple[str, ...] = ("nn.GRU", "default", "step", "sequence")

    def __or__(self, other: Entry) -> Entry:
        """Everything that either asks for."""
        both = (tuple(dict.fromkeys(getattr(self, f) + getattr(other, f))) for f in ("passes", "providers"))
        return Entry(self.case, *both)


ALL_PASSES = ("inference", "forward", "forward+backward")
GRAPHS = ("nn.GRU", "nn.GRU-graph", "default", "step", "step-graph", "sequence", "sequence-graph")
CPU = ("nn.GRU", "reference", "cell-loop", "nn.LSTM", "nn.RNN")  # tritongru as it comes is nn.GRU's path: cpu.py
LOOPS = ("aten", "reference", "cell-loop", "torchrl")  # PyTorch's own once more, and what is far slower

TARGET = Case(50, 8, 128, 128)  # where tritongru.GRU on the CPU is to stay within 2 % of nn.GRU
EMPTY = Case(1, 1, 1, 1)  # nothing to compute: what is left is the call itself
CPU_CASES = (TARGET, EMPTY)

# A cross-section; H in few sizes, since `step` compiles its kernels for each. CUDA graphs come last: a capture that
# fails ends the process.
QUICK = (
    Entry(Case(512, 32, 512, 512, "bf16"), ALL_PASSES),
    Entry(Case(512, 16, 1024, 1024, "bf16"), ALL_PASSES),
    Entry(Case(512, 32, 256, 256, "fp32"), ALL_PASSES),
    Entry(Case(512, 1, 512, 512, "bf16")),
    Entry(Case(512, 128, 512, 512, "bf16")),
    Entry(Case(512, 64, 1024, 1024, "bf16")),
    Entry(Case(512, 16, 128, 128, "fp16")),
    Entry(Case(512, 32, 512, 512, "bf16", packed=True)),
    Entry(Case(512, 32, 512, 512, "bf16", bidirectional=True)),
    Entry(Case(375, 32, 2048, 2048, "bf16")),
    Entry(Case(1, 64, 256, 256, "fp32", cell=True), ("inference", "forward+backward"), ("nn.GRU", "default")),
    Entry(Case(128, 32, 256, 256, "fp32"), providers=("nn.GRU", "default", *LOOPS)),
    Entry(Case(1, 1, 512, 512, "bf16"), ("streaming",), GRAPHS),
    Entry(Case(256, 32, 512, 512, "bf16"), providers=GRAPHS),
)

_SIZES = (2048, 1536, 2560, 2816)  # H, with B 32 in training
_TIMES = (187, 1500, 375, 750)
DEEPBENCH_TRAINING = tuple(
    Entry(Case(T, B, H, H, dtype), ("forward+backward",))
    for dtype in ("fp16", "fp32")
    for T, B, H in ((1500, 32, 1024), (1500, 64, 1024), (1, 32, 512), *((T, 32, H) for T in _TIMES for H in _SIZES))
)
DEEPBENCH_INFERENCE = tuple(
    Entry(Case(T, B, H, H, "fp16"), ("inference",))
    for T, H in (*((T, H) for T in _TIMES for H in _SIZES), (1, 512), (1500, 1024))
    for B in (1, 4, 2)
)

_GRID_H = (512, 1024, 256, 128, 2048, 1536, 768, 192, 384, 152, 64)
_GRID_B = (32, 1, 128, 16, 64, 4, 512)
_KINDS = (("bf16", "tf32"), ("fp32", "tf32"), ("fp16", "tf32"), ("fp32", "ieee"))  # dtype, precision of products
GRID = tuple(
    Entry(Case(512, B, H, H, dtype, precision))
    for dtype, precision in _KINDS
    # along the diagonals, so that what is there first covers both axes
    for H, B in sorted(product(_GRID_H, _GRID_B), key=lambda at: _GRID_H.index(at[0]) + _GRID_B.index(at[1]))
)
DEEP = tuple(
    Entry(Case(512, B, H, H, "bf16", layers=layers, bidirectional=both))
    for B, H in ((32, 512), (16, 1024), (64, 256))
    for layers, both in ((2, False), (4, False), (1, True), (2, True), (4, True))
)
PACKED = tuple(
    Entry(Case(512, B, H, H, dtype, packed=True, bidirectional=both))
    for both in (False, True)
    for dtype in ("bf16", "fp32")
    for B, H in ((32, 512), (64, 1024), (128, 256))
)
TIME = tuple(
    Entry(Case(T, 32, 512, 512, "bf16"), providers=GRAPHS)
    for T in (1, 64, 8, 1024, 2, 256, 4, 16, 32, 128, 512, 2048, 4096, 8192)
)
STREAMING = tuple(
    Entry(Case(1, 1, H, H, dtype, cell=cell), ("streaming",), ("nn.GRU", "default") if cell else GRAPHS)
    for H in (512, 1024, 256, 128, 2048)
    for dtype in ("bf16", "fp32")
    for cell in (False, True)
)
NETWORKS = tuple(
    Entry(Case(512, B, H, H, dtype), providers=("nn.GRU", "default", "nn.LSTM", "nn.RNN"))
    for dtype in ("bf16", "fp32")
    for B, H in ((32, 512), (32, 1024), (32, 256), (1, 512), (128, 512))
)
# Gates again in backward, weights in allocations of their own: what memory and alignment cost.
VARIANTS = tuple(
    Entry(
        Case(T, 32, H, H, "bf16"), ("forward+backward",),
        ("nn.GRU", "default", "step-recompute", "sequence-recompute", "step-separate"),
    )
    for T, H in ((512, 512), (2048, 512), (512, 1024))
)  # fmt: skip

# The forms of kernels/README.md, which have no backward; a T of their own, for entries of one shape become one.
STUDY_T = 384
FORMS = ("unfused", "step", "step-input", "sequence")
STUDY = tuple(Entry(Case(STUDY_T, 32, H, H, "bf16"), ("inference",), ("nn.GRU", *FORMS)) for H in (1024, 512, 256))


def merged(*groups: Iterable[Entry]) -> tuple[Entry, ...]:
    """The groups' entries in turn, one of each, those of the same shape in one."""
    found: dict[Case, Entry] = {}
    for entry in (e for several in zip_longest(*groups) for e in several if e is not None):
        found[entry.case] = found[entry.case] | entry if entry.case in found else entry
    return tuple(found.values())


SUITES: dict[str, tuple[Entry, ...]] = {
    "quick": QUICK,
    "full": merged(
        QUICK, GRID, DEEPBENCH_TRAINING, DEEPBENCH_INFERENCE, DEEP, PACKED, TIME, STREAMING, NETWORKS, VARIANTS,
        STUDY,
    ),
    # PyTorch's paths on a CPU; the layer's own cost beside nn.GRU is cpu.py
    "cpu": tuple(
        Entry(replace(TARGET, H=H, I=H, B=B), ALL_PASSES, CPU)
        for H, B in ((128, 8), (512, 8), (512, 1))
    ),
}  # fmt: skip

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
