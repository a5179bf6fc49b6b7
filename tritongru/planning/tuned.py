"""Tiles that won a measurement over the planned ones: rows in planning/tiles/, a file per GPU that was measured.

`python -m benchmarks --suite tune` writes them. A row is of one pass of a backend, in one dtype: for H up to the row's,
of `sequence` those of its class of K, and batches up to its B. Only that GPU takes them: what wins is a matter of its
SMs.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

from .devices import Device, described_as

FOLDER = Path(__file__).with_name("tiles")
# fields: as behind a backend's colon. us_per_step, planned_us: of these tiles and of the planned ones.
COLUMNS = ("backend", "pass", "dtype", "H", "B", "fields", "us_per_step", "planned_us")
LIKE = {"fp16": "bf16"}  # whose kernels are the same


@lru_cache(maxsize=4096)
def winner(backend: str, kind: str, dtype: str, batch: int, least: int, largest: int, device: Device) -> str:
    """The fields that won for a class, or none. kind: "forward" or "backward"; least, largest: of a row's H."""
    rows = [
        row
        for row in _rows(device)
        if (row["backend"], row["pass"], row["dtype"]) == (backend, kind, LIKE.get(dtype, dtype))
        and least <= int(row["H"]) <= largest
        and int(row["B"]) >= batch
    ]
    return min(rows, key=lambda row: (int(row["H"]), int(row["B"])), default={"fields": ""})["fields"]


def _rows(device: Device) -> tuple[dict[str, str], ...]:
    return _read(described_as(device))


@lru_cache
def _read(key: str | None) -> tuple[dict[str, str], ...]:
    path = FOLDER / f"{key}.csv"
    if not path.exists():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def forget() -> None:
    """Read the files again: they have been written."""
    winner.cache_clear()
    _read.cache_clear()
