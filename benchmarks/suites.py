"""The suites by name, and what of each a rehearsal without a GPU runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tritongru.planning import Device, describe
from tritongru.planning.candidates import candidates

from .cases import ALL_PASSES, BASELINE, CPU, FIRST, GRID, RIGHT, STUDY, TARGET, Entry, tuning
from .workloads import WORKLOADS

# By the device: what the chip holds decides which tiles there are to be tried.
SUITES: dict[str, Callable[[Device], Sequence[Entry]]] = {
    "workloads": lambda device: [workload.entry for workload in WORKLOADS],
    "grid": lambda device: GRID,
    "right": lambda device: RIGHT,
    "tune": tuning,
    "first": lambda device: FIRST,
    "study": lambda device: STUDY,
    # PyTorch's paths on a CPU; the layer's own cost beside nn.GRU is cpu.py
    "cpu": lambda device: [
        Entry(replace(TARGET, H=H, I=H, B=B), ALL_PASSES, CPU)
        for H, B in ((128, 8), (512, 8), (512, 1))
    ],
}  # fmt: skip


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
