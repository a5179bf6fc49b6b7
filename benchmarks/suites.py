"""The suites: entries, the most valuable first, for what a budget cuts off is at the end. A new shape is a line here,
or in workloads.py. T tells the rows of suites apart: each has a T of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

from tritongru.planning import Device, describe

from .candidates import TILED, candidates
from .cases import BASELINE, Case, Entry
from .workloads import WORKLOADS

BACKENDS = (BASELINE, "step", "sequence")
DTYPES = ("bf16", "fp32", "fp16")
GRID_T, SHORT_T, RIGHT_T, TUNE_T, STUDY_T, FIRST_T, LONG_T = 128, 2, 20, 160, 384, 100, 512
GRID_H = (512, 1024, 256, 128, 2048, 64, 768, 1536, 384, 192, 32, 2816)  # most used first, as below
GRID_B = (32, 128, 1, 512, 16, 64, 256, 4)
FORMS = ("unfused", "step", "step-input", "sequence")  # of kernels/README.md


def grid(device: Device) -> Iterator[Entry]:
    """What the layer chooses by. First what a call costs however short it is: of one step, which `step` takes in one
    launch, of a cell, and of two steps. Then T 128, along the diagonals of H and B, so that what is there first covers
    both."""
    short = dict(checked=False, rounds=20)
    for dtype, H, B in product(DTYPES, (256, 64, 512, 1024), (32, 1, 256)):
        yield Entry(Case(1, B, H, H, dtype), providers=BACKENDS[:2], **short)
        yield Entry(Case(1, B, H, H, dtype, cell=True), providers=BACKENDS[:2], **short)
        yield Entry(Case(SHORT_T, B, H, H, dtype), providers=BACKENDS, **short)
    sizes = sorted(product(GRID_H, GRID_B), key=lambda at: GRID_H.index(at[0]) + GRID_B.index(at[1]))
    for dtype, (H, B) in product(DTYPES, sizes):
        yield Entry(Case(GRID_T, B, H, H, dtype), providers=BACKENDS, checked=False, rounds=5)


def long(device: Device) -> Iterator[Entry]:
    """Many timesteps, and what a call holds in memory."""
    sizes = ((32, 512), (16, 1024), (64, 1024), (1, 512), (128, 512), (64, 256))
    cases = [Case(LONG_T, B, H, H, "bf16") for B, H in sizes]
    cases += [Case(LONG_T, 32, 512, 512, "bf16", packed=True), Case(LONG_T, 32, 512, 512, "bf16", bidirectional=True)]
    cases += [Case(LONG_T, 32, H, H) for H in (512, 256)] + [Case(LONG_T, 16, 128, 128, "fp16")]
    for case in cases:
        yield Entry(case, providers=BACKENDS, rounds=5)


def right(device: Device) -> Iterator[Entry]:
    """Every backend against float64 on the grid's sizes, nothing timed."""
    for dtype, H, B in product(DTYPES, sorted(GRID_H), (5, 70)):
        yield Entry(Case(RIGHT_T, B, H, H, dtype), ("forward+backward",), (*BACKENDS, "reference"), rounds=0)


def tune(device: Device) -> Iterator[Entry]:
    """Every class of tiles with its candidates, of which a row is a replay: the recurrence and little else."""
    providers: dict[Case, tuple[str, ...]] = {}
    for backend, dtype, H, B in TILED:
        case = Case(TUNE_T, B, H, H, dtype)
        if fields := candidates(backend, case.problem(training=True), device):
            providers[case] = (*providers.get(case, (BASELINE,)), backend, *(f"{backend}:{text}" for text in fields))
    for case, of_case in providers.items():
        how = dict(rounds=10, replayed=True, note="replayed from a CUDA graph")
        yield Entry(case, ("forward", "forward+backward"), of_case, **how)


# Small and odd, for compute-sanitizer, which slows a kernel a hundredfold. The last three exchange: odd H and a padded
# buffer; several row tiles; both directions.
MEMCHECK = (
    Case(1, 3, 5, 33, "fp16"),
    Case(4, 17, 7, 20, "fp32"),
    Case(3, 33, 9, 67, "bf16", bidirectional=True),
    Case(5, 4, 11, 24, "fp16", bidirectional=True, packed=True),
    Case(1, 2, 6, 19, "fp32", cell=True),
    Case(3, 17, 5, 203, "fp16"),
    Case(4, 40, 8, 512, "bf16"),
    Case(4, 5, 7, 264, "fp32", bidirectional=True, packed=True),
)

# By the device: what the chip holds decides which tiles there are to be tried.
SUITES: dict[str, Callable[[Device], Sequence[Entry]]] = {
    "workloads": lambda device: [workload.entry for workload in WORKLOADS],
    "grid": lambda device: [*grid(device)],
    "long": lambda device: [*long(device)],
    "right": lambda device: [*right(device)],
    "tune": lambda device: [*tune(device)],
    "first": lambda device: [Entry(Case(FIRST_T, 32, 512, 512, "bf16"), ("forward+backward",), BACKENDS, rounds=5)],
    "memcheck": lambda device: [Entry(case, providers=BACKENDS[1:], checked=False, rounds=0) for case in MEMCHECK],
    "study": lambda device: [
        Entry(Case(STUDY_T, 32, H, H, "bf16"), ("inference",), (BASELINE, *FORMS)) for H in (1024, 512, 256)
    ],
}


def chosen(suite: str, only: Sequence[str], extra: Sequence[str], device: Device) -> list[Entry]:
    """The suite's entries with every text of `only` in their name, the providers `extra` added to each.

    Raises:
        ValueError: there is none; or no such provider.
    """
    from .providers import find

    for name in extra:
        find(name)
    entries = SUITES[suite](device)
    found = [
        replace(entry, providers=tuple(dict.fromkeys((*entry.providers, *extra))))
        for entry in entries
        if all(text in entry.case.name for text in only)
    ]
    if not found:
        names = ", ".join(entry.case.name for entry in entries[:20])
        more = f" and {len(entries) - 20} more" if len(entries) > 20 else ""
        texts = " and ".join(map(repr, only))
        raise ValueError(f"no case of suite {suite} has {texts} in its name; there are {names}{more}")
    return found


def shrunk(suite: str, most: int = 4) -> list[Entry]:
    """Some entries of a suite, of several kinds, so small that the emulator runs them in seconds."""
    found: dict[object, Entry] = {}
    for entry in SUITES[suite](describe("h200")):
        case = entry.case
        small = replace(
            case, T=min(case.T, 3), B=min(case.B, 3), I=min(case.I, 6), H=min(case.H, 20), layers=min(case.layers, 2),
            blocks=min(case.blocks, 2), precision="ieee",
        )  # fmt: skip
        kind = (small, entry.passes)
        if kind in found:
            continue
        providers = entry.providers
        if entry.replayed:  # candidates of tiles: those that the interpreter has for this size
            fields = candidates(providers[1], small.problem(training=True), describe("interpreter"))
            providers = (BASELINE, providers[1], *(f"{providers[1]}:{text}" for text in fields[:2]))
        found[kind] = replace(entry, case=small, providers=providers, rounds=min(entry.rounds, 2))
    return list(found.values())[:: max(1, -(-len(found) // most))]
